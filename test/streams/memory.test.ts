import { beforeAll, beforeEach, describe, expect, test } from 'vitest';
import type { OutboxEvent } from '../../src/event.ts';
import { createMemory, type Memory } from '../../src/streams/memory.ts';
import { aClaimedEvent } from '../support/stages.ts';
import {
  appendConnection,
  EPOCH_KEY,
  openStreams,
  SIDES,
  STREAM_OPTIONS,
  type StreamStage,
  TOPIC,
} from '../support/streams.ts';

describe.each(SIDES)('with %s', (side) => {
  let stage: StreamStage;
  let memory: Memory;

  beforeAll(async () => {
    stage = await openStreams(side);
    memory = createMemory(await appendConnection(stage.server.url), STREAM_OPTIONS, stage.hasTwoServers);
  });

  beforeEach(async () => {
    await stage.clear();
  });

  const isAppended = async (event: OutboxEvent) => (await memory.appendedOf([event])).has(event.eventId);

  test('of some events, those are known whose entries are remembered', async () => {
    const events = [await stage.anEvent(), await stage.anEvent({ topic: 'other' }), await stage.anEvent()];
    const [first, second, third] = events as [OutboxEvent, OutboxEvent, OutboxEvent];
    await Promise.all([stage.publish(first), stage.publish(second)]);
    await stage.publish(third, 'release');
    const found = await memory.appendedOf([...events, aClaimedEvent()]);
    expect(found).toEqual(new Set([first.eventId, second.eventId]));
    expect(await memory.appendedOf([])).toEqual(new Set());
  });

  test('an entry of this epoch is good, though it is trimmed by now', async () => {
    const event = await stage.anEvent();
    await stage.publish(event);
    await stage.redis.xtrim(TOPIC, 'MAXLEN', 0);
    expect(await isAppended(event)).toBe(true);
  });

  test.each([
    ['another epoch', async (stage: StreamStage) => void (await stage.beginEpoch())],
    [
      'no epoch, while table and streams are compared',
      async (stage: StreamStage) => void (await stage.redis.set(EPOCH_KEY, 'checking:x')),
    ],
    [
      'no epoch, since Redis was emptied',
      async (stage: StreamStage) => void (await stage.redis.del(EPOCH_KEY)),
    ],
    [
      'the build before',
      async (stage: StreamStage, event: OutboxEvent, entryId: string) =>
        void (await stage.remember(event, entryId)),
    ],
  ])('an entry of %s is good if it is in the stream, and the event’s', async (_, prepare) => {
    const event = await stage.anEvent();
    const outcome = await stage.publish(event);
    const entryId = outcome.status === 'appended' ? outcome.entryId : '';
    await prepare(stage, event, entryId);
    expect(await isAppended(event)).toBe(true);
    await stage.redis.xdel(TOPIC, entryId);
    expect(await isAppended(event)).toBe(false);
    await stage.redis.del(TOPIC);
    await stage.redis.xadd(TOPIC, entryId, 'event_id', aClaimedEvent().eventId);
    expect(await isAppended(event)).toBe(false);
  });

  test('an entry of another epoch counts as there while its stream may not be read: its job must stay', async () => {
    const forbidden = await stage.anEvent({ topic: 'forbidden' });
    const [event, other] = [await stage.anEvent(), await stage.anEvent()];
    await Promise.all([stage.publish(forbidden), stage.publish(event)]);
    await stage.beginEpoch();
    const redis = await appendConnection(await stage.limitedUrl());
    const limited = createMemory(redis, STREAM_OPTIONS, stage.hasTwoServers);
    const all = [forbidden, event, other];
    expect(await limited.appendedOf(all)).toEqual(new Set([forbidden.eventId, event.eventId]));
    await stage.redis.set('forbidden', 'a string');
    expect(await isAppended(forbidden)).toBe(false);
  });

  test('nothing is known of a Redis that does not answer', async () => {
    const redis = await appendConnection(stage.server.url);
    const away = createMemory(redis, STREAM_OPTIONS, stage.hasTwoServers);
    redis.disconnect();
    await expect(away.appendedOf([aClaimedEvent()])).rejects.toThrow();
  });

  if (side === 'one server')
    test('events are remembered without their jobs, until their rows are marked published', async () => {
      const [first, second] = [await stage.anEvent(), await stage.anEvent()];
      await stage.publish(first);
      await stage.publish(second);
      for (const event of [first, second]) await stage.removeJob(event);
      expect((await memory.remembered()).toSorted()).toEqual([first.eventId, second.eventId].toSorted());
      expect(await isAppended(first)).toBe(true);
      memory.forget([first.eventId]);
      memory.forget([]);
      expect(await memory.remembered()).toEqual([second.eventId]);
      expect(await isAppended(first)).toBe(false);
    });

  if (side === 'two servers')
    test('who asks keeps the memory from ending', async () => {
      const event = await stage.anEvent();
      await stage.publish(event);
      const key = stage.memoryKey(event.eventId);
      await stage.redis.expire(key, 100);
      await isAppended(event);
      expect(await stage.redis.ttl(key)).toBeGreaterThan(3_000);
    });
});
