import { randomUUID } from 'node:crypto';
import { afterEach, beforeAll, beforeEach, describe, expect, onTestFinished, test, vi } from 'vitest';
import type { OutboxEvent } from '../../src/event.ts';
import { withDeadline } from '../../src/lifecycle.ts';
import { createStreams, type JobFacts } from '../../src/streams/append.ts';
import { NOT_KNOWN } from '../../src/streams/append-outcome.ts';
import { MEMORY_TTL_S } from '../../src/streams/gate-script.ts';
import { createRedis } from '../support/servers.ts';
import { type AdminRedis, aClaimedEvent, openAdminRedis, readStream } from '../support/stages.ts';
import {
  appendConnection,
  DLQ,
  ENTRY_ID,
  EPOCH_KEY,
  jobKey,
  MADE_AT,
  openStreams,
  SIDES,
  STREAM_OPTIONS,
  type StreamStage,
  TOPIC,
} from '../support/streams.ts';
import { waitFor } from '../support/wait.ts';

const FAILURE = { reason: 'WRONGTYPE', attempts: 6, failedAt: new Date('2026-01-02T03:04:05.678Z') };

/** Calls of scripts since the last question. */
async function scriptCalls(redis: AdminRedis): Promise<number> {
  const stats = await redis.info('commandstats');
  await redis.config('RESETSTAT');
  return Number(/cmdstat_evalsha:calls=(\d+)/.exec(stats)?.[1] ?? 0);
}

describe.each(SIDES)('with %s', (side) => {
  let stage: StreamStage;

  beforeAll(async () => {
    stage = await openStreams(side);
  });

  beforeEach(async () => {
    await stage.clear();
  });

  const events = (count: number, overrides: Partial<OutboxEvent> = {}) =>
    Promise.all(Array.from({ length: count }, (_, i) => stage.anEvent({ id: String(i + 1), ...overrides })));
  const publishAll = (all: readonly OutboxEvent[], pod = stage.streams) =>
    Promise.all(all.map((event) => stage.publish(event, 'open', { through: pod })));
  const ids = (all: readonly OutboxEvent[]) => all.map((it) => it.eventId);
  const statuses = (outcomes: readonly { status: string }[]) => outcomes.map((it) => it.status);

  describe('an event', () => {
    test('is appended with exactly the fields of the envelope', async () => {
      const payload = '{"n": 12345678901234567890.10, "text": "Jörg\\u0000 \\"x\\"", "z": [1,  2]}';
      const event = await stage.anEvent({
        payload,
        occurredAt: '2026-01-02T03:04:05.678901Z',
        tenantId: 'tenant',
      });
      expect(await stage.publish(event)).toEqual({
        ...{ status: 'appended', entryId: expect.stringMatching(ENTRY_ID), epoch: stage.epoch.name },
      });
      expect(await readStream(stage.redis, TOPIC)).toEqual([
        {
          ...{ event_id: event.eventId, event_type: 'UserCreated', topic: TOPIC, schema_version: '1' },
          ...{ occurred_at: '2026-01-02T03:04:05.678901Z', tenant_id: 'tenant', payload },
          ...{ aggregate_id: event.aggregateId, aggregate_type: 'user' },
        },
      ]);
    });

    test('carries a correlation id only when it has one, and the null tenant when it has none', async () => {
      await stage.publish(await stage.anEvent({ correlationId: 'correlation' }));
      await stage.publish(await stage.anEvent());
      const [first, second] = await readStream(stage.redis, TOPIC);
      expect(first).toMatchObject({
        correlation_id: 'correlation',
        tenant_id: '00000000-0000-0000-0000-000000000000',
      });
      expect(second).not.toHaveProperty('correlation_id');
    });

    test('goes to the stream of its topic', async () => {
      await stage.publish(await stage.anEvent({ topic: 'dictionary.word.v1' }));
      expect(await readStream(stage.redis, 'dictionary.word.v1')).toHaveLength(1);
      expect(await stage.redis.exists(TOPIC)).toBe(0);
    });

    test('is appended once: asked again, the same id is answered and nothing is written', async () => {
      const event = await stage.anEvent();
      const first = await stage.publish(event);
      expect(first.status).toBe('appended');
      const again = await Promise.all([stage.publish(event), stage.publish(event)]);
      for (const outcome of again) expect(outcome).toEqual({ ...first, status: 'remembered' });
      expect(await stage.idsIn()).toEqual([event.eventId]);
    });

    test('is appended once, though its job was deleted after the append, and made again', async () => {
      const [first, second] = (await stage.aggregate(2)) as [OutboxEvent, OutboxEvent];
      await stage.publish(second, 'after');
      const { entryId } = (await stage.publish(first)) as { entryId: string };
      const [, cascaded] = await stage.redis.xrange(TOPIC, '-', '+');
      for (const event of [first, second]) {
        await stage.removeJob(event);
        await stage.addJob(event, MADE_AT + 1);
      }
      const again = { madeAt: MADE_AT + 1 };
      expect(await stage.publish(second, 'open', again)).toMatchObject({
        ...{ status: 'remembered', entryId: cascaded?.[0] },
      });
      expect(await stage.publish(first, 'open', again)).toMatchObject({ status: 'remembered', entryId });
      expect(await stage.idsIn()).toEqual(ids([first, second]));
    });

    test('is appended once, though several pods ask at the same time', async () => {
      const event = await stage.anEvent();
      const other = await stage.pod();
      const { streams } = stage;
      const outcomes = await Promise.all(
        [streams, other, streams, other].map((through) => stage.publish(event, 'open', { through })),
      );
      expect(statuses(outcomes).sort()).toEqual(['appended', 'remembered', 'remembered', 'remembered']);
      expect(await stage.idsIn()).toEqual([event.eventId]);
    });
  });

  describe('what is asked for at the same time', () => {
    test('goes to Redis in one call, and into the stream in the order of ids', async () => {
      const [first, second, third] = await Promise.all(['9', '10', '100'].map((id) => stage.anEvent({ id })));
      await stage.publish(await stage.anEvent({ topic: 'other' }));
      await scriptCalls(stage.redis);
      await publishAll([third, first, second] as OutboxEvent[]);
      expect(await scriptCalls(stage.redis)).toBe(1);
      expect(await stage.idsIn()).toEqual(ids([first, second, third] as OutboxEvent[]));
    });

    test('goes in several calls where it is much: Redis does nothing else during one', async () => {
      await stage.publish(await stage.anEvent({ topic: 'other' }));
      await scriptCalls(stage.redis);
      const many = await events(150);
      expect(new Set(statuses(await publishAll([...many].reverse())))).toEqual(new Set(['appended']));
      expect(await scriptCalls(stage.redis)).toBe(3);
      expect(await stage.idsIn()).toEqual(ids(many));
    });

    test('goes in several calls where it is large; a very large one goes alone', async () => {
      await stage.publish(await stage.anEvent({ topic: 'other' }));
      await scriptCalls(stage.redis);
      const large = await events(5, { payload: JSON.stringify('x'.repeat(25_000)) });
      const huge = await stage.anEvent({ id: '6', payload: JSON.stringify('x'.repeat(1_000_000)) });
      const small = await stage.anEvent({ id: '7' });
      const outcomes = await publishAll([...large, huge, small]);
      expect(new Set(statuses(outcomes))).toEqual(new Set(['appended']));
      expect(await scriptCalls(stage.redis)).toBe(5);
      expect(await stage.idsIn()).toEqual(ids([...large, huge, small]));
    });

    test('is stopped by none that Redis refuses for its type', async () => {
      await stage.redis.set('broken', 'a string');
      const [first, broken, last] = (await Promise.all([
        ...[
          stage.anEvent({ id: '1' }),
          stage.anEvent({ id: '2', topic: 'broken' }),
          stage.anEvent({ id: '3' }),
        ],
      ])) as [OutboxEvent, OutboxEvent, OutboxEvent];
      expect(await publishAll([first, broken, last])).toMatchObject([
        { status: 'appended' },
        { status: 'refused', reason: expect.stringMatching(/^WRONGTYPE/) },
        { status: 'appended' },
      ]);
      expect(await stage.idsIn()).toEqual(ids([first, last]));
    });

    test('is stopped by none whose key is forbidden, which Redis says of the whole call', async () => {
      const limited = await stage.pod({ url: await stage.limitedUrl() });
      const [first, second] = await events(2);
      const forbidden = await stage.anEvent({ topic: 'forbidden' });
      const all = [first, forbidden, second] as OutboxEvent[];
      expect(await publishAll(all, limited)).toMatchObject([
        { status: 'appended' },
        { status: 'refused', reason: expect.stringMatching(/key/) },
        { status: 'appended' },
      ]);
      expect(await stage.idsIn()).toEqual(ids([first, second] as OutboxEvent[]));
    });

    test('is judged by its own epoch each', async () => {
      const [old, current] = (await events(2)) as [OutboxEvent, OutboxEvent];
      const before = stage.epoch.name as string;
      await stage.beginEpoch();
      const outcomes = await Promise.all([
        stage.publish(old, 'open', { of: before }),
        stage.publish(current),
      ]);
      expect(statuses(outcomes)).toEqual(['unavailable', 'appended']);
      expect(await stage.idsIn()).toEqual([current.eventId]);
    });
  });

  describe('what a pod knows of appends', () => {
    test('is good for their epoch alone', async () => {
      const [one, other] = (await events(2)) as [OutboxEvent, OutboxEvent];
      const before = stage.epoch.name as string;
      const knows = (event: OutboxEvent, of: string) => stage.streams.isAppended(event.eventId, of);
      expect(knows(one, before)).toBe(false);
      await stage.publish(one);
      expect([knows(one, before), knows(other, before), knows(one, 'another')]).toEqual([true, false, false]);
      const now = await stage.beginEpoch();
      await stage.publish(other);
      expect([knows(one, before), knows(one, now), knows(other, now)]).toEqual([false, false, true]);
    });

    test('is that of what was remembered as well, and nobody else’s', async () => {
      const event = await stage.anEvent();
      const other = await stage.pod();
      await stage.publish(event);
      const isKnown = () => other.isAppended(event.eventId, stage.epoch.name as string);
      expect(isKnown()).toBe(false);
      await stage.publish(event, 'open', { through: other });
      expect(isKnown()).toBe(true);
    });

    test('wakes who waits for one of some events; nobody waits for ever', async () => {
      const [one, other] = (await events(2)) as [OutboxEvent, OutboxEvent];
      const { streams } = stage;
      const waiting = [
        streams.untilAppended([one.eventId, other.eventId], 60_000),
        streams.untilAppended([other.eventId], 60_000),
      ];
      await streams.untilAppended([other.eventId], 1);
      await stage.publish(other);
      await withDeadline(10_000, Promise.all(waiting));
      await streams.untilAppended([one.eventId], 1);
      await stage.publish(one);
      expect(await stage.idsIn()).toEqual(ids([other, one]));
    });

    test('includes each stream, told of at its first entry in an epoch', async () => {
      const met: string[] = [];
      const pod = await stage.pod({ onFirstEntry: (stream) => met.push(stream) });
      await publishAll([...(await events(2)), await stage.anEvent({ topic: 'other' })], pod);
      await publishAll(await events(2), pod);
      expect(met.sort()).toEqual([TOPIC, 'other'].sort());
      await stage.beginEpoch();
      const dead = await stage.anEvent();
      await stage.giveUp(dead);
      await pod.deadLetter({ event: dead, ...FAILURE }, MADE_AT);
      await publishAll(await events(2), pod);
      expect(met).toHaveLength(3);
    });
  });

  describe('a stream of which an entry was found in this epoch, and none appended', () => {
    test('is missed when it is gone', async () => {
      const [one, other] = (await events(2)) as [OutboxEvent, OutboxEvent];
      await stage.publish(one);
      await stage.beginEpoch();
      expect(await stage.publish(one)).toMatchObject({ status: 'remembered' });
      await stage.redis.del(TOPIC);
      expect(await stage.publish(other)).toEqual(NOT_KNOWN);
      expect(stage.epoch.ended).toEqual([stage.epoch.name]);
    });

    test('is missed when a failed job was found to remember it, or its dead letter', async () => {
      const [one, other, dead, last] = await events(4);
      const bury = (event: OutboxEvent | undefined) =>
        stage.streams.deadLetter({ event: event as OutboxEvent, ...FAILURE }, MADE_AT);
      await stage.publish(one as OutboxEvent);
      for (const event of [one, dead, last]) await stage.giveUp(event as OutboxEvent);
      await bury(dead);
      await stage.beginEpoch();
      expect(await bury(one)).toMatchObject({ status: 'published' });
      expect(await bury(dead)).toMatchObject({ status: 'remembered' });
      await stage.redis.del(TOPIC, DLQ);
      expect(await stage.publish(other as OutboxEvent)).toEqual(NOT_KNOWN);
      expect(await bury(last)).toEqual(NOT_KNOWN);
    });
  });

  describe('trimming', () => {
    test('keeps about as many entries as are allowed, never fewer', async () => {
      await publishAll(await events(1_000), await stage.pod({ streamMaxLen: 150 }));
      const length = await stage.redis.xlen(TOPIC);
      expect(length).toBeGreaterThanOrEqual(150);
      expect(length).toBeLessThan(300); // whole nodes of 100 entries
    });

    test('does not happen at 0, and each stream has its own limit', async () => {
      const pod = await stage.pod({ dlqMaxLen: 100 });
      const all = await events(500);
      await publishAll(all, pod);
      expect(await stage.redis.xlen(TOPIC)).toBe(500);
      for (const event of all) await pod.deadLetter({ event, ...FAILURE }, null);
      const letters = await stage.redis.xlen(DLQ);
      expect(letters).toBeGreaterThanOrEqual(100);
      expect(letters).toBeLessThan(250);
    });
  });

  describe('an event that Redis refuses', () => {
    test('because the key is no stream: the reason says so, and nothing of the script', async () => {
      await stage.redis.set(TOPIC, 'a string');
      const event = await stage.anEvent();
      expect(await stage.publish(event)).toEqual({
        status: 'refused',
        reason: 'WRONGTYPE Operation against a key holding the wrong kind of value',
      });
      // Once the reason is gone, it is appended as if nothing had been.
      await stage.redis.del(TOPIC);
      expect(await stage.publish(event)).toMatchObject({ status: 'appended' });
    });

    test.each([
      ['the command', '~* +@all -xadd', /command/],
      ['the key', '~bull:* +@all', /key/],
    ])('because it may not use %s', async (_, rules, named) => {
      await stage.redis.call('ACL', 'SETUSER', 'weak', 'reset', 'on', '>secret', ...rules.split(' '));
      const weak = await stage.pod({ url: stage.server.adminUrl.replace('//', '//weak:secret@') });
      const outcome = await stage.publish(await stage.anEvent(), 'open', { through: weak });
      expect(outcome).toMatchObject({ status: 'refused', reason: expect.stringMatching(named) });
      expect(JSON.stringify(outcome)).not.toMatch(/user_script|[0-9a-f]{40}|@/);
      expect(await stage.redis.exists(TOPIC)).toBe(0);
    });
  });

  describe('the dead letter of a large event', () => {
    const payload = JSON.stringify('x'.repeat(100_000));
    let event: OutboxEvent;

    beforeEach(async () => {
      event = await stage.anEvent({ payload });
      await stage.giveUp(event);
    });

    test('has its payload, though for a moment no epoch was known: that is not for its size', async () => {
      const known = vi.spyOn(stage.epochs, 'known').mockResolvedValueOnce(undefined);
      onTestFinished(() => known.mockRestore());
      expect(await stage.streams.deadLetter({ event, ...FAILURE }, MADE_AT)).toEqual(NOT_KNOWN);
      const letter = await stage.streams.deadLetter({ event, ...FAILURE }, MADE_AT);
      expect([letter.status, await readStream(stage.redis, DLQ)]).toMatchObject(['appended', [{ payload }]]);
    });

    test('has it though the connection was lost; where it is lost again and again, the letter goes without', async () => {
      const redis = await appendConnection(stage.server.url);
      const pod = createStreams({
        ...{ redis, epoch: stage.epochs, options: STREAM_OPTIONS },
        ...(stage.hasTwoServers && { jobFacts: async () => [[String(MADE_AT), true, 6]] as JobFacts[] }),
      });
      const commands = redis as unknown as Record<'appendLetter', (...args: unknown[]) => Promise<string>>;
      const append = commands.appendLetter.bind(redis);
      let losses = 1;
      commands.appendLetter = (...args) =>
        args.includes(payload) && losses-- > 0
          ? Promise.reject(new Error('Connection is closed.'))
          : append(...args);
      const write = () => pod.deadLetter({ event, ...FAILURE }, MADE_AT);
      expect(await write()).toMatchObject({ status: 'unavailable' });
      expect([await write(), await readStream(stage.redis, DLQ)]).toMatchObject([
        ...[{ status: 'appended' }, [{ payload }]],
      ]);

      event = await stage.anEvent({ payload });
      await stage.giveUp(event);
      losses = Number.POSITIVE_INFINITY;
      const outcomes = [await write(), await write(), await write()];
      expect(statuses(outcomes)).toEqual(['unavailable', 'unavailable', 'appended']);
      expect((await readStream(stage.redis, DLQ))[1]).toMatchObject({
        payload: 'null',
        payload_withheld: expect.stringContaining('identity.outbox'),
      });
    });
  });

  describe('while Redis can take nothing', () => {
    test('because it is full, events are not to blame; then they are appended', async () => {
      const event = await stage.anEvent();
      await stage.redis.config('SET', 'maxmemory', '1');
      try {
        expect(await stage.publish(event)).toMatchObject({
          status: 'unavailable',
          reason: expect.stringMatching(/^OOM command not allowed when used memory > 'maxmemory'/),
        });
      } finally {
        await stage.redis.config('SET', 'maxmemory', '0');
      }
      expect(await stage.publish(event)).toMatchObject({ status: 'appended' });
    });

    test('because it is a replica', async () => {
      const event = await stage.anEvent();
      const dead = await stage.anEvent();
      await stage.giveUp(dead);
      const replica = await createRedis({ args: ['--replicaof', '127.0.0.1', String(stage.server.port)] });
      const reader = openAdminRedis(replica.adminUrl);
      await waitFor(async () => (await reader.get(EPOCH_KEY)) === stage.epoch.name, {
        what: 'the replica to be in step',
      });
      const pod = await stage.pod({ url: replica.url });
      const readOnly = { status: 'unavailable', reason: expect.stringMatching(/^READONLY/) };
      expect(await stage.publish(event, 'open', { through: pod })).toMatchObject(readOnly);
      // It may become a master with other data than the one that this pod knew.
      expect(stage.epoch.doubts).toBe(1);
      expect(await pod.deadLetter({ event: dead, ...FAILURE }, MADE_AT)).toMatchObject(readOnly);
      expect(stage.epoch.doubts).toBe(2);
    });
  });

  describe('when Redis may have lost entries', () => {
    test('because another epoch lasts, nothing at all is appended and the pod asks again', async () => {
      const event = await stage.anEvent();
      const remembered = await stage.anEvent();
      await stage.publish(remembered);
      const dead = await stage.anEvent();
      await stage.giveUp(dead);
      const before = stage.epoch.name as string;
      const all = () =>
        Promise.all([
          ...[stage.publish(event), stage.publish(remembered), stage.publish(event, 'release')],
          stage.streams.deadLetter({ event: dead, ...FAILURE }, MADE_AT),
          stage.streams.deadLetter({ event: dead, ...FAILURE }, null),
        ]);
      for (const name of ['another', undefined]) {
        if (name !== undefined) await stage.redis.set(EPOCH_KEY, name);
        else await stage.redis.del(EPOCH_KEY);
        expect(new Set(statuses(await all()))).toEqual(new Set(['unavailable']));
      }
      expect(stage.epoch.doubts).toBe(10);
      expect(stage.epoch.ended).toEqual([]);
      expect([await stage.redis.xlen(TOPIC), await stage.redis.exists(DLQ)]).toEqual([1, 0]);
      // It was not released either.
      await stage.redis.set(EPOCH_KEY, before);
      expect(await stage.publish(event)).toMatchObject({ status: 'appended' });
    });

    test('and no epoch is known, Redis is not even asked for a dead letter', async () => {
      const event = await stage.anEvent();
      await stage.giveUp(event);
      stage.epoch.name = undefined;
      const outcome = await stage.streams.deadLetter({ event, ...FAILURE }, MADE_AT);
      expect(outcome).toEqual(NOT_KNOWN);
      expect([await stage.redis.exists(DLQ), stage.epoch.doubts]).toEqual([0, 0]);
    });
  });

  test('the script is given to Redis again when Redis forgot it, for each of many appends at once', async () => {
    await stage.publish(await stage.anEvent());
    await stage.redis.script('FLUSH');
    const outcomes = await publishAll(await events(20));
    expect(statuses(outcomes)).toEqual(Array(20).fill('appended'));
    await stage.redis.script('FLUSH');
    expect(await stage.publish(await stage.anEvent())).toMatchObject({ status: 'appended' });
    expect(await stage.redis.xlen(TOPIC)).toBe(22);
  });
});

describe('a Redis that fails', () => {
  const dying = async (side: (typeof SIDES)[number]) => {
    const stage = await openStreams(side);
    await stage.clear();
    return stage;
  };

  test.each(SIDES)(
    'is said to be away at once, and nothing old is appended when it is back: %s',
    async (side) => {
      const stage = await dying(side);
      const event = await stage.anEvent();
      const dead = await stage.anEvent();
      await stage.giveUp(dead);
      const redis = await appendConnection(stage.server.url);
      const pod = createStreams({
        ...{ redis, epoch: stage.epochs, options: STREAM_OPTIONS },
        ...(stage.hasTwoServers && { jobFacts: async () => [[String(MADE_AT), false, 0]] as JobFacts[] }),
      });
      await stage.server.kill();
      await waitFor(() => redis.status !== 'ready', { what: 'the connection to be lost' });
      const through = { through: pod };
      const outcomes = await withDeadline(
        5_000,
        Promise.all([
          ...[stage.publish(event, 'open', through), stage.publish(event, 'open', through)],
          pod.deadLetter({ event: dead, ...FAILURE }, MADE_AT),
        ]),
      );
      for (const outcome of outcomes) expect(outcome.status).toBe('unavailable');
      await stage.server.restart();
      await waitFor(() => redis.status === 'ready', { what: 'the connection to be back' });
      await stage.beginEpoch();
      const other = await stage.anEvent();
      expect(await stage.publish(other, 'open', through)).toMatchObject({ status: 'appended' });
      expect(await stage.idsIn()).toEqual([other.eventId]);
      expect(await stage.redis.exists(DLQ)).toBe(0);
    },
  );

  test.each(SIDES)('because it hangs lets nobody wait; what it did take is found done: %s', async (side) => {
    const stage = await dying(side);
    const event = await stage.anEvent();
    stage.server.pause();
    try {
      expect(await withDeadline(10_000, stage.publish(event))).toMatchObject({ status: 'unavailable' });
    } finally {
      stage.server.resume();
    }
    await waitFor(async () => (await stage.redis.xlen(TOPIC)) === 1, { what: 'Redis to answer again' });
    const outcome = await waitFor(
      async () => {
        const answer = await stage.publish(event);
        return answer.status !== 'unavailable' && answer;
      },
      { what: 'the append connection to answer again' },
    );
    expect(outcome).toMatchObject({ status: 'remembered' });
    expect(await stage.idsIn()).toEqual([event.eventId]);
  });

  test('with the jobs, lets nothing be appended: nobody knows whether there are any', async () => {
    const stage = await dying('two servers');
    const event = await stage.anEvent();
    const dead = await stage.anEvent();
    await stage.giveUp(dead);
    await stage.queueServer.kill();
    expect(await stage.publish(event)).toMatchObject({ status: 'unavailable' });
    const letter = await stage.streams.deadLetter({ event: dead, ...FAILURE }, MADE_AT);
    expect(letter).toMatchObject({ status: 'unavailable' });
    expect(await stage.redis.keys('*')).toEqual([EPOCH_KEY]);
  });
});

describe('what another server has said of a job', () => {
  afterEach(() => {
    vi.useRealTimers();
  });

  test('is not believed by a pod that was stopped in between', async () => {
    const stage = await openStreams('two servers');
    await stage.clear();
    vi.useFakeTimers({ toFake: ['Date'] });
    let stoppedForMs = 6_000;
    const pod = createStreams({
      ...{ redis: await appendConnection(stage.server.url), epoch: stage.epochs, options: STREAM_OPTIONS },
      jobFacts: async (eventIds) => {
        vi.setSystemTime(Date.now() + stoppedForMs);
        return eventIds.map(() => [String(MADE_AT), false, 0]);
      },
    });
    const event = aClaimedEvent();
    expect(await stage.publish(event, 'open', { through: pod })).toMatchObject({
      ...{ status: 'unavailable', reason: expect.stringMatching(/out of date/) },
    });
    expect(await stage.redis.exists(TOPIC)).toBe(0);
    stoppedForMs = 4_000;
    expect(await stage.publish(event, 'open', { through: pod })).toMatchObject({ status: 'appended' });
  });

  test('is of no use when the connection to the streams was lost meanwhile, though the epoch has its name again', async () => {
    const stage = await openStreams('two servers');
    await stage.clear();
    const epoch = stage.epoch.name;
    const pod = createStreams({
      ...{ redis: await appendConnection(stage.server.url), epoch: stage.epochs, options: STREAM_OPTIONS },
      jobFacts: async (eventIds) => {
        stage.epoch.name = undefined;
        return eventIds.map(() => [String(MADE_AT), true, 1]);
      },
    });
    const event = aClaimedEvent();
    expect(await stage.publish(event, 'open', { through: pod })).toEqual(NOT_KNOWN);
    stage.epoch.name = epoch;
    expect(await pod.deadLetter({ event, ...FAILURE }, MADE_AT)).toEqual(NOT_KNOWN);
    expect([await stage.redis.exists(TOPIC), await stage.redis.exists(DLQ)]).toEqual([0, 0]);
  });

  test('is asked once for each of them, in one question for a whole call', async () => {
    const stage = await openStreams('two servers');
    await stage.clear();
    const questions: (readonly string[])[] = [];
    const pod = createStreams({
      ...{ redis: await appendConnection(stage.server.url), epoch: stage.epochs, options: STREAM_OPTIONS },
      jobFacts: async (eventIds) => {
        questions.push(eventIds);
        return eventIds.map(() => [String(MADE_AT), false, 0]);
      },
    });
    const first = aClaimedEvent({ id: '1' });
    const second = aClaimedEvent({ id: '2', after: first.eventId });
    const outcomes = await Promise.all([
      stage.publish(first, 'open', { through: pod }),
      stage.publish(second, 'after', { through: pod }),
    ]);
    expect(outcomes).toMatchObject([{ status: 'appended' }, { status: 'appended' }]);
    expect(questions).toEqual([[first.eventId, second.eventId]]);
  });

  test('and what is remembered of it may have ended before the job did; on one server it lasts as long', async () => {
    const [one, two] = await Promise.all([openStreams('one server'), openStreams('two servers')]);
    const hour = MEMORY_TTL_S * 1_000;
    for (const [ageMs, forgotten] of [
      [0, false],
      [hour / 2, false],
      // Clocks of pods differ.
      [hour - 60_000, true],
      [2 * hour, true],
    ] as const) {
      expect(two.streams.mayHaveForgotten(Date.now() - ageMs)).toBe(forgotten);
      expect(one.streams.mayHaveForgotten(Date.now() - ageMs)).toBe(false);
    }
  });
});

test('an answer that is no stream id never passes for one', async () => {
  const stage = await openStreams('one server');
  await stage.clear();
  const redis = await appendConnection(stage.server.url);
  const pod = createStreams({ redis, epoch: stage.epochs, options: STREAM_OPTIONS });
  const event = await stage.anEvent();
  for (const junk of ['OK', '1', '1-1', '+OK', '=1', '^-1', '+1700000000000', '=1-2-3', '+ ', 'nil']) {
    Object.assign(redis, { appendInOrder: async () => [junk, []], appendLetter: async () => junk });
    const refused = { status: 'refused', reason: expect.stringMatching(/no stream id/) };
    expect(await stage.publish(event, 'open', { through: pod })).toEqual(refused);
    expect(await pod.deadLetter({ event, ...FAILURE }, MADE_AT)).toEqual(refused);
  }
  expect(pod.isAppended(event.eventId, stage.epoch.name as string)).toBe(false);
});

test('a pod remembers the latest 4,000 events, and no more than 8,000', async () => {
  const stage = await openStreams('one server');
  await stage.clear();
  const events = Array.from({ length: 8_001 }, (_, i) =>
    aClaimedEvent({ id: String(i + 1), eventId: randomUUID(), payload: '{}' }),
  );
  const pipeline = stage.jobs.pipeline();
  for (const { eventId } of events) pipeline.hset(jobKey(eventId), 'timestamp', String(MADE_AT));
  await pipeline.exec();
  await Promise.all(events.map((event) => stage.publish(event)));
  expect(await stage.redis.xlen(TOPIC)).toBe(8_001);
  const known = events.map((it) => stage.streams.isAppended(it.eventId, stage.epoch.name as string));
  expect(known[0]).toBe(false);
  expect(known.slice(-4_000)).toEqual(Array(4_000).fill(true));
  expect(known.filter(Boolean).length).toBeLessThanOrEqual(8_000);
});
