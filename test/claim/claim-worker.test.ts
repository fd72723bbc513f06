import { Queue } from 'bullmq';
import { afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import type { ClaimOutcome } from '../../src/claim/claim.ts';
import { type ClaimWorker, createClaimWorker } from '../../src/claim/claim-worker.ts';
import { withDeadline } from '../../src/lifecycle.ts';
import type { Arming } from '../../src/outbox/wakeup.ts';
import { claimQueueName } from '../../src/queue/queues.ts';
import { createScheduler, type Scheduler } from '../../src/queue/scheduler.ts';
import { WORKER_CONNECTION } from '../../src/queue/workers.ts';
import { createRedis, type TestRedis } from '../support/servers.ts';
import { type AdminRedis, deferred, openAdminRedis, openRedis, silent } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const MORE: ClaimOutcome = { kind: 'more', events: 10 };
const ALL: ClaimOutcome = { kind: 'all', events: 3 };
const NOTHING: ClaimOutcome = { kind: 'all', events: 0 };
const NO_ROOM: ClaimOutcome = { kind: 'no-room' };

let server: TestRedis;
let admin: AdminRedis;
let queue: Queue;
/** Where requests for a claim really go. */
let scheduler: Scheduler;
const running: ClaimWorker[] = [];

beforeAll(async () => {
  server = await createRedis();
  admin = openAdminRedis(server.adminUrl);
  const redis = openRedis(server.url);
  queue = new Queue(claimQueueName('relay'), { connection: redis });
  scheduler = createScheduler({ queue, redis, pollIntervalMs: 60_000, logger: silent });
});

beforeEach(async () => {
  await admin.flushall();
});

afterEach(async () => {
  await Promise.all(running.splice(0).map((it) => it.stop(3_000)));
});

type Deps = Parameters<typeof createClaimWorker>[0];

function start(deps: Partial<Deps>): ClaimWorker {
  const worker = createClaimWorker({
    connection: openRedis(server.url, WORKER_CONNECTION),
    ...{ queuePrefix: 'bull', queueName: 'relay', logger: silent },
    claim: async () => NOTHING,
    outbox: { withClaimLock: (work) => work() },
    onTick: () => {},
    begin: () => false,
    onRefused: () => {},
    removeUnreadable: async () => false,
    arm: async () => 'deaf',
    scheduler,
    ...deps,
  });
  running.push(worker);
  worker.start();
  return worker;
}

/**
 * A claim worker whose claims come out as told, one after the other; afterwards everything is claimed. What it asked for
 * is in `log`: claims by their kind, armings by their outcome, and requests for another claim job.
 */
function startWorker(
  claims: (ClaimOutcome | Error)[],
  armings: Arming[] = [],
  { endless, locks = [], ...deps }: { endless?: ClaimOutcome; locks?: 'busy'[] } & Partial<Deps> = {},
) {
  const log: string[] = [];
  const worker = start({
    claim: async () => {
      const outcome = claims.shift() ?? endless ?? NOTHING;
      log.push(outcome instanceof Error ? 'error' : outcome.kind);
      if (outcome instanceof Error) throw outcome;
      return outcome;
    },
    outbox: {
      withClaimLock: (work) => {
        if (locks.shift() !== 'busy') return work();
        log.push('busy');
        return Promise.resolve('busy');
      },
    },
    onTick: () => void log.push('tick'),
    arm: async () => {
      const arming = armings.shift() ?? 'already-armed';
      log.push(arming);
      return arming;
    },
    scheduler: {
      wake: async () => {
        log.push('wake');
        await scheduler.wake();
      },
    },
    ...deps,
  });
  return { worker, log };
}

const idle = () =>
  waitFor(async () => (await queue.getJobCountByTypes('waiting', 'active', 'delayed')) === 0, {
    what: 'the claim queue to be empty',
  });

describe('a claim job', () => {
  test('goes on while there is more, then arms the wake-up and looks a last time', async () => {
    const { log } = startWorker([MORE, MORE, MORE, MORE, NOTHING], ['armed']);
    await scheduler.wake();
    await idle();
    expect(log).toEqual(['more', 'more', 'more', 'more', 'all', 'armed', 'all']);
  });

  test('looks again by itself while events come, with a pause, before writers are asked to wake it', async () => {
    const beganAt = performance.now();
    const { log } = startWorker([ALL, ALL, ALL, ALL, NOTHING], ['armed']);
    await scheduler.wake();
    await idle();
    expect(log).toEqual(['all', 'all', 'all', 'all', 'all', 'armed', 'all']);
    expect(performance.now() - beganAt).toBeGreaterThan(4 * 10 - 5);
  });

  test('takes all that is found in the last look', async () => {
    const { log } = startWorker([NOTHING, MORE, MORE, ALL], ['armed']);
    await scheduler.wake();
    await idle();
    expect(log).toEqual(['all', 'armed', 'more', 'more', 'all']);
  });

  test.each(['already-armed', 'deaf'] as const)(
    'needs no last look when the wake-up is %s',
    async (arming) => {
      const { log } = startWorker([ALL], [arming]);
      await scheduler.wake();
      await idle();
      expect(log).toEqual(['all', 'all', arming]);
    },
  );

  test('looks again while a writer has yet to commit', async () => {
    const { log } = startWorker([], ['writers', 'writers', 'armed']);
    await scheduler.wake();
    await idle();
    expect(log).toEqual(['all', 'writers', 'all', 'writers', 'all', 'armed', 'all']);
  });

  test('waits for room without ending', async () => {
    const { log } = startWorker(Array(6).fill(NO_ROOM));
    await scheduler.wake();
    await idle();
    expect(log).toEqual([...Array(6).fill('no-room'), 'all', 'already-armed']);
  });

  test('claims nothing while another pod claims, and asks for another claim job: what that one sees may be older', async () => {
    const { log } = startWorker([], [], { locks: ['busy', 'busy'] });
    await scheduler.wake();
    await waitFor(() => log.includes('already-armed'), { what: 'its own claim' });
    await idle();
    expect(log).toEqual(['busy', 'wake', 'busy', 'wake', 'all', 'already-armed']);
  });

  test('gives way after two seconds, and asks for another one', async () => {
    const begun = Date.now();
    const { log } = startWorker([], [], { endless: NO_ROOM });
    await scheduler.wake();
    await waitFor(() => log.includes('wake'), { what: 'the request for another claim job' });
    expect(Date.now() - begun).toBeGreaterThan(1_900);
    const { length } = log;
    await waitFor(() => log.length > length + 10, { what: 'the next claim job' });
    expect(log).not.toContain('tick');
  });

  test('that fails asks for another one after a while, without waiting for a tick', async () => {
    const { log } = startWorker([new Error('no database'), ALL]);
    await scheduler.wake();
    await waitFor(() => log.includes('all'), { what: 'the next claim' });
    expect(log.slice(0, 3)).toEqual(['error', 'wake', 'all']);
    await idle();
  });

  test('that fails does not keep the next one from running', async () => {
    const { log } = startWorker([new Error('no database'), ALL]);
    await scheduler.wake();
    await waitFor(() => log.includes('error'), { what: 'the failure' });
    await idle();
    await scheduler.wake();
    await waitFor(() => log.includes('all'), { what: 'the next claim' });
    await idle();
  });

  test('that fails again and again says so once in a while', async () => {
    const warned: string[] = [];
    const { log } = startWorker([new Error('no database'), new Error('no database'), NOTHING], [], {
      logger: { ...silent, warn: (_, message) => void warned.push(message) },
    });
    await scheduler.wake();
    await waitFor(() => log.includes('all'), { what: 'a claim that succeeds' });
    expect(log.filter((it) => it === 'error')).toHaveLength(2);
    expect(warned).toEqual(['claiming failed; nothing was claimed, trying again']);
  });

  test('begins the other duties when it is a tick, and only then', async () => {
    const { log } = startWorker([NOTHING]);
    await queue.add('tick', {}, { removeOnComplete: true });
    await idle();
    expect(log).toEqual(['tick', 'all', 'already-armed']);
    await scheduler.wake();
    await idle();
    expect(log.filter((it) => it === 'tick')).toHaveLength(1);
  });

  test('that is of another schedule begins the work of that, and claims nothing', async () => {
    const kicked: string[] = [];
    const { log } = startWorker([], [], {
      begin: (name) => {
        kicked.push(name);
        return name === 'prune';
      },
    });
    await queue.add('prune', {}, { removeOnComplete: true });
    await idle();
    expect([kicked, log]).toEqual([['prune'], []]);
    await queue.add('tick', {}, { removeOnComplete: true });
    await idle();
    expect(log).toEqual(['tick', 'all', 'already-armed']);
  });
});

describe('a claim worker', () => {
  test('works on one job at a time', async () => {
    const claiming = deferred();
    let begun = 0;
    const { workers } = start({
      claim: async () => {
        begun++;
        await claiming.promise;
        return NOTHING;
      },
    });
    await queue.add('wake', {}, { removeOnComplete: true });
    await queue.add('wake', {}, { removeOnComplete: true });
    await waitFor(() => begun === 1, { what: 'a claim' });
    expect([workers.slots(), workers.inProgress()]).toEqual([1, 1]);
    expect(await queue.getJobCounts('waiting', 'active')).toEqual({ waiting: 1, active: 1 });
    claiming.resolve();
    await idle();
    expect(begun).toBe(2);
  });

  test('stops after the claim in progress, and asks for nothing more', async () => {
    const [started, finish] = [deferred(), deferred()];
    let [finished, late, woken] = [false, 0, false];
    const worker = start({
      claim: async () => {
        if (finished) late++;
        started.resolve();
        await finish.promise;
        return MORE;
      },
      scheduler: {
        wake: async () => {
          woken = true;
        },
      },
    });
    await scheduler.wake();
    await started.promise;
    expect(worker.workers.isRunning()).toBe(true);
    const stopping = worker.stop(15_000);
    finished = true;
    finish.resolve();
    await withDeadline(10_000, stopping);
    expect(worker.workers.isRunning()).toBe(false);
    expect([late, woken]).toEqual([0, false]);
    expect(await queue.getJobCountByTypes('active')).toBe(0);
  });

  test.each(['before', 'while'])(
    'that fails %s it stops does not ask for another claim any more',
    async (when) => {
      const [started, fail] = [deferred(), deferred<never>()];
      let woken = false;
      const worker = start({
        claim: () => {
          started.resolve();
          return fail.promise;
        },
        scheduler: {
          wake: async () => {
            woken = true;
          },
        },
      });
      await scheduler.wake();
      await started.promise;
      if (when === 'before') {
        fail.reject(new Error('no database'));
        await idle();
      }
      const stopping = worker.stop(15_000);
      fail.reject(new Error('no database'));
      await stopping;
      const stoppedAt = performance.now();
      await waitFor(() => performance.now() - stoppedAt > 1_200, {
        what: 'the time after which it would ask',
      });
      expect(woken).toBe(false);
    },
  );

  test('does not wait for a claim that hangs beyond the deadline', async () => {
    const started = deferred();
    const worker = start({
      claim: () => {
        started.resolve();
        return new Promise(() => {});
      },
    });
    await scheduler.wake();
    await started.promise;
    await withDeadline(4_000, worker.stop(200));
  });
});
