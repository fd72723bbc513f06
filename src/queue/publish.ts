import { DelayedError, type Job, UnrecoverableError, Worker } from 'bullmq';
import type { Redis } from 'ioredis';
import type { Attempt, OutboxEvent } from '../event.ts';
import { succeedsWithin, withDeadline } from '../lifecycle.ts';
import type { Logger } from '../logger.ts';
import { closeWorker, type FailedJob, publishQueueName, reportErrors, WORKER_OPTIONS } from './queues.ts';

/** How soon an event is tried again when nobody could publish it. */
const POSTPONE_MS = 1_000;
/** A job may be found stalled so often before it is given up as one that kills its pod. */
const MAX_STALLED = 10;

export type PublishOptions = Readonly<{
  queuePrefix: string;
  queueName: string;
  concurrency: number;
  publishTimeoutMs: number;
  retryBaseDelayMs: number;
  /** Retries that may wait in Redis at once; beyond, they wait on their rows. */
  maxDelayed: number;
}>;

export type PublishWorker = Readonly<{
  start(): void;
  /** Takes no more jobs, waits for those in hand until the deadline, then leaves them to the other pods. */
  stop(deadlineMs: number): Promise<void>;
  isRunning(): boolean;
}>;

/** Runs publish jobs: one attempt each, then whatever follows from it. */
export function createPublishWorker(deps: {
  connection: Redis;
  options: PublishOptions;
  /** One attempt to publish; must not throw for anything that is the event's fault. */
  attempt: (event: OutboxEvent) => Promise<Attempt>;
  recordFailure: (failure: {
    id: string;
    attempts: number;
    reason: string;
    retryInMs: number;
  }) => Promise<void>;
  deadLetter: (failure: FailedJob) => Promise<void>;
  delayedCount: () => Promise<number>;
  logger: Logger;
}): PublishWorker {
  const { options, logger } = deps;
  const handlers = new Set<Promise<void>>();

  async function process(job: Job<OutboxEvent>, token?: string): Promise<void> {
    const event = job.data;
    const about = {
      eventId: event.eventId,
      topic: event.topic,
      attempt: event.attempts + job.attemptsMade + 1,
    };
    const outcome = await withDeadline(options.publishTimeoutMs, deps.attempt(event)).catch(
      (error: Error): Attempt => ({ kind: 'postpone', reason: error.message }),
    );
    switch (outcome.kind) {
      case 'done':
        logger.debug(about, 'event published');
        return;
      case 'postpone':
        logger.warn(
          { ...about, reason: outcome.reason, retryInMs: POSTPONE_MS },
          'cannot publish now; event postponed',
        );
        await job.moveToDelayed(Date.now() + POSTPONE_MS, token);
        throw new DelayedError();
      case 'give-up':
        throw new UnrecoverableError(outcome.reason);
      case 'retry':
        if (await waitsOnItsRow(job, outcome.reason)) return;
        throw new Error(outcome.reason);
    }
  }

  /**
   * When half of the jobs in Redis are waiting for a retry, further ones wait on their rows instead: fresh
   * events must always find room. The row's lease brings the event back when its time has come.
   */
  async function waitsOnItsRow(job: Job<OutboxEvent>, reason: string): Promise<boolean> {
    const attempts = job.attemptsMade + 1;
    if (attempts >= (job.opts.attempts ?? 1)) return false;
    try {
      if ((await deps.delayedCount()) < options.maxDelayed) return false;
      const failure = {
        id: job.data.id,
        attempts: job.data.attempts + attempts,
        reason,
        retryInMs: options.retryBaseDelayMs * 2 ** (job.data.attempts + attempts - 1),
      };
      await deps.recordFailure(failure);
      announceRetry(job, failure);
      return true;
    } catch (error) {
      logger.warn(
        { err: error, eventId: job.data.eventId },
        'cannot note a retry on its row; it waits in Redis',
      );
      return false;
    }
  }

  /** BullMQ calls this after every failed attempt; `finishedOn` tells the last one. */
  async function onFailed(job: Job<OutboxEvent>, error: Error): Promise<void> {
    const event = job.data;
    const attempts = event.attempts + job.attemptsMade;
    try {
      if (job.finishedOn) {
        await deps.deadLetter({ event, attempts, reason: error.message, failedAt: new Date(job.finishedOn) });
      } else {
        const failure = { id: event.id, attempts, reason: error.message, retryInMs: job.delay };
        await deps.recordFailure(failure);
        announceRetry(job, failure);
      }
    } catch (err) {
      logger.error(
        { err, eventId: event.eventId, attempts },
        'cannot record a failed attempt on its row; it is looked at again when its lease ends',
      );
    }
  }

  function announceRetry(
    job: Job<OutboxEvent>,
    failure: { attempts: number; reason: string; retryInMs: number },
  ) {
    const { eventId, topic } = job.data;
    const { attempts, reason, retryInMs } = failure;
    logger.info(
      { eventId, topic, attempt: attempts, reason, retryInMs },
      'publishing failed; retry scheduled',
    );
  }

  const worker = new Worker<OutboxEvent>(publishQueueName(options.queueName), process, {
    ...WORKER_OPTIONS,
    connection: deps.connection,
    prefix: options.queuePrefix,
    concurrency: options.concurrency,
    maxStalledCount: MAX_STALLED,
  });
  reportErrors(worker, logger);
  worker.on('stalled', (eventId) => logger.warn({ eventId }, 'took over an event from a pod that stopped'));
  worker.on('failed', (job, error) => {
    // A handler that rejects would end the process.
    if (!job) return;
    const handled = onFailed(job, error).finally(() => handlers.delete(handled));
    handlers.add(handled);
  });

  return {
    start: () => void worker.run().catch((error) => logger.error({ err: error }, 'publish worker ended')),
    async stop(deadlineMs) {
      await closeWorker(worker, deadlineMs);
      await succeedsWithin(deadlineMs, Promise.all(handlers));
    },
    isRunning: () => worker.isRunning() && !worker.isPaused(),
  };
}
