import { DelayedError, type Job, UnrecoverableError } from 'bullmq';
import type { Redis } from 'ioredis';
import { type Attempt, brief, type OutboxEvent } from '../event.ts';
import { succeedsWithin, withDeadline } from '../lifecycle.ts';
import type { Logger } from '../logger.ts';
import {
  closeWorker,
  type FailedJob,
  PatientWorker,
  publishQueueName,
  reportErrors,
  WORKER_OPTIONS,
} from './queues.ts';

/** How soon an event is tried again when nobody could publish it. */
const POSTPONE_MS = 1_000;
/** A job may be found stalled so often before it is given up as one that kills its pod. */
const MAX_STALLED = 10;

export type PublishOptions = Readonly<{
  queuePrefix: string;
  queueName: string;
  concurrency: number;
  publishTimeoutMs: number;
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
  /** Removes the event's job. */
  forget: (eventId: string) => Promise<void>;
  logger: Logger;
}): PublishWorker {
  const { options, logger } = deps;
  const handlers = new Set<Promise<void>>();

  async function process(job: Job<OutboxEvent>, token?: string): Promise<void> {
    const event = job.data;
    const about = {
      eventId: event.eventId,
      topic: brief(event.topic),
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
        throw new Error(outcome.reason);
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
        const { eventId } = event;
        const topic = brief(event.topic);
        const { reason, retryInMs } = failure;
        logger.info(
          { eventId, topic, attempt: attempts, reason, retryInMs },
          'publishing failed; retry scheduled',
        );
        // Fresh events must always find room: when retries take up more than their share of the jobs in Redis, this
        // one waits on its row, whose lease ends when its time has come. Counted after it was added, so that any
        // number that fail at once all see themselves.
        if ((await deps.delayedCount()) > options.maxDelayed) await deps.forget(eventId);
      }
    } catch (err) {
      logger.error(
        { err, eventId: event.eventId, attempts },
        'cannot record a failed attempt on its row; it is looked at again when its lease ends',
      );
    }
  }

  const worker = new PatientWorker<OutboxEvent>(publishQueueName(options.queueName), process, {
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
