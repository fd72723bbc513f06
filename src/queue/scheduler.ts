import type { Queue } from 'bullmq';
import type { Redis } from 'ioredis';
import { loop } from '../lifecycle.ts';
import type { Logger } from '../telemetry/logger.ts';
import { redisTime } from './clock.ts';

/** Names of the claim queue's jobs. */
export const TICK = 'tick';
export const WAKE = 'wake';

/** A job that BullMQ adds again and again. */
export type Schedule = Readonly<{ name: string; everyMs: number }>;

/** Interval at which schedules are checked: one that vanished (FLUSHALL, obliterate, a removed tick) is made again. */
const HEAL_INTERVAL_MS = 2_000;
/** A schedule that is further away than its interval plus this was set by a wrong clock. */
const TOO_FAR_MS = 2_000;

export type Scheduler = ReturnType<typeof createScheduler>;

/** Keeps the schedules in the claim queue: that of the ticks, and others. All pods keep the same ones. */
export function createScheduler(deps: {
  queue: Queue;
  redis: Redis;
  pollIntervalMs: number;
  /** Further schedules. */
  others?: readonly Schedule[];
  /** Names of schedules that an earlier configuration may have left behind. */
  retired?: readonly string[];
  logger: Logger;
}) {
  const { queue, redis, others = [], logger } = deps;
  const schedules: readonly Schedule[] = [{ name: TICK, everyMs: deps.pollIntervalMs }, ...others];
  let retired = deps.retired ?? [];
  let lookedAt = performance.now();
  let fails = false;

  async function heal(): Promise<void> {
    // While the queue is paused, each upsert would leave one more tick in it.
    if (await queue.isPaused()) return;
    for (const name of retired) await queue.removeJobScheduler(name);
    retired = [];
    for (const schedule of schedules) await uphold(schedule);
  }

  async function uphold({ name, everyMs }: Schedule): Promise<void> {
    // The pod that starts a tick sets the time of the next one by its own clock. If that clock is minutes fast, there would
    // be no tick for minutes.
    const next = (await queue.getJobScheduler(name))?.next;
    if (next !== undefined && next - (await redisTime(redis)) > everyMs + TOO_FAR_MS) {
      await queue.removeJobScheduler(name);
    }
    await queue.upsertJobScheduler(
      name,
      { every: everyMs },
      // A tick that fails is not retried: the next one is its retry.
      { name, opts: { attempts: 1, removeOnComplete: true, removeOnFail: { count: 20 } } },
    );
  }

  async function look(): Promise<void> {
    try {
      await heal();
      fails = false;
    } catch (error) {
      // Every 2 s, for as long as Redis is away: once will do.
      logger[fails ? 'debug' : 'warn']({ err: error }, 'cannot uphold the claim schedule; trying again');
      fails = true;
    }
    lookedAt = performance.now();
  }

  return {
    ...loop(look, HEAL_INTERVAL_MS),
    wake: createWake(queue, logger),
    /** When it last checked the schedules, with success or not; by `performance.now()`. */
    lastLookAt: (): number => lookedAt,
  };
}

/** Asks for a claim now. Any number of calls during a claim make one more claim. Never throws. */
export const createWake = (queue: Queue, logger: Logger) => async (): Promise<void> => {
  try {
    await queue.add(
      WAKE,
      {},
      {
        // The only mode of deduplication that keeps a job which is added during a claim.
        deduplication: { id: WAKE, keepLastIfActive: true },
        attempts: 1,
        removeOnComplete: true,
        removeOnFail: true,
      },
    );
  } catch (error) {
    logger.warn({ err: error }, 'cannot ask for a claim; the next tick will');
  }
};
