import type { Redis } from 'ioredis';
import { beforeAll, beforeEach, expect, test } from 'vitest';
import type { OutboxEvent } from '../../src/event.ts';
import { createOutbox, type Outbox } from '../../src/outbox/outbox.ts';
import { createStream } from '../../src/stream/append.ts';
import { createTurns } from '../../src/stream/turn.ts';
import { createDeadLetter } from '../../src/triage/dead-letter.ts';
import { insertEvents, someEvents } from '../support/events.ts';
import { createDatabase, createRedis } from '../support/servers.ts';
import {
  type AdminPool,
  type AdminRedis,
  openAdminPool,
  openAdminRedis,
  openPool,
  openRedis,
  readRows,
  readStates,
  readStream,
  silent,
} from '../support/stages.ts';

const DLQ = 'identity.user.v1.dlq';
const jobKey = (eventId: string) => `bull:relay-publish:${eventId}`;

let pool: AdminPool;
let redis: AdminRedis;
let relay: Redis;
let outbox: Outbox;
let event: OutboxEvent;

beforeAll(async () => {
  const [database, server] = await Promise.all([createDatabase(), createRedis()]);
  pool = openAdminPool(database.adminUrl);
  redis = openAdminRedis(server.adminUrl);
  relay = openRedis(server.url);
  outbox = createOutbox(openPool(database.url), {
    ...{
      ordering: 'aggregate',
      deadLetterPolicy: 'continue',
      claimLeaseMs: 60_000,
      maxEventBytes: 1_048_576,
    },
    ...{ streamName: 'identity.user.v1', statementTimeoutMs: 10_000 },
  });
});

/** Three rows of one aggregate; the job of the first has failed. */
beforeEach(async () => {
  await pool.query('TRUNCATE identity.outbox RESTART IDENTITY');
  await redis.flushall();
  await redis.set(EPOCH_KEY, EPOCH);
  await insertEvents(pool, someEvents(3, 1));
  const { leased } = await outbox.transaction('repeatable', (tx) => outbox.claimFresh(tx, 10));
  [event] = leased as [OutboxEvent];
  await redis.hset(jobKey(event.eventId), {
    ...{ name: event.eventType, timestamp: '1700000000000', finishedOn: '1700000000001' },
  });
});

const EPOCH_KEY = 'bull:relay:epoch';
const EPOCH = 'epoch';

type MarkDead = Parameters<typeof createDeadLetter>[0]['markDead'];

const markDead: MarkDead = async (dead) => {
  await outbox.transaction('durable', (tx) => outbox.markDead(tx, dead));
};

/** Events of which a dead letter was written, as told to whoever counts them. */
const written: string[] = [];

function bury(mark: MarkDead = markDead): Promise<void> {
  const epochs = { known: async () => EPOCH, doubt: () => {}, doubtAll: () => {} };
  const turns = createTurns({ isSettled: () => false, waiting: async () => 'some' });
  const options = { dlqStreamName: DLQ, streamMaxLen: 0, dlqMaxLen: 0, jobKey, epochKey: EPOCH_KEY };
  const stream = createStream(relay, epochs, turns, options);
  const deadLetter = createDeadLetter({
    append: stream.deadLetter,
    markDead: mark,
    onDead: () => {},
    onWritten: ({ eventId }) => written.push(eventId),
    logger: silent,
  });
  return deadLetter({
    event,
    attempts: 6,
    reason: 'WRONGTYPE',
    failedAt: new Date('2026-01-02T03:04:05.678Z'),
  });
}

test('a dead letter is one entry and a dead row, and the aggregate goes on', async () => {
  await bury();
  expect(await readStream(redis, DLQ)).toMatchObject([
    {
      ...{ original_event_id: event.eventId, error_message: 'WRONGTYPE', attempts: '6' },
      failed_at: '2026-01-02T03:04:05.678Z',
    },
  ]);
  const [row] = await readRows(pool);
  const [[entryId] = []] = await redis.xrange(DLQ, '-', '+');
  expect(row).toMatchObject({
    state: 'dead',
    attempts: 6,
    errorMessage: 'WRONGTYPE',
    streamEntryId: entryId,
  });
  expect(await readStates(pool)).toEqual(['dead', 'leased', 'parked']);
});

test('written any number of times, at once or one after the other, it is still one', async () => {
  written.length = 0;
  await Promise.all([bury(), bury(), bury()]);
  await bury();
  expect(await readStream(redis, DLQ)).toHaveLength(1);
  expect(written).toEqual([event.eventId]);
  expect(await readStates(pool)).toEqual(['dead', 'leased', 'parked']);
});

test('left half done after its entry, it is finished by whoever comes next', async () => {
  await expect(bury(() => Promise.reject(new Error('the pod died')))).rejects.toThrow('the pod died');
  expect(await readStream(redis, DLQ)).toHaveLength(1);
  expect(await readStates(pool)).toEqual(['leased', 'parked', 'parked']);
  await bury();
  expect(await readStream(redis, DLQ)).toHaveLength(1);
  expect(await readStates(pool)).toEqual(['dead', 'leased', 'parked']);
});

test('that Redis does not take leaves the row as it is, to be looked at again', async () => {
  await redis.set(DLQ, 'a string');
  await bury();
  expect(await readStates(pool)).toEqual(['leased', 'parked', 'parked']);
  await redis.del(DLQ);
  await redis.config('SET', 'maxmemory', '1');
  try {
    await bury();
  } finally {
    await redis.config('SET', 'maxmemory', '0');
  }
  expect(await readStates(pool)).toEqual(['leased', 'parked', 'parked']);
  await bury();
  expect(await readStates(pool)).toEqual(['dead', 'leased', 'parked']);
});

test('of a job that was removed meanwhile is not written: the row will be tried again', async () => {
  await redis.del(jobKey(event.eventId));
  await bury();
  expect(await redis.exists(DLQ)).toBe(0);
  expect(await readStates(pool)).toEqual(['leased', 'parked', 'parked']);
});
