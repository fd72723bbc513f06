import type { Queue } from 'bullmq';
import type { Redis } from 'ioredis';
import type { Logger } from '../logger.ts';

/** Names of the claim queue's jobs. */
export const TICK = 'tick';
export const WAKE = 'wake';

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

/** The repeatable job that claims. Any number of pods may run one: they uphold the same schedule. */
export function createScheduler(deps: {
  queue: Queue;
  redis: Redis;
  pollIntervalMs: number;
  logger: Logger;
}): Scheduler {
  const { queue, redis, pollIntervalMs, logger } = deps;
  let timer: NodeJS.Timeout | undefined;
  let running: Promise<void> = Promise.resolve();
  let stopped = true;
  let lookedAt = Date.now();

  async function redisTime(): Promise<number> {
    // From INFO, which the relay may ask for in any case, as it may not for TIME.
    const microseconds = /^server_time_usec:(\d+)/m.exec(await redis.info('server'))?.[1];
    return microseconds === undefined ? Date.now() : Number(microseconds) / 1_000;
  }

  async function heal(): Promise<void> {
    // Upserting while the queue is paused leaves one more tick behind each time.
    if (await queue.isPaused()) return;
    // The next tick is set by the clock of whoever starts the one before. A pod whose clock is minutes fast, and then
    // gone, left the others without any for so long.
    const next = (await queue.getJobScheduler(TICK))?.next;
    if (next !== undefined && next - (await redisTime()) > pollIntervalMs + TOO_FAR_MS) {
      await queue.removeJobScheduler(TICK);
    }
    await queue.upsertJobScheduler(
      TICK,
      { every: pollIntervalMs },
      // A tick that fails is not retried: the next one is its retry.
      { name: TICK, opts: { attempts: 1, removeOnComplete: true, removeOnFail: { count: 20 } } },
    );
  }

  async function look(): Promise<void> {
    try {
      await heal();
    } catch (error) {
      logger.warn({ err: error }, 'cannot uphold the claim schedule; trying again');
    }
    lookedAt = Date.now();
    if (!stopped) timer = setTimeout(lookAgain, HEAL_INTERVAL_MS);
  }
  function lookAgain(): void {
    running = look();
  }

  return {
    start() {
      if (!stopped) return;
      stopped = false;
      lookAgain();
    },
    async stop() {
      stopped = true;
      clearTimeout(timer);
      await running;
    },
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
