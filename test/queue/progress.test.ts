import { Queue } from 'bullmq';
import type { Redis } from 'ioredis';
import { afterEach, beforeAll, beforeEach, expect, onTestFinished, test, vi } from 'vitest';
import { createProgressWatch, type ProgressWatch, type Workplace } from '../../src/queue/progress.ts';
import { createRedis } from '../support/servers.ts';
import { type AdminRedis, openAdminRedis, openRedis } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const LOOK_MS = 20;
const STUCK_MS = 300;

let redis: Redis;
let admin: AdminRedis;
let queue: Queue;
const open: ProgressWatch[] = [];

beforeAll(async () => {
  const { url, adminUrl } = await createRedis();
  redis = openRedis(url);
  admin = openAdminRedis(adminUrl);
});

beforeEach(async () => {
  await admin.flushall();
  queue = new Queue('work', { connection: redis });
});

afterEach(async () => {
  await Promise.all(open.splice(0).map((it) => it.stop()));
});

type Doing = {
  lastStartedAt: number;
  inProgress: number;
  oldestStartedAt: number | undefined;
  slots: number;
};

/** A watch over workers whose state the test decides. */
function watch(overrides: Partial<Workplace> = {}, assertWritable = async () => {}) {
  const doing: Doing = {
    lastStartedAt: performance.now(),
    inProgress: 0,
    oldestStartedAt: undefined,
    slots: 2,
  };
  let looks = 0;
  const progress = createProgressWatch({
    redis,
    workplaces: [
      {
        workers: {
          slots: () => doing.slots,
          lastStartedAt: () => doing.lastStartedAt,
          inProgress: () => doing.inProgress,
          oldestStartedAt: () => {
            looks++;
            return doing.oldestStartedAt;
          },
        },
        queue,
        deadlineMs: 100,
        oneByOne: false,
        ...overrides,
      },
    ],
    assertWritable,
    stuckAfterMs: STUCK_MS,
    lookIntervalMs: LOOK_MS,
  });
  open.push(progress);
  progress.start();
  /** Resolves after more than enough time and looks to call a pod stuck. */
  const aWhile = async (each: () => void = () => {}) => {
    const [until, enough] = [Date.now() + 3 * STUCK_MS, looks + 5];
    await waitFor(
      () => {
        each();
        return Date.now() > until && looks > enough;
      },
      { what: 'some looks' },
    );
  };
  return { doing, progress, aWhile };
}
const isStuck = (progress: ProgressWatch) =>
  waitFor(() => progress.reasons().length > 0, { what: 'the watch to find out' });

test('jobs that wait beside workers with nothing to do are found, and forgotten when one is taken', async () => {
  await queue.add('job', {});
  const { progress, doing } = watch();
  await isStuck(progress);
  expect(progress.reasons()).toEqual([expect.stringMatching(/^jobs wait in work and this pod takes none/)]);
  doing.lastStartedAt = performance.now();
  await waitFor(() => progress.reasons().length === 0, { what: 'the watch to see it' });
});

test('a job that does not end is found', async () => {
  const { progress, doing } = watch();
  Object.assign(doing, { inProgress: 1, oldestStartedAt: performance.now() - 101 });
  await isStuck(progress);
  expect(progress.reasons()).toEqual([expect.stringMatching(/^a job of work does not end/)]);
});

test('both are found, and for how long, where the clock was set back meanwhile', async () => {
  await queue.add('job', {});
  const { progress, doing } = watch();
  doing.inProgress = 1;
  doing.oldestStartedAt = doing.lastStartedAt;
  const now = Date.now.bind(Date);
  const clock = vi.spyOn(Date, 'now').mockImplementation(() => now() - 3_600_000);
  onTestFinished(() => clock.mockRestore());
  await waitFor(() => progress.reasons().length === 2, { what: 'the watch to find out', timeoutMs: 20_000 });
  for (const reason of progress.reasons()) expect(reason).toMatch(/, (since )?\d s( after its deadline)?$/);
});

const healthy: Record<string, () => Promise<Parameters<typeof watch>>> = {
  'that has nothing to do': async () => [],
  'whose queue an operator has paused': async () => {
    await queue.add('job', {});
    await queue.pause();
    return [];
  },
  'whose queue an operator has bounded': async () => {
    await queue.add('job', {});
    await queue.setGlobalConcurrency(1);
    await admin.lpush(queue.toKey('active'), 'a job of another pod');
    return [];
  },
  'while Redis takes no writes': async () => {
    await queue.add('job', {});
    return [{}, () => Promise.reject(new Error('OOM'))];
  },
};
for (const [circumstance, make] of Object.entries(healthy)) {
  test(`a pod ${circumstance} is not stuck`, async () => {
    const { progress, aWhile } = watch(...(await make()));
    await aWhile();
    expect(progress.reasons()).toEqual([]);
  });
}

test('a pod whose slots are taken, be they few, is not stuck, nor one that takes one job after the other', async () => {
  await queue.add('job', {});
  const full = watch();
  full.doing.inProgress = 2;
  await full.aWhile();
  expect(full.progress.reasons()).toEqual([]);
  const shrunk = watch();
  Object.assign(shrunk.doing, { inProgress: 1, slots: 1 });
  await shrunk.aWhile();
  expect(shrunk.progress.reasons()).toEqual([]);
  const busy = watch();
  await busy.aWhile(() => {
    busy.doing.lastStartedAt = performance.now();
  });
  expect(busy.progress.reasons()).toEqual([]);
});

test('a pod is not stuck while others take one job after the other that is taken one by one', async () => {
  await queue.add('job', {});
  const { progress, aWhile } = watch({ oneByOne: true });
  let turn: Promise<unknown> = Promise.resolve();
  await aWhile(() => {
    turn = turn.then(async () => {
      await queue.add('job', {});
      await admin.rpop(queue.toKey('wait'));
    });
  });
  expect(progress.reasons()).toEqual([]);
  await turn;
  await isStuck(progress);
});
