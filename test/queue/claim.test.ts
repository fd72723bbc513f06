import { Queue } from 'bullmq';
import { afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { withDeadline } from '../../src/lifecycle.ts';
import {
  type ClaimRound,
  type ClaimWorker,
  claimable,
  createClaimWorker,
  roomAhead,
} from '../../src/queue/claim.ts';
import { claimQueueName } from '../../src/queue/queues.ts';
import { createScheduler } from '../../src/queue/scheduler.ts';
import { WORKER_CONNECTION } from '../../src/queue/worker.ts';
import { createRedis, type TestRedis } from '../support/servers.ts';
import { type AdminRedis, deferred, openAdminRedis, openRedis, silent } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

type Arming = 'armed' | 'already-armed' | 'writers' | 'deaf';

const MORE: ClaimRound = { kind: 'more', events: 10 };
const ALL: ClaimRound = { kind: 'all', events: 3 };
const NOTHING: ClaimRound = { kind: 'all', events: 0 };

let server: TestRedis;
let admin: AdminRedis;
let queue: Queue;
/** The real wish for a claim. */
let wake: () => Promise<void>;
const running: ClaimWorker[] = [];

beforeAll(async () => {
  server = await createRedis();
  admin = openAdminRedis(server.adminUrl);
  const redis = openRedis(server.url);
  queue = new Queue(claimQueueName('relay'), { connection: redis });
  wake = createScheduler({ queue, redis, pollIntervalMs: 60_000, logger: silent }).wake;
});

beforeEach(async () => {
  await admin.flushall();
});

afterEach(async () => {
  await Promise.all(running.splice(0).map((it) => it.stop(3_000)));
});

/**
 * A claim worker whose rounds come out as told, one after the other; afterwards everything is claimed. What it asked
 * for is in `log`: rounds by their kind, armings by their outcome, and wishes for another turn.
 */
function startWorker(
  rounds: (ClaimRound | Error)[],
  armings: Arming[] = [],
  { endless, turns = [] }: { endless?: ClaimRound; turns?: 'busy'[] } = {},
) {
  const log: string[] = [];
  const worker = createClaimWorker({
    connection: openRedis(server.url, WORKER_CONNECTION),
    ...{ queuePrefix: 'bull', queueName: 'relay', logger: silent },
    claim: async () => {
      const round = rounds.shift() ?? endless ?? NOTHING;
      log.push(round instanceof Error ? 'error' : round.kind);
      if (round instanceof Error) throw round;
      return round;
    },
    exclusively: (turn) => {
      if (turns.shift() !== 'busy') return turn();
      log.push('busy');
      return Promise.resolve('busy');
    },
    maintain: async () => void log.push('maintain'),
    arm: async () => {
      const arming = armings.shift() ?? 'already-armed';
      log.push(arming);
      return arming;
    },
    wake: async () => {
      log.push('wake');
      await wake();
    },
  });
  running.push(worker);
  worker.start();
  return { worker, log };
}

const idle = () =>
  waitFor(async () => (await queue.getJobCountByTypes('waiting', 'active', 'delayed')) === 0, {
    what: 'the claim queue to be empty',
  });

/** Rounds may overlap, so how many there are is not said; that some lie between two other steps is. */
const stepsOf = (log: readonly string[]) =>
  log
    .map((it) => (it === 'more' || it === 'all' || it === 'no-room' ? 'claim' : it))
    .filter((it, at, all) => it !== all[at - 1]);

test('events that were read ahead leave the room to claims, their successors, and others like them', () => {
  const options = { maxInFlight: 1_000, concurrency: 100 };
  const inFlight = { waiting: 300, active: 50, delayed: 10, failed: 5, total: 360 };
  expect(roomAhead(inFlight, options)).toBe(1_000 - 360 - 100 - 64);
  expect(roomAhead({ ...inFlight, active: 350, total: 660 }, options)).toBeLessThan(0);
  expect(
    roomAhead({ waiting: 0, active: 0, delayed: 0, failed: 0, total: 0 }, { ...options, maxInFlight: 20 }),
  ).toBeLessThan(0);
});

describe('a claim job', () => {
  test('goes on while there is more, then arms the wake-up and looks a last time', async () => {
    const rounds: ClaimRound[] = [MORE, MORE, MORE, MORE, ALL];
    const { log } = startWorker(rounds, ['armed']);
    await wake();
    await idle();
    expect(stepsOf(log)).toEqual(['claim', 'armed', 'claim']);
    expect(log.lastIndexOf('more')).toBeLessThan(log.indexOf('armed'));
    expect(rounds).toEqual([]);
  });

  test('looks again by itself while events come, with a pause, before writers are asked to wake it', async () => {
    const some: ClaimRound = { kind: 'all', events: 3 };
    const beganAt = performance.now();
    const { log } = startWorker([some, some, some, some, NOTHING], ['armed']);
    await wake();
    await idle();
    expect(log).toEqual(['all', 'all', 'all', 'all', 'all', 'armed', 'all']);
    expect(performance.now() - beganAt).toBeGreaterThan(4 * 10 - 5);
  });

  test('takes all that is found in the last look', async () => {
    const rounds: ClaimRound[] = [NOTHING, MORE, MORE, MORE];
    const { log } = startWorker(rounds, ['armed']);
    await wake();
    await idle();
    expect(stepsOf(log)).toEqual(['claim', 'armed', 'claim']);
    expect(log.indexOf('more')).toBeGreaterThan(log.indexOf('armed'));
    expect(rounds).toEqual([]);
  });

  test.each(['already-armed', 'deaf'] as const)(
    'needs no last look when the wake-up is %s',
    async (arming) => {
      const { log } = startWorker([ALL], [arming]);
      await wake();
      await idle();
      expect(stepsOf(log)).toEqual(['claim', arming]);
    },
  );

  test('looks again while a writer has yet to commit', async () => {
    const { log } = startWorker([], ['writers', 'writers', 'armed']);
    await wake();
    await idle();
    expect(stepsOf(log)).toEqual(['claim', 'writers', 'claim', 'writers', 'claim', 'armed', 'claim']);
  });

  test('waits for room without ending', async () => {
    const { log } = startWorker(Array(6).fill({ kind: 'no-room' }));
    await wake();
    await idle();
    expect(stepsOf(log)).toEqual(['claim', 'already-armed']);
    expect(log.filter((it) => it === 'no-room')).toHaveLength(6);
  });

  test('asks for another claim while another pod is claiming: what that one sees may be older', async () => {
    const { log } = startWorker([], [], { turns: ['busy', 'busy'] });
    await wake();
    await waitFor(() => log.includes('already-armed'), { what: 'its own turn' });
    await idle();
    expect(stepsOf(log)).toEqual(['busy', 'wake', 'busy', 'wake', 'claim', 'already-armed']);
  });

  test('gives way after two seconds, and asks for another turn', async () => {
    const begun = Date.now();
    const { log } = startWorker([], [], { endless: { kind: 'no-room' } });
    await wake();
    await waitFor(() => log.includes('wake'), { what: 'the wish for another turn' });
    expect(Date.now() - begun).toBeGreaterThan(1_900);
    const { length } = log;
    await waitFor(() => log.length > length + 10, { what: 'the next turn' });
    expect(log).not.toContain('maintain');
  });

  test('that fails asks for another one after a while, without waiting for a tick', async () => {
    const { log } = startWorker([new Error('no database'), ALL]);
    await wake();
    await waitFor(() => log.includes('all'), { what: 'the next claim' });
    expect(log.slice(0, 3)).toEqual(['error', 'wake', 'all']);
    await idle();
  });

  test('that fails does not keep the next one from running', async () => {
    const { log } = startWorker([new Error('no database'), ALL]);
    await wake();
    await waitFor(() => log.includes('error'), { what: 'the failure' });
    await idle();
    await wake();
    await waitFor(() => log.includes('all'), { what: 'the next claim' });
    await idle();
  });

  test('sees to the other duties first when it is a tick, and only then', async () => {
    const { log } = startWorker([ALL]);
    await queue.add('tick', {}, { removeOnComplete: true });
    await idle();
    expect(stepsOf(log)).toEqual(['maintain', 'claim', 'already-armed']);
    await wake();
    await idle();
    expect(log.filter((it) => it === 'maintain')).toHaveLength(1);
  });
});

describe('a claim worker', () => {
  test('stops after the round in hand, and asks for nothing more', async () => {
    const [started, finish] = [deferred(), deferred()];
    let finished = false;
    let late = 0;
    let woken = false;
    const worker = createClaimWorker({
      connection: openRedis(server.url, WORKER_CONNECTION),
      ...{ queuePrefix: 'bull', queueName: 'relay', logger: silent },
      claim: async () => {
        if (finished) late++;
        started.resolve();
        await finish.promise;
        return MORE;
      },
      exclusively: (turn) => turn(),
      maintain: async () => {},
      arm: async () => 'deaf',
      wake: async () => {
        woken = true;
      },
    });
    worker.start();
    await wake();
    await started.promise;
    expect(worker.isRunning()).toBe(true);
    const stopping = worker.stop(5_000);
    finished = true;
    finish.resolve();
    await withDeadline(4_000, stopping);
    expect(worker.isRunning()).toBe(false);
    expect([late, woken]).toEqual([0, false]);
    expect(await queue.getJobCountByTypes('active')).toBe(0);
  });

  test('does not wait for a round that hangs beyond the deadline', async () => {
    const started = deferred();
    const worker = createClaimWorker({
      connection: openRedis(server.url, WORKER_CONNECTION),
      ...{ queuePrefix: 'bull', queueName: 'relay', logger: silent },
      claim: () => {
        started.resolve();
        return new Promise(() => {});
      },
      exclusively: (turn) => turn(),
      ...{ maintain: async () => {}, arm: async () => 'deaf', wake: async () => {} },
    });
    worker.start();
    await wake();
    await started.promise;
    await withDeadline(4_000, worker.stop(200));
  });

  test('says when it last came to an end', async () => {
    const { worker } = startWorker([ALL]);
    const before = worker.lastTurnAt();
    await wake();
    await idle();
    await waitFor(() => worker.lastTurnAt() >= before, { what: 'the turn to end' });
  });
});

describe('room for further jobs', () => {
  const counts = (waiting: number, active: number, delayed = 0) => ({
    ...{ waiting, active, delayed, failed: 0, total: waiting + active + delayed },
  });
  const options = { ordering: 'aggregate', maxInFlight: 1_000, concurrency: 200, batchSize: 100 } as const;

  test('an empty queue takes a batch, a full one nothing', () => {
    expect(claimable(counts(0, 0), 0, options)).toBe(100);
    expect(claimable(counts(800, 200), 0, options)).toBe(0);
  });

  test.each([...Array.from({ length: 40 }, (_, i) => i + 1), 100, 1_000])(
    'in order, never more than %i with every successor',
    (maxInFlight) => {
      for (let delayed = 0; delayed <= maxInFlight / 4; delayed += Math.ceil(maxInFlight / 40)) {
        let waiting = 0;
        for (;;) {
          const limit = claimable(counts(waiting, 0, delayed), 0, { ...options, maxInFlight });
          if (limit === 0) break;
          waiting += limit;
        }
        // All that this pod can work on are active at once, retries too, and each has brought its successor.
        const most = waiting + delayed + Math.min(waiting + delayed, options.concurrency);
        expect(most).toBeLessThanOrEqual(maxInFlight > 2 ? maxInFlight : maxInFlight + 1);
        expect(waiting, 'there is always room for some').toBeGreaterThan(0);
      }
    },
  );

  test('jobs that a round is about to add are counted, and without order a job takes one place', () => {
    expect(claimable(counts(0, 0), 1_000, options)).toBe(0);
    expect(claimable(counts(750, 200), 0, { ...options, ordering: 'none' })).toBe(0);
    expect(claimable(counts(600, 0), 0, { ...options, ordering: 'none', batchSize: 400 })).toBe(400);
  });
});
