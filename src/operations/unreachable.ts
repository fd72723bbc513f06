import {
  isNoAnswer,
  NO_SESSION_FREE,
  READ_ONLY,
  sqlState,
  TIMED_OUT,
  TOO_MANY_SESSIONS,
  TooFewSessionsError,
} from '../connections/pool-health.ts';
import { isLost, refusesEverybody } from '../connections/refusals.ts';
import { createSpacedWarnings, type Logger } from '../telemetry/logger.ts';

/**
 * What requests over HTTP are told while a server cannot be reached, refuses everybody, or has no session for them: nothing
 * else of it.
 */

/** Seconds; a server that was restarted is back by then. */
export const RETRY_AFTER = '5';
const LOG_EVERY_MS = 10_000;

/** node-postgres has no codes for these, nor has the pool. */
const NO_SESSION = /^Connection terminated|^timeout (exceeded|expired)|^the pool gave no database session/;
/** Class 08: the connection failed. 57P0x: the server ends, crashed, or starts. */
const SESSION_ENDED = /^(08|57P0[123])/;
/** An errno, as of connect(). Those of Redis are in events of ioredis, never in the error of a command. */
const ERRNO = /^E(?!RR_)[A-Z_]+$/;

function serverOf(error: Error): 'Redis' | 'PostgreSQL' | undefined {
  if (isLost(error)) return 'Redis';
  const isAway =
    NO_SESSION.test(error.message) ||
    isNoAnswer(error) ||
    SESSION_ENDED.test(sqlState(error) ?? '') ||
    ERRNO.test(String((error as NodeJS.ErrnoException).code));
  return isAway ? 'PostgreSQL' : undefined;
}

/** What takes no changes now, as after a failover to a replica. */
function refuserOf(error: Error): 'Redis' | 'PostgreSQL' | undefined {
  if (refusesEverybody(error)) return 'Redis';
  return sqlState(error) === READ_ONLY ? 'PostgreSQL' : undefined;
}

const areSessionsInUse = (error: Error): boolean =>
  error instanceof TooFewSessionsError ||
  error.message.startsWith(NO_SESSION_FREE) ||
  sqlState(error) === TOO_MANY_SESSIONS;

/**
 * @returns for an error of a request: what to answer with 503, where a later one may succeed. The log has the error, at most
 * once in 10 s
 */
export function createUnreachable(logger: Logger) {
  const warn = createSpacedWarnings(logger, LOG_EVERY_MS);
  return (error: Error): string | undefined => {
    if (areSessionsInUse(error)) {
      warn(
        { err: error },
        'all database sessions are in use; requests to the dashboard and the HTTP API get a 503',
      );
      return 'all database sessions are in use; try again';
    }
    const refuser = refuserOf(error);
    if (refuser !== undefined) {
      warn(
        { err: error, server: refuser },
        'a server refuses changes; requests to the dashboard and the HTTP API get a 503',
        `${refuser} refuses`,
      );
      return `${refuser} refuses changes now; try again`;
    }
    if (sqlState(error) === TIMED_OUT) {
      warn(
        { err: error },
        'a statement of a request took too long; requests to the dashboard and the HTTP API get a 503',
      );
      return 'PostgreSQL did not do this in time; try again';
    }
    const server = serverOf(error);
    if (server === undefined) return undefined;
    warn(
      { err: error, server },
      'a server cannot be reached; requests to the dashboard and the HTTP API get a 503',
      server,
    );
    return `${server} cannot be reached; try again`;
  };
}
