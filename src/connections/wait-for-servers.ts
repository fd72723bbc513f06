import { once } from 'node:events';
import type { Redis } from 'ioredis';
import { NotReadyError, pause, withDeadline } from '../lifecycle.ts';
import { type Finding, RequirementError } from '../requirement.ts';
import { errorText, type Logger } from '../telemetry/logger.ts';
import { type Pool, transaction } from './database.ts';
import { databaseFinding } from './database-requirements.ts';
import { lastErrorOf } from './preflight.ts';
import { redisFinding } from './redis-requirements.ts';

/** Waits until the servers answer. */

const RETRY_MS = 500;
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
  await Promise.all([
    untilAnswered(POSTGRES, asksDatabase, endsAt, logger),
    untilAnswered(REDIS, answers(redis), endsAt, logger),
    untilAnswered(STREAM_REDIS, answers(streamRedis), endsAt, logger),
  ]);
}

/** A probe for the connections to one server. While one is not ready, the probe fails with its last error. */
function answers(connections: readonly Redis[]): () => Promise<unknown> {
  const probes = connections.map((redis) => {
    const reason = lastErrorOf(redis);
    return async () => {
      if (redis.status !== 'ready')
        await once(redis, 'ready', { signal: AbortSignal.timeout(RETRY_MS) }).catch(() => {
          throw reason() ?? new Error(`connection is ${redis.status}`);
        });
      await redis.ping();
    };
  });
  return () => Promise.all(probes.map((probe) => probe()));
}

async function untilAnswered(
  server: Server,
  ask: () => Promise<unknown>,
  endsAt: number,
  logger: Logger,
): Promise<void> {
  let loggedAt = Date.now();
  for (;;) {
    try {
      // The last question has time to find out why there is no connection.
      await withDeadline(Math.max(endsAt - Date.now(), 3 * RETRY_MS), ask());
      return;
    } catch (error) {
      const failure = failureOf(server, error);
      if (failure instanceof RequirementError || Date.now() >= endsAt) throw failure;
      if (Date.now() - loggedAt >= LOG_EVERY_MS) {
        loggedAt = Date.now();
        logger.warn({ err: error, server: server.name }, 'waiting for a server to answer');
      }
      await pause(Math.min(RETRY_MS, Math.max(endsAt - Date.now(), 1)));
    }
  }
}

type Server = Readonly<{ name: string; variable: string; finding: (error: unknown) => Finding }>;
export const POSTGRES: Server = {
  ...{ name: 'PostgreSQL', variable: 'RELAY_DATABASE_URL', finding: databaseFinding },
};
const REDIS: Server = { name: 'Redis', variable: 'RELAY_REDIS_URL', finding: redisFinding };
const STREAM_REDIS: Server = {
  ...{ name: 'Redis of the streams', variable: 'RELAY_STREAM_REDIS_URL', finding: redisFinding },
};

/** What it means for the relay that a server cannot be asked. */
export function failureOf({ name, variable, finding }: Server, error: unknown): Error {
  const reason = `(see ${variable}): ${errorText(error)}`;
  return finding(error).mayPass === false
    ? new RequirementError(`${name} does not let the relay in ${reason}`)
    : new NotReadyError(`${name} cannot be reached ${reason}`);
}
