import { Queue, Worker } from 'bullmq';
import { afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { FAILS_FAST } from '../../src/connections/servers.ts';
import { withDeadline } from '../../src/lifecycle.ts';
import { claimQueueName } from '../../src/queue/queues.ts';
import { createScheduler, type Scheduler, TICK } from '../../src/queue/scheduler.ts';
import { WORKER_CONNECTION } from '../../src/queue/workers.ts';
import { createRedis, type TestRedis } from '../support/servers.ts';
import { type AdminRedis, deferred, openAdminRedis, openRedis, silent } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const QUEUE = claimQueueName('relay');
const POLL_MS = 100;

let server: TestRedis;
let admin: AdminRedis;
let queue: Queue;
const running: (Scheduler | Worker)[] = [];

beforeAll(async () => {
  server = await createRedis();
  admin = openAdminRedis(server.adminUrl);
  queue = new Queue(QUEUE, { connection: openRedis(server.url) });
});

beforeEach(async () => {
  await admin.flushall();
});

afterEach(async () => {
  for (const it of running.splice(0).reverse()) await ('stop' in it ? it.stop() : it.close());
});

async function createOne(options: { pollIntervalMs?: number } = {}) {
  const redis = openRedis(server.url, FAILS_FAST);
  await waitFor(() => redis.status === 'ready', { what: 'the connection' });
  const scheduler = createScheduler({
    queue: new Queue(QUEUE, { connection: redis }),
    ...{ redis, pollIntervalMs: POLL_MS, logger: silent, ...options },
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

  test('is pulled back when a pod whose clock is fast has set its next tick far ahead', async () => {
    const now = Date.now;
    Date.now = () => now() + 600_000;
    try {
      await queue.upsertJobScheduler(TICK, { every: POLL_MS }, { name: TICK });
    } finally {
      Date.now = now;
    }
    let ticks = 0;
    work(async () => void ticks++);
    (await createOne()).start();
    await waitFor(() => ticks >= 3, { what: 'ticks' });
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
    const redis = openRedis(fragile.url, FAILS_FAST);
    await waitFor(() => redis.status === 'ready', { what: 'the connection' });
    const away = new Queue(QUEUE, { connection: redis });
    away.on('error', () => {});
    const scheduler = createScheduler({
      ...{ queue: away, redis, pollIntervalMs: POLL_MS, logger: silent },
    });
    await fragile.kill();
    await waitFor(() => redis.status !== 'ready', { what: 'the connection to be lost' });
    await withDeadline(1_000, scheduler.wake());
    scheduler.start();
    await looksAgain(scheduler);
    await scheduler.stop();
  });
});
