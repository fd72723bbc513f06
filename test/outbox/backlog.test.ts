import { beforeAll, beforeEach, expect, test } from 'vitest';
import type { Pool } from '../../src/connections/database.ts';
import { type BacklogReader, createBacklog } from '../../src/outbox/backlog.ts';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { createDatabase } from '../support/servers.ts';
import { type AdminPool, openAdminPool, openPool } from '../support/stages.ts';

const OPTIONS = {
  streamName: 'default.stream',
  deadLetterPolicy: 'continue',
  statementTimeoutMs: 10_000,
} as const;

let pool: AdminPool;
let relay: Pool;
let backlog: BacklogReader;

beforeAll(async () => {
  const { url, adminUrl } = await createDatabase();
  pool = openAdminPool(adminUrl);
  relay = openPool(url);
  backlog = createBacklog(relay, OPTIONS);
});

beforeEach(async () => {
  await pool.query('TRUNCATE identity.outbox RESTART IDENTITY');
});

const set = (id: number, assignments: string) =>
  pool.query(`UPDATE identity.outbox SET ${assignments} WHERE id = $1`, [id]);
const created = (ago: string) => `created_at = now() - interval '${ago}'`;
const LEASED = `next_attempt_at = now() + interval '1 minute'`;
const RETRYING = `${LEASED}, attempts = 2, error_message = 'WRONGTYPE it is a string'`;
const DUE = `next_attempt_at = now() - interval '1 minute'`;
const PARKED = `next_attempt_at = 'infinity'`;
const PUBLISHED = `published = true, published_at = now(), next_attempt_at = NULL, stream_entry_id = '1-1'`;
const DEAD_WITHOUT_LETTER = 'dead_lettered_at = now(), stream_entry_id = NULL';
const DEAD = `dead_lettered_at = now(), next_attempt_at = 'infinity', stream_entry_id = '1-1'`;

test('the backlog counts the rows of each state', async () => {
  await insertEvents(pool, someEvents(11));
  const assignments = [LEASED, LEASED, LEASED, RETRYING, DUE, DUE, PARKED, PUBLISHED, DEAD];
  for (const [at, assignment] of assignments.entries()) await set(at + 1, assignment);
  const counts = { fresh: 2, leased: 3, retrying: 1, due: 2, parked: 1, dead: 1 };
  expect(await backlog.count()).toMatchObject(counts);
});

test('a dead row whose dead letter is lost is dead and nothing else', async () => {
  await insertEvents(pool, someEvents(2));
  await set(1, `${DEAD_WITHOUT_LETTER}, ${DUE}`);
  await set(2, `${DEAD_WITHOUT_LETTER}, ${RETRYING}`);
  expect(await backlog.count()).toMatchObject({
    fresh: 0,
    leased: 0,
    retrying: 0,
    due: 0,
    parked: 0,
    dead: 2,
  });
  expect(await backlog.oldest()).toEqual([]);
});

test('an event waits from its creation, one in backoff, parked or dead has an age of its own', async () => {
  await insertEvents(pool, someEvents(6));
  await set(1, `${created('1 hour')}, ${RETRYING}`);
  await set(2, `${created('2 hours')}, ${PARKED}`);
  await set(3, `${created('3 hours')}, ${DEAD}`);
  await set(3, `dead_lettered_at = now() - interval '500 seconds'`);
  await set(4, `${created('100 seconds')}, ${DUE}`);
  await set(5, `${created('80 seconds')}, ${LEASED}`);
  await set(6, created('50 seconds'));
  const ages = async () => {
    const { oldestSeconds } = await backlog.count();
    return Object.fromEntries(
      // The test itself takes a moment.
      Object.entries(oldestSeconds).map(([what, age]) => [
        what,
        age === null ? null : Math.floor(age / 10) * 10,
      ]),
    );
  };
  expect(await ages()).toEqual({ waiting: 100, retrying: 3_600, parked: 7_200, dead: 500 });
  await set(4, PUBLISHED);
  expect(await ages()).toMatchObject({ waiting: 80 });
  await set(5, PUBLISHED);
  expect(await ages()).toMatchObject({ waiting: 50 });
  await set(6, PUBLISHED);
  expect(await ages()).toMatchObject({ waiting: null });
  // A retry that is due waits from then on, however long its backoffs were before.
  await set(1, `next_attempt_at = now() - interval '20 seconds'`);
  expect(await ages()).toEqual({ waiting: 20, retrying: null, parked: 7_200, dead: 500 });
});

test('rows that were created at infinity have no age, and are counted', async () => {
  await insertEvents(pool, someEvents(2));
  await set(1, `created_at = '-infinity'`);
  await set(2, `created_at = 'infinity', ${LEASED}`);
  expect(await backlog.count()).toMatchObject({ fresh: 1, leased: 1, oldestSeconds: { waiting: null } });
  expect((await backlog.oldest()).map((row) => row.ageSeconds)).toEqual([null, null]);
});

test('the oldest row of each state tells what it waits for', async () => {
  const [first, second, third, fourth] = [anEvent(), anEvent(), anEvent(), anEvent()];
  await insertEvents(pool, [
    first,
    second,
    third,
    fourth,
    anEvent(),
    anEvent({ aggregateId: first.aggregateId }),
  ]);
  await set(1, RETRYING);
  await set(2, LEASED);
  await set(3, `${DUE}, topic = NULL`);
  await set(6, PARKED);
  const rows = await backlog.oldest();
  expect(rows.map(({ state, id }) => [state, id])).toEqual([
    ['retrying', '1'],
    ['leased', '2'],
    ['due', '3'],
    ['fresh', '4'],
    ['parked', '6'],
  ]);
  expect(rows[0]).toMatchObject({
    eventId: first.eventId,
    eventType: first.eventType,
    aggregateId: first.aggregateId,
    attempts: 2,
    error: 'WRONGTYPE it is a string',
    behind: null,
  });
  expect(rows[0]?.nextInSeconds).toBeGreaterThan(50);
  expect(rows[2]?.nextInSeconds).toBeLessThan(-50);
  expect(rows[2]?.topic).toBe('default.stream');
  expect(rows[4]?.behind).toEqual({ eventId: first.eventId, isDead: false });

  // Only where dead rows hold their aggregates is a dead one waited for.
  await set(1, DEAD);
  const parked = async (by: BacklogReader) =>
    (await by.oldest()).find((row) => row.state === 'parked')?.behind;
  expect(await parked(backlog)).toBeNull();
  const holding = createBacklog(relay, { ...OPTIONS, deadLetterPolicy: 'hold' });
  expect(await parked(holding)).toEqual({ eventId: first.eventId, isDead: true });
});

test('rates are those of the last one and five minutes, published and dead apart', async () => {
  await insertEvents(pool, someEvents(100));
  await pool.query(`UPDATE identity.outbox SET ${PUBLISHED} WHERE id <= 30`);
  await pool.query(`UPDATE identity.outbox SET ${PUBLISHED} WHERE id > 40`);
  await pool.query(`UPDATE identity.outbox SET published_at = now() - interval '2 minutes' WHERE id > 40`);
  await pool.query(`UPDATE identity.outbox SET ${DEAD} WHERE id BETWEEN 31 AND 36`);
  await pool.query(`UPDATE identity.outbox SET published_at = now() - interval '6 minutes' WHERE id = 100`);
  expect(await backlog.rates()).toEqual({
    published: { lastMinute: 0.5, lastFiveMinutes: 89 / 300 },
    dead: { lastMinute: 0.1, lastFiveMinutes: 0.02 },
  });
});
