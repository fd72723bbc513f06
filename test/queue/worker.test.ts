import { type Job, Queue } from 'bullmq';
import { afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { closeWorker, PatientWorker, WORKER_CONNECTION, WORKER_OPTIONS } from '../../src/queue/worker.ts';
import { createRedis, type TestRedis } from '../support/servers.ts';
import { type AdminRedis, deferred, openAdminRedis, openRedis } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

let server: TestRedis;
let admin: AdminRedis;
let queue: Queue<number>;
const running: PatientWorker<number>[] = [];

beforeAll(async () => {
  server = await createRedis();
  admin = openAdminRedis(server.adminUrl);
  queue = new Queue('many', {
    connection: openRedis(server.url),
    defaultJobOptions: { removeOnComplete: true },
  });
});

beforeEach(async () => {
  await admin.flushall();
});

afterEach(async () => {
  await Promise.all(running.splice(0).map((it) => closeWorker(it, 1_000)));
});

function aWorker(process: (job: Job<number>) => Promise<void>, places = 10): PatientWorker<number> {
  const worker = new PatientWorker<number>('many', process, {
    ...WORKER_OPTIONS,
    connection: openRedis(server.url, WORKER_CONNECTION),
    concurrency: places,
  });
  worker.on('error', () => {});
  running.push(worker);
  return worker;
}

const addJobs = (count: number) =>
  queue.addBulk(Array.from({ length: count }, (_, i) => ({ name: 'job', data: i })));
/** Nobody tells a worker's main loop, which would look after two seconds. */
async function addUnheard(count: number): Promise<void> {
  const aside = new Queue<number>('aside', { connection: openRedis(server.url) });
  const jobs = await aside.addBulk(Array.from({ length: count }, (_, data) => ({ name: 'job', data })));
  for (const id of [...jobs.map((job) => job.id as string), 'wait'])
    await admin.rename(aside.toKey(id), queue.toKey(id));
}
const isDone = () =>
  waitFor(async () => Object.values(await queue.getJobCounts()).every((it) => it === 0), {
    what: 'all jobs to be done',
  });
async function callsOf(command: string): Promise<number> {
  const stats = await admin.info('commandstats');
  return Number(new RegExp(`cmdstat_${command}:calls=(\\d+)`).exec(stats)?.[1] ?? 0);
}
/** Whatever a worker asks of the queue is a script. */
const scriptCalls = () => callsOf('evalsha');
const timesItWaited = () => callsOf('bzpopmin');

describe('a job', () => {
  test('is begun the moment it is there, however many more wait', async () => {
    await addJobs(50);
    const seen: ('taken' | 'begun')[] = [];
    const worker = aWorker(async () => void seen.push('begun'), 50);
    worker.on('active', () => seen.push('taken'));
    void worker.run();
    await isDone();
    expect(seen.filter((it) => it === 'begun')).toHaveLength(50);
    expect(seen.indexOf('begun')).toBeLessThan(5);
  });

  test('does not wait for another one that takes its time', async () => {
    const slow = deferred();
    const begun: number[] = [];
    void aWorker(async ({ data }) => {
      begun.push(data);
      if (data === 0) await slow.promise;
    }, 2).run();
    await addJobs(20);
    await waitFor(() => begun.length === 20, { what: 'the others to be begun' });
    slow.resolve();
    await isDone();
  });

  test('is taken in the order in which jobs were added, where there is one place', async () => {
    const begun: number[] = [];
    await addJobs(20);
    void aWorker(async ({ data }) => void begun.push(data), 1).run();
    await isDone();
    expect(begun).toEqual(Array.from({ length: 20 }, (_, i) => i));
  });

  test('is begun in the order in which jobs were added, where several are asked for at once', async () => {
    const begun: number[] = [];
    await addJobs(20);
    const worker = aWorker(async ({ data }) => void begun.push(data), 50);
    worker.expect(20);
    void worker.run();
    await isDone();
    expect(begun).toEqual(Array.from({ length: 20 }, (_, i) => i));
  });

  test('is taken at once by who knows that it comes, unless it pauses', async () => {
    const held = deferred();
    const worker = aWorker(async () => held.promise, 10);
    void worker.run();
    await waitFor(async () => (await timesItWaited()) > 0, { what: 'the main loop to wait' });
    await addUnheard(3);
    worker.take(5);
    await waitFor(() => worker.inHand() === 3, { what: 'the jobs to be taken', timeoutMs: 1_000 });
    const paused = worker.pause();
    await addUnheard(1);
    worker.take(1);
    held.resolve();
    await paused;
    expect(await queue.getJobCounts('waiting', 'active')).toEqual({ waiting: 1, active: 0 });
  });

  test('that cannot be moved on in Redis ends nothing but itself', async () => {
    const begun: number[] = [];
    const worker = aWorker(async (job) => {
      begun.push(job.data);
      if (job.data === 0 && begun.length === 1) await admin.del(`${queue.toKey(job.id as string)}:lock`);
    }, 1);
    await addJobs(3);
    void worker.run();
    await isDone();
    // Its lock was gone: the stalled check brought it back.
    expect(begun.toSorted()).toEqual([0, 0, 1, 2]);
  });
});

describe('in hand', () => {
  test.each([1, 5, 40])('are never more jobs than there are places: %i', async (places) => {
    let working = 0;
    let most = 0;
    const worker = aWorker(async () => {
      working++;
      most = Math.max(most, working, worker.inHand());
      await new Promise(setImmediate);
      working--;
    }, places);
    worker.expect(1_000);
    void worker.run();
    for (let i = 0; i < 5; i++) {
      await addJobs(60);
      worker.take(60);
    }
    await isDone();
    expect(most).toBeLessThanOrEqual(places);
    expect(most).toBeGreaterThan(places / 4);
    await waitFor(() => worker.inHand() === 0, { what: 'it to hear of that' });
  });

  test('are fewer once jobs took too long, and as many as before when they are quick again', async () => {
    const held = new Map<number, ReturnType<typeof deferred<void>>>();
    const worker = aWorker(async ({ data }) => {
      const one = deferred();
      held.set(data, one);
      await one.promise;
    }, 40);
    const finishAll = () => {
      for (const [data, one] of held) {
        held.delete(data);
        one.resolve();
      }
    };
    void worker.run();
    const beganAt = performance.now();
    await addJobs(200);
    await waitFor(() => held.size === 40, { what: 'all places to be taken' });
    worker.narrow(performance.now());
    // Told of all that was in hand with it.
    for (let i = 0; i < 40; i++) worker.narrow(beganAt);
    expect(worker.places).toBe(20);
    finishAll();
    await waitFor(() => held.size === 20, { what: 'half of the places to be taken' });
    await waitFor(async () => (await queue.getActiveCount()) === 20, { what: 'the others to be left free' });
    expect(held.size).toBe(20);
    for (let i = 0; i < 100; i++) worker.widen();
    expect(worker.places).toBe(40);
    await waitFor(() => held.size === 40, { what: 'all places to be taken again' });
    for (let i = 1; i <= 10; i++) worker.narrow(performance.now() + i * 60_000);
    expect(worker.places).toBe(8);
    const finishing = setInterval(finishAll, 5);
    await isDone().finally(() => clearInterval(finishing));
  });

  test.each([5, 10])('%i of 10 when it pauses are finished first; no more are taken', async (jobs) => {
    const held = deferred();
    const worker = aWorker(async () => held.promise, 10);
    void worker.run();
    await addJobs(jobs);
    await waitFor(() => worker.inHand() === jobs, { what: 'the jobs to be taken' });
    let paused = false;
    const pausing = worker.pause().then(() => {
      paused = true;
    });
    await waitFor(() => jobs === 10 || !worker.isRunning(), { what: 'it to ask no more' });
    await addJobs(20);
    expect([worker.inHand(), paused]).toEqual([jobs, false]);
    held.resolve();
    await pausing;
    expect(worker.inHand()).toBe(0);
    expect(await queue.getJobCounts('waiting', 'active')).toEqual({ waiting: 20, active: 0 });
  });

  test('are those that closing waits for, too', async () => {
    const held = deferred();
    const done: number[] = [];
    const worker = aWorker(async ({ data }) => {
      await held.promise;
      done.push(data);
    }, 10);
    void worker.run();
    await addJobs(4);
    await waitFor(() => worker.inHand() === 4, { what: 'the jobs to be taken' });
    const closing = worker.close();
    await waitFor(() => !worker.isRunning(), { what: 'it to ask no more' });
    held.resolve();
    await closing;
    expect(done.toSorted()).toEqual([0, 1, 2, 3]);
    expect(await queue.getJobCounts('waiting', 'active')).toEqual({ waiting: 0, active: 0 });
  });
});

describe('what it asks of Redis', () => {
  test('is hardly more than it gets, when it knows how many jobs come', async () => {
    const worker = aWorker(async () => {}, 100);
    void worker.run();
    await addJobs(1);
    await isDone();
    await waitFor(async () => String(await admin.client('LIST')).includes('cmd=bzpopmin'), {
      what: 'it to wait for jobs',
    });
    const before = await scriptCalls();
    worker.expect(30);
    await addJobs(30);
    await isDone();
    // Each job is added, taken and finished; taking and finishing may find nothing more.
    expect((await scriptCalls()) - before).toBeLessThan(30 * 3 + 40);
  });

  test('is nothing over and over, when nothing is there', async () => {
    const worker = aWorker(async () => {}, 100);
    worker.expect(500);
    void worker.run();
    await addJobs(1);
    await isDone();
    await waitFor(async () => String(await admin.client('LIST')).includes('cmd=bzpopmin'), {
      what: 'it to wait for jobs',
    });
    const before = await scriptCalls();
    const waits = await timesItWaited();
    await waitFor(async () => (await timesItWaited()) >= waits + 2, { what: 'it to wait twice more' });
    expect((await scriptCalls()) - before).toBeLessThan(10);
  });
});
