import { Queue, QueueKeys } from 'bullmq';
import type { Redis } from 'ioredis';
import type { RelayConfig } from '../config/config.ts';
import {
  closesConnection,
  isConnectionLoss,
  isRefusal,
  LARGE_BYTES,
  reasonOf,
  untilConnected,
} from '../connections/refusals.ts';
import { brief, type Failure, inSteps, isEvent, type OutboxEvent, type TraceContext } from '../event.ts';
import { NotReadyError, pause, succeedsWithin, withDeadline } from '../lifecycle.ts';
import type { Logger } from '../telemetry/logger.ts';
import { redisTime } from './clock.ts';
import { createJobViews } from './job-views.ts';

type QueueOptions = Pick<RelayConfig, 'queuePrefix' | 'queueName' | 'maxRetryAttempts' | 'retryBaseDelayMs'>;

/** Jobs of one queue in Redis, by state. */
type JobCounts = Readonly<Record<'waiting' | 'active' | 'delayed' | 'prioritized' | 'failed', number>>;
export type QueueFigures = JobCounts &
  Readonly<{
    isPaused: boolean;
    /** What another program has set for the whole queue in BullMQ, in words. The relay sets none. */
    limits: readonly string[];
  }>;
/** Publish jobs. `total` is without failed ones, which have ended. */
export type InFlight = JobCounts & Readonly<{ total: number }>;

/**
 * What BullMQ knows of an event's job.
 * - `alive`: waiting, delayed, or active with a worker on it (or soon found to be stalled); with the failed
 *   attempts of the event so far, and why the last one failed; `isKept`: a worker has had it for longer than any of the
 *   relay's would
 * - `failed`: its retries are spent
 * - `missing`: there is no job; it has ended, or Redis lost it
 */
export type JobFate =
  | Readonly<{ state: 'alive'; attempts: number; reason: string; isKept?: boolean }>
  | Readonly<{ state: 'failed' | 'missing' }>;

/** A publish job whose retries are spent, as its dead letter needs it. `madeAt`: when the job was made, Unix time in ms. */
export type FailedJob = Failure & Readonly<{ madeAt: number }>;

/** An event's job, as an operator sees it. Times are ISO 8601. */
export type JobView = Readonly<{
  /** BullMQ's word, e.g. `failed` or `delayed`. */
  state: string;
  /** Attempts that ended, of this job. */
  attempts: number;
  failedReason: string | null;
  lastStartedAt: string | null;
  failedAt: string | null;
}>;

export type Queues = ReturnType<typeof createQueues>;

export const claimQueueName = (queueName: string) => `${queueName}-claim`;
export const publishQueueName = (queueName: string) => `${queueName}-publish`;

/** No worker of the relay has a job for longer, however slow a server is: one that does is another program's. */
const KEPT_MS = 120_000;
/** Approximate size of a job without its payload. */
const JOB_BYTES = 800;
/** Events that are remembered to be too large, at most. */
const TOO_LARGE_KEPT = 1_000;

/** What bullmq-otel puts the job's runs below. */
const traced = (trace: TraceContext) => ({
  telemetry: { metadata: JSON.stringify(trace) },
});

/** Redis key of an event's publish job. */
export const publishJobKey = (options: Pick<QueueOptions, 'queuePrefix' | 'queueName'>, eventId: string) =>
  new QueueKeys(options.queuePrefix).toKey(publishQueueName(options.queueName), eventId);

/** The event in a job's data; undefined where another program's data is. */
function eventOf(data: string | null): OutboxEvent | undefined {
  try {
    const event: unknown = JSON.parse(data ?? 'null');
    return isEvent(event) ? event : undefined;
  } catch {
    return undefined;
  }
}

export function createQueues(redis: Redis, options: QueueOptions, logger: Pick<Logger, 'debug'>) {
  const shared = { connection: redis, prefix: options.queuePrefix };
  const claim = new Queue(claimQueueName(options.queueName), shared);
  const publish = new Queue<OutboxEvent, void, string>(publishQueueName(options.queueName), {
    ...shared,
    defaultJobOptions: {
      // Frees the id, and is the cheapest setting.
      removeOnComplete: true,
      // Failed jobs stay (BullMQ's default): until their dead letter is written, then up to RELAY_FAILED_JOBS_KEPT.
    },
  });

  const publishViews = createJobViews(redis, publish);

  // The owner of the connection reports its errors; without a listener BullMQ would print them.
  for (const queue of [claim, publish]) queue.on('error', (error) => logger.debug({ err: error }, 'queue'));

  /**
   * The job's total number of runs and its backoff. BullMQ waits base * 2^(runs - 1); a job that has to be
   * made again continues where its predecessor was.
   */
  function retries(priorAttempts: number) {
    const attempts = Math.max(1, options.maxRetryAttempts + 1 - priorAttempts);
    const delay = options.retryBaseDelayMs * 2 ** Math.min(priorAttempts, options.maxRetryAttempts);
    return { attempts, backoff: { type: 'exponential', delay } };
  }

  const jobOf = (event: OutboxEvent) => ({
    name: brief(event.eventType),
    data: event,
    opts: { jobId: event.eventId, ...retries(event.attempts), ...(event.trace && traced(event.trace)) },
  });

  async function add(event: OutboxEvent): Promise<void> {
    const { name, data, opts } = jobOf(event);
    await publish.add(name, data, opts);
  }

  /** Events whose jobs the server does not take, and why. A claim that is made again need not find out again. */
  const tooLarge = new Map<string, string>();

  async function addLarge(event: OutboxEvent): Promise<void> {
    const reason = tooLarge.get(event.eventId) ?? (await refusalOf(event));
    if (reason === null) return;
    if (tooLarge.size >= TOO_LARGE_KEPT) tooLarge.clear();
    tooLarge.set(event.eventId, reason);
    // If the server takes the job without payload, the size was the reason.
    await add({ ...event, payload: 'null', withheld: reason });
    tooLarge.delete(event.eventId);
  }

  /**
   * Why the server does not take the event's job, or null when it has.
   * @throws when it takes no job now
   */
  async function refusalOf(event: OutboxEvent): Promise<string | null> {
    const bytes = Buffer.byteLength(JSON.stringify(event));
    for (let losses = 1; ; losses++) {
      try {
        await add(event);
        return null;
      } catch (error) {
        if (isRefusal(error as Error))
          return `Redis does not take its job of ${bytes} bytes: ${reasonOf(error as Error)}`;
        if (!isConnectionLoss(error as Error)) throw error;
        await untilConnected(redis);
        // Twice in a row, each time right after the server has answered: a network that fails does not choose the event.
        if (losses === 2) return closesConnection(bytes);
      }
    }
  }

  return {
    claim,
    publish,

    /** Jobs as a dashboard shows them. */
    views: { claim: createJobViews(redis, claim), publish: publishViews },

    jobKey: (eventId: string): string => publishJobKey(options, eventId),

    /**
     * Adds one publish job per event, which publish/publish.ts runs; one that is there already is left as it is. A large
     * event that the server does not take gets a job without its payload, by which it is dead-lettered.
     * @throws when any of them could not be added (others may have been)
     */
    async addPublishJobs(events: readonly OutboxEvent[]): Promise<void> {
      const sized = events.map((event) => ({ event, bytes: JOB_BYTES + event.payload.length }));
      for (const step of inSteps(sized, events.length, LARGE_BYTES)) {
        const [{ event, bytes }] = step as [(typeof step)[number]];
        // addBulk makes a transaction of Redis, which costs this process 150 µs: too much for one job.
        if (step.length > 1) await publish.addBulk(step.map((it) => jobOf(it.event)));
        else if (bytes < LARGE_BYTES) await add(event);
        else await addLarge(event);
      }
    },

    async inFlight(): Promise<InFlight> {
      const counts = await countsOf(publish);
      return { ...counts, total: counts.waiting + counts.active + counts.delayed + counts.prioritized };
    },

    /** What dashboards show, of both queues. */
    async figures(): Promise<Record<'claim' | 'publish', QueueFigures>> {
      const [ofClaim, ofPublish] = await Promise.all(
        [claim, publish].map(async (queue): Promise<QueueFigures> => {
          const [counts, held] = await Promise.all([countsOf(queue), heldUp(redis, queue.toKey('meta'))]);
          return { ...counts, ...held };
        }),
      );
      return { claim: ofClaim as QueueFigures, publish: ofPublish as QueueFigures };
    },

    /** Where BullMQ has the event's job: `active`, `waiting`, `delayed`, `failed`, …; `unknown` when it has none. */
    jobState: (eventId: string): Promise<string> => publish.getJobState(eventId),

    async jobFate(eventId: string): Promise<JobFate> {
      const state = await publish.getJobState(eventId);
      const key = publish.toKey(eventId);
      if (state === 'failed') return { state };
      if (state === 'unknown') {
        // A hash whose id is in no list (Redis lost a part). With it, BullMQ would not add the event's next job.
        await redis.del(key);
        return { state: 'missing' };
      }
      const facts = await redis.hmget(key, 'timestamp', 'finishedOn', 'atm', 'failedReason', 'processedOn');
      const [madeAt, endedAt, failures, reason, begunAt] = facts;
      if (!madeAt) return { state: 'missing' };
      // Its last attempt has failed since we asked for its state.
      if (endedAt) return { state: 'failed' };
      const failed = Number(failures ?? 0);
      const isKept = state === 'active' && (await redisTime(redis)) - Number(begunAt) > KEPT_MS;
      const alive = (attempts: number, why: string) =>
        ({ state: 'alive', attempts, reason: why, ...(isKept && { isKept }) }) as const;
      if (failed === 0 && state !== 'delayed') return alive(0, '');
      const event = eventOf(await redis.hget(key, 'data'));
      if (failed > 0) return alive((event?.attempts ?? 0) + failed, reason ?? '');
      if (event?.eventId === eventId) return alive(0, '');
      // Another program's job under the event's id: it keeps the event's own out until it is due.
      await publish.remove(eventId);
      return { state: 'missing' };
    },

    /** What became of the event's job, if it has failed. The event is that of its row: another program may write to jobs. */
    async failedJob(event: OutboxEvent): Promise<FailedJob | null> {
      const key = publish.toKey(event.eventId);
      const facts = await redis.hmget(key, 'data', 'finishedOn', 'atm', 'failedReason', 'timestamp');
      const [data = null, endedAt, failures, reason, madeAt] = facts;
      if (!endedAt) return null;
      const before = eventOf(data)?.attempts ?? 0;
      return {
        event,
        // The last attempt is not on the row yet.
        attempts: Math.max(event.attempts, before + Number(failures ?? 0)),
        reason: reason ?? '',
        failedAt: new Date(Number(endedAt)),
        madeAt: Number(madeAt),
      };
    },

    /** What the gate needs to know of jobs where the streams are on another server; see JobFacts in streams/append.ts. */
    async jobFacts(
      eventIds: readonly string[],
    ): Promise<(readonly [madeAt: string, hasEnded: boolean, failures: number] | null)[]> {
      const asked = redis.pipeline();
      for (const eventId of eventIds) asked.hmget(publish.toKey(eventId), 'timestamp', 'finishedOn', 'atm');
      return ((await asked.exec()) ?? []).map(([error, reply]) => {
        if (error) throw error;
        const [madeAt, endedAt, failures] = reply as (string | null)[];
        return madeAt ? [madeAt, Boolean(endedAt), Number(failures ?? 0)] : null;
      });
    },

    /** Failed jobs beyond the newest `kept`, at most `limit` of them. */
    async failedBeyond(kept: number, limit: number): Promise<{ eventId: string; topic: string }[]> {
      const excess = (await publish.getJobCountByTypes('failed')) - kept;
      if (excess <= 0) return [];
      const jobIds = await publish.getRanges(['failed'], kept, kept + Math.min(excess, limit) - 1);
      const found = await Promise.all(jobIds.map((jobId) => redis.hget(publish.toKey(jobId), 'data')));
      return found.flatMap((data) => {
        // A job without an event is another program's: it stays.
        const event = eventOf(data);
        return event ? [{ eventId: event.eventId, topic: event.topic }] : [];
      });
    },

    /** Of these events, those that have a job. */
    async withJobs(eventIds: readonly string[]): Promise<ReadonlySet<string>> {
      const found = await Promise.all(eventIds.map((eventId) => redis.exists(publish.toKey(eventId))));
      return new Set(eventIds.filter((_, i) => found[i] === 1));
    },

    /**
     * Removes an event's job, unless a worker has it.
     * @returns whether the event has no job now
     */
    remove: async (eventId: string): Promise<boolean> => (await publish.remove(eventId)) === 1,

    /**
     * Removes a job whose data or options BullMQ cannot read: every worker that takes it fails, and the job stalls.
     * @returns whether it was such a job, and is gone
     */
    async removeUnreadable(queue: Queue, jobId: string): Promise<boolean> {
      try {
        await queue.getJob(jobId);
        return false;
      } catch (error) {
        if (!(error instanceof SyntaxError)) throw error;
      }
      // Another worker may take it before it is removed, and fail as well. Its lock protects nothing then.
      for (let tries = 0; tries < 2; tries++) {
        await redis.del(`${queue.toKey(jobId)}:lock`);
        if ((await queue.remove(jobId)) === 1) return true;
      }
      return false;
    },

    /** The event's job, or null. */
    async view(eventId: string): Promise<JobView | null> {
      const [job, state] = await Promise.all([publishViews.brief(eventId), publish.getJobState(eventId)]);
      if (!job) return null;
      const time = (ms: number | undefined) => (ms ? new Date(ms).toISOString() : null);
      return {
        state,
        attempts: job.attemptsMade,
        failedReason: job.failedReason ?? null,
        lastStartedAt: time(job.processedOn),
        failedAt: time(job.finishedOn),
      };
    },

    /** @throws the error of BullMQ's first command; then the queues never work, see openQueues */
    async ready(): Promise<void> {
      await Promise.all([claim.waitUntilReady(), publish.waitUntilReady()]);
    },

    async close(): Promise<void> {
      await Promise.allSettled([claim.close(), publish.close()]);
    },
  };
}

/** What keeps workers from the jobs of a queue, by its key `meta`. */
export async function heldUp(
  redis: Redis,
  metaKey: string,
): Promise<Pick<QueueFigures, 'isPaused' | 'limits'>> {
  const [paused, jobs, max, ms] = await redis.hmget(metaKey, 'paused', 'concurrency', 'max', 'duration');
  return {
    isPaused: paused !== null,
    limits: [
      ...(jobs ? [`at most ${jobs} in progress (global concurrency)`] : []),
      ...(max ? [`at most ${max} in ${ms} ms (global rate limit)`] : []),
    ],
  };
}

async function countsOf(queue: Pick<Queue, 'getJobCounts'>): Promise<JobCounts> {
  const counts = await queue.getJobCounts('waiting', 'active', 'delayed', 'prioritized', 'failed');
  const { waiting = 0, active = 0, delayed = 0, prioritized = 0, failed = 0 } = counts;
  return { waiting, active, delayed, prioritized, failed };
}

const OPEN_RETRY_MS = 200;
const CLOSE_TIMEOUT_MS = 2_000;

/**
 * Makes queues until they work. BullMQ asks Redis for its version when a queue is made. If the connection breaks at that
 * moment, each later call of that queue fails with the same error, even when the connection is back.
 *
 * @throws {NotReadyError} when Redis does not answer within `timeoutMs`
 */
export async function openQueues(
  redis: Redis,
  options: QueueOptions,
  logger: Pick<Logger, 'debug'>,
  timeoutMs: number,
): Promise<Queues> {
  const endsAt = Date.now() + timeoutMs;
  for (;;) {
    const queues = createQueues(redis, options, logger);
    try {
      await withDeadline(Math.max(endsAt - Date.now(), OPEN_RETRY_MS), queues.ready());
      return queues;
    } catch (error) {
      await succeedsWithin(CLOSE_TIMEOUT_MS, queues.close());
      if (Date.now() >= endsAt)
        throw new NotReadyError(`Redis cannot be reached (see RELAY_REDIS_URL): ${(error as Error).message}`);
      await pause(OPEN_RETRY_MS);
    }
  }
}
