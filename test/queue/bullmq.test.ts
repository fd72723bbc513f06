/**
 * What the relay leans on in BullMQ beyond its documented API: the names of the job hash's fields, which the append
 * script, the poison guard and the lease reaper read, and the moments at which events are told. When a new version of
 * BullMQ breaks one of these, it is here that it shows.
 */
import { DelayedError, type Job, Queue, Worker, type WorkerOptions } from 'bullmq';
import { afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { createRedis, type TestRedis } from '../support/servers.ts';
import { type AdminRedis, deferred, openAdminRedis, openRedis } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const JOB = 'bull:contract:one';

let server: TestRedis;
let admin: AdminRedis;
let queue: Queue;
const running: Worker[] = [];

beforeAll(async () => {
  server = await createRedis();
  admin = openAdminRedis(server.adminUrl);
  queue = new Queue('contract', { connection: openRedis(server.url) });
});

beforeEach(async () => {
  await admin.flushall();
});

afterEach(async () => {
  await Promise.all(running.splice(0).map((it) => it.close()));
});

function work(process: (job: Job, token?: string) => Promise<unknown>, options: Partial<WorkerOptions> = {}) {
  const worker = new Worker('contract', process, {
    connection: openRedis(server.url, { maxRetriesPerRequest: null }),
    ...options,
  });
  worker.on('error', () => {});
  running.push(worker);
  return worker;
}

const add = (opts = {}) => queue.add('job', { a: 'ä' }, { jobId: 'one', removeOnComplete: true, ...opts });
const is = (state: string) =>
  waitFor(async () => (await queue.getJobState('one')) === state, { what: `the job to be ${state}` });

describe('the hash of a job', () => {
  test('tells when it was made and what it holds; nothing yet of an end or a failure', async () => {
    const { timestamp } = await add();
    expect(await admin.hgetall(JOB)).toMatchObject({ timestamp: String(timestamp), data: '{"a":"ä"}' });
    expect(await admin.hmget(JOB, 'finishedOn', 'failedReason')).toEqual([null, null]);
    for (const count of await admin.hmget(JOB, 'atm', 'stc')) expect(count).toSatisfy(isNone);
  });

  test('counts failed attempts, tells the last reason, and the end after the last attempt alone', async () => {
    const gates = [deferred(), deferred()];
    work(async (job) => {
      await gates[job.attemptsMade]?.promise;
      throw new Error(`no ${job.attemptsMade + 1}`);
    });
    await add({ attempts: 2, backoff: { type: 'fixed', delay: 1 } });
    gates[0]?.resolve();
    await waitFor(async () => (await admin.hget(JOB, 'atm')) === '1', { what: 'a failed attempt' });
    expect(await admin.hmget(JOB, 'finishedOn', 'failedReason')).toEqual([null, 'no 1']);
    gates[1]?.resolve();
    await is('failed');
    expect(await admin.hmget(JOB, 'finishedOn', 'failedReason', 'atm')).toEqual([
      expect.stringMatching(/^\d{13}$/),
      'no 2',
      '2',
    ]);
  });

  test('keeps the fields that are ours on every way, and forgets its end when a dashboard retries it', async () => {
    let runs = 0;
    const last = deferred();
    work(async (job, token) => {
      runs++;
      if (runs === 1) {
        await job.moveToDelayed(Date.now() + 1, token);
        throw new DelayedError();
      }
      if (runs < 4) throw new Error('no');
      await last.promise;
    });
    const { timestamp } = await add({ attempts: 2, backoff: { type: 'fixed', delay: 1 }, delay: 50 });
    await admin.hset(JOB, 'relay:entry', 'e 1-0');
    await is('failed');
    expect(await admin.hget(JOB, 'relay:entry')).toBe('e 1-0');
    const job = await queue.getJob('one');
    await job?.retry();
    await waitFor(() => runs === 4, { what: 'the run of the retry' });
    // The gate knows by the failed attempts that this is not the first run.
    expect(await admin.hmget(JOB, 'relay:entry', 'finishedOn', 'atm', 'timestamp')).toEqual([
      'e 1-0',
      null,
      '2',
      String(timestamp),
    ]);
    last.resolve();
    await is('unknown');
    expect(await admin.exists(JOB)).toBe(0);
  });

  test('counts stalls, from 0 again without the count; a stall is no failed attempt', async () => {
    const stalls: number[] = [];
    const worker = work(async () => {}, { autorun: false, maxStalledCount: 100, stalledInterval: 200 });
    await add();
    const stall = () => admin.lmove('bull:contract:wait', 'bull:contract:active', 'RIGHT', 'LEFT');
    await worker.startStalledCheckTimer();
    for (let i = 1; i <= 3; i++) {
      await stall();
      await waitFor(async () => (await admin.llen('bull:contract:wait')) === 1, { what: 'a stalled check' });
      stalls.push(Number(await admin.hget(JOB, 'stc')));
      if (i === 2) await admin.hdel(JOB, 'stc');
    }
    expect(stalls).toEqual([1, 2, 1]);
    expect(await admin.hget(JOB, 'atm')).toSatisfy(isNone);
    const stalledCounts: number[] = [];
    work(async (job) => void stalledCounts.push(job.stalledCounter), { maxStalledCount: 100 });
    await is('unknown');
    expect(stalledCounts).toEqual([1]);
  });
});

describe('events of a worker', () => {
  test('"completed" is told when the job has left Redis, its hash as well', async () => {
    const seen = deferred<Promise<number>>();
    const worker = work(async () => 'result');
    worker.on('completed', () => seen.resolve(admin.exists(JOB)));
    await add();
    expect(await await seen.promise).toBe(0);
  });

  test('"completed" is not told by a worker that lost the lock of the job', async () => {
    const told: string[] = [];
    const failed = deferred();
    const worker = work(async () => {
      await admin.set(`${JOB}:lock`, 'another worker');
      setImmediate(() => failed.resolve());
    });
    worker.on('completed', () => told.push('completed'));
    worker.on('failed', () => told.push('failed'));
    const refused = new Promise((resolve) => worker.on('error', resolve));
    await add();
    await Promise.all([failed.promise, refused]);
    expect([told, await queue.getJobState('one')]).toEqual([[], 'active']);
    // Or closing waits for it.
    await admin.del(`${JOB}:lock`);
  });

  test('"failed" is told after each attempt, when Redis has it: with the delay, or the end', async () => {
    const told: unknown[] = [];
    const worker = work(async () => Promise.reject(new Error('no')));
    worker.on('failed', (job) => {
      const hash = admin.hmget(JOB, 'atm', 'finishedOn');
      const { attemptsMade, delay, finishedOn } = job as Job;
      told.push(
        hash.then(([atm, ended]) => [
          Number(atm) >= attemptsMade,
          attemptsMade,
          delay,
          ended === null ? null : finishedOn === Number(ended),
        ]),
      );
    });
    await add({ attempts: 2, backoff: { type: 'exponential', delay: 300 } });
    await waitFor(() => told.length === 2, { what: 'two failures' });
    expect(await Promise.all(told)).toEqual([
      [true, 1, 300, null],
      [true, 2, expect.any(Number), true],
    ]);
  });
});

/** A count that was never begun. */
const isNone = (count: string | null) => count === null || count === '0';
