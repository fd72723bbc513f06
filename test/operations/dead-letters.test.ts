import { Queue } from 'bullmq';
import { beforeAll, beforeEach, describe, expect, onTestFinished, test } from 'vitest';
import { loadConfig } from '../../src/config/load-config.ts';
import type { Pool } from '../../src/connections/database.ts';
import { FAILS_FAST } from '../../src/connections/servers.ts';
import { CursorError, toCursor } from '../../src/operations/cursor.ts';
import type { DeadLetters } from '../../src/operations/dead-letters.ts';
import { openOperations } from '../../src/operations/open.ts';
import { createBacklog } from '../../src/outbox/backlog.ts';
import { deadLetterFields } from '../../src/streams/envelope.ts';
import type { SampleEvent } from '../demo/sample.ts';
import { atEndOfFile } from '../support/cleanup.ts';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { asRelay, OPERATOR_ROLE, RELAY_USER, redisRules } from '../support/least-privilege.ts';
import { createDatabase, createRedis } from '../support/servers.ts';
import {
  type AdminPool,
  type AdminRedis,
  aClaimedEvent,
  openAdminPool,
  openAdminRedis,
  openPool,
  openRedis,
  readRows,
  readStates,
  silent,
} from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const DLQ = 'identity.user.v1.dlq';
const BY = { by: 'alice' };

let pool: AdminPool;
let redis: AdminRedis;
let operators: Pool;
let publish: Queue;
let deadLetters: DeadLetters;
let relayUrl: string;
let redisUrl: string;

beforeAll(async () => {
  const [database, server] = await Promise.all([createDatabase(), createRedis()]);
  relayUrl = database.url;
  redisUrl = server.url;
  pool = openAdminPool(database.adminUrl);
  redis = openAdminRedis(server.adminUrl);
  operators = openPool(asRelay(database.url, OPERATOR_ROLE), { max: 4 });
  const relayRedis = openRedis(server.url, FAILS_FAST);
  await waitFor(() => relayRedis.status === 'ready', { what: 'the connection' });
  const config = loadConfig({
    ...{ RELAY_DATABASE_URL: database.url, RELAY_REDIS_URL: server.url, RELAY_DEAD_LETTER_POLICY: 'hold' },
  });
  const operations = openOperations(config, {
    pool: operators,
    redis: relayRedis,
    streamRedis: relayRedis,
    logger: silent,
  });
  deadLetters = operations.deadLetters;
  publish = new Queue('relay-publish', { connection: relayRedis, prefix: 'bull' });
  atEndOfFile(async () => {
    await Promise.all([operations.close(), publish.close()]);
  });
});

beforeEach(async () => {
  await pool.query('TRUNCATE identity.outbox RESTART IDENTITY');
  await redis.flushall();
});

type Death = { error?: string; at?: string; attempts?: number };

/** Rows that are dead, as the relay leaves them: each with its entry in the dead-letter stream, whose id it has. */
async function dead(events: readonly SampleEvent[], death: Death = {}): Promise<string[]> {
  const { error = 'WRONGTYPE', at = '2026-01-31T12:00:00Z', attempts = 6 } = death;
  const ids = await insertEvents(pool, events);
  for (const [i, event] of events.entries()) {
    const entryId = await writeDeadLetter(event, { error, at, attempts });
    await pool.query(
      `UPDATE identity.outbox SET dead_lettered_at = $2, next_attempt_at = 'infinity', attempts = $3,
              error_message = $4, stream_entry_id = $5 WHERE id = $1`,
      [ids[i], at, attempts, error, entryId],
    );
  }
  return ids;
}

async function writeDeadLetter(event: SampleEvent, { error = 'WRONGTYPE', at = '', attempts = 6 }: Death) {
  const { eventId, eventType, aggregateType, aggregateId, payload } = event;
  const claimed = aClaimedEvent({
    ...{ eventId, eventType, aggregateType, aggregateId, topic: event.topic ?? 'identity.user.v1' },
    ...{ payload: JSON.stringify(payload), occurredAt: event.createdAt.toISOString() },
  });
  const failure = { reason: error, attempts, failedAt: new Date(at || Date.now()) };
  return (await redis.xadd(DLQ, '*', ...deadLetterFields(claimed, failure))) as string;
}

/** A job as BullMQ leaves it when its retries are spent. */
async function failedJob(eventId: string, fields: Record<string, string> = {}): Promise<void> {
  await publish.add('x', {}, { jobId: eventId });
  const key = publish.toKey(eventId);
  await redis
    .multi()
    .lrem(publish.toKey('wait'), 0, eventId)
    .zadd(publish.toKey('failed'), 1, eventId)
    .exec();
  await redis.hset(key, { finishedOn: '1', failedReason: 'no', ...fields });
}

/** Appends the event's entry, as in an earlier epoch. Answers what its job remembers of it. */
async function memoryOfAnAppend({ eventId, topic }: SampleEvent): Promise<Record<string, string>> {
  const entryId = await redis.xadd(topic ?? 'identity.user.v1', '*', 'event_id', eventId);
  return { 'relay:entry': `older ${entryId}` };
}

/** Somebody waits for a row that another has; other databases of the server are those of other test files. */
const WAITING = `SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'transactionid'`;
/** Steps back through streams since the statistics were reset. */
const lookUps = async () =>
  Number(/cmdstat_xrevrange:calls=(\d+)/.exec(await redis.info('commandstats'))?.[1] ?? 0);

const idsOf = (events: readonly { eventId: string }[]) => events.map((event) => event.eventId);
const columns = async (eventId: string) =>
  (await pool.query('SELECT * FROM identity.outbox WHERE event_id = $1', [eventId])).rows[0];

describe('the list', () => {
  test('has dead letters only, the latest first, page by page, and no payload', async () => {
    const events = someEvents(5);
    for (const [i, event] of events.entries()) await dead([event], { at: `2026-01-31T12:00:0${i % 3}.5Z` });
    const [published] = await insertEvents(pool, someEvents(3));
    await pool.query('UPDATE identity.outbox SET published = true, dead_lettered_at = now() WHERE id = $1', [
      published,
    ]);
    const found: string[] = [];
    let next: string | undefined;
    for (let pages = 1; ; pages++) {
      const page = await deadLetters.list({}, { limit: 2, ...(next !== undefined && { after: next }) });
      found.push(...idsOf(page.letters));
      expect(JSON.stringify(page)).not.toContain('email');
      if (page.next === null) {
        expect(pages).toBe(3);
        break;
      }
      next = page.next;
    }
    expect(found).toEqual([2, 4, 1, 3, 0].map((i) => events[i]?.eventId));
    await expect(deadLetters.list({}, { after: 'x' })).rejects.toThrow(CursorError);
    await expect(deadLetters.replay({ filter: {} }, { ...BY, after: next as string })).rejects.toThrow(
      CursorError,
    );
    const forged = [
      { at: 'x', id: '1' },
      { at: '2026-01-31T12:00:00Z', id: 'x' },
    ];
    for (const place of forged)
      await expect(deadLetters.list({}, { after: toCursor(place) })).rejects.toThrow(CursorError);
    const pruned = { pruned: true, after: toCursor({ entryId: 'x' }) };
    await expect(deadLetters.list({}, pruned)).rejects.toThrow(CursorError);
    const aggregate = { aggregateType: 'user', aggregateId: 'x', id: '1' };
    await expect(deadLetters.replay({ filter: {} }, { ...BY, after: toCursor(aggregate) })).rejects.toThrow(
      CursorError,
    );
  });

  test('is filtered by type, topic, aggregate, error and time, each of rows and of pruned ones', async () => {
    const odd = anEvent({ eventType: 'UserDisabled', aggregateType: 'group', topic: 'a.b' });
    await dead([odd], { error: 'No Permission (7 tries)', at: '2026-02-01T12:00:00Z' });
    await dead(someEvents(2));
    const filters = [
      { eventType: 'UserDisabled' },
      { topic: 'a.b' },
      { aggregateId: odd.aggregateId },
      { aggregateType: 'group', aggregateId: odd.aggregateId },
      { error: 'no permission' },
      { since: '2026-02-01T12:00:00Z' },
      { since: '2026-02-01T11:00:00Z', until: '2026-02-01T13:00:00Z' },
    ];
    const nothing = [
      { until: '2026-01-01T00:00:00Z' },
      { error: '%' },
      { aggregateType: 'user', eventType: 'UserDisabled' },
    ];
    for (const pruned of [false, true]) {
      if (pruned) await pool.query('DELETE FROM identity.outbox');
      for (const filter of filters) {
        const { letters } = await deadLetters.list(filter, { pruned });
        expect(letters, JSON.stringify(filter)).toEqual([
          expect.objectContaining({
            eventId: odd.eventId,
            error: 'No Permission (7 tries)',
            attempts: 6,
            pruned,
          }),
        ]);
      }
      for (const filter of nothing) expect((await deadLetters.list(filter, { pruned })).letters).toEqual([]);
      expect((await deadLetters.list({}, { pruned })).letters).toHaveLength(3);
    }
    expect((await deadLetters.list({}, { pruned: false })).letters).toEqual([]);
  });

  test('is grouped by what was wrong, whatever numbers and ids the errors name', async () => {
    const large = someEvents(3);
    for (const [i, event] of large.entries())
      await dead([event], { error: `event has ${i}00 bytes`, at: `2026-01-0${i + 1}T00:00:00Z` });
    await dead([anEvent({ eventType: 'UserUpdated' })], { error: `user ${large[0]?.aggregateId} is gone` });
    expect(await deadLetters.groups({})).toEqual([
      {
        ...{ error: 'event has # bytes', count: 3, example: large[2]?.eventId, eventTypes: ['UserCreated'] },
        ...{ first: '2026-01-01T00:00:00.000000Z', last: '2026-01-03T00:00:00.000000Z' },
      },
      expect.objectContaining({ error: 'user # is gone', count: 1, eventTypes: ['UserUpdated'] }),
    ]);
    expect(await deadLetters.groups({}, 1)).toHaveLength(1);
    expect(await deadLetters.groups({ error: 'gone' })).toHaveLength(1);
    // The text of a group finds all of its events.
    const letters = async (error: string, pruned: boolean) =>
      (await deadLetters.list({ error }, { pruned })).letters;
    for (const pruned of [false, true]) {
      if (pruned) await pool.query('DELETE FROM identity.outbox');
      expect(await letters('event has # BYTES', pruned)).toHaveLength(3);
      expect(await letters('event has 100 bytes', pruned)).toHaveLength(1);
      expect(await letters('user # is gone', pruned)).toHaveLength(1);
      expect(await letters('user 7 is gone', pruned)).toEqual([]);
    }
  });
});

describe('one event', () => {
  test('is cut where it is read: no list and no page brings the megabytes that somebody wrote into the table', async () => {
    const events = someEvents(3, 3);
    await dead(events, { error: `${'x'.repeat(1_990)} ${'y'.repeat(1 << 20)}` });
    await pool.query(
      `UPDATE identity.outbox SET discard_reason = repeat('z', 1 << 20), discarded_by = repeat('z', 1 << 20)`,
    );
    const size = (it: unknown) => JSON.stringify(it).length;
    const { letters } = await deadLetters.list({});
    expect(letters).toHaveLength(3);
    expect(letters[0]?.error).toHaveLength(2_000);
    expect(size(letters)).toBeLessThan(10_000);
    const [group] = await deadLetters.groups({});
    expect([group?.count, group?.error.length]).toEqual([3, 300]);
    const shown = await deadLetters.show(events[0]?.eventId ?? '');
    expect(size(shown)).toBeLessThan(10_000);
    // What is beyond is not looked through either.
    expect((await deadLetters.list({ error: 'y'.repeat(100) })).letters).toEqual([]);
    expect((await deadLetters.list({ error: 'xy' })).letters).toEqual([]);
    expect((await deadLetters.list({ error: 'X Y' })).letters).toHaveLength(3);
    const backlog = createBacklog(operators, {
      ...{ streamName: 'identity.user.v1', deadLetterPolicy: 'continue', statementTimeoutMs: 10_000 },
    });
    await pool.query(
      'UPDATE identity.outbox SET dead_lettered_at = NULL, next_attempt_at = NULL WHERE id = 1',
    );
    expect(size(await backlog.oldest())).toBeLessThan(10_000);

    await pool.query('DELETE FROM identity.outbox');
    const { letters: pruned } = await deadLetters.list({}, { pruned: true });
    expect(pruned).toHaveLength(3);
    expect(size(pruned)).toBeLessThan(10_000);
  });

  test('is counted among the latest so many alone, where that is asked for', async () => {
    await dead(someEvents(2, 2), { error: 'old', at: '2026-01-01T00:00:00Z' });
    await dead(someEvents(3, 3), { error: 'new', at: '2026-01-02T00:00:00Z' });
    expect((await deadLetters.groups({}, 10, 4)).map(({ error, count }) => [error, count])).toEqual([
      ['new', 3],
      ['old', 1],
    ]);
    expect((await deadLetters.groups({ error: 'old' }, 10, 4)).map(({ count }) => count)).toEqual([2]);
  });

  test('is shown with envelope, error, times, dead letter and job', async () => {
    const event = anEvent();
    await dead([event]);
    await failedJob(event.eventId);
    const [[entryId]] = (await redis.xrange(DLQ, '-', '+')) as [[string, string[]]];
    expect(await deadLetters.show(event.eventId)).toMatchObject({
      event: { eventId: event.eventId, payload: expect.stringContaining('@example.com') },
      ...{ state: 'dead', attempts: 6, error: 'WRONGTYPE', dlqEntryId: entryId, job: { state: 'failed' } },
      timeline: expect.arrayContaining([
        { at: '2026-01-31T12:00:00.000000Z', what: 'dead-lettered after 6 attempts' },
      ]),
    });
    await deadLetters.replay({ eventIds: [event.eventId] }, BY);
    const replayed = await deadLetters.show(event.eventId);
    expect(replayed).toMatchObject({ state: 'fresh', dlqEntryId: null, job: null });
    expect(replayed?.timeline.map(({ what }) => what)).toEqual(['created', 'replayed']);
    expect(await deadLetters.show(anEvent().eventId)).toBeNull();
  });

  test('is shown from its dead letter when its row is gone', async () => {
    const event = anEvent();
    await writeDeadLetter(event, { at: '2026-01-31T12:00:00.000Z' });
    expect(await deadLetters.show(event.eventId)).toMatchObject({
      event: { eventId: event.eventId, payload: JSON.stringify(event.payload) },
      ...{ state: 'pruned', attempts: 6, error: 'WRONGTYPE', job: null },
    });
  });
});

describe('a replay', () => {
  test('makes rows fresh with all their attempts, takes failed job and dead letters away', async () => {
    const [event, other] = [anEvent(), anEvent()];
    await dead([event, other]);
    await writeDeadLetter(event, {});
    await failedJob(event.eventId);
    expect(await deadLetters.replay({ eventIds: [event.eventId] }, BY)).toEqual({
      ...{ done: 1, refused: 0, refusals: [], next: null },
    });
    expect(await readRows(pool)).toMatchObject([{ state: 'fresh', attempts: 0 }, { state: 'dead' }]);
    expect((await columns(event.eventId)).replayed_at).not.toBeNull();
    expect(await publish.getJob(event.eventId)).toBeUndefined();
    expect(await redis.xlen(DLQ)).toBe(1);
    // It asks for a claim at once.
    expect(await redis.llen('bull:relay-claim:wait')).toBe(1);
  });

  test('lets a job that is worked on, or that remembers an append, be asked first', async () => {
    const [appended, busy] = someEvents(2) as [SampleEvent, SampleEvent];
    await dead([appended, busy]);
    await failedJob(appended.eventId, await memoryOfAnAppend(appended));
    await failedJob(busy.eventId);
    await redis.set(`${publish.toKey(busy.eventId)}:lock`, 'token');
    await deadLetters.replay({ filter: {} }, BY);
    expect(await readStates(pool)).toEqual(['due', 'due']);
    expect(await publish.getJobState(busy.eventId)).toBe('failed');
    // The dead letter of a job that may fail again is still the row's.
    expect(await redis.xlen(DLQ)).toBe(2);
    // The lease reaper finds by it that the event is published.
    expect(await publish.getJobState(appended.eventId)).toBe('failed');
  });

  test('believes no memory of an entry that is lost, or is another event’s', async () => {
    const [lost, other] = someEvents(2) as [SampleEvent, SampleEvent];
    await dead([lost, other]);
    await failedJob(lost.eventId, { 'relay:entry': 'older 1-1' });
    await failedJob(other.eventId, await memoryOfAnAppend(anEvent()));
    expect(await deadLetters.replay({ filter: {} }, BY)).toMatchObject({ done: 2 });
    expect(await readStates(pool)).toEqual(['fresh', 'fresh']);
    for (const { eventId } of [lost, other]) expect(await publish.getJob(eventId)).toBeUndefined();
  });

  test('and a discard by a role that may do neither take no job away', async () => {
    const event = anEvent();
    await dead([event]);
    await failedJob(event.eventId);
    const pods = openPool(relayUrl);
    const config = loadConfig({ RELAY_DATABASE_URL: relayUrl, RELAY_REDIS_URL: redisUrl });
    const connection = openRedis(redisUrl, FAILS_FAST);
    const unable = openOperations(config, {
      ...{ pool: pods, redis: connection, streamRedis: connection, logger: silent },
    });
    onTestFinished(unable.close);
    await expect(unable.deadLetters.replay({ filter: {} }, BY)).rejects.toThrow('permission denied');
    await expect(unable.deadLetters.discard({ filter: {} }, 'x', BY)).rejects.toThrow('permission denied');
    expect(await publish.getJobState(event.eventId)).toBe('failed');
    expect(await readStates(pool)).toEqual(['dead']);
  });

  test('looks dead letters up before it holds rows, and takes one away that is written meanwhile', async () => {
    const event = anEvent();
    await dead([event]);
    const somebody = await pool.connect();
    await somebody.query('BEGIN; SELECT FROM identity.outbox FOR UPDATE');
    await redis.config('RESETSTAT');
    const replay = deadLetters.replay({ filter: {} }, BY);
    try {
      await waitFor(async () => (await pool.query(WAITING)).rowCount, { what: 'the replay to wait' });
      expect(await lookUps()).toBeGreaterThan(0);
      const entryId = await writeDeadLetter(event, {});
      await somebody.query('UPDATE identity.outbox SET stream_entry_id = $1', [entryId]);
    } finally {
      await somebody.query('COMMIT');
      somebody.release();
    }
    expect(await replay).toMatchObject({ done: 1 });
    expect(await redis.xlen(DLQ)).toBe(0);
  });

  test('and a discard are done once they are committed, whatever becomes of what comes after', async () => {
    const [replayed, discarded, pruned] = someEvents(3) as [SampleEvent, SampleEvent, SampleEvent];
    await dead([replayed, discarded]);
    await writeDeadLetter(pruned, {});
    await insertEvents(pool, [anEvent({ aggregateId: discarded.aggregateId })]);
    await pool.query(`UPDATE identity.outbox SET next_attempt_at = 'infinity'`);
    await pool.query(`
      CREATE FUNCTION no_release() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not now'; END $$;
      CREATE TRIGGER no_release BEFORE UPDATE ON identity.outbox FOR EACH ROW
      WHEN (OLD.dead_lettered_at IS NULL) EXECUTE FUNCTION no_release()`);
    await redis.acl('SETUSER', RELAY_USER, '-xdel');
    try {
      for (const { eventId } of [replayed, pruned])
        expect(await deadLetters.replay({ eventIds: [eventId] }, BY)).toMatchObject({ done: 1, refused: 0 });
      expect(await deadLetters.discard({ filter: {} }, 'x', BY)).toMatchObject({ done: 1, refused: 0 });
    } finally {
      await redis.acl('SETUSER', RELAY_USER, '+xdel');
      await pool.query('DROP FUNCTION no_release CASCADE');
    }
    expect(await readStates(pool)).toEqual(['fresh', 'contradictory', 'parked', 'fresh']);
  });

  test('works where the relay may not touch the streams of the events; a job that remembers an append stays', async () => {
    const [event, appended] = [anEvent({ topic: 'payments.v1' }), anEvent({ topic: 'payments.v1' })];
    await dead([event, appended]);
    await failedJob(event.eventId);
    await failedJob(appended.eventId, await memoryOfAnAppend(appended));
    const rules = redisRules({ RELAY_ALLOWED_TOPICS: 'identity.*' });
    await redis.acl('SETUSER', RELAY_USER, 'reset', ...rules);
    try {
      expect(await deadLetters.replay({ filter: {} }, BY)).toMatchObject({ done: 2, refused: 0 });
    } finally {
      await redis.acl('SETUSER', RELAY_USER, 'reset', ...redisRules());
    }
    expect(await readStates(pool)).toEqual(['fresh', 'due']);
  });

  test('works where the dead letter was trimmed', async () => {
    await dead(someEvents(2));
    await redis.del(DLQ);
    expect(await deadLetters.replay({ filter: {} }, BY)).toMatchObject({ done: 2 });
    expect(await readStates(pool)).toEqual(['fresh', 'fresh']);
  });

  test('goes in the order of aggregates, in batches that may be cut off, and never ahead of a row that is locked', async () => {
    const events = someEvents(450, 1);
    await insertEvents(pool, events);
    await pool.query(`UPDATE identity.outbox SET dead_lettered_at = now(), next_attempt_at = 'infinity'`);
    const first = await deadLetters.replay({ filter: {} }, { ...BY, limit: 210 });
    expect(first).toMatchObject({ done: 210, next: expect.any(String) });
    const fresh = async () =>
      (await readRows(pool))
        .filter((row) => row.state === 'fresh')
        .map((row) => row.id)
        .toSorted((a, b) => Number(a) - Number(b));
    const upTo = (n: number) => Array.from({ length: n }, (_, i) => String(i + 1));
    expect(await fresh()).toEqual(upTo(210));

    const somebody = await pool.connect();
    await somebody.query('BEGIN; SELECT FROM identity.outbox WHERE id = 211 FOR UPDATE');
    const rest = deadLetters.replay({ filter: {} }, { ...BY, after: first.next as string });
    try {
      await waitFor(async () => (await pool.query(WAITING)).rowCount, {
        what: 'the replay to wait for the row',
        timeoutMs: 5_000,
      });
      expect(await fresh()).toEqual(upTo(210));
    } finally {
      await somebody.query('COMMIT');
      somebody.release();
    }
    expect(await rest).toMatchObject({ done: 240, next: null });
    expect(await fresh()).toEqual(upTo(450));
  });

  test('ends between two batches when it is told to', async () => {
    await insertEvents(pool, someEvents(450));
    await pool.query(`UPDATE identity.outbox SET dead_lettered_at = now(), next_attempt_at = 'infinity'`);
    let seen = 0;
    const stopped = () => seen > 0;
    const onProgress = (count: number) => {
      seen = count;
    };
    const result = await deadLetters.replay({ filter: {} }, { ...BY, stopped, onProgress });
    expect(result.done).toBe(200);
    expect(result.next).not.toBeNull();
    expect(await deadLetters.replay({ filter: {} }, BY)).toMatchObject({ done: 250, next: null });
  });

  test('waits while many rows are fresh: new events would wait behind its own', async () => {
    await pool.query(`
      INSERT INTO identity.outbox (event_type, aggregate_id, payload, dead_lettered_at, next_attempt_at)
      SELECT 'X', gen_random_uuid(), '{}', CASE WHEN n > 1000 THEN now() END, CASE WHEN n > 1000 THEN 'infinity'::timestamptz END
      FROM generate_series(1, 1450) n`);
    let seen = 0;
    const onProgress = (count: number) => {
      seen = count;
    };
    const replay = deadLetters.replay({ filter: {} }, { ...BY, onProgress });
    await waitFor(() => seen === 200, { what: 'the first batch' });
    const goesOn = waitFor(() => seen > 200, { what: 'it', timeoutMs: 500 });
    await expect(goesOn).rejects.toThrow('Waited');
    await pool.query('UPDATE identity.outbox SET published = true WHERE next_attempt_at IS NULL');
    expect(await replay).toMatchObject({ done: 450, next: null });
  });

  test('says which events it cannot replay, and a dry run changes nothing', async () => {
    const [live, gone] = [anEvent(), anEvent()];
    await insertEvents(pool, [live]);
    const [event] = someEvents(1) as [SampleEvent];
    await dead([event]);
    const selection = { eventIds: idsOf([live, gone, event, event]) };
    const answer = {
      ...{ done: 1, refused: 2, next: null },
      refusals: [
        { eventId: live.eventId, reason: 'it is not dead, but fresh' },
        { eventId: gone.eventId, reason: 'neither the table nor the dead-letter stream knows it' },
      ],
    };
    expect(await deadLetters.replay(selection, { ...BY, dryRun: true })).toEqual(answer);
    expect(await deadLetters.replay({ filter: {} }, { ...BY, dryRun: true })).toMatchObject({ done: 1 });
    expect(await readStates(pool)).toEqual(['fresh', 'dead']);
    expect(await deadLetters.replay(selection, BY)).toEqual(answer);
  });

  test('does nothing when Redis cannot be asked: the failed job would swallow the new one', async () => {
    await dead([anEvent()]);
    await redis.acl('SETUSER', RELAY_USER, '-exists');
    try {
      await expect(deadLetters.replay({ filter: {} }, BY)).rejects.toThrow(
        /NOPERM|ACL failure|can't run this command/,
      );
    } finally {
      await redis.acl('SETUSER', RELAY_USER, '+exists');
    }
    expect(await readStates(pool)).toEqual(['dead']);
    expect(await redis.xlen(DLQ)).toBe(1);
  });
});

describe('an event whose row is gone', () => {
  test('gets its row again from its dead letter, once, behind the rows of its aggregate', async () => {
    const event = anEvent({ topic: 'a.b', payload: { text: 'x', big: 12 } });
    await writeDeadLetter(event, {});
    await writeDeadLetter(event, {});
    await failedJob(event.eventId);
    const selection = { filter: {}, pruned: true };
    expect((await deadLetters.list({}, { pruned: true })).letters).toHaveLength(1);
    expect(await deadLetters.replay(selection, { ...BY, dryRun: true })).toMatchObject({ done: 1 });
    expect(await deadLetters.replay(selection, BY)).toMatchObject({ done: 1, refused: 0 });
    const { event_type, aggregate_id, topic, payload, created_at, attempts } = await columns(event.eventId);
    expect({ event_type, aggregate_id, topic, payload, created_at, attempts }).toEqual({
      ...{ event_type: event.eventType, aggregate_id: event.aggregateId, topic: 'a.b' },
      ...{ payload: event.payload, created_at: event.createdAt, attempts: 0 },
    });
    expect(await redis.xlen(DLQ)).toBe(0);
    expect(await publish.getJob(event.eventId)).toBeUndefined();
    for (const again of [selection, { eventIds: [event.eventId] }])
      expect(await deadLetters.replay(again, BY)).toMatchObject({ done: 0 });
    expect(await readStates(pool)).toEqual(['fresh']);
  });

  test('is looked for among so many entries only; the answer says where to go on', async () => {
    for (let i = 0; i < 45; i++) await writeDeadLetter(anEvent(), {});
    const last = anEvent({ topic: 'a.b' });
    await writeDeadLetter(last, {});
    const filter = { topic: 'a.b' };
    const page = await deadLetters.list(filter, { pruned: true, look: 40 });
    expect(page).toEqual({ letters: [], next: expect.any(String) });
    const rest = await deadLetters.list(filter, { pruned: true, look: 40, after: page.next as string });
    expect(rest).toMatchObject({ letters: [{ eventId: last.eventId }], next: null });
    const selection = { filter, pruned: true };
    const first = await deadLetters.replay(selection, { ...BY, limit: 40 });
    expect(first).toMatchObject({ done: 0, next: expect.any(String) });
    expect(
      await deadLetters.replay(selection, { ...BY, limit: 40, after: first.next as string }),
    ).toMatchObject({ done: 1, next: null });
  });

  test('is not looked for one by one', async () => {
    const events = someEvents(30);
    for (const event of events) await writeDeadLetter(event, {});
    for (const [act, selection] of [
      ['replay', { eventIds: idsOf(events.slice(0, 10)) }],
      ['replay', { filter: { eventType: 'UserCreated' }, pruned: true }],
    ] as const) {
      await redis.config('RESETSTAT');
      expect((await deadLetters[act](selection, BY)).done).toBeGreaterThanOrEqual(10);
      expect(await lookUps()).toBeLessThan(10);
    }
    expect(await redis.xlen(DLQ)).toBe(0);
  });

  test('is left alone when it is in its stream, or its payload is nowhere', async () => {
    const [there, withheld] = [anEvent(), anEvent()];
    await writeDeadLetter(there, {});
    await redis.xadd('identity.user.v1', '*', 'event_id', there.eventId);
    const claimed = aClaimedEvent({ eventId: withheld.eventId, payload: 'null', withheld: 'too large' });
    await redis.xadd(
      DLQ,
      '*',
      ...deadLetterFields(claimed, { reason: 'x', attempts: 1, failedAt: new Date() }),
    );
    expect(await deadLetters.replay({ eventIds: idsOf([there, withheld]) }, BY)).toMatchObject({
      ...{ done: 0, refused: 2 },
      refusals: [
        { reason: 'it is in its stream already' },
        { reason: 'its payload was in its row alone, and that is gone' },
      ],
    });
    expect(await readStates(pool)).toEqual([]);
    expect(await redis.xlen(DLQ)).toBe(2);
  });
});

describe('a discard', () => {
  test('keeps the row with reason and name, takes job and dead letter away, and lets its aggregate go on', async () => {
    const event = anEvent();
    await dead([event]);
    await insertEvents(pool, someEvents(2, 1, { aggregateId: event.aggregateId }));
    await pool.query(`UPDATE identity.outbox SET next_attempt_at = 'infinity'`);
    await failedJob(event.eventId);
    const selection = { eventIds: [event.eventId] };
    expect(await deadLetters.discard(selection, 'obsolete', { ...BY, dryRun: true })).toMatchObject({
      done: 1,
    });
    expect(await readStates(pool)).toEqual(['dead', 'parked', 'parked']);
    expect(await deadLetters.discard(selection, 'obsolete', BY)).toMatchObject({ done: 1, refused: 0 });
    expect(await columns(event.eventId)).toMatchObject({
      ...{ published: true, discard_reason: 'obsolete', discarded_by: 'alice', stream_entry_id: null },
      ...{ dead_lettered_at: expect.any(Date), error_message: 'WRONGTYPE' },
    });
    expect((await readStates(pool)).slice(1)).toEqual(['fresh', 'parked']);
    expect(await publish.getJob(event.eventId)).toBeUndefined();
    expect(await redis.xlen(DLQ)).toBe(0);
    expect(await deadLetters.show(event.eventId)).toMatchObject({
      state: 'discarded',
      timeline: expect.arrayContaining([{ at: expect.any(String), what: 'discarded by alice: obsolete' }]),
    });
    // It is no dead letter any more.
    expect(await deadLetters.replay(selection, BY)).toMatchObject({ done: 0, refused: 1 });
    expect(await deadLetters.replay({ filter: {} }, BY)).toMatchObject({ done: 0 });
    expect((await deadLetters.list({})).letters).toEqual([]);
    const backlog = createBacklog(operators, { ...loadConfig({}), statementTimeoutMs: 5_000 });
    expect((await backlog.count()).dead).toBe(0);
  });

  test('refuses an event whose job is being worked on', async () => {
    const event = anEvent();
    await dead([event]);
    await failedJob(event.eventId);
    await redis.set(`${publish.toKey(event.eventId)}:lock`, 'token');
    expect(await deadLetters.discard({ filter: {} }, 'x', BY)).toMatchObject({ done: 0, refused: 1 });
    expect(await readStates(pool)).toEqual(['dead']);
  });

  test('refuses an event whose job remembers an append, however often; a replay has its stream asked', async () => {
    const event = anEvent();
    await dead([event]);
    await failedJob(event.eventId, await memoryOfAnAppend(event));
    for (let i = 0; i < 2; i++)
      expect(await deadLetters.discard({ filter: {} }, 'x', BY)).toMatchObject({ done: 0, refused: 1 });
    expect(await readStates(pool)).toEqual(['dead']);
    await deadLetters.replay({ filter: {} }, BY);
    expect(await readStates(pool)).toEqual(['due']);
  });

  test('of an event whose row is gone takes its entries away', async () => {
    const event = anEvent();
    await writeDeadLetter(event, {});
    expect(await deadLetters.discard({ eventIds: [event.eventId] }, 'x', BY)).toMatchObject({ done: 1 });
    expect(await redis.xlen(DLQ)).toBe(0);
  });
});
