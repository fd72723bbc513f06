import { describe, expect, test } from 'vitest';
import { createMemory } from '../../src/streams/memory.ts';
import { aClaimedEvent } from '../support/stages.ts';
import { appendConnection, openStreams, SIDES, STREAM_OPTIONS } from '../support/streams.ts';

test('events are remembered without their jobs, until their rows are marked published', async () => {
  const stage = await openStreams('one server');
  await stage.clear();
  const memory = createMemory(await appendConnection(stage.server.url), STREAM_OPTIONS, false);
  const [first, second] = [await stage.anEvent(), await stage.anEvent()];
  for (const event of [first, second]) {
    await stage.publish(event);
    await stage.removeJob(event);
  }
  expect((await memory.remembered()).toSorted()).toEqual([first.eventId, second.eventId].toSorted());
  memory.forget([first.eventId]);
  memory.forget([]);
  expect(await memory.remembered()).toEqual([second.eventId]);
});

describe.each(SIDES)('with %s', (side) => {
  test('those are known whose append is remembered, without their jobs too; who was released is none', async () => {
    const stage = await openStreams(side);
    await stage.clear();
    const redis = await appendConnection(stage.server.url);
    const memory = createMemory(redis, STREAM_OPTIONS, stage.hasTwoServers);
    const [first, second, released] = [await stage.anEvent(), await stage.anEvent(), await stage.anEvent()];
    await stage.publish(first);
    await stage.publish(second);
    await stage.publish(released, 'release');
    await stage.removeJob(first);
    const eventIds = [first, second, released, aClaimedEvent()].map((event) => event.eventId);
    expect(await memory.appendedOf(eventIds)).toEqual(new Set([first.eventId, second.eventId]));
    expect(await memory.appendedOf([])).toEqual(new Set());
    redis.disconnect();
    await expect(memory.appendedOf(eventIds)).rejects.toThrow();
  });
});
