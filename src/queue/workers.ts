import { DelayedError, type Job, type Telemetry, UnrecoverableError, Worker } from 'bullmq';
import type { Redis, RedisOptions } from 'ioredis';
import { succeedsWithin } from '../lifecycle.ts';
import { createSpacedWarnings, type Logger } from '../telemetry/logger.ts';

/** BullMQ's workers, several of them for one queue in a pod. */

/** A worker waits up to 10 s for a job. An answer that takes longer than this means a lost connection. */
const BLOCKING_ANSWER_TIMEOUT_MS = 15_000;

/**
 * Connections of BullMQ's workers: commands wait until Redis is back, and are sent again on the next connection. A command
 * that ran twice finds its lock gone, or leaves a job that no worker has: the stalled check finds both.
 */
export const WORKER_CONNECTION: RedisOptions = {
  maxRetriesPerRequest: null,
  enableOfflineQueue: true,
  socketTimeout: BLOCKING_ANSWER_TIMEOUT_MS,
};

/** Lock of a job. Another pod takes over a killed pod's jobs after this and one or two stalled checks. */
const LOCK_DURATION_MS = 5_000;
/**
 * Workers of one queue in a pod, at most. A worker fetches one job after the other and begins none while there are
 * more, up to its concurrency: one with 300 slots takes 300 ms for that, eight with 38 each 40 ms (measured).
 */
const WORKERS_MAX = 8;
/** Slots that a pod keeps however long jobs take: rows are acknowledged together. */
const FEWEST_SLOTS = 8;
/** Pause of a worker that Redis refused. By itself, BullMQ asks again at once, 10,000 times a second (measured). */
const REFUSED_PAUSE_MS = 1_000;
/** Interval at which the same error of a worker is logged: an outage makes one a second. */
const REPEAT_AFTER_MS = 10_000;
const ERROR = 'a worker met an error; it goes on';
const JOB_ID = /[\da-f]{8}(-[\da-f]{4}){3}-[\da-f]{12}/g;

/** What becomes of a job whose processor has ended. */
export type Fate<R> =
  | Readonly<{ kind: 'completed'; result: R }>
  /** It runs again after `ms`. The attempt does not count. */
  | Readonly<{ kind: 'delayed'; ms: number }>
  /** An attempt failed: BullMQ's backoff, or after the last one the failed jobs. */
  | Readonly<{ kind: 'failed'; reason: string; isFinal: boolean }>;

/** One run of a job. */
export type Run<T> = Readonly<{
  id: string;
  name: string;
  /** Null where another program made the job. An empty object where Redis lost the job's hash and kept its id in a list. */
  data: T | null;
  /** Unix time in ms. */
  madeAt: number;
  /** Attempts that failed before. */
  failures: number;
  /** How often the job was started, this run included. */
  starts: number;
  /** How often BullMQ found the job without its worker. */
  stalls: number;
}>;

/** An attempt that failed. */
export type FailedRun<T> = Run<T> &
  Readonly<{
    error: Error;
    /** This attempt included. */
    failures: number;
    /** When the last attempt failed; null while there are more. */
    failedForGoodAt: Date | null;
    /** Until the next attempt. */
    retryInMs: number;
  }>;

export type Workers = ReturnType<typeof createWorkers>;

/**
 * Workers of one queue; together they work on `concurrency` jobs at once.
 *
 * @param deps.onCompleted told after the job has ended in Redis, if it was this worker that ended it
 * @param deps.onFailed told after each failed attempt; must not throw
 * @param deps.onStalled told of a job that was found without its worker; must not reject
 * @param deps.onRefused told why, when Redis lets a worker take or end no job: then there are no attempts
 */
export function createWorkers<T, R = void>(deps: {
  queueName: string;
  queuePrefix: string;
  connection: Redis;
  concurrency: number;
  process: (run: Run<T>) => Promise<Fate<R>>;
  onCompleted?: (run: Run<T>, result: R) => void;
  onFailed?: (run: FailedRun<T>) => void;
  onRefused?: (reason: string) => void;
  onStalled?: (jobId: string) => Promise<void>;
  telemetry?: Telemetry | undefined;
  /**
   * Time after which a job is given up. When one takes more than half of it, half as many are in progress at once from
   * then on, and one more for each that takes less than a quarter. Putting a job off may take as long as well: then
   * its lock ends, and the stalled check finds it.
   */
  timeoutMs: number;
  logger: Logger;
}) {
  const { queueName, concurrency, logger } = deps;
  const count = Math.min(WORKERS_MAX, concurrency);
  let slots = concurrency;
  let shrunkAt = Number.NEGATIVE_INFINITY;
  let lastStartedAt = performance.now();
  let isStopping = false;
  const startedAt = new Map<Job<T>, number>();
  const warn = createSpacedWarnings(logger, REPEAT_AFTER_MS);
  const pauses = new Set<NodeJS.Timeout>();
  /** None before the start: each connects as soon as it is made. */
  let workers: Worker<T, R>[] = [];

  async function process(job: Job<T, R>, token?: string): Promise<R> {
    const beganAt = performance.now();
    lastStartedAt = beganAt;
    startedAt.set(job, beganAt);
    try {
      const fate = await deps.process(runOf(job));
      fitSlots(beganAt, fate.kind === 'completed');
      switch (fate.kind) {
        case 'completed':
          return fate.result;
        case 'delayed':
          // If this fails, the job stays active, its lock ends, and the stalled check finds it; the attempt does not count.
          // Waiting longer would renew the lock for ever.
          await succeedsWithin(deps.timeoutMs, job.moveToDelayed(Date.now() + fate.ms, token));
          throw new DelayedError();
        case 'failed':
          throw fate.isFinal ? new UnrecoverableError(fate.reason) : new Error(fate.reason);
      }
    } finally {
      startedAt.delete(job);
    }
  }

  function createOne(index: number): Worker<T, R> {
    const worker = new Worker<T, R>(queueName, process, {
      connection: deps.connection,
      prefix: deps.queuePrefix,
      autorun: false,
      concurrency: shareOf(slots, index),
      lockDuration: LOCK_DURATION_MS,
      stalledInterval: LOCK_DURATION_MS / 2,
      // After Redis refused a worker, jobs that wait already are found this soon.
      drainDelay: 2,
      // How long a worker waits after an error of the connection before it asks again.
      runRetryDelay: 1_000,
      // For jobs without the relay's options: Redis lost the hash, or another program added the job.
      removeOnComplete: { count: 0 },
      // Stalls never fail a job: the poison guard counts crashes.
      maxStalledCount: 1_000_000,
      ...(deps.telemetry && { telemetry: deps.telemetry }),
    });
    worker.on('error', (error) => {
      report(error);
      if (error.name !== 'ReplyError') return;
      deps.onRefused?.(error.message);
      pauseAWhile(worker);
    });
    worker.on('stalled', (jobId) => void deps.onStalled?.(jobId));
    worker.on('completed', (job, result) => deps.onCompleted?.(runOf(job), result));
    worker.on('failed', (job, error) => {
      if (!job) return;
      deps.onFailed?.({
        ...runOf(job),
        error,
        failedForGoodAt: job.finishedOn ? new Date(job.finishedOn) : null,
        retryInMs: job.delay,
      });
    });
    return worker;
  }

  const shareOf = (all: number, index: number): number =>
    Math.max(1, Math.floor(all / count) + (index < all % count ? 1 : 0));

  /** After a refusal that concerns every job (OOM, READONLY, NOPERM). */
  function pauseAWhile(worker: Worker<T, R>): void {
    if (isStopping || worker.isPaused()) return;
    void worker.pause(true);
    const timer = setTimeout(() => {
      pauses.delete(timer);
      if (!isStopping) void worker.resume();
    }, REFUSED_PAUSE_MS);
    pauses.add(timer);
  }

  function report(error: Error): void {
    // While Redis is away, the log has a line about that already.
    if (deps.connection.status !== 'ready') {
      logger.debug({ err: error, queue: queueName }, ERROR);
      return;
    }
    // After a pod has slept, each of its jobs makes the same error, with its own id in it.
    warn({ err: error, queue: queueName }, ERROR, error.message.replace(JOB_ID, '#'));
  }

  function setSlots(wanted: number): void {
    slots = wanted;
    workers.forEach((worker, index) => {
      worker.concurrency = shareOf(wanted, index);
    });
  }

  /**
   * Fits the number of slots to the time that jobs take. Without this, a pod with too little CPU gives up most of its jobs,
   * and publishes next to nothing for a minute (measured). Jobs that began before the last change do not count.
   */
  function fitSlots(beganAt: number, isCompleted: boolean): void {
    const tookMs = performance.now() - beganAt;
    const fewer = Math.max(FEWEST_SLOTS, Math.floor(slots / 2));
    if (tookMs > deps.timeoutMs / 2) {
      if (beganAt < shrunkAt || fewer >= slots) return;
      shrunkAt = performance.now();
      setSlots(fewer);
      logger.warn(
        { queue: queueName, seconds: Math.round(tookMs / 100) / 10, atOnce: slots },
        'attempts take long; fewer events are published at once',
      );
    } else if (isCompleted && tookMs < deps.timeoutMs / 4 && slots < concurrency) setSlots(slots + 1);
  }

  return {
    start(): void {
      workers = Array.from({ length: count }, (_, index) => createOne(index));
      for (const worker of workers)
        worker.run().catch((error) => logger.error({ err: error, queue: queueName }, 'a worker ended'));
    },

    /**
     * Takes no more jobs and waits for those in progress until the deadline. What is left then goes to other pods once the
     * connection is closed: its locks end.
     */
    async stop(deadlineMs: number): Promise<void> {
      isStopping = true;
      for (const timer of pauses) clearTimeout(timer);
      // Not paused first: BullMQ's pause waits for nothing where a worker pauses already, and after its wait it connects
      // again, be the worker closed by then or not.
      await Promise.all(workers.map((worker) => succeedsWithin(deadlineMs, worker.close())));
    },

    isRunning: (): boolean =>
      !isStopping && workers.length > 0 && workers.every((worker) => worker.isRunning() || worker.isPaused()),

    /** Jobs that they work on at once, at most. */
    slots: (): number => slots,

    /** When they last began to work on a job, or on nothing yet; by `performance.now()`. */
    lastStartedAt: (): number => lastStartedAt,

    inProgress: (): number => startedAt.size,

    /** When they began the job that has been in progress for the longest time; by `performance.now()`. */
    oldestStartedAt(): number | undefined {
      // A Map keeps the order in which they were begun.
      for (const at of startedAt.values()) return at;
      return undefined;
    },
  };
}

const runOf = <T>(job: Job<T>): Run<T> => ({
  id: job.id ?? '',
  name: job.name,
  data: (job.data as T | null | undefined) ?? null,
  madeAt: job.timestamp,
  failures: job.attemptsMade,
  starts: job.attemptsStarted,
  stalls: job.stalledCounter,
});
