import { expect, test } from 'vitest';
import { insertEvents, someEvents } from '../support/events.ts';
import { DLQ, type Entry, STREAM, type Stage, setStage } from '../support/flow.ts';
import { waitFor } from '../support/wait.ts';

const WORDS = 'dictionary.word.v1';

const verifyOf =
  (stage: Stage) =>
  async (...args: string[]) => {
    const { code, lines } = await stage.command(['verify', '--since', '1h', '--json', ...args]);
    const json = lines.find((line) => line.startsWith('{"since"'));
    if (json === undefined) throw new Error(`relay verify ended with ${code}:\n${lines.join('\n')}`);
    return { code, ...JSON.parse(json) };
  };

/** Event ids in the order of the stream, one aggregate after the other. */
const byAggregate = (entries: readonly Entry[]) =>
  entries
    .toSorted((a, b) => (a.fields.aggregate_id as string).localeCompare(b.fields.aggregate_id as string))
    .map(({ fields }) => fields.event_id);

const idsOf = (entries: readonly Entry[]) => entries.map(({ entryId }) => entryId);

test('relay verify tells what is missing, has it published again on demand, and leaves alone what was trimmed', async () => {
  const stage = await setStage({ env: { RELAY_RETRY_BASE_DELAY: '0.1', RELAY_MAX_RETRY_ATTEMPTS: '0' } });
  await stage.redis.set('broken', 'a string');
  const pod = await stage.pod();
  await insertEvents(stage.pool, [
    ...someEvents(60, 6),
    ...someEvents(20, 2, { topic: WORDS }),
    ...someEvents(3, 3, { topic: 'broken' }),
  ]);
  await stage.rested();
  const verify = verifyOf(stage);
  const clean = { lost: 0, trimmed: 0, unreadable: 0 };
  expect(await verify()).toMatchObject({
    code: 0,
    streams: {
      [STREAM]: { rows: 60, ...clean },
      [WORDS]: { rows: 20, ...clean },
      [DLQ]: { rows: 3, ...clean },
    },
  });

  await stage.redis.xtrim(STREAM, 'MAXLEN', 50);
  const entries = await stage.entries();
  const lost = entries.slice(30, 40);
  await stage.redis.xdel(STREAM, ...idsOf(lost));
  const words = await stage.entries(WORDS);
  await stage.redis.xdel(WORDS, ...idsOf(words.slice(5)));
  const letters = await stage.entries(DLQ);
  await stage.redis.xdel(DLQ, ...idsOf(letters.slice(1, 2)));
  const missing = {
    code: 1,
    streams: { [STREAM]: { lost: 10, trimmed: 10 }, [WORDS]: { lost: 15 }, [DLQ]: { lost: 1 } },
    total: { rows: 83, lost: 26, unpublished: 0 },
  };
  expect(await verify()).toMatchObject(missing);
  expect(await verify('--topic', WORDS)).toMatchObject({ code: 1, total: { rows: 20, lost: 15 } });
  expect(await verify('--until', words[0]?.fields.occurred_at ?? '')).toMatchObject({
    code: 0,
    total: { rows: 0 },
  });
  // Looking changes nothing.
  expect(await stage.redis.xlen(STREAM)).toBe(40);
  expect(await stage.count('NOT published AND dead_lettered_at IS NULL')).toBe(0);

  // A relay at work publishes them at once.
  expect(await verify('--repair', '--topic', STREAM)).toMatchObject({
    code: 0,
    total: { lost: 10, unpublished: 10 },
  });
  await stage.rested();
  expect(byAggregate((await stage.entries()).slice(-10))).toEqual(byAggregate(lost));
  expect(await stage.redis.xlen(STREAM)).toBe(50);
  expect(await stage.redis.xlen(WORDS)).toBe(5);

  // Where none is at work, the next one does.
  await pod.kill();
  expect(await verify('--repair')).toMatchObject({ code: 0, total: { lost: 16, unpublished: 16 } });
  expect(await stage.count('NOT published AND dead_lettered_at IS NULL')).toBe(15);
  expect(await verify()).toMatchObject({ code: 0, total: { rows: 67, lost: 0, trimmed: 10 } });
  await stage.pod();
  await stage.rested();
  expect(byAggregate((await stage.entries(WORDS)).slice(-15))).toEqual(byAggregate(words.slice(5)));
  await waitFor(
    async () => (await stage.count('dead_lettered_at IS NOT NULL AND stream_entry_id IS NOT NULL')) === 3,
    {
      what: 'the dead letter to be written again',
    },
  );
  const found = await stage.entries(DLQ);
  const but = (entry: Entry | undefined) => ({ ...entry?.fields, failed_at: '' });
  expect(found.map(but)).toEqual([0, 2, 1].map((i) => but(letters[i])));
  expect(await verify()).toMatchObject({ code: 0, total: { rows: 83, lost: 0, trimmed: 10 } });
});

test('relay verify says in words what it found, and what it needs', async () => {
  const stage = await setStage();
  await stage.pod();
  await insertEvents(stage.pool, someEvents(3));
  await stage.rested();
  expect((await stage.command(['verify', '--since', '600'])).lines.join('\n')).toMatch(
    /3 +3 +0 +0 +0 +identity\.user\.v1\nNothing is missing\./,
  );
  await stage.redis.xdel(STREAM, ...(await stage.entries()).slice(1).map(({ entryId }) => entryId));
  const found = await stage.command(['verify', '--since', '10m']);
  expect(found.code).toBe(1);
  expect(found.lines.join('\n')).toMatch(
    /2 entries are missing; the same command with --repair publishes them again\./,
  );
  const repaired = await stage.command(['verify', '--since', '10m', '--repair']);
  expect(repaired.code).toBe(0);
  expect(repaired.lines.join('\n')).toMatch(/The relay publishes 2 of 2 missing entries again, in order/);
  for (const since of ['yesterday', '', '5y']) {
    const { code, lines } = await stage.command(['verify', '--since', since]);
    expect(code).toBe(1);
    expect(lines.join('\n')).toMatch(/Expected how long ago/);
  }
});

test('an interrupted repair leaves the rest of the time as it is, and a second one does that', async () => {
  const stage = await setStage();
  const pod = await stage.pod();
  await insertEvents(stage.pool, someEvents(2_500, 50));
  await stage.rested();
  await pod.kill();
  const entries = await stage.entries();
  // Of the first thousand rows, and of the rest; neither the first entry nor the last.
  const lost = entries.filter((_, i) => i % 100 === 50);
  await stage.redis.xdel(STREAM, ...idsOf(lost));
  const verify = verifyOf(stage);
  expect(await verify()).toMatchObject({ code: 1, total: { rows: 2_500, lost: 25 } });

  // Held up at the first page until the signal has been sent.
  const holder = await stage.pool.connect();
  await holder.query('BEGIN; LOCK TABLE identity.outbox IN ACCESS EXCLUSIVE MODE');
  const command = await stage.spawn(['verify', '--since', '1h', '--json', '--repair']);
  const waits = `SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'relation'`;
  await waitFor(async () => (await stage.pool.query(waits)).rowCount, { what: 'the first page' });
  const ended = command.kill('SIGINT');
  await holder.query('COMMIT');
  holder.release();
  expect(await ended).toEqual({ code: 1, signal: null });
  const { total, interrupted } = JSON.parse(command.lines.find((line) => line.startsWith('{')) ?? '{}');
  expect(interrupted).toBe(true);
  expect(total.rows).toBeLessThan(2_500);
  expect(total.lost).toBeGreaterThan(0);
  expect(total.unpublished).toBe(total.lost);
  expect(await stage.count('NOT published')).toBe(total.lost);
  const left = 25 - total.lost;

  await stage.pod();
  await stage.rested();
  expect(await verify()).toMatchObject({ code: 1, total: { rows: 2_500, lost: left } });
  expect(await verify('--repair')).toMatchObject({ code: 0, total: { lost: left, unpublished: left } });
  await stage.rested();
  expect(await verify()).toMatchObject({ code: 0, total: { rows: 2_500, lost: 0 } });
  const again = (await stage.entries()).slice(-25);
  expect(byAggregate(again)).toEqual(byAggregate(lost));
});

test('a repair that is killed in the midst holds the relay up for some seconds only', async () => {
  const stage = await setStage();
  await Promise.all([stage.pod(), stage.pod()]);
  await insertEvents(stage.pool, someEvents(100, 10));
  await stage.rested();
  const lost = (await stage.entries()).slice(40, 60);
  await stage.redis.xdel(STREAM, ...idsOf(lost));
  // A transaction that rests on an entry is under way: the repair waits for it.
  const holder = await stage.pool.connect();
  await holder.query('BEGIN; LOCK TABLE identity.relay_epoch_lock IN ROW SHARE MODE');
  const command = await stage.spawn(['verify', '--since', '1h', '--repair']);
  const waits = `SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'relation'`;
  await waitFor(async () => (await stage.pool.query(waits)).rowCount, { what: 'the repair to wait' });
  await command.kill('SIGKILL');
  await holder.query('COMMIT');
  holder.release();
  await insertEvents(stage.pool, someEvents(20, 5));
  await stage.rested();
  expect(await verifyOf(stage)('--repair')).toMatchObject({ code: 0, total: { rows: 120, unreadable: 0 } });
  await stage.rested();
  expect(byAggregate(await stage.entries()).toSorted()).toEqual(
    (await stage.rows()).map((row) => row.event_id).toSorted(),
  );
  expect(await verifyOf(stage)()).toMatchObject({ code: 0, total: { rows: 120, lost: 0 } });
});

test('rows whose entry ids are no entry ids, or name another event’s entry, are missing, and published again', async () => {
  const stage = await setStage();
  await stage.pod();
  await insertEvents(stage.pool, someEvents(40, 4));
  await stage.rested();
  const others = await stage.row((await stage.entries())[0]?.fields.event_id as string);
  const garbage = [
    'garbage',
    '',
    '-',
    '+',
    '17',
    '(5-0',
    '5-x',
    '99999999999999999999999-1',
    `${others.stream_entry_id}`,
  ];
  const rows = (await stage.rows()).slice(10, 10 + garbage.length);
  for (const [i, entryId] of garbage.entries())
    await stage.pool.query('UPDATE identity.outbox SET stream_entry_id = $2 WHERE id = $1', [
      rows[i]?.id,
      entryId,
    ]);
  const verify = verifyOf(stage);
  expect(await verify()).toMatchObject({ code: 1, total: { rows: 40, lost: garbage.length, trimmed: 0 } });
  expect(await verify('--repair')).toMatchObject({ code: 0, total: { unpublished: garbage.length } });
  await stage.rested();
  expect(await verify()).toMatchObject({ code: 0, total: { rows: 40, lost: 0 } });
  for (const { event_id, stream_entry_id } of await stage.rows())
    expect((await stage.redis.xrange(STREAM, `${stream_entry_id}`, `${stream_entry_id}`))[0]?.[1]).toContain(
      event_id,
    );
});
