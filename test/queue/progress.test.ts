import { Queue } from 'bullmq';
import type { Redis } from 'ioredis';
import { afterEach, beforeAll, beforeEach, expect, test } from 'vitest';
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

type Hands = { lastTakenAt: number; inHand: number; oldestTakenAt: number | undefined };

/** A watch over a worker whose state the test decides. */
function watch(overrides: Partial<Workplace> = {}, assertWritable = async () => {}) {
  const hands: Hands = { lastTakenAt: Date.now(), inHand: 0, oldestTakenAt: undefined };
  let looks = 0;
  const progress = createProgressWatch({
    redis,
    workplaces: [
      {
        worker: {
          places: 2,
          lastTakenAt: () => hands.lastTakenAt,
          inHand: () => hands.inHand,
          oldestTakenAt: () => {
            looks++;
            return hands.oldestTakenAt;
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
  return { hands, progress, aWhile };
}
const isStuck = (progress: ProgressWatch) =>
  waitFor(() => progress.reasons().length > 0, { what: 'the watch to find out' });

test('jobs that wait beside a worker with nothing to do are found, and forgotten when it takes one', async () => {
  await queue.add('job', {});
  const { progress, hands } = watch();
  await isStuck(progress);
  expect(progress.reasons()).toEqual([expect.stringMatching(/^jobs wait in work and this pod takes none/)]);
  hands.lastTakenAt = Date.now();
  await waitFor(() => progress.reasons().length === 0, { what: 'the watch to see it' });
});

test('a job that does not end is found', async () => {
  const { progress, hands } = watch();
  Object.assign(hands, { inHand: 1, oldestTakenAt: Date.now() - 101 });
  await isStuck(progress);
  expect(progress.reasons()).toEqual([expect.stringMatching(/^a job of work does not end/)]);
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

test('a pod that has its hands full, or takes one job after the other, is not stuck', async () => {
  await queue.add('job', {});
  const full = watch();
  full.hands.inHand = 2;
  await full.aWhile();
  expect(full.progress.reasons()).toEqual([]);
  const busy = watch();
  await busy.aWhile(() => {
    busy.hands.lastTakenAt = Date.now();
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
