import { type Job, Worker } from 'bullmq';
import { beforeAll, beforeEach, describe, expect, onTestFinished, test, vi } from 'vitest';
import { FAILS_FAST } from '../../src/connections/servers.ts';
import type { OutboxEvent } from '../../src/event.ts';
import { withDeadline } from '../../src/lifecycle.ts';
import {
  createQueues,
  openQueues,
  publishJobKey,
  publishQueueName,
  type Queues,
} from '../../src/queue/queues.ts';
import { WORKER_CONNECTION } from '../../src/queue/workers.ts';
import { startProxy, through } from '../support/proxy.ts';
import { createRedis, type TestRedis } from '../support/servers.ts';
import {
  type AdminRedis,
  aClaimedEvent,
  deferred,
  openAdminRedis,
  openRedis,
  silent,
} from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const OPTIONS = { queuePrefix: 'bull', queueName: 'relay', maxRetryAttempts: 5, retryBaseDelayMs: 60_000 };

let server: TestRedis;
let admin: AdminRedis;
let queues: Queues;

beforeAll(async () => {
  server = await createRedis();
  admin = openAdminRedis(server.adminUrl);
  const redis = openRedis(server.url, FAILS_FAST);
  await waitFor(() => redis.status === 'ready', { what: 'the connection' });
  queues = createQueues(redis, OPTIONS, silent);
});

beforeEach(async () => {
  await admin.flushall();
});

/** Runs publish jobs in the given way until the work is done. */
async function working<T>(
  run: (job: Job<OutboxEvent>) => Promise<void>,
  work: (worker: Worker) => Promise<T>,
) {
  const worker = new Worker<OutboxEvent>(publishQueueName(OPTIONS.queueName), run, {
    connection: openRedis(server.url, WORKER_CONNECTION),
    prefix: OPTIONS.queuePrefix,
  });
  worker.on('error', () => {});
  try {
    return await work(worker);
  } finally {
    await worker.close();
  }
}

/** Lets an event's only run fail. */
async function failed(event: OutboxEvent, reason = 'refused'): Promise<OutboxEvent> {
  await queues.addPublishJobs([{ ...event, attempts: OPTIONS.maxRetryAttempts }]);
  await working(
    async () => {
      throw new Error(reason);
    },
    () =>
      waitFor(async () => (await queues.publish.getJobState(event.eventId)) === 'failed', {
        what: 'the job to fail',
      }),
  );
  return event;
}

test('queues work although the connection breaks at the moment when they are made', async () => {
  const proxy = await startProxy(server.port);
  onTestFinished(proxy.close);
  const redis = openRedis(through(proxy, server.url), FAILS_FAST);
  await waitFor(() => redis.status === 'ready', { what: 'the connection' });
  // Nothing is answered any more: BullMQ's first question is on its way when the connection breaks.
  proxy.loseTrack();
  const opening = openQueues(redis, OPTIONS, silent, 10_000);
  proxy.cut();
  const { addPublishJobs, publish } = await opening;
  const event = aClaimedEvent();
  await addPublishJobs([event]);
  expect(await publish.getJobState(event.eventId)).toBe('waiting');
});

describe('publish jobs', () => {
  test('are added once each, with the event as their data', async () => {
    const events = [aClaimedEvent(), aClaimedEvent({ payload: '{"n": 12345678901234567890.10}' })];
    await queues.addPublishJobs(events);
    for (const event of events) {
      expect(await queues.publish.getJob(event.eventId)).toMatchObject({
        ...{ id: event.eventId, name: event.eventType, data: event },
      });
    }
    await queues.addPublishJobs(events.map((event) => ({ ...event, payload: 'another' })));
    expect(await queues.inFlight()).toMatchObject({ waiting: 2, total: 2 });
    expect((await queues.publish.getJob(events[0]?.eventId ?? ''))?.data).toEqual(events[0]);
  });

  test('are found under the key that the append goes by', async () => {
    const event = aClaimedEvent();
    await queues.addPublishJobs([event]);
    expect(await admin.hget(publishJobKey(OPTIONS, event.eventId), 'timestamp')).toMatch(/^\d+$/);
  });

  test('cost nothing in Redis once they are done', async () => {
    await queues.addPublishJobs([aClaimedEvent()]);
    await working(
      async () => {},
      () => waitFor(async () => (await queues.inFlight()).total === 0, { what: 'the job to be done' }),
    );
    expect(await queues.publish.getJobCountByTypes('completed')).toBe(0);
    expect(await admin.keys('bull:relay-publish:????????-*')).toEqual([]);
  });

  test('are counted by state; failed ones take no room', async () => {
    await failed(aClaimedEvent());
    await queues.addPublishJobs([aClaimedEvent(), aClaimedEvent()]);
    expect(await queues.inFlight()).toEqual({
      waiting: 2,
      active: 0,
      delayed: 0,
      prioritized: 0,
      failed: 1,
      total: 2,
    });
  });

  test('that cannot be added are an error at once, not a wait', async () => {
    const fragile = await createRedis();
    const redis = openRedis(fragile.url, { ...FAILS_FAST, commandTimeout: 2_000 });
    await waitFor(() => redis.status === 'ready', { what: 'the connection' });
    const through = createQueues(redis, OPTIONS, silent);
    await through.addPublishJobs([aClaimedEvent()]);
    await fragile.kill();
    await waitFor(() => redis.status !== 'ready', { what: 'the connection to be lost' });
    await expect(withDeadline(1_000, through.addPublishJobs([aClaimedEvent()]))).rejects.not.toThrow(
      'no answer within',
    );
    await through.close();
  });

  test('are refused together when Redis is full: no silent success', async () => {
    await queues.addPublishJobs([aClaimedEvent()]);
    await admin.config('SET', 'maxmemory', '1');
    try {
      await expect(queues.addPublishJobs([aClaimedEvent(), aClaimedEvent()])).rejects.toThrow('OOM');
    } finally {
      await admin.config('SET', 'maxmemory', '0');
    }
  });
});

describe('retries', () => {
  /** The delays, in seconds, that BullMQ gives a job whose every run fails; the waits are cut short. */
  async function delaysOf(event: OutboxEvent): Promise<number[]> {
    const delays: number[] = [];
    const spent = deferred();
    await queues.addPublishJobs([event]);
    await working(
      async () => {
        throw new Error('refused');
      },
      async (worker) => {
        worker.on('failed', (job) => {
          if (!job || job.finishedOn) return spent.resolve();
          delays.push(job.delay / 1_000);
          job.promote().catch((error) => spent.reject(error));
        });
        await withDeadline(10_000, spent.promise);
      },
    );
    return delays;
  }

  test('come after 60, 120, 240, 480 and 960 s', async () => {
    expect(await delaysOf(aClaimedEvent())).toEqual([60, 120, 240, 480, 960]);
  });

  test.each([
    [1, [120, 240, 480, 960]],
    [3, [480, 960]],
    [5, []],
    [9, []],
  ])('of a job that is made again after %i failed attempts go on from there', async (attempts, delays) => {
    expect(await delaysOf(aClaimedEvent({ attempts }))).toEqual(delays);
  });
});

describe('a failed job', () => {
  test('is as its dead letter needs it', async () => {
    const event = await failed(aClaimedEvent(), 'WRONGTYPE Operation');
    // Its row has not heard of the last attempts.
    const job = await queues.failedJob({ ...event, attempts: 4 });
    expect(job).toMatchObject({
      event: { ...event, attempts: 4 },
      attempts: 6,
      reason: 'WRONGTYPE Operation',
      madeAt: Number(await admin.hget(publishJobKey(OPTIONS, event.eventId), 'timestamp')),
    });
    expect(Math.abs((job?.failedAt.getTime() ?? 0) - Date.now())).toBeLessThan(10_000);
  });

  test('is none while the job has runs left, and none when there is no job', async () => {
    const event = aClaimedEvent();
    expect(await queues.failedJob(event)).toBeNull();
    await queues.addPublishJobs([event]);
    expect(await queues.failedJob(event)).toBeNull();
  });

  test('is none the less when another program has overwritten its data, and hinders no other one', async () => {
    for (const data of ['{', 'null', '{"attempts":"x"}']) {
      const event = await failed(aClaimedEvent(), 'WRONGTYPE Operation');
      await admin.hset(queues.jobKey(event.eventId), 'data', data);
      expect(await queues.failedJob(event)).toMatchObject({
        event,
        attempts: event.attempts + 1,
        reason: 'WRONGTYPE Operation',
      });
    }
    const intact = await failed(aClaimedEvent());
    expect((await queues.failedBeyond(0, 100)).map((it) => it.eventId)).toEqual([intact.eventId]);
  });

  test('is in the way of another one for its event, silently, until it is removed', async () => {
    const event = await failed(aClaimedEvent());
    const again = { ...event, attempts: 2 };
    for (const events of [[again], [again, aClaimedEvent()]]) {
      await queues.addPublishJobs(events);
      expect(await queues.publish.getJobState(event.eventId)).toBe('failed');
    }
    expect(await queues.remove(event.eventId)).toBe(true);
    await queues.addPublishJobs([again]);
    expect(await queues.publish.getJobState(event.eventId)).toBe('waiting');
    expect(await queues.publish.getJob(event.eventId)).toMatchObject({ attemptsMade: 0, data: again });
  });

  test('that is waiting or running again is left as it is', async () => {
    const event = aClaimedEvent({ attempts: 2 });
    await queues.addPublishJobs([event]);
    await queues.addPublishJobs([{ ...event, payload: 'another' }]);
    expect((await queues.publish.getJob(event.eventId))?.data).toEqual(event);
  });

  test('beyond the newest that are kept is named, and can be removed', async () => {
    const events: OutboxEvent[] = [];
    for (let i = 0; i < 5; i++) events.push(await failed(aClaimedEvent()));
    const ids = events.map((event) => event.eventId);
    expect(await queues.failedBeyond(5, 100)).toEqual([]);
    const excess = await queues.failedBeyond(2, 100);
    expect(excess.map((it) => it.eventId).sort()).toEqual(ids.slice(0, 3).sort());
    expect(new Set(excess.map((it) => it.topic))).toEqual(new Set(['identity.user.v1']));
    expect(await queues.failedBeyond(2, 1)).toHaveLength(1);
    for (const { eventId } of excess) expect(await queues.remove(eventId)).toBe(true);
    expect(await queues.failedBeyond(2, 100)).toEqual([]);
    expect((await queues.publish.getFailed()).map((job) => job.id).sort()).toEqual(ids.slice(3).sort());
  });
});

describe('a job that is removed', () => {
  test('is gone, whatever it waited for; to remove none is fine', async () => {
    const [waiting, delayed, never] = [aClaimedEvent(), aClaimedEvent(), aClaimedEvent()];
    await queues.addPublishJobs([waiting]);
    await queues.publish.add('x', delayed, { jobId: delayed.eventId, delay: 60_000 });
    const dead = await failed(aClaimedEvent({ attempts: 1 }));
    for (const event of [waiting, delayed, dead, never]) {
      expect(await queues.remove(event.eventId)).toBe(true);
      expect(await queues.jobState(event.eventId)).toBe('unknown');
    }
  });

  test('is none that a worker has', async () => {
    const event = aClaimedEvent();
    await queues.addPublishJobs([event]);
    const [started, finish] = [deferred(), deferred()];
    await working(
      async () => {
        started.resolve();
        await finish.promise;
      },
      async () => {
        await started.promise;
        expect(await queues.remove(event.eventId)).toBe(false);
        expect(await queues.jobState(event.eventId)).toBe('active');
        finish.resolve();
        await waitFor(async () => (await queues.jobState(event.eventId)) === 'unknown', {
          what: 'the job to be done',
        });
      },
    );
  });
});

test('the facts about jobs are when they were made, whether they have ended, and how often they failed', async () => {
  const [waiting, retrying, never] = [aClaimedEvent(), aClaimedEvent(), aClaimedEvent()];
  const dead = await failed(aClaimedEvent());
  await queues.addPublishJobs([waiting, retrying]);
  await admin.hset(publishJobKey(OPTIONS, retrying.eventId), 'atm', 2);
  const madeAt = (event: OutboxEvent) => admin.hget(publishJobKey(OPTIONS, event.eventId), 'timestamp');
  const events = [dead, never, retrying, waiting];
  expect(await queues.jobFacts(events.map((event) => event.eventId))).toEqual([
    [await madeAt(dead), true, 1],
    null,
    [await madeAt(retrying), false, 2],
    [await madeAt(waiting), false, 0],
  ]);
});

test('a job that nobody can read is removed although a worker has taken it; one that can be read stays', async () => {
  const [unreadable, readable] = ['raw', aClaimedEvent()];
  await queues.addPublishJobs([readable]);
  await admin.hset(queues.publish.toKey(unreadable), { name: 'x', data: '{}', opts: '{' });
  await admin.lpush(queues.publish.toKey('active'), unreadable);
  await admin.set(`${queues.publish.toKey(unreadable)}:lock`, 'a worker');
  expect(await queues.removeUnreadable(queues.publish, unreadable)).toBe(true);
  expect(await queues.removeUnreadable(queues.publish, readable.eventId)).toBe(false);
  expect(await queues.publish.getJobCounts('active', 'waiting')).toEqual({ active: 0, waiting: 1 });
  expect(await admin.exists(queues.publish.toKey(unreadable))).toBe(0);
});

describe('the fate of a job', () => {
  const ALIVE = { state: 'alive', attempts: 0, reason: '' };

  test('is alive while it waits, runs, or waits for its retry', async () => {
    const event = aClaimedEvent({ attempts: 1 });
    await queues.addPublishJobs([event]);
    expect(await queues.jobFate(event.eventId)).toEqual(ALIVE);
    const [started, finish] = [deferred(), deferred()];
    await working(
      async () => {
        started.resolve();
        await finish.promise;
        throw new Error('refused');
      },
      async () => {
        await started.promise;
        expect(await queues.jobFate(event.eventId)).toEqual(ALIVE);
        finish.resolve();
        await waitFor(async () => (await queues.publish.getJobState(event.eventId)) === 'delayed', {
          what: 'the job to wait for its retry',
        });
        // What a dead pod did not mirror on the row: with the attempt before this job was made.
        expect(await queues.jobFate(event.eventId)).toEqual({ ...ALIVE, attempts: 2, reason: 'refused' });
      },
    );
  });

  test('is alive with the failures that BullMQ counts, when another program has overwritten its data', async () => {
    for (const data of ['{', 'null', '{"attempts":"x"}']) {
      const event = aClaimedEvent({ attempts: 1 });
      await queues.addPublishJobs([event]);
      await admin.hset(queues.jobKey(event.eventId), { data, atm: '3', failedReason: 'refused' });
      expect(await queues.jobFate(event.eventId)).toEqual({ ...ALIVE, attempts: 3, reason: 'refused' });
    }
  });

  test('is missing where another program has a job of the event’s id that waits: it is put out of the way', async () => {
    const event = aClaimedEvent();
    await queues.publish.add('theirs', { not: 'an event' } as never, {
      jobId: event.eventId,
      delay: 86_400_000,
    });
    await queues.addPublishJobs([event]);
    expect(await queues.jobFate(event.eventId)).toEqual({ state: 'missing' });
    await queues.addPublishJobs([event]);
    expect(await queues.jobFate(event.eventId)).toEqual(ALIVE);
    await (await queues.publish.getJob(event.eventId))?.remove();
    await queues.publish.add('ours', event, { jobId: event.eventId, delay: 86_400_000 });
    expect(await queues.jobFate(event.eventId)).toEqual(ALIVE);
  });

  test('is alive while the queue is paused', async () => {
    const event = aClaimedEvent();
    await queues.addPublishJobs([event]);
    await queues.publish.pause();
    expect(await queues.jobFate(event.eventId)).toEqual(ALIVE);
  });

  test('is failed when its retries are spent', async () => {
    const event = await failed(aClaimedEvent());
    expect(await queues.jobFate(event.eventId)).toEqual({ state: 'failed' });
  });

  test('is failed when its last attempt fails right after its state was asked for', async () => {
    const event = await failed(aClaimedEvent());
    vi.spyOn(queues.publish, 'getJobState').mockResolvedValueOnce('active');
    expect(await queues.jobFate(event.eventId)).toEqual({ state: 'failed' });
  });

  test('is missing when it is done, or never was', async () => {
    const event = aClaimedEvent();
    expect(await queues.jobFate(event.eventId)).toEqual({ state: 'missing' });
    await queues.addPublishJobs([event]);
    await queues.remove(event.eventId);
    expect(await queues.jobFate(event.eventId)).toEqual({ state: 'missing' });
  });

  test('is missing when only its hash is left, which is put out of the way', async () => {
    const event = aClaimedEvent();
    await queues.addPublishJobs([event]);
    await admin.lrem(queues.publish.toKey('wait'), 0, event.eventId);
    expect(await queues.jobFate(event.eventId)).toEqual({ state: 'missing' });
    await queues.addPublishJobs([event]);
    expect(await queues.jobFate(event.eventId)).toEqual(ALIVE);
    expect(await runOnce()).toEqual([event.eventId]);
  });

  test('is missing when only a list still names it; made again, it runs', async () => {
    const event = aClaimedEvent();
    await queues.addPublishJobs([event]);
    await admin.del(publishJobKey(OPTIONS, event.eventId));
    expect(await queues.jobFate(event.eventId)).toEqual({ state: 'missing' });
    await queues.addPublishJobs([event]);
    expect(await queues.jobFate(event.eventId)).toEqual(ALIVE);
    expect([...new Set(await runOnce())]).toEqual([event.eventId]);
  });

  /** The jobs that run, until none is left. */
  async function runOnce(): Promise<(string | undefined)[]> {
    const ran: (string | undefined)[] = [];
    await working(
      async (job) => void ran.push(job.id),
      () => waitFor(async () => (await queues.inFlight()).total === 0, { what: 'the jobs to be done' }),
    );
    return ran;
  }
});
