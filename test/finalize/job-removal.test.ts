import { UnrecoverableError } from 'bullmq';
import { beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { createJobRemoval } from '../../src/finalize/job-removal.ts';
import type { LeasedEvent } from '../../src/outbox/outbox.ts';
import { streamOptionsOf } from '../../src/stream-options.ts';
import { createMemory } from '../../src/streams/memory.ts';
import { openContext, type TestContext } from '../support/context.ts';
import { insertEvents, someEvents } from '../support/events.ts';
import { deferred } from '../support/stages.ts';

describe.each([
  ['with one Redis', false],
  ['where streams have a Redis of their own', true],
])('the job of an event, %s,', (_, twoServers) => {
  let stage: TestContext;

  beforeAll(async () => {
    stage = await openContext({ RELAY_RETRY_BASE_DELAY: '3600' }, { twoServers });
  });
  beforeEach(() => stage.clear());

  async function claimed(count: number): Promise<LeasedEvent[]> {
    await insertEvents(stage.pool, someEvents(count));
    return stage.claim();
  }

  const removed = (events: readonly LeasedEvent[]) => stage.context.removeJobs(events);
  const stateOf = (event: LeasedEvent) => stage.context.queues.jobState(event.eventId);
  const publishJob = (event: LeasedEvent) => stage.context.queues.publish.getJob(event.eventId);

  test('is removed when it waits, waits for a retry, or has failed', async () => {
    const [delayed, failed, waiting] = (await claimed(3)) as [LeasedEvent, LeasedEvent, LeasedEvent];
    await (await publishJob(waiting))?.remove();
    await stage.runJobs(async (job) => {
      throw job.id === failed.eventId ? new UnrecoverableError('no') : new Error('no');
    });
    await stage.context.queues.addPublishJobs([waiting]);
    expect(await Promise.all([delayed, failed, waiting].map(stateOf))).toEqual([
      ...['delayed', 'failed', 'waiting'],
    ]);
    expect(await removed([delayed, failed, waiting])).toEqual(new Map());
    expect(await Promise.all([delayed, failed, waiting].map(stateOf))).toEqual([
      ...['unknown', 'unknown', 'unknown'],
    ]);
  });

  test('that is gone already is no trouble, nor is none at all', async () => {
    const [event] = (await claimed(1)) as [LeasedEvent];
    await removed([event]);
    expect(await removed([event])).toEqual(new Map());
    expect(await removed([])).toEqual(new Map());
  });

  test('is left when a worker has it; others beside it are removed', async () => {
    const [busy, idle] = (await claimed(2)) as [LeasedEvent, LeasedEvent];
    await (await publishJob(idle))?.remove();
    const [begun, end] = [deferred(), deferred()];
    const run = stage.runJobs(async () => {
      begun.resolve();
      await end.promise;
    });
    await begun.promise;
    const answer = await removed([busy, idle]);
    const state = await stateOf(busy);
    end.resolve();
    await run;
    expect([answer, state]).toEqual([new Map([[busy.eventId, 'busy']]), 'active']);
  });

  test('is left when it remembers that the event was appended; others beside it are removed', async () => {
    const [appended, other] = (await claimed(2)) as [LeasedEvent, LeasedEvent];
    await stage.append(appended);
    expect(await removed([appended, other])).toEqual(new Map([[appended.eventId, 'remembers']]));
    expect([await stateOf(appended), await stateOf(other)]).toEqual(['waiting', 'unknown']);
  });

  test('that remembers an entry of an earlier epoch is left if this very entry is there', async () => {
    const [kept, lost, anothers] = (await claimed(3)) as [LeasedEvent, LeasedEvent, LeasedEvent];
    for (const event of [kept, lost]) await stage.append(event);
    const lostId = await lastEntryOf(lost);
    await stage.streamRedis.xdel(lost.topic, lostId);
    // The name of the epoch ends with what is remembered of it.
    await stage.streamRedis.set('bull:relay:epoch', 'server/history:another');
    await remember(anothers, `earlier ${await lastEntryOf(kept)}`);
    expect(await removed([kept, lost, anothers])).toEqual(new Map([[kept.eventId, 'remembers']]));
    expect(await Promise.all([kept, lost, anothers].map(stateOf))).toEqual([
      ...['waiting', 'unknown', 'unknown'],
    ]);
    stage.context.epoch.invalidate();
    await stage.currentEpoch();
  });

  test('is left alone when it cannot be asked what it remembers', async () => {
    const [event] = (await claimed(1)) as [LeasedEvent];
    const memory = {
      ...stage.context.memory,
      appendedOf: (): Promise<never> => Promise.reject(new Error('no Redis')),
    };
    const removeJobs = createJobRemoval({ queues: stage.context.queues, memory });
    await expect(removeJobs([event])).rejects.toThrow('no Redis');
    expect(await stateOf(event)).toBe('waiting');
  });

  test('is asked for its memory first: what is appended while it is being removed is in a worker’s hands', async () => {
    const [event] = (await claimed(1)) as [LeasedEvent];
    const memory = createMemory(stage.context.servers.appendRedis, streamOptionsOf(stage.config), twoServers);
    const [begun, end] = [deferred(), deferred()];
    let run: Promise<void> | undefined;
    const removeJobs = createJobRemoval({
      queues: stage.context.queues,
      memory: {
        ...memory,
        async appendedOf(events) {
          const appended = await memory.appendedOf(events);
          run = stage.runJobs(async () => {
            await stage.append(event);
            begun.resolve();
            await end.promise;
          });
          await begun.promise;
          return appended;
        },
      },
    });
    const answer = await removeJobs([event]);
    const state = await stateOf(event);
    end.resolve();
    await run;
    expect([answer, state]).toEqual([new Map([[event.eventId, 'busy']]), 'active']);
  });

  async function lastEntryOf(event: LeasedEvent): Promise<string> {
    return (await stage.context.lookup.find(event.topic, [event.eventId])).get(event.eventId) as string;
  }

  /** As `gate-script.ts` keeps it. */
  async function remember(event: LeasedEvent, memory: string): Promise<void> {
    if (twoServers) await stage.streamRedis.set(`bull:relay:entry:${event.eventId}`, memory);
    else await stage.redis.hset(stage.keyOf(event.eventId), 'relay:entry', memory);
  }
});
