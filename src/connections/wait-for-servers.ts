import { once } from 'node:events';
import type { Redis } from 'ioredis';
import { NotReadyError, pause, withDeadline } from '../lifecycle.ts';
import { type Finding, RequirementError } from '../requirement.ts';
import { errorText, type Logger } from '../telemetry/logger.ts';
import { type Pool, transaction } from './database.ts';
import { databaseFinding } from './database-requirements.ts';
import { sqlState } from './pool-health.ts';
import { lastErrorOf } from './preflight.ts';
import { redisFinding } from './redis-requirements.ts';

/** Waits until the servers answer. */

const RETRY_MS = 500;
const FIRST_LOG_MS = 1_000;
const LOG_EVERY_MS = 5_000;
/** Deadline of the question to PostgreSQL. */
const LOOK_MS = 2_500;

/**
 * Waits until database and Redis answer.
 * @throws {NotReadyError} when one does not answer within `timeoutMs`
 * @throws {RequirementError} at once when one refuses the relay for a reason that does not pass, such as its password
 */
export async function waitForServers(deps: {
  pool: Pool;
  redis: readonly Redis[];
  /** For the streams, if they have a server of their own. */
  streamRedis?: readonly Redis[];
  timeoutMs: number;
  logger: Logger;
}): Promise<void> {
  const { pool, redis, timeoutMs, logger } = deps;
  const streamRedis = (deps.streamRedis ?? []).filter((it) => !redis.includes(it));
  const endsAt = Date.now() + timeoutMs;
  // In a transaction, which is run again if its session ends.
  const asksDatabase = () => transaction(pool, LOOK_MS, 'repeatable', (tx) => tx.query('SELECT 1'));
  const stop = new AbortController();
  const until = { endsAt, logger, signal: stop.signal };
  try {
    await Promise.all([
      untilAnswered(POSTGRES, asksDatabase, until),
      untilAnswered(REDIS, answers(redis), until),
      untilAnswered(STREAM_REDIS, answers(streamRedis), until),
    ]);
  } finally {
    stop.abort(); // the other waits, where one has failed
  }
}

/** A probe for the connections to one server. While one is not ready, the probe fails with its last error. */
function answers(connections: readonly Redis[]): () => Promise<unknown> {
  const probes = connections.map((redis) => {
    const reason = lastErrorOf(redis);
    return async () => {
      if (redis.status !== 'ready')
        await once(redis, 'ready', { signal: AbortSignal.timeout(RETRY_MS) }).catch(() => {
          throw reason() ?? new Error('not connected yet');
        });
      await redis.ping().catch((error) => {
        throw reason() ?? error; // what ioredis says without a connection tells nobody why there is none
      });
    };
  });
  return () => Promise.all(probes.map((probe) => probe()));
}

async function untilAnswered(
  server: Server,
  ask: () => Promise<unknown>,
  { endsAt, logger, signal }: Readonly<{ endsAt: number; logger: Logger; signal: AbortSignal }>,
): Promise<void> {
  let reason = 'no answer yet';
  // Not after a try: the first may last longer. The reason is enough, a stack says nothing of the server.
  const log = () => logger.warn({ server: server.name, reason }, 'waiting for a server to answer');
  const timers = [setTimeout(log, FIRST_LOG_MS), setInterval(log, LOG_EVERY_MS)];
  try {
    while (!signal.aborted) {
      try {
        // The last question has time to find out why there is no connection.
        await withDeadline(Math.max(endsAt - Date.now(), 3 * RETRY_MS), ask());
        return;
      } catch (error) {
        const failure = failureOf(server, error);
        if (failure instanceof RequirementError || Date.now() >= endsAt) throw failure;
        reason = errorText(error);
        await pause(Math.min(RETRY_MS, Math.max(endsAt - Date.now(), 1)), signal);
      }
    }
  } finally {
    for (const timer of timers) clearTimeout(timer);
  }
}

const WRONG_PASSWORD = '28P01';

type Server = Readonly<{
  name: string;
  variable: string;
  /** Whether waiting does not help. Only where that is sure: much passes in a failover or a roll-out. */
  refuses: (error: unknown) => boolean;
  finding: (error: unknown, variable: string) => Finding;
}>;
export const POSTGRES: Server = {
  ...{ name: 'PostgreSQL', variable: 'RELAY_DATABASE_URL', finding: databaseFinding },
  refuses: (error) => sqlState(error) === WRONG_PASSWORD || /statement pooling mode/.test(errorText(error)),
};
const REDIS: Server = {
  ...{ name: 'Redis', variable: 'RELAY_REDIS_URL', finding: redisFinding },
  refuses: (error) => /^(WRONGPASS|NOAUTH)\b|DB index|SELECT is not allowed/.test(errorText(error)),
};
const STREAM_REDIS: Server = {
  ...REDIS,
  ...{ name: 'Redis of the streams', variable: 'RELAY_STREAM_REDIS_URL' },
};

/** What it means for the relay that a server cannot be asked. */
export function failureOf({ name, variable, refuses, finding }: Server, error: unknown): Error {
  if (refuses(error))
    return new RequirementError(`${name} does not let the relay in: ${finding(error, variable).finding}`);
  const failed = sqlState(error) === undefined ? 'cannot be reached' : 'refuses the connection';
  return new NotReadyError(`${name} ${failed} (see ${variable}): ${errorText(error)}`);
}
