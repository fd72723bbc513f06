import type { Queue } from 'bullmq';
import type { Redis } from 'ioredis';
import { loop } from '../lifecycle.ts';
import type { Logger } from '../telemetry/logger.ts';
import { redisTime } from './clock.ts';

/** Names of the claim queue's jobs. */
export const TICK = 'tick';
export const WAKE = 'wake';

/** A job that comes again and again. */
export type Schedule = Readonly<{ name: string; everyMs: number }>;

/** How soon a scheduler that vanished (FLUSHALL, obliterate, a removed tick) is back at the latest. */
const HEAL_INTERVAL_MS = 2_000;
/** Clocks that are kept differ by less. */
const TOO_FAR_MS = 2_000;

export type Scheduler = Readonly<{
  start(): void;
  stop(): Promise<void>;
  /** Asks for a claim now; any number of wishes in the meantime make one more claim. Never throws. */
  wake(): Promise<void>;
  /** When it last looked, whether it succeeded or not; ms since the epoch. */
  lastLookAt(): number;
}>;

/** The repeatable job that claims, and others. Any number of pods may run one: they uphold the same schedules. */
export function createScheduler(deps: {
  queue: Queue;
  redis: Redis;
  pollIntervalMs: number;
  /** Further schedules, upheld like that of the ticks. */
  others?: readonly Schedule[];
  /** Names of schedules that an earlier configuration may have left behind. */
  retired?: readonly string[];
  logger: Logger;
}): Scheduler {
  const { queue, redis, others = [], logger } = deps;
  const schedules: readonly Schedule[] = [{ name: TICK, everyMs: deps.pollIntervalMs }, ...others];
  let retired = deps.retired ?? [];
  let lookedAt = Date.now();

  async function heal(): Promise<void> {
    // Upserting while the queue is paused leaves one more tick behind each time.
    if (await queue.isPaused()) return;
    for (const name of retired) await queue.removeJobScheduler(name);
    retired = [];
    for (const schedule of schedules) await uphold(schedule);
  }

  async function uphold({ name, everyMs }: Schedule): Promise<void> {
    // The next tick is set by the clock of the pod that starts the one before. A pod whose clock is minutes fast, and then
    // gone, left the others without any for so long.
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
    } catch (error) {
      logger.warn({ err: error }, 'cannot uphold the claim schedule; trying again');
    }
    lookedAt = Date.now();
  }

  return {
    ...loop(look, HEAL_INTERVAL_MS),
    async wake() {
      try {
        await queue.add(
          WAKE,
          {},
          {
            // The only mode of deduplication that keeps a wish which arrives in mid-claim.
            deduplication: { id: WAKE, keepLastIfActive: true },
            attempts: 1,
            removeOnComplete: true,
            removeOnFail: true,
          },
        );
      } catch (error) {
        logger.warn({ err: error }, 'cannot ask for a claim; the next tick will');
      }
    },
    lastLookAt: () => lookedAt,
  };
}
