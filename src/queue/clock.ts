import type { Redis } from 'ioredis';
import { loop } from '../lifecycle.ts';
import type { Logger } from '../telemetry/logger.ts';

/**
 * The pod that puts a job off writes down, by its own clock, when the job is due. The pod that takes due jobs compares that with
 * its own clock. A pod whose clock is an hour ahead finds every retry of the fleet due at once; the retries that it puts off
 * are due an hour late for the others. So all pods go by one clock, that of the queues' Redis.
 */

const INTERVAL_MS = 5_000;
/** A difference below this is left alone: the clocks of a fleet that is well differ by milliseconds. */
const TOLERANCE_MS = 1_000;

/** Unix time in ms, by the clock of Redis; by that of this process if Redis does not tell it. */
export async function redisTime(redis: Redis): Promise<number> {
  // From INFO, which the relay may ask for in any case, as it may not for TIME.
  const microseconds = /^server_time_usec:(\d+)/m.exec(await redis.info('server'))?.[1];
  return microseconds === undefined ? Date.now() : Number(microseconds) / 1_000;
}

export type Clock = ReturnType<typeof createClock>;

/**
 * Compares the clock of this process with that of Redis, again and again.
 *
 * @param deps.adjust makes `Date.now()` answer so much less from now on. Only who has the process to itself can; without
 *   it the difference is only told
 */
export function createClock(deps: {
  redisTime: () => Promise<number>;
  adjust?: ((aheadMs: number) => void) | undefined;
  logger: Logger;
}) {
  const { adjust, logger } = deps;
  let aheadMs = 0;
  let adjustedMs = 0;
  let isReported = false;

  async function askRedis(): Promise<void> {
    const askedAt = Date.now();
    const time = await deps.redisTime();
    const answeredAt = Date.now();
    const offMs = (askedAt + answeredAt) / 2 - time;
    aheadMs = offMs + adjustedMs;
    // Redis was asked the time at any moment between question and answer.
    if (adjust !== undefined && Math.abs(offMs) > TOLERANCE_MS + (answeredAt - askedAt) / 2) {
      adjust(aheadMs);
      adjustedMs = aheadMs;
    }
    report(Math.abs(aheadMs) > TOLERANCE_MS + (answeredAt - askedAt) / 2);
  }

  function report(isOff: boolean): void {
    if (isOff === isReported) return;
    isReported = isOff;
    const about = { aheadSeconds: Math.round(aheadMs / 100) / 10 };
    if (!isOff) logger.warn(about, 'the clock of this pod agrees with that of Redis again');
    else if (adjust !== undefined)
      logger.warn(
        about,
        'the clock of this pod differs from that of Redis, by which the relay goes from now on: set it right, other programs go by it',
      );
    else
      logger.warn(
        about,
        'the clock of this process differs from that of Redis: retries come as much too early or too late until it is set right',
      );
  }

  const compare = (): Promise<void> =>
    askRedis().catch((error) => logger.debug({ err: error }, 'Redis did not tell its time; asked again'));

  return {
    /** Once, and at once. Throws nothing: where Redis does not tell its time, the next comparison may. */
    compare,
    /** Goes on comparing. */
    ...loop(compare, INTERVAL_MS),
    /** By how much the clock of this machine is ahead of Redis; negative when it is behind. */
    aheadMs: (): number => aheadMs,
  };
}
