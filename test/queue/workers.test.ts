import { Queue } from 'bullmq';
import { afterEach, beforeAll, beforeEach, describe, expect, onTestFinished, test } from 'vitest';
import { withDeadline } from '../../src/lifecycle.ts';
import {
  createWorkers,
  type Fate,
  type Run,
  WORKER_CONNECTION,
  type Workers,
} from '../../src/queue/workers.ts';
import { createRedis, type TestRedis } from '../support/servers.ts';
import { type AdminRedis, deferred, openAdminRedis, openRedis, silent } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

/** A job whose worker is gone is found by the stalled check after one or two locks of 5 s. */
const TAKE_OVER_MS = 25_000;

const DONE: Fate<string> = { kind: 'completed', result: 'done' };

let server: TestRedis;
let admin: AdminRedis;
let queue: Queue;
const running: Workers[] = [];

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
  await admin.config('SET', 'maxmemory', '0');
  await Promise.all(running.splice(0).map((it) => it.stop(1_000)));
});

type Deps = Parameters<typeof createWorkers<number, string>>[0];

function startWorkers(process: Deps['process'], deps: Partial<Deps> = {}): Workers {
  const workers = createWorkers<number, string>({
    ...{ queueName: 'many', queuePrefix: 'bull', concurrency: 10, timeoutMs: 60_000, logger: silent },
    ...{ connection: openRedis(server.url, WORKER_CONNECTION), process, ...deps },
  });
  running.push(workers);
  workers.start();
  return workers;
}

const addJobs = (count: number) =>
  queue.addBulk(Array.from({ length: count }, (_, i) => ({ name: 'job', data: i })));
const add = (opts: Parameters<Queue['add']>[2] = {}) => queue.add('job', 7, { jobId: 'one', ...opts });
const stateOf = (id: string) => queue.getJobState(id);
const isDone = (timeoutMs = 15_000) =>
  waitFor(async () => Object.values(await queue.getJobCounts()).every((it) => it === 0), {
    what: 'all jobs to be done',
    timeoutMs,
  });

/** A processor whose jobs end when the test says so. */
function held() {
  const jobs: { data: number | null; end: (fate?: Fate<string>) => void }[] = [];
  return {
    jobs,
    process: ({ data }: Run<number>) =>
      new Promise<Fate<string>>((resolve) => {
        jobs.push({ data, end: (fate = DONE) => resolve(fate) });
      }),
    endAll: () => {
      for (const job of jobs.splice(0)) job.end();
    },
    has: (count: number) => waitFor(() => jobs.length === count, { what: `${count} jobs in progress` }),
  };
}

async function callsOf(command: string): Promise<number> {
  const stats = await admin.info('commandstats');
  return Number(new RegExp(`cmdstat_${command}:calls=(\\d+)`).exec(stats)?.[1] ?? 0);
}
/** Workers that wait for a job. */
async function waitingWorkers(): Promise<number> {
  return String(await admin.client('LIST')).match(/cmd=bzpopmin/g)?.length ?? 0;
}

describe('the workers of a pod', () => {
  test.each([
    [1, 1],
    [3, 3],
    [8, 8],
    [13, 8],
    [300, 8],
  ])('work on exactly %i jobs at once, as %i workers', async (concurrency, count) => {
    let [working, most] = [0, 0];
    const gate = deferred();
    const workers = startWorkers(
      async () => {
        most = Math.max(most, ++working, workers.inProgress());
        await gate.promise;
        await new Promise(setImmediate);
        working--;
        return DONE;
      },
      { concurrency },
    );
    await waitFor(async () => (await waitingWorkers()) === count, { what: 'all workers to wait' });
    expect(workers.slots()).toBe(concurrency);
    await addJobs(2 * concurrency + 20);
    await waitFor(() => working === concurrency, { what: 'as many jobs as allowed' });
    gate.resolve();
    await isDone();
    expect(most).toBe(concurrency);
    await waitFor(() => workers.inProgress() === 0, { what: 'the workers to know' });
  });

  test('do not let a job wait for another one that takes its time', async () => {
    const slow = deferred();
    const begun: (number | null)[] = [];
    startWorkers(
      async ({ data }) => {
        begun.push(data);
        if (data === 0) await slow.promise;
        return DONE;
      },
      { concurrency: 2 },
    );
    await addJobs(20);
    await waitFor(() => begun.length === 20, { what: 'the others to be begun' });
    slow.resolve();
    await isDone();
  });

  test('take jobs in the order in which they were added, where there is one slot', async () => {
    const begun: (number | null)[] = [];
    await addJobs(20);
    startWorkers(
      async ({ data }) => {
        begun.push(data);
        return DONE;
      },
      { concurrency: 1 },
    );
    await isDone();
    expect(begun).toEqual(Array.from({ length: 20 }, (_, i) => i));
  });

  test('tell what they have in progress, since when, and when they last began', async () => {
    const { process, jobs, has } = held();
    const madeAt = performance.now();
    const workers = startWorkers(process, { concurrency: 2 });
    expect([workers.inProgress(), workers.oldestStartedAt()]).toEqual([0, undefined]);
    expect(workers.lastStartedAt()).toBeGreaterThanOrEqual(madeAt);
    await addJobs(1);
    await has(1);
    const first = workers.lastStartedAt();
    expect([workers.inProgress(), workers.oldestStartedAt()]).toEqual([1, first]);
    await waitFor(() => performance.now() > first, { what: 'the clock to go on' });
    await addJobs(1);
    await has(2);
    const second = workers.lastStartedAt();
    expect(second).toBeGreaterThan(first);
    expect([workers.inProgress(), workers.oldestStartedAt()]).toEqual([2, first]);
    jobs[0]?.end();
    await waitFor(() => workers.oldestStartedAt() === second, { what: 'the first job to end' });
    expect([workers.inProgress(), workers.lastStartedAt()]).toEqual([1, second]);
    jobs[1]?.end();
    await waitFor(() => workers.oldestStartedAt() === undefined, { what: 'the second job to end' });
    expect(workers.inProgress()).toBe(0);
  });

  test('ask Redis for little while there is nothing to do', async () => {
    startWorkers(async () => DONE, { concurrency: 100 });
    await addJobs(1);
    await isDone();
    await waitFor(async () => (await waitingWorkers()) === 8, { what: 'all workers to wait' });
    const [calls, waits, beganAt] = [await callsOf('evalsha'), await callsOf('bzpopmin'), performance.now()];
    await waitFor(async () => (await callsOf('bzpopmin')) >= waits + 8, { what: 'each to wait once more' });
    const seconds = (performance.now() - beganAt) / 1_000;
    // Of each of the 8 workers: a stalled check in 2.5 s, a look for jobs in 5 s.
    expect(((await callsOf('evalsha')) - calls) / seconds).toBeLessThan(15);
  });
});

describe('the fate of a job', () => {
  test('completed: it is gone from Redis when its end is told, with its result', async () => {
    const told: unknown[] = [];
    const states: Promise<string>[] = [];
    const failures: unknown[] = [];
    startWorkers(async () => DONE, {
      onCompleted(run, result) {
        told.push([run.id, run.data, result]);
        states.push(stateOf(run.id));
      },
      onFailed: (run) => failures.push(run),
    });
    await add();
    await waitFor(() => told.length > 0, { what: 'the end to be told' });
    expect(await Promise.all(states)).toEqual(['unknown']);
    expect([told, failures]).toEqual([[['one', 7, 'done']], []]);
  });

  test('delayed: it is run again after that time, at no cost to its attempts', async () => {
    const runs: Run<number>[] = [];
    const failures: unknown[] = [];
    startWorkers(
      async (run) => {
        runs.push(run);
        return runs.length === 1 ? { kind: 'delayed', ms: 2_000 } : DONE;
      },
      { onFailed: (run) => failures.push(run) },
    );
    const { timestamp } = await add({ attempts: 1 });
    await waitFor(async () => (await stateOf('one')) === 'delayed', { what: 'the job to be put off' });
    const job = await queue.getJob('one');
    expect(job?.attemptsMade).toBe(0);
    // BullMQ counts from when it gets round to it.
    expect(job?.delay).toBeGreaterThan(0);
    expect(job?.delay).toBeLessThanOrEqual(2_000);
    await isDone();
    const run = { id: 'one', name: 'job', data: 7, madeAt: timestamp, failures: 0, stalls: 0 };
    expect(runs).toEqual([
      { ...run, starts: 1 },
      { ...run, starts: 2 },
    ]);
    expect(failures).toEqual([]);
  });

  test('failed: it is told with the delay of its retry, and in the end with the time of that', async () => {
    const failures: Parameters<NonNullable<Deps['onFailed']>>[0][] = [];
    startWorkers(async ({ starts }) => ({ kind: 'failed', reason: `no ${starts}`, isFinal: false }), {
      onFailed: (run) => failures.push(run),
    });
    const begun = Date.now();
    await add({ attempts: 3, backoff: { type: 'exponential', delay: 20 } });
    await waitFor(() => failures.length === 3, { what: 'three failures' });
    expect(failures.map((it) => [it.failures, it.error.message, it.retryInMs])).toEqual([
      [1, 'no 1', 20],
      [2, 'no 2', 40],
      [3, 'no 3', expect.any(Number)],
    ]);
    expect(failures.map((it) => it.failedForGoodAt === null)).toEqual([true, true, false]);
    expect(failures[2]?.failedForGoodAt?.getTime()).toBeGreaterThanOrEqual(begun);
    expect(failures[2]).toMatchObject({ id: 'one', data: 7 });
    expect(await stateOf('one')).toBe('failed');
  });

  test('failed for good: no attempt that is left is made', async () => {
    const failures: Parameters<NonNullable<Deps['onFailed']>>[0][] = [];
    startWorkers(async () => ({ kind: 'failed', reason: 'hopeless', isFinal: true }), {
      onFailed: (run) => failures.push(run),
    });
    await add({ attempts: 5 });
    await waitFor(() => failures.length > 0, { what: 'the failure' });
    expect(failures).toMatchObject([{ failures: 1, error: { message: 'hopeless' } }]);
    expect(failures[0]?.failedForGoodAt).toBeInstanceOf(Date);
    expect(await stateOf('one')).toBe('failed');
  });

  test('of a job that another worker took over meanwhile: its first worker tells of no end', async () => {
    const completed: number[] = [];
    const runs: Run<number>[] = [];
    const stalled: string[] = [];
    startWorkers(
      async (run) => {
        runs.push(run);
        // As if this pod had hung for longer than its lock lasts.
        if (runs.length === 1) await admin.del(`${queue.toKey(run.id)}:lock`);
        return DONE;
      },
      {
        concurrency: 1,
        onCompleted: (run) => completed.push(run.stalls),
        onStalled: async (id) => void stalled.push(id),
      },
    );
    await add({ attempts: 1 });
    await waitFor(() => completed.length > 0, { what: 'an end to be told', timeoutMs: TAKE_OVER_MS });
    await isDone();
    expect(runs.map((it) => [it.starts, it.stalls, it.failures])).toEqual([
      [1, 0, 0],
      [2, 1, 0],
    ]);
    expect([completed, stalled]).toEqual([[1], ['one']]);
  });

  test('that cannot be written: its lock ends, and the job is found and run again at no cost', async () => {
    // The connection swallows the first delay, as a half-open network does.
    const connection = openRedis(server.url, WORKER_CONNECTION);
    const send = connection.sendCommand.bind(connection);
    let swallowed = 0;
    connection.sendCommand = (command, stream) => {
      const isDelay = /^eval/.test(command.name) && command.args[2] === queue.toKey('marker');
      if (isDelay && command.args.includes(queue.toKey('one')) && swallowed++ === 0)
        return new Promise(() => {});
      return send(command, stream);
    };
    const runs: Run<number>[] = [];
    const failures: unknown[] = [];
    startWorkers(
      async (run) => {
        runs.push(run);
        return runs.length === 1 ? { kind: 'delayed', ms: 10 } : DONE;
      },
      { connection, timeoutMs: 300, onFailed: (run) => failures.push(run) },
    );
    await add({ attempts: 1 });
    await isDone(TAKE_OVER_MS);
    expect(swallowed).toBe(1);
    expect(runs.map((it) => [it.stalls, it.failures])).toEqual([
      [0, 0],
      [1, 0],
    ]);
    expect(failures).toEqual([]);
  });
});

describe('a job that is not ours', () => {
  test('or has lost its hash is run without data, and leaves nothing behind', async () => {
    const runs: Run<number>[] = [];
    await admin.hset(queue.toKey('foreign'), { name: 'x', data: 'null', opts: '{}', timestamp: 1 });
    await admin.rpush(queue.toKey('wait'), 'lost', 'foreign');
    startWorkers(async (run) => {
      runs.push(run);
      return DONE;
    });
    await queue.add('job', 7, { jobId: 'ours' });
    await waitFor(() => runs.length === 3, { what: 'all to be run' });
    await isDone();
    const dataOf = (id: string) => runs.find((it) => it.id === id)?.data;
    expect(['foreign', 'lost', 'ours'].map(dataOf)).toEqual([null, {}, 7]);
    expect(await admin.exists(queue.toKey('lost'), queue.toKey('foreign'))).toBe(0);
  });

  test('nor anybody’s, without hash among the active ones: it is cleaned away, and its id can be used again', async () => {
    const runs: Run<number>[] = [];
    await admin.lpush(queue.toKey('active'), 'one');
    startWorkers(async (run) => {
      runs.push(run);
      return DONE;
    });
    await isDone(TAKE_OVER_MS);
    expect(await admin.exists(queue.toKey('one'))).toBe(0);
    const before = runs.length;
    await add();
    await waitFor(() => runs.length > before, { what: 'the job to be run' });
    expect(runs.at(-1)).toMatchObject({ id: 'one', data: 7 });
  });

  test('but listed as active without a worker is found, told of, and run', async () => {
    const stalled: string[] = [];
    await add();
    // However often that happened: a stall is no crash.
    await admin.hset(queue.toKey('one'), 'stc', 7);
    await admin.lmove(queue.toKey('wait'), queue.toKey('active'), 'RIGHT', 'LEFT');
    const runs: Run<number>[] = [];
    startWorkers(
      async (run) => {
        runs.push(run);
        return DONE;
      },
      { onStalled: async (id) => void stalled.push(id) },
    );
    await isDone(TAKE_OVER_MS);
    expect(runs).toMatchObject([{ id: 'one', data: 7, failures: 0, stalls: 8 }]);
    expect(stalled).toEqual(['one']);
  });
});

describe('when Redis refuses everybody', () => {
  test.each([
    [
      'is full',
      'OOM',
      () => admin.config('SET', 'maxmemory', '1'),
      () => admin.config('SET', 'maxmemory', '0'),
    ],
    ['is read-only', 'READONLY', () => admin.replicaof('127.0.0.1', 9), () => admin.replicaof('NO', 'ONE')],
  ])(
    'since it %s, workers ask once in a second or so, say so once, and go on',
    async (_, error, begin, end) => {
      const [done, warned]: [number[], string[]] = [[], []];
      const warn = (fields: Record<string, unknown>) => {
        warned.push((fields.err as Error).message.split(' ', 1)[0] as string);
      };
      await addJobs(3);
      await begin();
      const workers = startWorkers(
        async ({ data }) => {
          done.push(data as number);
          return DONE;
        },
        { logger: { ...silent, warn } },
      );
      try {
        const refusals = async () =>
          Number(/total_error_replies:(\d+)/.exec(await admin.info('stats'))?.[1] ?? 0);
        await waitFor(async () => (await refusals()) > 0, { what: 'a worker to be refused' });
        const [before, beganAt] = [await refusals(), performance.now()];
        await waitFor(() => performance.now() - beganAt > 2_000, { what: 'two seconds to pass' });
        const perSecond = ((await refusals()) - before) / ((performance.now() - beganAt) / 1_000);
        expect(perSecond).toBeLessThan(50);
        expect(workers.isRunning()).toBe(true);
      } finally {
        await end();
      }
      await isDone();
      expect(done.toSorted()).toEqual([0, 1, 2]);
      expect(new Set(warned)).toEqual(new Set([error]));
      expect(warned.length).toBeLessThan(3);
    },
  );

  test('while Redis is away, which has a log line of its own, workers warn of nothing more, and go on afterwards', async () => {
    const own = await createRedis();
    const connection = openRedis(own.url, WORKER_CONNECTION);
    const told: string[] = [];
    const telling = (level: string) => () => void told.push(level);
    const done: number[] = [];
    const process = async ({ data }: Run<number>) => {
      done.push(data as number);
      return DONE;
    };
    startWorkers(process, {
      connection,
      logger: { ...silent, debug: telling('debug'), warn: telling('warn') },
    });
    await waitFor(() => connection.status === 'ready', { what: 'the workers to be connected' });
    await own.stop();
    await waitFor(() => told.length >= 5, { what: 'the workers to meet errors' });
    await own.restart();
    const other = new Queue('many', { connection: openRedis(own.url) });
    onTestFinished(() => other.close());
    await other.add('job', 7);
    await waitFor(() => done.length > 0, { what: 'the job to be done' });
    // Their connections may break before the one that tells.
    expect(new Set(told.slice(told.indexOf('debug')))).toEqual(new Set(['debug']));
  });
});

describe('slots', () => {
  const TIMEOUT_MS = 3_000;
  const slowly = async () => {
    const beganAt = performance.now();
    await waitFor(() => performance.now() - beganAt > TIMEOUT_MS / 2 + 50, { what: 'half of the timeout' });
  };

  test('are half as many once jobs took more than half of the timeout, and grow again with quick ones', async () => {
    const { process, jobs, endAll, has } = held();
    const warned: unknown[] = [];
    const logger = { ...silent, warn: (fields: Record<string, unknown>) => void warned.push(fields.atOnce) };
    const workers = startWorkers(process, { concurrency: 40, timeoutMs: TIMEOUT_MS, logger });
    await addJobs(400);
    await has(40);
    await slowly();
    // All of these took long, and all had begun before there were fewer slots: only the first one tells something new.
    endAll();
    await has(20);
    expect([workers.slots(), warned]).toEqual([20, [20]]);
    // There is work for more, and nobody takes it.
    expect(await queue.getActiveCount()).toBe(20);
    // Jobs that are put off or fail are no sign that there is time for more.
    for (const job of jobs.splice(0, 10)) job.end({ kind: 'delayed', ms: 0 });
    await has(20);
    expect(workers.slots()).toBe(20);
    const ending = setInterval(endAll, 5);
    try {
      await waitFor(() => workers.slots() === 40, { what: 'all slots to be back' });
      await isDone();
    } finally {
      clearInterval(ending);
    }
    expect(workers.slots()).toBe(40);
  });

  test.each([
    [10, 8],
    [5, 5],
  ])('of %i are never fewer than %i', async (concurrency, fewest) => {
    const { process, endAll, has } = held();
    const workers = startWorkers(process, { concurrency, timeoutMs: TIMEOUT_MS });
    await addJobs(3 * concurrency);
    await has(concurrency);
    await slowly();
    endAll();
    await has(fewest);
    await slowly();
    endAll();
    await has(fewest);
    expect(workers.slots()).toBe(fewest);
    endAll();
    const ending = setInterval(endAll, 5);
    await isDone().finally(() => clearInterval(ending));
  });
});

test('workers that were never started have no connection, do not run, and stop', async () => {
  const connections = async () =>
    String(await admin.client('LIST'))
      .trim()
      .split('\n').length;
  const connection = openRedis(server.url, WORKER_CONNECTION);
  await connection.ping();
  const all = await connections();
  const workers = createWorkers<number, string>({
    ...{ queueName: 'many', queuePrefix: 'bull', concurrency: 10, timeoutMs: 60_000, logger: silent },
    ...{ connection, process: async () => DONE },
  });
  await Promise.all(Array.from({ length: 20 }, () => connection.ping()));
  expect([await connections(), workers.isRunning()]).toEqual([all, false]);
  await workers.stop(1_000);
  expect(workers.isRunning()).toBe(false);
});

describe('stopping', () => {
  test.each([5, 10])('waits for the %i of 10 jobs in progress, and takes no more', async (count) => {
    const { process, endAll, has } = held();
    const completed: unknown[] = [];
    const workers = startWorkers(process, { onCompleted: (run) => completed.push(run.data) });
    await addJobs(count);
    await has(count);
    let stopped = false;
    const stopping = workers.stop(20_000).then(() => {
      stopped = true;
    });
    expect(workers.isRunning()).toBe(false);
    await waitFor(async () => (await waitingWorkers()) === 0, { what: 'the workers to ask no more' });
    await addJobs(20);
    expect([workers.inProgress(), stopped]).toEqual([count, false]);
    endAll();
    await withDeadline(15_000, stopping);
    expect([workers.inProgress(), completed.length]).toEqual([0, count]);
    expect(await queue.getJobCounts('waiting', 'active')).toEqual({ waiting: 20, active: 0 });
  });

  test('waits for the job of a worker that pauses, since Redis refused it another one', async () => {
    const connection = openRedis(server.url, WORKER_CONNECTION);
    const send = connection.sendCommand.bind(connection);
    let isRefusing = false;
    connection.sendCommand = (command, stream) => {
      const [, , firstKey, ...others] = command.args.map(String);
      // To end a job takes the same first key, and that of the job.
      const isFetch = firstKey === queue.toKey('wait') && !others.some((it) => /^bull:many:\d+$/.test(it));
      if (!isFetch || !isRefusing) return send(command, stream);
      return Promise.reject(Object.assign(new Error('OOM no memory'), { name: 'ReplyError' }));
    };
    const { process, jobs, has } = held();
    const completed: unknown[] = [];
    const refused = deferred();
    const workers = startWorkers(process, {
      ...{ connection, concurrency: 9, onCompleted: (run) => completed.push(run.data) },
      logger: { ...silent, warn: () => refused.resolve() },
    });
    await addJobs(9);
    await has(9);
    // One of the eight workers has two slots. The token of a job's lock begins with the name of its worker.
    const [active] = [await queue.getActive()];
    const workerOf = new Map<number, string>();
    for (const job of active)
      workerOf.set(job.data, String(await admin.get(`${queue.toKey(job.id as string)}:lock`)).slice(0, 36));
    const names = [...workerOf.values()];
    const [busiest] = names.filter((name, at) => names.indexOf(name) < at);
    const [first, second] = jobs.filter((it) => workerOf.get(it.data as number) === busiest);
    const others = jobs.filter((it) => it !== first && it !== second);
    isRefusing = true;
    first?.end();
    await waitFor(() => completed.length === 1, { what: 'a slot to be free' });
    await addJobs(1);
    await withDeadline(15_000, refused.promise);
    for (const job of others) job.end();
    let stopped = false;
    const beganAt = performance.now();
    const stopping = workers.stop(20_000).then(() => {
      stopped = true;
    });
    await waitFor(() => performance.now() - beganAt > 3_000, { what: 'more time than closing takes' });
    expect(stopped).toBe(false);
    second?.end();
    await withDeadline(15_000, stopping);
    expect(completed).toHaveLength(9);
  });

  test.each([1, 10_000])('leaves no connection behind, with %i ms of time', async (deadlineMs) => {
    const connections = async () =>
      String(await admin.client('LIST'))
        .trim()
        .split('\n').length;
    const { process, endAll, has } = held();
    const completed: unknown[] = [];
    const workers = startWorkers(process, { onCompleted: (run) => completed.push(run.data) });
    await waitFor(async () => (await waitingWorkers()) === 8, { what: 'all workers to wait' });
    const all = await connections();
    await addJobs(3);
    await has(3);
    const stopping = workers.stop(deadlineMs);
    if (deadlineMs === 1) await stopping;
    endAll();
    await stopping;
    await waitFor(() => completed.length === 3, { what: 'the jobs to end' });
    // Each worker had one of its own, to wait for jobs.
    await waitFor(async () => (await connections()) === all - 8, { what: 'their connections to be closed' });
  });

  test('does not wait beyond its deadline: the job is handed back, and another pod runs it', async () => {
    const { process, has } = held();
    const connection = openRedis(server.url, WORKER_CONNECTION);
    const workers = startWorkers(process, { connection });
    await add({ attempts: 1 });
    await has(1);
    await withDeadline(5_000, workers.stop(100));
    connection.disconnect();
    const runs: Run<number>[] = [];
    startWorkers(async (run) => {
      runs.push(run);
      return DONE;
    });
    await isDone(TAKE_OVER_MS);
    expect(runs).toMatchObject([{ id: 'one', data: 7, failures: 0, stalls: 1 }]);
  });
});
