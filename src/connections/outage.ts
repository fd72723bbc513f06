import type { Logger } from '../telemetry/logger.ts';
import { sqlState, TOO_MANY_SESSIONS } from './pool-health.ts';

/** Errors of an outage of PostgreSQL, for which the log has a line already. */
const told = new WeakSet<object>();

/** How to log that some work failed: while PostgreSQL is away, one line says so for all work. */
export const levelOf = (error: Error): 'warn' | 'debug' => (told.has(error) ? 'debug' : 'warn');

/** What pg-pool says when all its sessions are in use. */
const POOL_IS_BUSY = 'timeout exceeded when trying to connect';

export type Outage = ReturnType<typeof createOutage>;

/** Tells of an outage of PostgreSQL and of its end, once, whichever pool notices it. */
export function createOutage(logger: Logger, host: string | undefined) {
  let isAway = false;
  let openedAt = Number.NEGATIVE_INFINITY;
  return {
    /** No session could be opened. `askedAt`: when it was asked for; one that was opened since says more. */
    met(error: Error, askedAt: number): void {
      if (sqlState(error) === TOO_MANY_SESSIONS || error.message === POOL_IS_BUSY) return;
      if (openedAt >= askedAt) return;
      if (!isAway)
        logger.warn({ err: error, host }, 'no connection to PostgreSQL; trying again until it is back');
      isAway = true;
      told.add(error);
    },
    /** A new session was opened. */
    over(): void {
      openedAt = performance.now();
      if (isAway) logger.info({ host }, 'the connection to PostgreSQL is back');
      isAway = false;
    },
  };
}
