import { beforeAll, beforeEach, expect, test } from 'vitest';
import { loadConfig } from '../../src/config/load-config.ts';
import type { Pool } from '../../src/connections/database.ts';
import { FAILS_FAST } from '../../src/connections/servers.ts';
import type { OutboxEvent } from '../../src/event.ts';
import { CursorError, toCursor } from '../../src/operations/cursor.ts';
import { openOperations } from '../../src/operations/open.ts';
import { createRepublish, type Republish } from '../../src/operations/republishing.ts';
import { createPublished } from '../../src/outbox/published.ts';
import type { SampleEvent } from '../demo/sample.ts';
import { atEndOfFile } from '../support/cleanup.ts';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { createDatabase, createRedis } from '../support/servers.ts';
import {
  type AdminPool,
  type AdminRedis,
  openAdminPool,
  openAdminRedis,
  openPool,
  openRedis,
  readStream,
  silent,
} from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const STREAM = 'identity.user.v1';
const EPOCH = 'bull:relay:epoch';
const BY = { by: 'alice' };
const ALL = { since: '2020-01-01T00:00:00Z', until: '2100-01-01T00:00:00Z', filter: {} };

let pool: AdminPool;
let redis: AdminRedis;
/** The connection that entries are appended on. */
let relayRedis: ReturnType<typeof openRedis>;
let relayPool: Pool;
let republish: Republish;
let epoch: string;

beforeAll(async () => {
  const [database, server] = await Promise.all([createDatabase(), createRedis()]);
  pool = openAdminPool(database.adminUrl);
  redis = openAdminRedis(server.adminUrl);
  relayPool = openPool(database.url, { max: 4 });
  relayRedis = openRedis(server.url, FAILS_FAST);
  await waitFor(() => relayRedis.status === 'ready', { what: 'the connection' });
  const config = loadConfig({ RELAY_DATABASE_URL: database.url, RELAY_REDIS_URL: server.url });
  const operations = openOperations(config, {
    pool: relayPool,
    redis: relayRedis,
    streamRedis: relayRedis,
    logger: silent,
  });
  republish = operations.republish;
  atEndOfFile(operations.close);
  const info = `${await redis.info('server')}${await redis.info('replication')}`;
  const named = (name: string) => new RegExp(`${name}:(\\w+)`).exec(info)?.[1];
  epoch = `${named('run_id')}/${named('master_replid')}:x`;
});

beforeEach(async () => {
  await pool.query('TRUNCATE identity.outbox RESTART IDENTITY');
  await redis.flushall();
  await redis.set(EPOCH, epoch);
});

/** Rows as the relay leaves them: published within one statement, in the given order of their entries. */
async function published(
  events: readonly SampleEvent[],
  at = '2026-01-31T12:00:00Z',
  order = events.map((_, i) => i),
) {
  const ids = await insertEvents(pool, events);
  for (const i of order) {
    const event = events[i] as SampleEvent;
    const entryId = await redis.xadd(event.topic ?? STREAM, '*', 'event_id', event.eventId);
    await pool.query(
      `UPDATE identity.outbox SET published = true, published_at = $2, stream_entry_id = $3 WHERE id = $1`,
      [ids[i], at, entryId],
    );
  }
  return ids;
}

const again = async (stream = STREAM) =>
  (await readStream(redis, stream)).filter((it) => it.replayed_at !== undefined);
const idsOf = (events: readonly { eventId: string }[]) => events.map((event) => event.eventId);
const entryIds = async () =>
  (await pool.query('SELECT id, stream_entry_id, published_at FROM identity.outbox ORDER BY id')).rows;

test('entries come again in the order of their stream, whole and marked; rows stay as they are', async () => {
  const events = someEvents(6, 2);
  await published(events, '2026-01-31T12:00:00Z', [0, 1, 3, 2, 5, 4]);
  const before = await entryIds();
  expect(await republish.count(ALL)).toEqual({ streams: new Map([[STREAM, 6]]), next: null });
  expect(await republish.run(ALL, BY)).toEqual({
    ...{ appended: 6, refused: 0, reason: null, error: null, next: null },
  });
  const entries = await again();
  expect(entries.map((it) => it.event_id)).toEqual([0, 1, 3, 2, 5, 4].map((i) => events[i]?.eventId));
  expect(entries[0]).toMatchObject({ event_type: 'UserCreated', topic: STREAM, schema_version: '1' });
  expect(JSON.parse(entries[0]?.payload ?? '')).toEqual(events[0]?.payload);
  expect(Date.parse(entries[0]?.replayed_at ?? '')).toBeGreaterThan(Date.now() - 60_000);
  expect(await entryIds()).toEqual(before);
});

test('only what was published in that time and matches: neither dead, nor discarded, nor waiting', async () => {
  const word = anEvent({ eventType: 'WordAdded', aggregateType: 'word', topic: 'words' });
  const [early, late, dead, discarded] = someEvents(4) as [
    SampleEvent,
    SampleEvent,
    SampleEvent,
    SampleEvent,
  ];
  await published([early], '2026-01-30T12:00:00Z');
  await published([word, dead, discarded]);
  await published([late], '2026-02-01T12:00:00Z');
  await insertEvents(pool, [anEvent()]);
  await pool.query(
    `UPDATE identity.outbox SET published = event_id = $2, dead_lettered_at = published_at WHERE event_id = ANY ($1)`,
    [idsOf([dead, discarded]), discarded.eventId],
  );
  const of = async (range: Partial<typeof ALL>) => {
    const all = { ...ALL, ...range };
    const { streams: counts } = await republish.count(all);
    const { appended } = await republish.run(all, BY);
    expect([...counts.values()].reduce((sum, n) => sum + n, 0)).toBe(appended);
    const found = [...(await again()), ...(await again('words'))].map((it) => it.event_id);
    for (const stream of [STREAM, 'words']) await redis.xtrim(stream, 'MAXLEN', 0);
    return found;
  };
  expect((await of({})).toSorted()).toEqual(idsOf([word, early, late]).toSorted());
  expect(await of({ until: '2026-01-31T00:00:00Z' })).toEqual([early.eventId]);
  expect(await of({ since: '2026-02-01T00:00:00Z' })).toEqual([late.eventId]);
  for (const filter of [
    { topic: 'words' },
    { eventType: 'WordAdded' },
    { aggregateId: word.aggregateId },
    { aggregateType: 'word' },
  ])
    expect(await of({ filter } as never), JSON.stringify(filter)).toEqual([word.eventId]);
});

test('cut off, it goes on where it was: each entry once, in order', async () => {
  const events = someEvents(25, 5);
  await published(events);
  let next: string | undefined;
  for (let runs = 0; runs < 4; runs++) {
    const result = await republish.run(ALL, { ...BY, limit: 7, ...(next !== undefined && { after: next }) });
    expect(result.appended).toBe(runs < 3 ? 7 : 4);
    expect(result.next === null).toBe(runs === 3);
    next = result.next ?? undefined;
  }
  expect((await again()).map((it) => it.event_id)).toEqual(idsOf(events));
});

test('a count goes on where it ended, too', async () => {
  await published(someEvents(5));
  const first = await republish.count(ALL, { limit: 3 });
  expect(first).toEqual({ streams: new Map([[STREAM, 3]]), next: expect.any(String) });
  expect(await republish.count(ALL, { limit: 3, after: first.next as string })).toEqual({
    ...{ streams: new Map([[STREAM, 2]]), next: null },
  });
});

test('a count with the cursor of a run that was cut off counts the rest', async () => {
  await published(someEvents(25, 5));
  const { next } = await republish.run(ALL, { ...BY, limit: 7 });
  expect(await republish.count(ALL, { after: next as string })).toEqual({
    ...{ streams: new Map([[STREAM, 18]]), next: null },
  });
});

/** Beside the table, with a stream that takes everything, or fails. */
const besideTable = (append: (event: OutboxEvent) => Promise<null>) =>
  createRepublish({
    published: createPublished(relayPool, {
      streamName: STREAM,
      maxEventBytes: 1e6,
      statementTimeoutMs: 15_000,
    }),
    republisher: () => append,
    problemOf: () => null,
    logger: silent,
  });

test.each([
  ['equal pages', Array.from({ length: 12 }, () => 1_000)],
  ['pages that end among entries that go back', [5_700, 300, 500, 1_500, 4_000]],
])(
  'in %s, every entry comes once and in order, even where one of two streams was restored',
  async (_, limits) => {
    // Both by turns, b's later; a was lost and restored after that. Neighbours were acknowledged the wrong way round.
    await pool.query(
      `INSERT INTO identity.outbox (event_type, aggregate_id, payload, topic, published, published_at, stream_entry_id)
     SELECT 'X', gen_random_uuid(), '{}', CASE n % 2 WHEN 0 THEN 'a' ELSE 'b' END, true,
            '2026-01-31T12:00:00Z'::timestamptz + (n # 2) * interval '1 ms', (2000 - n % 2 * 1000) || '-' || n
     FROM generate_series(4, 12003) n`,
    );
    const found: Record<string, number[]> = { a: [], b: [] };
    const paged = besideTable(async ({ topic, id }) => {
      found[topic]?.push(Number(id));
      return null;
    });
    let next: string | undefined;
    for (const limit of limits)
      next =
        (await paged.run(ALL, { ...BY, limit, ...(next !== undefined && { after: next }) })).next ??
        undefined;
    expect(next).toBeUndefined();
    const ofAll = (first: number) => Array.from({ length: 6_000 }, (_, i) => first + 2 * i);
    expect(found).toEqual({ a: ofAll(1), b: ofAll(2) });
  },
);

test('ended early by an error, it says what was appended and where to go on', async () => {
  const events = someEvents(4);
  await published(events);
  const appended: string[] = [];
  let room = 2;
  const full = besideTable(async ({ eventId }) => {
    if (room-- <= 0) throw new Error('OOM');
    appended.push(eventId);
    return null;
  });
  const first = await full.run(ALL, BY);
  expect(first).toMatchObject({ appended: 2, error: 'OOM', next: expect.any(String) });
  // Nothing was done: it failed.
  await expect(full.run(ALL, { ...BY, after: first.next as string })).rejects.toThrow('OOM');
  room = 2;
  expect(await full.run(ALL, { ...BY, after: first.next as string })).toMatchObject({
    ...{ appended: 2, error: null, next: null },
  });
  expect(appended).toEqual(idsOf(events));
});

test('a cursor of somebody’s own making is refused', async () => {
  await published(someEvents(2));
  const { next } = await republish.run(ALL, { ...BY, limit: 1 });
  const place = JSON.parse(Buffer.from(next as string, 'base64url').toString());
  for (const forged of [
    { finalizedAt: 'x' },
    { finalizedAt: '2026-02-30 12:00:00+00' },
    { id: 'x' },
    { entryId: '1' },
  ])
    await expect(
      republish.run(ALL, { ...BY, after: toCursor({ ...place, ...forged }) }),
      JSON.stringify(forged),
    ).rejects.toThrow(CursorError);
  await expect(republish.count(ALL, { after: toCursor({ ...place, finalizedAt: 'x' }) })).rejects.toThrow(
    CursorError,
  );
});

test('nothing is appended while it is not known whether Redis lost entries; a comparison is waited for', async () => {
  await published(someEvents(3));
  await redis.set(EPOCH, 'checking:somebody');
  const running = republish.run(ALL, BY);
  await expect(
    Promise.race([running, waitFor(async () => (await again()).length, { what: 'it', timeoutMs: 600 })]),
  ).rejects.toThrow('Waited');
  await redis.set(EPOCH, epoch);
  expect(await running).toMatchObject({ appended: 3 });

  // Lost in the middle, restarted on the way: what has another name gets nothing.
  await redis.xtrim(STREAM, 'MAXLEN', 0);
  await redis.set(EPOCH, epoch);
  const onProgress = (seen: number) => {
    // On the same connection, so that it comes before the next append.
    if (seen === 1) void relayRedis.set(EPOCH, 'a/b:x');
  };
  const second = republish.run(ALL, { ...BY, onProgress });
  const goesOn = waitFor(async () => (await again()).length > 1, { what: 'it', timeoutMs: 600 });
  await expect(Promise.race([second, goesOn])).rejects.toThrow('Waited');
  await redis.set(EPOCH, epoch);
  expect(await second).toMatchObject({ appended: 3 });
});

test('a stream that takes nothing is left out, and said', async () => {
  await published([anEvent({ topic: 'broken' }), anEvent()]);
  await redis.del('broken');
  await redis.set('broken', 'a string');
  expect(await republish.run(ALL, BY)).toMatchObject({
    ...{ appended: 1, refused: 1, next: null },
    reason: expect.stringContaining('WRONGTYPE'),
  });
});

test('a stream that was lost is not made anew: then what it lost would look like trimmed', async () => {
  await published(someEvents(3));
  await redis.del(STREAM);
  expect(await republish.run(ALL, BY)).toMatchObject({
    ...{ appended: 0, refused: 3, next: null },
    reason: expect.stringContaining('verify --repair'),
  });
  expect(await redis.exists(STREAM)).toBe(0);
});
