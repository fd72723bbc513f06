import { once } from 'node:events';
import type { Redis } from 'ioredis';
import { NotReadyError, pause, withDeadline } from '../lifecycle.ts';
import { lacks, missingFromTable } from '../outbox/required.ts';
import { errorText, type Logger } from '../telemetry/logger.ts';
import { type Pool, transaction } from './database.ts';
import { sqlState } from './pool-health.ts';

/** Waits for the servers, and asks whether they can do what the relay needs. */

const RETRY_MS = 500;
const LOG_EVERY_MS = 5_000;
/** Deadline of one query here. */
const LOOK_MS = 2_500;

/**
 * Waits until database and Redis answer.
 * @throws {NotReadyError} when one does not answer within `timeoutMs`
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
    waitFor('PostgreSQL', 'RELAY_DATABASE_URL', asksDatabase, endsAt, logger),
    waitFor('Redis', 'RELAY_REDIS_URL', answers(redis), endsAt, logger),
    waitFor('Redis of the streams', 'RELAY_STREAM_REDIS_URL', answers(streamRedis), endsAt, logger),
  ]);
}

/** @throws {NotReadyError} when the table is not as it must be */
export async function requireTable(pool: Pool): Promise<void> {
  const missing = await transaction(pool, LOOK_MS, 'repeatable', missingFromTable);
  if (missing.length > 0) throw new NotReadyError(lacks(missing));
}

/** The last error of a connection while it is not ready: ioredis' own errors do not say why there is none. */
export function lastErrorOf(redis: Redis): () => Error | undefined {
  let last: Error | undefined;
  redis.on('error', (error) => {
    last = error;
  });
  redis.on('ready', () => {
    last = undefined;
  });
  return () => last;
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

async function waitFor(
  server: string,
  variable: string,
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
      if (Date.now() >= endsAt) {
        const what = isAnswer(error) ? 'does not let the relay in' : 'cannot be reached';
        throw new NotReadyError(`${server} ${what} (see ${variable}): ${errorText(error)}`);
      }
      if (Date.now() - loggedAt >= LOG_EVERY_MS) {
        loggedAt = Date.now();
        logger.warn({ err: error, server }, 'waiting for a server to answer');
      }
      await pause(Math.min(RETRY_MS, Math.max(endsAt - Date.now(), 1)));
    }
  }
}

/** Whether the server itself said so, as it does where it refuses a password. */
const isAnswer = (error: unknown): boolean =>
  sqlState(error) !== undefined || (error as Error).name === 'ReplyError';

/**
 * Connects a lazy client.
 * @throws the first `error` event, which has the reason, if it is not connected within `timeoutMs`
 */
export async function connected(redis: Redis, timeoutMs: number): Promise<void> {
  if (redis.status === 'ready') return;
  let reason: Error | undefined;
  redis.on('error', (error) => {
    reason ??= error;
  });
  try {
    const connecting: Promise<unknown> = redis.status === 'wait' ? redis.connect() : redis.ping();
    await withDeadline(timeoutMs, connecting);
  } catch (error) {
    throw reason ?? error;
  }
}

/**
 * Checks that PostgreSQL takes writes. SELECT 1 would also succeed on a standby or in a read-only session. This writes
 * nothing and locks no row.
 *
 * @throws why it takes none
 */
export async function assertWritable(pool: Pool): Promise<void> {
  await transaction(pool, LOOK_MS, 'repeatable', (tx) =>
    tx.query('SELECT FROM identity.outbox WHERE false FOR UPDATE'),
  );
}

const PROBE_KEY_TTL_MS = 10_000;

/**
 * A probe that writes a short-lived key. PING would also succeed if Redis is full, read-only or lacks replicas.
 *
 * The probe throws the reason why Redis takes no writes.
 */
export function createWriteProbe(redis: Redis, key: string): () => Promise<void> {
  const lost = lastErrorOf(redis);
  return async () => {
    if (redis.status !== 'ready') {
      throw lost() ?? new Error(`no connection to Redis yet (${redis.status}): is it loading its data?`);
    }
    await writeProbeKey(redis, key);
  };
}

export async function writeProbeKey(redis: Redis, key: string): Promise<void> {
  await redis.set(key, '', 'PX', PROBE_KEY_TTL_MS);
}

export type RedisFacts = Readonly<{ version: string; aofEnabled: boolean; maxmemoryPolicy: string }>;

/** The fields of INFO. */
export async function infoOf(redis: Redis): Promise<(field: string) => string | undefined> {
  const lines = (await redis.info()).split('\r\n');
  const fields = new Map(lines.map((line) => line.split(/:(.*)/s, 2) as [string, string]));
  return (field) => fields.get(field);
}

/** The facts in INFO that health and requirements depend on. */
export async function inspectRedis(redis: Redis): Promise<RedisFacts> {
  const info = await infoOf(redis);
  return {
    version: info('redis_version') ?? 'unknown',
    aofEnabled: info('aof_enabled') === '1',
    maxmemoryPolicy: info('maxmemory_policy') ?? 'unknown',
  };
}
