import { DelayedError, type Job, type Telemetry, UnrecoverableError } from 'bullmq';
import type { Redis } from 'ioredis';
import pLimit from 'p-limit';
import { type Attempt, brief, type InTurn, type OutboxEvent, type Run } from '../event.ts';
import { succeedsWithin, withDeadline } from '../lifecycle.ts';
import type { Logger } from '../logger.ts';
import { type FailedJob, publishQueueName } from './queues.ts';
import { CrashLimitError, type Suspects } from './suspects.ts';
import { closeWorker, PatientWorker, reportErrors, WORKER_OPTIONS } from './worker.ts';

/** How soon an event is tried again when nobody could publish it. */
const POSTPONE_MS = 1_000;
/** How soon one whose turn has not come; then twice that, and so on. */
const WAIT_MS = 50;
/** Failures that are written at once: each takes a connection of the pool, and claims and receipts need some as well. */
const WRITTEN_AT_ONCE = 4;

export type PublishOptions = Readonly<{
  queuePrefix: string;
  queueName: string;
  concurrency: number;
  publishTimeoutMs: number;
  /** Delay of the first retry. */
  retryBaseDelayMs: number;
  /** Retries that may wait in Redis at once; beyond, they wait on their rows. */
  maxDelayed: number;
}>;

export type PublishWorker = Readonly<{
  start(): void;
  /** Takes no more jobs, waits for those in hand until the deadline, then leaves them to the other pods. */
  stop(deadlineMs: number): Promise<void>;
  isRunning(): boolean;
  worker: PatientWorker<OutboxEvent>;
}>;

/** Runs publish jobs: one attempt each, then whatever follows from it. */
export function createPublishWorker(deps: {
  connection: Redis;
  options: PublishOptions;
  /** One attempt to publish; must not throw for anything that is the event's fault. */
  attempt: (event: OutboxEvent, run: Run, inTurn: InTurn) => Promise<Attempt>;
  /** Told what each attempt came to, and how long it took. */
  onAttempted?: (event: OutboxEvent, outcome: Attempt, seconds: number) => void;
  /** Runs attempt number `attempt`, to be seen in the event's trace. */
  traced: (
    event: OutboxEvent,
    attempt: number,
    run: (event: OutboxEvent) => Promise<Attempt>,
  ) => Promise<Attempt>;
  telemetry?: Telemetry | undefined;
  suspects: Suspects;
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
  const { options, suspects, logger } = deps;
  const handlers = new Set<Promise<void>>();
  const writing = pLimit(WRITTEN_AT_ONCE);
  /** Resolves when the failures before are written, or just being: no more events fail than can be written. */
  const turnToFail = () => writing(() => {});
  const report = reportPostponed(logger);

  async function process(job: Job<OutboxEvent>, token?: string): Promise<void> {
    const event = job.data;
    if (event.eventId === undefined) {
      // Redis lost the job's hash and kept its id in a list. Its row's lease brings the event back; what BullMQ made
      // of the id must not be in the way then.
      logger.warn({ eventId: job.id }, 'a job has lost its event; its row decides');
      job.opts.removeOnComplete = true;
      return;
    }
    const about = {
      eventId: event.eventId,
      topic: brief(event.topic),
      attempt: event.attempts + job.attemptsMade + 1,
    };
    const startedAt = performance.now();
    const expiresAt = Date.now() + options.publishTimeoutMs;
    const run: Run = {
      isFirst: job.attemptsStarted === 1,
      // Half of it, since another pod's clock may differ.
      isLate: job.attemptsMade > 0 || Date.now() - job.timestamp > options.retryBaseDelayMs / 2,
    };
    const inTurn: InTurn = (append) =>
      job.stalledCounter > 0
        ? suspects.alone(event.eventId, expiresAt, append)
        : suspects.together(expiresAt, append);
    const outcome = await deps.traced(event, about.attempt, (traced) =>
      withDeadline(options.publishTimeoutMs, deps.attempt(traced, run, inTurn)).catch(
        (error: Error): Attempt => ({
          kind: error instanceof CrashLimitError ? 'give-up' : 'postpone',
          reason: error.message,
        }),
      ),
    );
    const tookMs = performance.now() - startedAt;
    deps.onAttempted?.(event, outcome, tookMs / 1_000);
    if (tookMs > options.publishTimeoutMs / 2) {
      if (worker.narrow(startedAt)) {
        const seconds = Math.round(tookMs / 100) / 10;
        logger.warn(
          { seconds, atOnce: worker.places },
          'attempts take long; fewer events are published at once',
        );
      }
    } else if (outcome.kind === 'done' && tookMs < options.publishTimeoutMs / 4) worker.widen();
    switch (outcome.kind) {
      case 'done':
        logger.debug(about, 'event published');
        return;
      case 'wait':
      case 'postpone': {
        if (outcome.kind === 'postpone') report(about, outcome.reason);
        const waits = job.attemptsStarted - 1;
        const delay = outcome.kind === 'wait' ? Math.min(POSTPONE_MS, WAIT_MS * 2 ** waits) : POSTPONE_MS;
        // If not even that is possible, the job stays where it is and its lock ends: found by the stalled check, at no
        // cost to the event's attempts. Waiting for it would renew the lock for ever.
        await succeedsWithin(options.publishTimeoutMs, job.moveToDelayed(Date.now() + delay, token));
        throw new DelayedError();
      }
      case 'give-up':
        await turnToFail();
        throw new UnrecoverableError(outcome.reason);
      case 'retry':
        await turnToFail();
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
        // Whoever retries it from a dashboard means it: it is started again.
        if (job.stalledCounter > 0)
          await suspects.absolve(event.eventId, Date.now() + options.publishTimeoutMs);
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
    ...(deps.telemetry && { telemetry: deps.telemetry }),
    // A stall is no crash, and a crash not the fault of all that were in hand: suspects.ts tells them apart.
    maxStalledCount: 1_000_000,
  });
  reportErrors(worker, logger);
  worker.on('stalled', (eventId) => logger.warn({ eventId }, 'took over an event from a pod that stopped'));
  worker.on('failed', (job, error) => {
    // A handler that rejects would end the process.
    if (!job) return;
    const handled = writing(() => onFailed(job, error)).finally(() => handlers.delete(handled));
    handlers.add(handled);
  });

  return {
    start: () => void worker.run().catch((error) => logger.error({ err: error }, 'publish worker ended')),
    async stop(deadlineMs) {
      await closeWorker(worker, deadlineMs);
      await succeedsWithin(deadlineMs, Promise.all(handlers));
      suspects.stop();
    },
    isRunning: () => worker.isRunning() && !worker.isPaused(),
    worker,
  };
}

/** An outage postpones thousands of events a second: one line when it begins, and one in so long while it lasts. */
const REPORT_INTERVAL_MS = 10_000;

function reportPostponed(logger: Logger): (about: Record<string, unknown>, reason: string) => void {
  let reportedAt = 0;
  let events = 0;
  return (about, reason) => {
    logger.debug({ ...about, reason, retryInMs: POSTPONE_MS }, 'event postponed');
    events++;
    if (Date.now() - reportedAt < REPORT_INTERVAL_MS) return;
    logger.warn({ events, reason }, 'cannot publish now; events are postponed');
    reportedAt = Date.now();
    events = 0;
  };
}
