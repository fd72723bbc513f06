import { expect, test } from 'vitest';
import type { SampleEvent } from '../demo/sample.ts';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { DLQ, type Stage, setStage } from '../support/flow.ts';
import { blocksUnder } from '../support/readme.ts';
import { waitFor } from '../support/wait.ts';

/** A topic whose key holds a string: Redis refuses every append to it. */
const BAD_TOPIC = 'identity.broken.v1';

const QUICK = { RELAY_RETRY_BASE_DELAY: '0.1', RELAY_MAX_RETRY_ATTEMPTS: '2', RELAY_POLL_INTERVAL: '0.5' };

const RUNBOOK = 'docs/runbook.md';
const DEAD = { page: 'docs/dead-letters.md', heading: 'In SQL' };

/** The statement of `page` under `heading` that begins with `verb`, with `value` where its reader has to fill in. */
function statement(at: { page: string; heading: string }, verb: 'SELECT' | 'UPDATE', value = ''): string {
  const found = blocksUnder(at.page, at.heading, 'sql').filter((text) => text.startsWith(verb));
  expect(found, `${verb} under "${at.heading}"`).toHaveLength(1);
  return (found[0] as string).replace('…', value);
}

/** Events that Redis refuses, of one aggregate, all dead. */
async function deadEvents(stage: Stage, count: number): Promise<SampleEvent[]> {
  await stage.redis.set(BAD_TOPIC, 'a string');
  const events = someEvents(count, 1, { topic: BAD_TOPIC });
  await insertEvents(stage.pool, events);
  await stage.rested();
  return events;
}

test('the documented statement replays dead events, in their order, with retries of their own', async () => {
  const stage = await setStage({ env: QUICK });
  await stage.pod();
  const dead = await deadEvents(stage, 3);
  const found = await stage.pool.query(statement(DEAD, 'SELECT'));
  expect(found.rows.map((row) => row.event_id)).toEqual(dead.map((event) => event.eventId));

  const replay = statement(DEAD, 'UPDATE', dead.map(({ eventId }) => eventId).join(`', '`));
  // The cause is still there: every event is tried again, with one retry less, and dies again.
  const again = (await stage.pool.query(replay)).rowCount;
  expect(again).toBe(3);
  await stage.rested();
  expect((await stage.rows()).map((row) => row.attempts)).toEqual([3, 3, 3]);
  expect(await stage.entries(DLQ)).toHaveLength(6);

  await stage.redis.del(BAD_TOPIC);
  await stage.pool.query(replay);
  await stage.rested();
  expect((await stage.entries(BAD_TOPIC)).map(({ fields }) => fields.event_id)).toEqual(
    dead.map((event) => event.eventId),
  );
  for (const row of await stage.rows())
    expect(row).toMatchObject({ published: true, dead_lettered_at: null });
  // Nothing is left to replay, and what is published is not touched.
  expect((await stage.pool.query(replay)).rowCount).toBe(0);
});

test('the documented statement skips a dead event that holds its aggregate', async () => {
  const stage = await setStage({ env: { ...QUICK, RELAY_DEAD_LETTER_POLICY: 'hold' } });
  await stage.pod();
  const [dead] = await deadEvents(stage, 1);
  const successors = someEvents(4, 1, { aggregateId: dead?.aggregateId as string });
  await insertEvents(stage.pool, successors);
  await waitFor(async () => (await stage.count(`next_attempt_at = 'infinity'`)) === 5, {
    what: 'the successors to be held',
  });
  const skip = statement({ page: RUNBOOK, heading: 'An aggregate is held' }, 'UPDATE', dead?.eventId);
  expect((await stage.pool.query(skip)).rowCount).toBe(1);
  await stage.rested();
  expect((await stage.entries()).map(({ fields }) => fields.event_id)).toEqual(
    successors.map((event) => event.eventId),
  );
  // It goes on pointing at its dead letter: nobody takes it for an entry that its stream has lost.
  const [letter] = await stage.entries(DLQ);
  expect(await stage.row(dead?.eventId as string)).toMatchObject({
    published: true,
    stream_entry_id: letter?.entryId,
  });
});

test('the documented statement finds the event that its aggregate waits for', async () => {
  const stage = await setStage({ env: { RELAY_RETRY_BASE_DELAY: '60' } });
  await stage.redis.set(BAD_TOPIC, 'a string');
  await stage.pod();
  const failing = anEvent({ topic: BAD_TOPIC });
  await insertEvents(stage.pool, [failing, ...someEvents(5, 1, { aggregateId: failing.aggregateId })]);
  const asked = statement({ page: RUNBOOK, heading: 'The backlog grows' }, 'SELECT');
  // Those behind it are parked a moment after its failed attempt.
  const rows = await waitFor(
    async () => {
      const { rows } = await stage.pool.query(asked);
      return rows.length > 0 && rows;
    },
    { what: 'the statement to find something' },
  );
  expect(rows).toEqual([
    expect.objectContaining({
      event_id: failing.eventId,
      topic: BAD_TOPIC,
      error_message: expect.stringContaining('WRONGTYPE'),
    }),
  ]);
});
