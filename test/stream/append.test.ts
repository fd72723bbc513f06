import { randomUUID } from 'node:crypto';
import type { Redis } from 'ioredis';
import { beforeAll, beforeEach, describe, expect, test } from 'vitest';
import type { OutboxEvent, Receipt } from '../../src/event.ts';
import { withDeadline } from '../../src/lifecycle.ts';
import { APPEND_CONNECTION, createStream, type Stream } from '../../src/stream/append.ts';
import { createTurns } from '../../src/stream/turn.ts';
import { createRedis, type TestRedis } from '../support/servers.ts';
import {
  type AdminRedis,
  aChain,
  aClaimedEvent,
  openAdminRedis,
  openRedis,
  readStream,
} from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const TOPIC = 'identity.user.v1';
const DLQ = 'identity.user.v1.dlq';
const EPOCH_KEY = 'bull:relay:epoch';
const jobKey = (eventId: string) => `bull:relay-publish:${eventId}`;
const ENTRY_ID = /^\d+-\d+$/;

/** As the relay connects, with time enough only for a healthy server. */
const CONNECTION = { ...APPEND_CONNECTION, commandTimeout: 1_000, retryStrategy: () => 50 };

function streamOn(redis: Redis, options: { streamMaxLen?: number; dlqMaxLen?: number } = {}): Stream {
  const turns = createTurns({
    isSettled: (id) => settled.has(id),
    waiting: async (ids) => {
      asked.push(...ids);
      const found = ids.flatMap((id) => live.get(id) ?? []);
      return found.includes('for-retry') ? 'for-retry' : (found[0] ?? 'none');
    },
  });
  return createStream(redis, epochs, turns, {
    ...{ dlqStreamName: DLQ, streamMaxLen: 0, dlqMaxLen: 0, jobKey, epochKey: EPOCH_KEY },
    ...options,
  });
}

/** Rows that are neither published nor dead, and what they wait for. */
const live = new Map<string, 'some' | 'for-retry'>();
/** Those whose receipts this pod has given. */
const settled = new Set<string>();
/** Rows that somebody looked at. */
const asked: string[] = [];

/** The epoch of this test, and what the stream says of it. */
let epoch: string | undefined;
let doubts: string[] = [];
const epochs = {
  known: async () => epoch,
  doubt: () => void doubts.push('this pod'),
  doubtAll: (of: string) => void doubts.push(of),
};

/** The publish job's hash, as far as the stream knows it. */
async function jobOf(redis: AdminRedis, event: OutboxEvent): Promise<OutboxEvent> {
  if (epoch !== undefined) await redis.set(EPOCH_KEY, epoch);
  await redis.hset(jobKey(event.eventId), { name: event.eventType, data: '{}', timestamp: '1700000000000' });
  return event;
}

async function connected(url: string): Promise<Redis> {
  const redis = openRedis(url, CONNECTION);
  await waitFor(() => redis.status === 'ready', { what: 'the append connection' });
  return redis;
}

let server: TestRedis;
let admin: AdminRedis;
let stream: Stream;

beforeAll(async () => {
  server = await createRedis();
  admin = openAdminRedis(server.adminUrl);
  stream = streamOn(await connected(server.url));
});

beforeEach(async () => {
  await admin.flushall();
  epoch = randomUUID();
  doubts = [];
  live.clear();
  settled.clear();
  asked.length = 0;
});

/** The same, of a job that has failed for good. */
async function anEventGivenUp(overrides: Partial<OutboxEvent> = {}): Promise<OutboxEvent> {
  const event = await anEventWithJob(overrides);
  await giveUp(event);
  return event;
}
const giveUp = (event: OutboxEvent) => admin.hset(jobKey(event.eventId), 'finishedOn', '1700000000001');

const anEventWithJob = (overrides: Partial<OutboxEvent> = {}) => jobOf(admin, aClaimedEvent(overrides));
const FAILURE = { reason: 'WRONGTYPE', attempts: 6, failedAt: new Date('2026-01-02T03:04:05.678Z') };

describe('events of one aggregate that got their jobs together', () => {
  /** So many, in their order. `at` of them is found by the stream id. */
  async function aRun(count: number) {
    const plain = await Promise.all(
      Array.from({ length: count }, (_, i) => anEventWithJob({ id: String(7 + i) })),
    );
    const receipts = [{ id: '6', entryId: '1-6' }];
    const chained = (i: number) => {
      const after = plain.slice(0, i).map(({ id, eventId }) => ({ id, eventId }));
      return { ...(plain[i] as OutboxEvent), chain: aChain({ epoch: epoch as string, receipts, after }) };
    };
    return { events: plain.map((_, i) => chained(i)), receipts };
  }
  const idsInStream = async () => (await readStream(admin, TOPIC)).map((fields) => fields.event_id);
  const ids = (events: readonly OutboxEvent[]) => events.map((it) => it.eventId);

  test('are appended in their order, whichever is run first, and know what comes before them', async () => {
    const { events, receipts } = await aRun(3);
    const [first, second, third] = events as [OutboxEvent, OutboxEvent, OutboxEvent];
    const outcomes = await Promise.all([third, first, second].map(stream.publish));
    expect(await idsInStream()).toEqual(ids(events));
    const entryIds = (outcomes as { entryId: string }[]).map((it) => it.entryId);
    expect(outcomes).toMatchObject([
      {
        status: 'appended',
        preceding: [...receipts, { id: '7', entryId: entryIds[1] }, { id: '8', entryId: entryIds[2] }],
      },
      { status: 'appended', preceding: receipts },
      { status: 'appended', preceding: [...receipts, { id: '7', entryId: entryIds[1] }] },
    ]);
    expect(await stream.publish(third)).toEqual({ ...outcomes[0], status: 'already-appended' });
    expect(asked).toEqual([]);
  });

  test('wait for one that is on its way, here or on another pod, and not for ever', async () => {
    const { events } = await aRun(3);
    const [first, second, third] = events as [OutboxEvent, OutboxEvent, OutboxEvent];
    expect(await stream.publish(second)).toEqual({ status: 'early' });
    const waiting = [stream.publish(third), stream.publish(second)];
    const other = streamOn(await connected(server.url));
    await other.publish(first);
    for (const outcome of await Promise.all(waiting)) expect(outcome).toMatchObject({ status: 'appended' });
    expect(await idsInStream()).toEqual(ids(events));
    expect(asked).toEqual([]);
  });

  test('do not wait for one that has failed for good', async () => {
    const { events, receipts } = await aRun(2);
    const [first, second] = events as [OutboxEvent, OutboxEvent];
    await giveUp(first);
    expect(await stream.publish(second)).toMatchObject({ status: 'appended', preceding: receipts });
  });

  test('do not wait for one that waits for a retry, nor for one whose row does', async () => {
    const { events } = await aRun(3);
    const [first, second, third] = events as [OutboxEvent, OutboxEvent, OutboxEvent];
    await admin.hset(jobKey(first.eventId), 'atm', '1');
    expect(await stream.publish(second)).toEqual({ status: 'behind-retry' });
    // Appended by the retry, it is like any other.
    await stream.publish(first);
    expect(await stream.publish(second)).toMatchObject({ status: 'appended' });
    expect(asked).toEqual([]);

    await admin.del(jobKey(second.eventId));
    live.set(second.id, 'for-retry');
    expect(await stream.publish(third)).toEqual({ status: 'behind-retry' });
    expect(await idsInStream()).toEqual(ids([first, second]));
  });

  test('ask no row whose receipt was given in the meantime', async () => {
    const { events } = await aRun(2);
    const given = new Set<string>();
    const turns = createTurns({
      isSettled: (id) => given.has(id),
      waiting: () => Promise.reject(new Error('a row was asked')),
    });
    const appended = await turns.inTurn(events[1] as OutboxEvent, async (first) => {
      for (const { id } of first) given.add(id);
      return first.length > 0 ? '*|gone' : '1-1';
    });
    expect(appended).toEqual({ reply: '1-1', first: [] });
  });

  test('wait for one whose job is gone as long as its row waits for something', async () => {
    const { events, receipts } = await aRun(3);
    const [first, second, third] = events as [OutboxEvent, OutboxEvent, OutboxEvent];
    const published = await stream.publish(first);
    await admin.del(jobKey(first.eventId));
    live.set(first.id, 'some');
    expect(await stream.publish(second)).toEqual({ status: 'early' });
    expect(new Set(asked)).toEqual(new Set([first.id]));
    live.clear();
    expect(await stream.publish(second)).toMatchObject({ status: 'appended', preceding: receipts });
    expect(published).toMatchObject({ status: 'appended' });
    // Appended already: its place is known, that of the first is not, so the rows say whose turn it is.
    expect(await stream.publish(second)).toMatchObject({ status: 'already-appended', preceding: [] });
    asked.length = 0;
    settled.add(first.id);
    expect(await stream.publish(third)).toMatchObject({
      status: 'appended',
      preceding: [{ id: '6' }, { id: '8' }],
    });
    expect(asked).toEqual([]);
  });
});

describe('an event', () => {
  test('is appended with exactly the fields of the envelope', async () => {
    const payload = '{"n": 12345678901234567890.10, "text": "Jörg\\u0000 \\"x\\"", "z": [1,  2]}';
    const event = await anEventWithJob({
      payload,
      occurredAt: '2026-01-02T03:04:05.678901Z',
      tenantId: 'tenant',
    });
    const outcome = await stream.publish(event);
    expect(outcome).toEqual({
      ...{ status: 'appended', entryId: expect.stringMatching(ENTRY_ID), epoch },
      preceding: [],
    });
    expect(await readStream(admin, TOPIC)).toEqual([
      {
        ...{ event_id: event.eventId, event_type: 'UserCreated', topic: TOPIC, schema_version: '1' },
        ...{ occurred_at: '2026-01-02T03:04:05.678901Z', tenant_id: 'tenant', payload },
        ...{ aggregate_id: event.aggregateId, aggregate_type: 'user' },
      },
    ]);
  });

  test('carries a correlation id only when it has one, and the null tenant when it has none', async () => {
    await stream.publish(await anEventWithJob({ correlationId: 'correlation' }));
    await stream.publish(await anEventWithJob());
    const [first, second] = await readStream(admin, TOPIC);
    expect(first).toMatchObject({
      correlation_id: 'correlation',
      tenant_id: '00000000-0000-0000-0000-000000000000',
    });
    expect(second).not.toHaveProperty('correlation_id');
  });

  test('goes to the stream of its topic', async () => {
    await stream.publish(await anEventWithJob({ topic: 'dictionary.word.v1' }));
    expect(await readStream(admin, 'dictionary.word.v1')).toHaveLength(1);
    expect(await admin.exists(TOPIC)).toBe(0);
  });

  test('is appended once: asked again, the same id is answered and nothing is written', async () => {
    const event = await anEventWithJob();
    const first = await stream.publish(event);
    expect(first.status).toBe('appended');
    const again = await Promise.all([stream.publish(event), stream.publish(event)]);
    for (const outcome of again) expect(outcome).toEqual({ ...first, status: 'already-appended' });
    expect(await readStream(admin, TOPIC)).toHaveLength(1);
  });

  test('is appended once, though several ask at the same time', async () => {
    const event = await anEventWithJob();
    const other = streamOn(await connected(server.url));
    const outcomes = await Promise.all([stream, other, stream, other].map((it) => it.publish(event)));
    expect(outcomes.filter((it) => it.status === 'appended')).toHaveLength(1);
    expect(outcomes.filter((it) => it.status === 'already-appended')).toHaveLength(3);
    expect(await readStream(admin, TOPIC)).toHaveLength(1);
  });

  test('whose job is gone is not appended, and leaves nothing behind', async () => {
    const event = aClaimedEvent();
    await admin.set(EPOCH_KEY, epoch as string);
    expect(await stream.publish(event)).toEqual({ status: 'job-gone' });
    expect(await stream.deadLetter(event, FAILURE)).toEqual({ status: 'job-gone' });
    expect(await admin.keys('*')).toEqual([EPOCH_KEY]);
  });

  test('whose job is gone is not brought back by an entry that was remembered alone', async () => {
    const event = await anEventWithJob();
    await stream.publish(event);
    await admin.del(jobKey(event.eventId));
    expect(await stream.publish(event)).toEqual({ status: 'job-gone' });
    expect(await readStream(admin, TOPIC)).toHaveLength(1);
  });
});

describe('a dead letter', () => {
  test('has the old fields, the rest of the envelope, and why and when', async () => {
    const event = await anEventGivenUp({ tenantId: 'tenant', correlationId: 'correlation' });
    expect(await stream.deadLetter(event, FAILURE)).toMatchObject({ status: 'appended' });
    expect(await readStream(admin, DLQ)).toEqual([
      {
        ...{ original_event_id: event.eventId, event_type: 'UserCreated', aggregate_id: event.aggregateId },
        ...{ payload: event.payload, error_message: 'WRONGTYPE', attempts: '6' },
        ...{ failed_at: '2026-01-02T03:04:05.678Z', created_at: event.occurredAt },
        ...{ event_id: event.eventId, topic: TOPIC, tenant_id: 'tenant', aggregate_type: 'user' },
        ...{ schema_version: '1', occurred_at: event.occurredAt, correlation_id: 'correlation' },
      },
    ]);
  });

  test('is appended once, apart from the entry of the event itself', async () => {
    const event = await anEventWithJob();
    const entry = await stream.publish(event);
    await giveUp(event);
    const letter = await stream.deadLetter(event, FAILURE);
    expect(await stream.deadLetter(event, { ...FAILURE, reason: 'another' })).toEqual({
      ...letter,
      status: 'already-appended',
    });
    expect(await stream.publish(event)).toEqual({ ...entry, status: 'already-appended' });
    expect(await readStream(admin, DLQ)).toHaveLength(1);
    expect(await readStream(admin, TOPIC)).toHaveLength(1);
  });
});

describe('a job that is not as it should be', () => {
  test('because it was made again: a dead letter that comes late is not written', async () => {
    const event = await anEventWithJob();
    expect(await stream.deadLetter(event, FAILURE)).toEqual({ status: 'job-gone' });
    expect(await admin.exists(DLQ)).toBe(0);
  });

  test('because it was given up: an attempt that comes late appends nothing', async () => {
    const event = await anEventGivenUp();
    expect(await stream.publish(event)).toEqual({ status: 'job-gone' });
    expect(await admin.exists(TOPIC)).toBe(0);
  });
});

describe('trimming', () => {
  const append = async (through: Stream, count: number) => {
    const events = await Promise.all(Array.from({ length: count }, () => anEventWithJob()));
    await Promise.all(events.map(through.publish));
  };

  test('keeps about as many entries as are allowed, never fewer', async () => {
    const trimmed = streamOn(await connected(server.url), { streamMaxLen: 150 });
    await append(trimmed, 1_000);
    const { length } = await readStream(admin, TOPIC);
    expect(length).toBeGreaterThanOrEqual(150);
    expect(length).toBeLessThan(300); // whole nodes of 100 entries
  });

  test('does not happen at 0, and each stream has its own limit', async () => {
    await append(streamOn(await connected(server.url), { dlqMaxLen: 1 }), 500);
    expect(await readStream(admin, TOPIC)).toHaveLength(500);
  });
});

describe('an event that Redis refuses', () => {
  test('because the key is no stream: the reason says so, and nothing of the script', async () => {
    await admin.set(TOPIC, 'a string');
    const event = await anEventWithJob();
    expect(await stream.publish(event)).toEqual({
      status: 'refused',
      reason: 'WRONGTYPE Operation against a key holding the wrong kind of value',
    });
    // Once the reason is gone, it is appended as if nothing had been.
    await admin.del(TOPIC);
    expect(await stream.publish(event)).toMatchObject({ status: 'appended' });
  });

  test.each([
    ['the command', '~* +@all -xadd', /command/],
    ['the key', '~bull:* +@all', /key/],
  ])('because it may not use %s', async (_, rules, named) => {
    await admin.call('ACL', 'SETUSER', 'weak', 'reset', 'on', '>secret', ...rules.split(' '));
    const weak = streamOn(await connected(server.adminUrl.replace('//', '//weak:secret@')));
    const outcome = await weak.publish(await anEventWithJob());
    expect(outcome).toMatchObject({ status: 'refused', reason: expect.stringMatching(named) });
    expect(JSON.stringify(outcome)).not.toMatch(/user_script|[0-9a-f]{40}|@/);
    expect(await admin.exists(TOPIC)).toBe(0);
  });

  test('takes away the dead letter of a job that somebody has retried', async () => {
    const event = await anEventWithJob();
    await giveUp(event);
    await stream.deadLetter(event, { reason: 'x', attempts: 6, failedAt: new Date() });
    expect(await admin.xlen(DLQ)).toBe(1);
    // Too early: it is dead still, with the same dead letter.
    expect(await stream.publish(event)).toMatchObject({ status: 'job-gone' });
    expect(await admin.xlen(DLQ)).toBe(1);
    await admin.hdel(jobKey(event.eventId), 'finishedOn');
    expect(await stream.publish(event)).toMatchObject({ status: 'appended' });
    expect([await admin.xlen(TOPIC), await admin.xlen(DLQ)]).toEqual([1, 0]);
  });

  test('with an answer that is no stream id never passes for published', async () => {
    const event = await anEventWithJob();
    for (const junk of ['OK', '1', '-1', '1700000000000', '1-2-3', ' ']) {
      await admin.hset(jobKey(event.eventId), 'relay:entry', junk);
      expect(await stream.publish(event)).toMatchObject({ status: 'refused' });
    }
  });
});

describe('while Redis can take nothing', () => {
  test('because it is full, events are not to blame; then they are appended', async () => {
    const event = await anEventWithJob();
    await admin.config('SET', 'maxmemory', '1');
    try {
      expect(await stream.publish(event)).toMatchObject({
        status: 'unavailable',
        reason: expect.stringMatching(/^OOM command not allowed when used memory > 'maxmemory'/),
      });
    } finally {
      await admin.config('SET', 'maxmemory', '0');
    }
    expect(await stream.publish(event)).toMatchObject({ status: 'appended' });
  });

  test('because it is a replica', async () => {
    const replica = await createRedis({ args: ['--replicaof', '127.0.0.1', String(server.port)] });
    const reader = openAdminRedis(replica.adminUrl);
    const event = await anEventWithJob();
    await waitFor(() => reader.exists(jobKey(event.eventId)), { what: 'the replica to be in step' });
    const outcome = await streamOn(await connected(replica.url)).publish(event);
    expect(outcome).toMatchObject({ status: 'unavailable', reason: expect.stringMatching(/^READONLY/) });
    // It may become a master with other data than the one that this pod knew.
    expect(doubts).toEqual(['this pod']);
  });

  test('because it is away, this is said at once, and nothing old is appended when it is back', async () => {
    const fragile = await createRedis();
    const redis = await connected(fragile.url);
    const through = streamOn(redis);
    const before = openAdminRedis(fragile.adminUrl);
    const event = await jobOf(before, aClaimedEvent());
    await fragile.kill();
    await waitFor(() => redis.status !== 'ready', { what: 'the connection to be lost' });
    const outcomes = await withDeadline(
      1_000,
      Promise.all([through.publish(event), through.publish(event), through.deadLetter(event, FAILURE)]),
    );
    for (const outcome of outcomes) expect(outcome.status).toBe('unavailable');
    await fragile.restart();
    await waitFor(() => redis.status === 'ready', { what: 'the connection to be back' });
    const other = await jobOf(before, aClaimedEvent());
    expect(await through.publish(other)).toMatchObject({ status: 'appended' });
    expect((await readStream(before, TOPIC)).map((entry) => entry.event_id)).toEqual([other.eventId]);
    expect(await before.exists(DLQ)).toBe(0);
  });

  test('because it hangs, nobody waits for long; what it did take in the end is found done', async () => {
    const slow = await createRedis();
    const redis = await connected(slow.url);
    const through = streamOn(redis);
    const event = await jobOf(openAdminRedis(slow.adminUrl), aClaimedEvent());
    slow.pause();
    try {
      expect(await withDeadline(3_000, through.publish(event))).toMatchObject({ status: 'unavailable' });
    } finally {
      slow.resume();
    }
    await waitFor(() => redis.ping().catch(() => false), { what: 'Redis to answer again' });
    expect(await through.publish(event)).toMatchObject({ status: 'already-appended' });
    expect(await readStream(openAdminRedis(slow.adminUrl), TOPIC)).toHaveLength(1);
  });
});

describe('when Redis may have lost entries', () => {
  test('of the epoch that this pod knows, nothing is appended and the pod asks again', async () => {
    const event = await anEventWithJob();
    const stale = epoch;
    await admin.set(EPOCH_KEY, 'another');
    expect(await stream.publish(event)).toMatchObject({ status: 'unavailable' });
    expect(await stream.deadLetter(event, FAILURE)).toMatchObject({ status: 'unavailable' });
    await admin.del(EPOCH_KEY);
    expect(await stream.publish(event)).toMatchObject({ status: 'unavailable' });
    expect(await admin.keys('*')).toEqual([jobKey(event.eventId)]);
    expect(doubts).toEqual(['this pod', 'this pod', 'this pod']);
    await admin.set(EPOCH_KEY, stale as string);
    expect(await stream.publish(event)).toMatchObject({ status: 'appended' });
  });

  test('an event that came along with others waits until these have their places', async () => {
    const receipts = ['1', '2'].map((id) => ({ id, entryId: '1-1' }));
    live.set('2', 'some');
    const same = await anEventWithJob({ chain: aChain({ epoch: epoch as string, receipts }) });
    expect(await stream.publish(same)).toMatchObject({ status: 'appended' });
    const other = await anEventWithJob({ chain: aChain({ epoch: 'an earlier one', receipts }) });
    expect(await stream.publish(other)).toMatchObject({ status: 'unavailable' });
    expect(await admin.xlen(same.topic)).toBe(1);
    const [, another] = receipts as [Receipt, Receipt];
    const after = [{ ...another, eventId: same.eventId }];
    const last = await anEventWithJob({ chain: aChain({ epoch: 'an earlier one', after }) });
    expect(await stream.publish(last)).toMatchObject({ status: 'unavailable' });
    live.clear();
    expect(await stream.publish(other)).toMatchObject({ status: 'appended' });
  });

  test('and no epoch is known, Redis is not even asked', async () => {
    const event = await anEventWithJob();
    epoch = undefined;
    expect(await stream.publish(event)).toMatchObject({ status: 'unavailable' });
    expect(await admin.exists(TOPIC)).toBe(0);
  });

  test('because a stream that had entries is gone, it is not begun anew, and the epoch ends for all pods', async () => {
    await stream.publish(await anEventWithJob());
    await stream.publish(await anEventWithJob({ topic: 'dictionary.word.v1' }));
    await admin.del(TOPIC);
    const event = await anEventWithJob();
    expect(await stream.publish(event)).toMatchObject({ status: 'unavailable' });
    expect(await admin.exists(TOPIC)).toBe(0);
    expect(doubts).toEqual([epoch]);
    // Trimmed to nothing, a stream is still there.
    await admin.xtrim('dictionary.word.v1', 'MAXLEN', 0);
    const other = await anEventWithJob({ topic: 'dictionary.word.v1' });
    expect(await stream.publish(other)).toMatchObject({ status: 'appended' });
    // In the next epoch it is known to be gone.
    epoch = randomUUID();
    await admin.set(EPOCH_KEY, epoch);
    expect(await stream.publish(event)).toMatchObject({ status: 'appended' });
  });
});

describe('the script', () => {
  test('is given to Redis again when Redis forgot it, for each of many appends at once', async () => {
    await stream.publish(await anEventWithJob());
    await admin.script('FLUSH');
    const events = await Promise.all(Array.from({ length: 20 }, () => anEventWithJob()));
    const outcomes = await Promise.all(events.map(stream.publish));
    expect(outcomes.map((it) => it.status)).toEqual(Array(20).fill('appended'));
    await admin.script('FLUSH');
    expect(await stream.publish(await anEventWithJob())).toMatchObject({ status: 'appended' });
    expect(await readStream(admin, TOPIC)).toHaveLength(22);
  });

  test('is given to a Redis that was started anew', async () => {
    const fragile = await createRedis();
    const redis = await connected(fragile.url);
    const through = streamOn(redis);
    const other = openAdminRedis(fragile.adminUrl);
    expect(await through.publish(await jobOf(other, aClaimedEvent()))).toMatchObject({ status: 'appended' });
    await fragile.restart();
    await waitFor(() => redis.status === 'ready', { what: 'the connection to be back' });
    const events = await Promise.all([1, 2, 3].map(() => jobOf(other, aClaimedEvent())));
    const outcomes = await Promise.all(events.map(through.publish));
    expect(outcomes.map((it) => it.status)).toEqual(['appended', 'appended', 'appended']);
  });
});
