import { Queue, Worker } from 'bullmq';
import type { Redis } from 'ioredis';
import { afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import type { PrivateRedis } from '../../src/demo/servers.ts';
import { withDeadline } from '../../src/lifecycle.ts';
import { claimQueueName, QUEUE_CONNECTION, WORKER_CONNECTION } from '../../src/queue/queues.ts';
import { createScheduler, type Scheduler } from '../../src/queue/scheduler.ts';
import { createRedis } from '../support/servers.ts';
import { deferred, openRedis, silent } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const QUEUE = claimQueueName('relay');
const MEMORY_KEY = 'bull:relay:memory';
const POLL_MS = 100;

let server: PrivateRedis;
let admin: Redis;
let queue: Queue;
const running: (Scheduler | Worker)[] = [];

beforeAll(async () => {
  server = await createRedis();
  admin = openRedis(server.url);
  queue = new Queue(QUEUE, { connection: admin });
});

beforeEach(async () => {
  await admin.flushall();
});

afterEach(async () => {
  for (const it of running.splice(0).reverse()) await ('stop' in it ? it.stop() : it.close());
});

async function createOne(options: { pollIntervalMs?: number; onMemoryLost?: () => Promise<void> } = {}) {
  const redis = openRedis(server.url, QUEUE_CONNECTION);
  await waitFor(() => redis.status === 'ready', { what: 'the connection' });
  const scheduler = createScheduler({
    queue: new Queue(QUEUE, { connection: redis }),
    ...{ redis, memoryKey: MEMORY_KEY, pollIntervalMs: POLL_MS, logger: silent },
    onMemoryLost: async () => {},
    ...options,
  });
  running.push(scheduler);
  return scheduler;
}

function work(run: (name: string) => Promise<void>): Worker {
  const worker = new Worker(QUEUE, (job) => run(job.name), {
    connection: openRedis(server.url, WORKER_CONNECTION),
  });
  worker.on('error', () => {});
  running.push(worker);
  return worker;
}

/** Waits until `scheduler` has looked after the schedule once more. */
async function looksAgain(scheduler: Scheduler, times = 1): Promise<void> {
  for (let i = 0; i < times; i++) {
    const before = scheduler.lastLookAt();
    await waitFor(() => scheduler.lastLookAt() > before, { what: 'the scheduler to look again' });
  }
}

const schedules = () => queue.getJobSchedulersCount();
const pending = () => queue.getJobCountByTypes('waiting', 'delayed', 'prioritized', 'active');

describe('the schedule', () => {
  test('ticks at the poll interval', async () => {
    const at: number[] = [];
    work(async (name) => {
      if (name === 'tick') at.push(Date.now());
    });
    (await createOne()).start();
    await waitFor(() => at.length >= 11, { what: 'eleven ticks' });
    const mean = ((at[10] ?? 0) - (at[0] ?? 0)) / 10;
    expect(mean).toBeGreaterThan(POLL_MS * 0.8);
    expect(mean).toBeLessThan(POLL_MS * 2);
  });

  test('is one, however many pods uphold it', async () => {
    const pods = await Promise.all(Array.from({ length: 5 }, () => createOne({ pollIntervalMs: 60_000 })));
    for (const pod of pods) pod.start();
    await Promise.all(pods.map((pod) => looksAgain(pod)));
    expect(await schedules()).toBe(1);
    expect(await pending()).toBe(1);
  });

  test.each([
    ['Redis forgot everything', () => admin.flushall()],
    ['its queue was obliterated', () => queue.obliterate({ force: true })],
    ['an operator removed it', () => queue.removeJobScheduler('tick')],
    [
      'its next tick vanished',
      async () => {
        const [key = ''] = await admin.keys('bull:relay-claim:repeat:tick:*');
        await admin.multi().del(key).del('bull:relay-claim:delayed').exec();
      },
    ],
  ])('heals when %s', async (_, harm) => {
    let ticks = 0;
    work(async () => void ticks++);
    (await createOne()).start();
    await waitFor(() => ticks >= 2, { what: 'the first ticks' });
    await harm();
    ticks = 0;
    await waitFor(() => ticks >= 3, { what: 'ticks again', timeoutMs: 8_000 });
    expect(await schedules()).toBe(1);
  });

  test('does not pile up ticks while the queue is paused', async () => {
    const pods = await Promise.all(Array.from({ length: 3 }, () => createOne()));
    await queue.pause();
    for (const pod of pods) pod.start();
    await Promise.all(pods.map((pod) => looksAgain(pod)));
    expect(await pending()).toBeLessThanOrEqual(1);
    await queue.resume();
    let ticks = 0;
    work(async () => void ticks++);
    await waitFor(() => ticks >= 2, { what: 'ticks again' });
  });

  test('outlives a pod that stops', async () => {
    const pod = await createOne({ pollIntervalMs: 60_000 });
    pod.start();
    pod.start();
    await waitFor(async () => (await schedules()) === 1, { what: 'the schedule' });
    await Promise.all([pod.stop(), pod.stop()]);
    expect(await schedules()).toBe(1);
  });
});

describe('a Redis that lost its memory', () => {
  test('is noticed once: when it is new, and again after it was emptied', async () => {
    let lost = 0;
    const pod = await createOne({ onMemoryLost: async () => void lost++ });
    pod.start();
    await looksAgain(pod);
    expect(lost).toBe(1);
    await looksAgain(pod);
    expect(lost).toBe(1);
    await admin.flushall();
    await waitFor(() => lost === 2, { what: 'the loss to be noticed' });
    await looksAgain(pod, 2);
    expect(lost).toBe(2);
  });

  test('is not taken note of before the rows are looked after', async () => {
    let calls = 0;
    const pod = await createOne({
      onMemoryLost: async () => {
        calls++;
        if (calls === 1) throw new Error('no database');
      },
    });
    pod.start();
    await waitFor(() => calls === 1, { what: 'the first try' });
    expect(await admin.exists(MEMORY_KEY)).toBe(0);
    await waitFor(() => admin.exists(MEMORY_KEY), { what: 'the second try' });
    expect(calls).toBe(2);
  });
});

describe('a wake-up', () => {
  test('asks for one claim, however often it is wished for', async () => {
    const pod = await createOne();
    await Promise.all(Array.from({ length: 10 }, () => pod.wake()));
    expect(await queue.getJobCountByTypes('waiting')).toBe(1);
  });

  test('in the middle of a claim is not lost: one more claim follows', async () => {
    const [started, finish] = [deferred(), deferred()];
    let claims = 0;
    work(async () => {
      claims++;
      if (claims > 1) return;
      started.resolve();
      await finish.promise;
    });
    const pod = await createOne();
    await pod.wake();
    await started.promise;
    await Promise.all(Array.from({ length: 10 }, () => pod.wake()));
    finish.resolve();
    await waitFor(() => claims === 2, { what: 'the claim that was wished for meanwhile' });
    await waitFor(async () => (await pending()) === 0, { what: 'the queue to be empty' });
    expect(claims).toBe(2);
    await pod.wake();
    await waitFor(() => claims === 3, { what: 'a claim that is wished for afterwards' });
  });

  test('is given up quietly while Redis is away', async () => {
    const fragile = await createRedis();
    const redis = openRedis(fragile.url, QUEUE_CONNECTION);
    await waitFor(() => redis.status === 'ready', { what: 'the connection' });
    const away = new Queue(QUEUE, { connection: redis });
    away.on('error', () => {});
    const scheduler = createScheduler({
      ...{ queue: away, redis, memoryKey: MEMORY_KEY, pollIntervalMs: POLL_MS, logger: silent },
      onMemoryLost: async () => {},
    });
    await fragile.kill();
    await waitFor(() => redis.status !== 'ready', { what: 'the connection to be lost' });
    await withDeadline(1_000, scheduler.wake());
    scheduler.start();
    await looksAgain(scheduler);
    await scheduler.stop();
  });
});
