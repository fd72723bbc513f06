import { setTimeout as delay } from 'node:timers/promises';
import type { Redis } from 'ioredis';
import { afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import type { Attempt, OutboxEvent, Run } from '../../src/event.ts';
import { withDeadline } from '../../src/lifecycle.ts';
import { createPublishWorker, type PublishOptions, type PublishWorker } from '../../src/queue/publish.ts';
import { createQueues, type FailedJob, type Queues } from '../../src/queue/queues.ts';
import { createSuspects } from '../../src/queue/suspects.ts';
import { WORKER_CONNECTION } from '../../src/queue/worker.ts';
import { untraced } from '../../src/tracing/tracing.ts';
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

const BASE_MS = 20;
const QUEUE = { queuePrefix: 'bull', queueName: 'relay', retryBaseDelayMs: BASE_MS };

type Failure = { id: string; attempts: number; reason: string; retryInMs: number };

let server: TestRedis;
let admin: AdminRedis;
let redis: Redis;
let queues: Queues;
const running: PublishWorker[] = [];

beforeAll(async () => {
  server = await createRedis();
  admin = openAdminRedis(server.adminUrl);
  redis = openRedis(server.url);
  queues = createQueues(redis, { ...QUEUE, maxRetryAttempts: 3 }, silent);
});

beforeEach(async () => {
  await admin.flushall();
});

afterEach(async () => {
  await Promise.all(running.splice(0).map((it) => it.stop(1_000)));
});

/** A worker whose attempts come out as told; what it noted on rows and gave up is in `notes` and `dead`. */
function startWorker(
  attempt: (event: OutboxEvent, run: Run) => Promise<Attempt>,
  options: Partial<PublishOptions> = {},
  deps: Partial<Parameters<typeof createPublishWorker>[0]> = {},
) {
  const notes: Failure[] = [];
  const dead: FailedJob[] = [];
  const worker = createPublishWorker({
    traced: untraced.publish,
    connection: openRedis(server.url, WORKER_CONNECTION),
    options: { ...QUEUE, concurrency: 10, publishTimeoutMs: 5_000, maxDelayed: 100, ...options },
    attempt,
    recordFailure: async (failure) => void notes.push(failure),
    deadLetter: async (failure) => void dead.push(failure),
    suspects: createSuspects({ redis, jobKey: queues.jobKey, maxCrashes: 3 }),
    delayedCount: async () => (await queues.inFlight()).delayed,
    forget: queues.remove,
    logger: silent,
    ...deps,
  });
  running.push(worker);
  worker.start();
  return { worker, notes, dead };
}

const outcomes = (...list: Attempt[]) => {
  const rest = [...list];
  return async (): Promise<Attempt> => rest.shift() ?? { kind: 'done' };
};
const stateOf = (event: OutboxEvent) => queues.publish.getJobState(event.eventId);
const isGone = (event: OutboxEvent) =>
  waitFor(async () => (await stateOf(event)) === 'unknown', { what: 'the job to be done' });

describe('an attempt', () => {
  test('that is done ends the job, and nothing is noted', async () => {
    const { notes, dead } = startWorker(outcomes({ kind: 'done' }));
    const event = aClaimedEvent();
    await queues.addPublishJobs([event]);
    await isGone(event);
    expect([notes, dead]).toEqual([[], []]);
  });

  test('gets the event as it was claimed, byte for byte', async () => {
    const got: OutboxEvent[] = [];
    startWorker(async (event) => {
      got.push(event);
      return { kind: 'done' };
    });
    const event = aClaimedEvent({
      payload: '{"n": 12345678901234567890.10, "t": "Jörg \\u0000"}',
      tenantId: 't',
    });
    await queues.addPublishJobs([event]);
    await isGone(event);
    expect(got).toEqual([event]);
  });

  test('is told whether its job was ever begun before, and whether one with it may have failed since', async () => {
    const runs: Run[] = [];
    const outcome = outcomes(
      { kind: 'postpone', reason: 'x' },
      { kind: 'retry', reason: 'x' },
      { kind: 'give-up', reason: 'x' },
    );
    const { dead } = startWorker(
      async (_, run) => {
        runs.push(run);
        return outcome();
      },
      { retryBaseDelayMs: 600_000 },
    );
    const event = aClaimedEvent();
    await queues.addPublishJobs([event]);
    await waitFor(() => dead.length > 0, { what: 'the event to be given up' });
    const job = await queues.publish.getJob(event.eventId);
    await job?.retry();
    await isGone(event);
    expect(runs).toEqual([
      { isFirst: true, isLate: false },
      { isFirst: false, isLate: false },
      { isFirst: false, isLate: true },
      { isFirst: false, isLate: true },
    ]);
  });

  test('is late when its job is old enough for one before it to have been retried', async () => {
    const runs: Run[] = [];
    startWorker(async (_, run) => {
      runs.push(run);
      return runs.length === 1 ? { kind: 'postpone', reason: 'x' } : { kind: 'done' };
    });
    const event = aClaimedEvent();
    await queues.addPublishJobs([event]);
    await isGone(event);
    expect(runs[1]).toEqual({ isFirst: false, isLate: true });
  });

  test('that was refused is retried, each time after twice the delay, then given up', async () => {
    const { notes, dead } = startWorker(async () => ({ kind: 'retry', reason: 'WRONGTYPE' }));
    const event = aClaimedEvent({ id: '42' });
    await queues.addPublishJobs([event]);
    await waitFor(() => dead.length > 0, { what: 'the event to be given up' });
    expect(notes).toEqual(
      [1, 2, 3].map((attempts) => ({
        ...{ id: '42', attempts, reason: 'WRONGTYPE', retryInMs: BASE_MS * 2 ** (attempts - 1) },
      })),
    );
    expect(dead).toMatchObject([{ event, attempts: 4, reason: 'WRONGTYPE', failedAt: expect.any(Date) }]);
    expect(await stateOf(event)).toBe('failed');
  });

  test('of a job that was made again counts from the attempts before', async () => {
    const { notes, dead } = startWorker(async () => ({ kind: 'retry', reason: 'x' }));
    await queues.addPublishJobs([aClaimedEvent({ attempts: 2 })]);
    await waitFor(() => dead.length > 0, { what: 'the event to be given up' });
    expect(notes).toMatchObject([{ attempts: 3, retryInMs: BASE_MS * 4 }]);
    expect(dead).toMatchObject([{ attempts: 4 }]);
  });

  test('that can never succeed is given up at once', async () => {
    const { notes, dead } = startWorker(async () => ({ kind: 'give-up', reason: 'topic is empty' }));
    const event = aClaimedEvent();
    await queues.addPublishJobs([event]);
    await waitFor(() => dead.length > 0, { what: 'the event to be given up' });
    expect(dead).toMatchObject([{ attempts: 1, reason: 'topic is empty' }]);
    expect(notes).toEqual([]);
    expect(await stateOf(event)).toBe('failed');
  });

  test('that nobody could make is postponed at no cost, and made soon', async () => {
    const postponed: Attempt = { kind: 'postpone', reason: 'OOM' };
    const { notes, dead } = startWorker(outcomes(postponed));
    const event = aClaimedEvent({ attempts: 3 }); // its only attempt is left
    await queues.addPublishJobs([event]);
    await waitFor(async () => (await stateOf(event)) === 'delayed', { what: 'the job to be postponed' });
    const job = await queues.publish.getJob(event.eventId);
    expect(job).toMatchObject({ attemptsMade: 0 });
    expect(job?.delay).toBeLessThanOrEqual(1_000);
    await isGone(event);
    expect([notes, dead]).toEqual([[], []]);
  });

  test('whose turn has not come is made very soon, and then less and less often', async () => {
    const madeAt: number[] = [];
    const { notes } = startWorker(async () => {
      madeAt.push(performance.now());
      return { kind: madeAt.length < 5 ? 'wait' : 'done' };
    });
    const event = aClaimedEvent();
    await queues.addPublishJobs([event]);
    await isGone(event);
    const waits = madeAt.slice(1).map((at, i) => at - (madeAt[i] as number));
    for (const [i, wait] of waits.entries()) expect(wait).toBeGreaterThanOrEqual(50 * 2 ** i - 5);
    expect(waits[0]).toBeLessThan(400);
    expect(notes).toEqual([]);
  });

  test('that hangs is ended by its deadline, and made again', async () => {
    let attempts = 0;
    const { notes, dead } = startWorker(
      () => {
        attempts++;
        return attempts === 1 ? new Promise(() => {}) : Promise.resolve({ kind: 'done' });
      },
      { publishTimeoutMs: 100 },
    );
    const event = aClaimedEvent();
    await queues.addPublishJobs([event]);
    await isGone(event);
    expect(attempts).toBe(2);
    expect([notes, dead]).toEqual([[], []]);
  });

  test('that can be neither made nor postponed lets go of its job, which is found and made again at no cost', async () => {
    // The connection swallows the first postponement, as a half-open network does.
    const connection = openRedis(server.url, WORKER_CONNECTION);
    const send = connection.sendCommand.bind(connection);
    let swallowed = 0;
    let event = aClaimedEvent();
    connection.sendCommand = (command, stream) => {
      const key = `bull:relay-publish:${event.eventId}`;
      const postpones = /^eval/.test(command.name) && command.args[2] === 'bull:relay-publish:marker';
      if (postpones && command.args.includes(key) && swallowed++ === 0) return new Promise(() => {});
      return send(command, stream);
    };
    const { notes, dead } = startWorker(
      outcomes({ kind: 'postpone', reason: 'away' }),
      { publishTimeoutMs: 300 },
      { connection },
    );
    event = aClaimedEvent({ attempts: 3 });
    await queues.addPublishJobs([event]);
    await waitFor(async () => (await stateOf(event)) === 'unknown', {
      what: 'the job to be done',
      timeoutMs: 25_000,
    });
    expect(swallowed).toBe(1);
    expect([notes, dead]).toEqual([[], []]);
  }, 40_000);

  test('that throws is nobody’s fault: it is made again', async () => {
    let attempts = 0;
    const { dead } = startWorker(async () => {
      attempts++;
      if (attempts === 1) throw new Error('unforeseen');
      return { kind: 'done' };
    });
    const event = aClaimedEvent({ attempts: 3 });
    await queues.addPublishJobs([event]);
    await isGone(event);
    expect(dead).toEqual([]);
  });
});

test('attempts that take the longer the more are made at once are made fewer at a time, and none for ever', async () => {
  // One server for all, which does not know what was given up meanwhile: 200 at once take a second.
  const SERVED_IN_MS = 5;
  let served = Promise.resolve();
  let attempts = 0;
  const { worker } = startWorker(
    () => {
      attempts++;
      served = served.then(() => delay(SERVED_IN_MS));
      return served.then((): Attempt => ({ kind: 'done' }));
    },
    { concurrency: 200, publishTimeoutMs: 200 },
  );
  const events = Array.from({ length: 300 }, () => aClaimedEvent());
  await queues.addPublishJobs(events);
  const left = async () => (await queues.inFlight()).total;
  await waitFor(async () => (await left()) === 0, { what: 'all to be done', timeoutMs: 25_000 });
  expect(attempts).toBeGreaterThan(events.length);
  expect(worker.worker.places).toBeLessThan(200);
}, 40_000);

describe('a job that is listed as active, and nobody works on it,', () => {
  test('is found and done', async () => {
    const event = aClaimedEvent();
    await queues.addPublishJobs([event]);
    await admin.lmove(queues.publish.toKey('wait'), queues.publish.toKey('active'), 'RIGHT', 'LEFT');
    const { dead } = startWorker(outcomes());
    await isGone(event);
    expect(dead).toEqual([]);
  });

  test('and has no hash either is cleaned away, so that its event can be added again', async () => {
    const event = aClaimedEvent();
    await admin.lpush(queues.publish.toKey('active'), event.eventId);
    const got: OutboxEvent[] = [];
    startWorker(async (it) => {
      got.push(it);
      return { kind: 'done' };
    });
    await waitFor(async () => (await admin.llen(queues.publish.toKey('active'))) === 0, {
      what: 'the list to be empty',
    });
    await isGone(event);
    expect(await admin.exists(queues.jobKey(event.eventId))).toBe(0);
    await queues.addPublishJobs([event]);
    await waitFor(() => got.length > 0, { what: 'the event to be published' });
    expect(got).toEqual([event]);
  });
});

describe('when too many retries wait in Redis', () => {
  test('further ones wait on their rows: the job is gone, the row knows when', async () => {
    const { notes, dead } = startWorker(async () => ({ kind: 'retry', reason: 'x' }), { maxDelayed: 0 });
    const event = aClaimedEvent({ id: '7', attempts: 1 });
    await queues.addPublishJobs([event]);
    await isGone(event);
    expect(notes).toEqual([{ id: '7', attempts: 2, reason: 'x', retryInMs: BASE_MS * 2 }]);
    expect(dead).toEqual([]);
  });

  test('the last attempt is given up all the same', async () => {
    const { dead } = startWorker(async () => ({ kind: 'retry', reason: 'x' }), { maxDelayed: 0 });
    const event = aClaimedEvent({ attempts: 3 });
    await queues.addPublishJobs([event]);
    await waitFor(() => dead.length > 0, { what: 'the event to be given up' });
    expect(await stateOf(event)).toBe('failed');
  });

  test('no more of them than allowed stay in Redis', async () => {
    const long = createQueues(redis, { ...QUEUE, retryBaseDelayMs: 60_000, maxRetryAttempts: 3 }, silent);
    const { notes } = startWorker(async () => ({ kind: 'retry', reason: 'x' }), {
      ...{ maxDelayed: 5, concurrency: 10 },
    });
    await long.addPublishJobs(Array.from({ length: 12 }, () => aClaimedEvent()));
    await waitFor(() => notes.length === 12, { what: 'all to have failed once' });
    // Many fail at the same moment: each must see that there are too many, none may count on the others.
    await waitFor(async () => (await queues.inFlight()).total <= 5, { what: 'the others to be gone' });
    expect(new Set(notes.map((it) => it.retryInMs))).toEqual(new Set([60_000]));
  });

  test('a retry whose row cannot be noted stays in Redis', async () => {
    startWorker(
      async () => ({ kind: 'retry', reason: 'x' }),
      { maxDelayed: 0 },
      { recordFailure: () => Promise.reject(new Error('no database')) },
    );
    const long = createQueues(redis, { ...QUEUE, retryBaseDelayMs: 60_000, maxRetryAttempts: 3 }, silent);
    const event = aClaimedEvent();
    await long.addPublishJobs([event]);
    await waitFor(async () => (await stateOf(event)) === 'delayed', { what: 'the job to wait' });
  });
});

test('of many that fail at once a few are written at a time, and no more fail than can be written', async () => {
  const [MANY, PLACES, AT_ONCE, WRITING_MS] = [80, 10, 4, 20];
  let [failed, begun, now, most, mostAhead] = [0, 0, 0, 0, 0];
  const write = async () => {
    begun++;
    most = Math.max(most, ++now);
    await delay(WRITING_MS);
    now--;
  };
  startWorker(
    async ({ id }) => {
      mostAhead = Math.max(mostAhead, ++failed - begun);
      return { kind: Number(id) % 2 === 0 ? 'give-up' : 'retry', reason: 'x' };
    },
    { concurrency: PLACES, maxDelayed: MANY },
    { recordFailure: write, deadLetter: write },
  );
  const long = createQueues(redis, { ...QUEUE, retryBaseDelayMs: 60_000, maxRetryAttempts: 3 }, silent);
  await long.addPublishJobs(Array.from({ length: MANY }, (_, id) => aClaimedEvent({ id: String(id) })));
  await waitFor(() => begun === MANY, { what: 'all to be written' });
  expect(most).toBe(AT_ONCE);
  // Each place has one that has failed, and one whose place was taken may wait to be written.
  expect(mostAhead).toBeLessThanOrEqual(2 * PLACES);
});

describe('a worker', () => {
  test('lives on when nothing can be noted on rows and no dead letter be written', async () => {
    startWorker(
      async (event) => (event.payload === '"bad"' ? { kind: 'give-up', reason: 'bad' } : { kind: 'done' }),
      {},
      {
        recordFailure: () => Promise.reject(new Error('no database')),
        deadLetter: () => Promise.reject(new Error('no database')),
      },
    );
    const bad = aClaimedEvent({ payload: '"bad"' });
    const good = aClaimedEvent();
    await queues.addPublishJobs([bad]);
    await waitFor(async () => (await stateOf(bad)) === 'failed', { what: 'the bad one to fail' });
    await queues.addPublishJobs([good]);
    await isGone(good);
  });

  test('that stops takes no more jobs and finishes those in hand', async () => {
    const [started, finish] = [deferred(), deferred()];
    const { worker } = startWorker(
      async () => {
        started.resolve();
        await finish.promise;
        return { kind: 'done' };
      },
      { concurrency: 1 },
    );
    const [first, second] = [aClaimedEvent(), aClaimedEvent()];
    await queues.addPublishJobs([first]);
    await started.promise;
    await queues.addPublishJobs([second]);
    const stopping = worker.stop(5_000);
    finish.resolve();
    await withDeadline(4_000, stopping);
    expect(await stateOf(first)).toBe('unknown');
    expect(await stateOf(second)).toBe('waiting');
    expect(worker.isRunning()).toBe(false);
  });

  test('that stops waits for the dead letter that is being written', async () => {
    const [started, finish] = [deferred(), deferred()];
    const order: string[] = [];
    const { worker } = startWorker(
      async () => ({ kind: 'give-up', reason: 'x' }),
      {},
      {
        deadLetter: async () => {
          started.resolve();
          await finish.promise;
          order.push('written');
        },
      },
    );
    await queues.addPublishJobs([aClaimedEvent()]);
    await started.promise;
    const stopping = worker.stop(5_000).then(() => order.push('stopped'));
    await waitFor(async () => !(await admin.client('LIST'))?.toString().includes('cmd=bzpopmin'), {
      what: 'the worker to have closed its own connection',
    });
    await queues.inFlight();
    finish.resolve();
    await withDeadline(4_000, stopping);
    expect(order).toEqual(['written', 'stopped']);
  });

  test('that stops does not wait beyond its deadline: the job is handed back and another takes it over', async () => {
    const started = deferred();
    const hanging = startWorker(
      () => {
        started.resolve();
        return new Promise(() => {});
      },
      { publishTimeoutMs: 60_000 },
    );
    const event = aClaimedEvent();
    await queues.addPublishJobs([event]);
    await started.promise;
    await withDeadline(5_000, hanging.worker.stop(100));
    const taken = deferred<OutboxEvent>();
    startWorker(async (it) => {
      taken.resolve(it);
      return { kind: 'done' };
    });
    expect(await withDeadline(20_000, taken.promise)).toEqual(event);
    await isGone(event);
  });

  test('does not spin while Redis is full and jobs are waiting; it goes on once there is room', async () => {
    const event = aClaimedEvent();
    await queues.addPublishJobs([event]);
    await admin.config('SET', 'maxmemory', '1');
    try {
      startWorker(outcomes());
      const refusals = async () => {
        const [, count = '0'] = /total_error_replies:(\d+)/.exec(await admin.info('stats')) ?? [];
        return Number(count);
      };
      await waitFor(async () => (await refusals()) > 0, { what: 'the worker to be refused' });
      const before = await refusals();
      const begun = Date.now();
      await waitFor(() => Date.now() - begun > 1_500, { what: 'a second and a half to pass' });
      expect((await refusals()) - before).toBeLessThan(50);
    } finally {
      await admin.config('SET', 'maxmemory', '0');
    }
    await isGone(event);
  });
});
