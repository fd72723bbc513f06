import { randomUUID } from 'node:crypto';
import { expect, test } from 'vitest';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { DLQ, STREAM, type Stage, setStage } from '../support/flow.ts';
import { waitFor } from '../support/wait.ts';

/**
 * Rows as a producer can write them that has more rights than "relay grants" gives: it says of its row what only the
 * relay may say. Such a row is judged by itself: the others are published, compared, repaired and republished all the
 * same.
 */

/** What is no entry id, or none that Redis gives by its clock. */
const FORGED = [
  ...['garbage', '', '-1', '1-', '-', '0', '1-1-1', '+', '$', '>', '1-1\n', '１-１', '(5-5', 'null'],
  ...['99999999999999999999-1', '1-99999999999999999999', '18446744073709551616-0', '-5-5'],
  ...['18446744073709551615-18446744073709551615', '1700000000000-0000000000000000000'],
  'x'.repeat(10_000_000),
];

type Forged = Readonly<{ topic?: string; entryId?: string; published?: boolean; attempts?: number }>;

/** Answers the event ids. */
async function forge(stage: Stage, rows: readonly Forged[]): Promise<string[]> {
  const ids: string[] = [];
  for (const { topic = STREAM, entryId, published = true, attempts = 0 } of rows) {
    const eventId = randomUUID();
    await stage.pool.query(
      `INSERT INTO identity.outbox (event_id, event_type, aggregate_id, payload, topic, published, published_at,
                                    stream_entry_id, attempts)
       VALUES ($1, 'Forged', gen_random_uuid(), '{}', $2, $3, CASE WHEN $3 THEN now() END, $4, $5)`,
      [eventId, topic, published, entryId, attempts],
    );
    ids.push(eventId);
  }
  return ids;
}

const dump = async (stage: Stage, key: string) => (await stage.redis.xlen(key)) && stage.entries(key);

test('forged entry ids keep nobody from what is lost: all come back, and every command works', async () => {
  const stage = await setStage({ env: { RELAY_POLL_INTERVAL: '0.5' } });
  await stage.pod();
  const events = someEvents(20, 5);
  await insertEvents(stage.pool, events);
  await stage.rested();
  const forged = await forge(
    stage,
    FORGED.map((entryId) => ({ entryId })),
  );
  const commands: readonly (readonly string[])[] = [
    ['status'],
    ['verify', '--since', '1h', '--json'],
    ['republish', '--since', '1h', '--until', 'now', '--dry-run'],
    ['republish', '--since', '1h', '--until', 'now', '--yes'],
    ['prune', '--older-than', '2h', '--dry-run'],
    ['dlq', 'list'],
    ...forged.slice(-2).map((eventId) => ['dlq', 'show', eventId]),
  ];
  for (const command of commands) {
    const { code, lines } = await stage.command(command);
    const text = lines.join('\n');
    expect(text.length, command.join(' ')).toBeLessThan(20_000);
    // What is forged is missing, and nothing else.
    if (command[0] === 'verify') expect(text).toContain(`"lost":${FORGED.length},`);
    else expect(code, text).toBe(0);
  }
  const again = (await stage.entries()).filter(({ fields }) => fields.replayed_at !== undefined);
  expect(again.map(({ fields }) => fields.event_id).toSorted()).toEqual(
    events.map(({ eventId }) => eventId).toSorted(),
  );

  await stage.redis.flushall();
  await waitFor(async () => (await stage.redis.xlen(STREAM)) >= 20 + FORGED.length, {
    what: 'all events to be in the stream again',
  });
  await stage.rested();
  const inStream = new Set((await stage.entries()).map(({ fields }) => fields.event_id));
  for (const eventId of [...events.map((it) => it.eventId), ...forged]) expect(inStream).toContain(eventId);
  expect((await stage.command(['verify', '--since', '1h'])).code).toBe(0);
});

test('what must not be appended is not, by no road: the keys of BullMQ and the dead-letter stream are left alone', async () => {
  const stage = await setStage({
    env: {
      ...{
        RELAY_POLL_INTERVAL: '0.5',
        RELAY_VALIDATION: 'strict',
        RELAY_ALLOWED_TOPICS: `${STREAM},words.*`,
      },
    },
  });
  const pod = await stage.pod();
  await insertEvents(stage.pool, [...someEvents(20, 5), anEvent({ topic: 'bull:relay-publish:wait' })]);
  await stage.rested();
  const JOBS = 'bull:relay-publish:events';
  const topics = [
    JOBS,
    'bull:relay-publish:wait',
    'bull:other',
    DLQ,
    'payments.v1',
    '',
    'x'.repeat(10_000_000),
  ];
  await forge(
    stage,
    topics.map((topic) => ({ topic, entryId: '1-1' })),
  );
  // The payload breaks the schema of its type.
  await stage.pool.query(
    `INSERT INTO identity.outbox (event_type, aggregate_id, payload, topic, published, published_at, stream_entry_id)
     VALUES ('UserCreated', gen_random_uuid(), '{}', $1, true, now(), '1-1')`,
    [STREAM],
  );
  const before = { jobs: await dump(stage, JOBS), letters: await dump(stage, DLQ) };
  const republished = await stage.command(['republish', '--since', '1h', '--until', 'now', '--yes']);
  expect(republished.lines.join('\n')).toContain('appended 20 events again');
  expect(republished.lines.join('\n')).toContain(`${topics.length + 1} events refused: `);
  expect({ jobs: await dump(stage, JOBS), letters: await dump(stage, DLQ) }).toEqual(before);
  expect(await stage.redis.exists('payments.v1', 'bull:other')).toBe(0);

  await stage.redis.flushall();
  await waitFor(async () => (await stage.redis.xlen(STREAM)) === 20, {
    what: 'the 20 to be in their stream again',
  });
  await stage.rested();
  const appended = async (key: string) =>
    ((await stage.redis.exists(key)) === 1 ? await stage.entries(key) : []).filter(
      ({ fields }) => fields.event_type === 'Forged' && fields.original_event_id === undefined,
    );
  for (const key of [JOBS, DLQ]) expect(await appended(key)).toEqual([]);
  expect(await stage.redis.exists('payments.v1', 'bull:other', '')).toBe(0);
  // What could not be looked at is said, by the pod and by the command, which does not call itself done.
  expect(pod.lines.join('\n')).toContain('not all entries could be looked for');
  const verify = await stage.command(['verify', '--since', '1h', '--repair']);
  expect(verify.code).toBe(1);
  expect(verify.lines.join('\n')).toContain('not compared: the key of the topic is no stream');
});

test('an event that claims to have failed as often as an integer can say, or less than never, ends as any other', async () => {
  const stage = await setStage({
    env: { ...{ RELAY_POLL_INTERVAL: '0.5', RELAY_RETRY_BASE_DELAY: '0.05', RELAY_MAX_RETRY_ATTEMPTS: '2' } },
  });
  await stage.redis.set('broken', 'a string');
  await stage.pod();
  const bounds = [2_147_483_647, 2_147_483_646, -1, -2_147_483_648];
  const good = await forge(
    stage,
    bounds.map((attempts) => ({ published: false, attempts })),
  );
  const bad = await forge(
    stage,
    bounds.map((attempts) => ({ published: false, attempts, topic: 'broken' })),
  );
  await stage.rested();
  for (const eventId of good) expect(await stage.row(eventId)).toMatchObject({ published: true });
  for (const eventId of bad)
    expect(await stage.row(eventId)).toMatchObject({ dead_lettered_at: expect.any(Date) });
  expect(await stage.redis.xlen(DLQ)).toBe(bounds.length);
});
