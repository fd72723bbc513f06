import type { Redis } from 'ioredis';
import { NotReadyError, withDeadline } from '../lifecycle.ts';
import { lacks, missingFromTable } from '../outbox/required.ts';
import { type Pool, transaction } from './database.ts';

/** Questions to the servers: whether they can do what the relay needs, and why there is no connection. */

/** Deadline of one query here. */
const LOOK_MS = 2_500;

/** @throws {NotReadyError} when the table is not as it must be */
export async function requireTable(pool: Pool): Promise<void> {
  const missing = await transaction(pool, LOOK_MS, 'repeatable', missingFromTable);
  if (missing.length > 0) throw new NotReadyError(lacks(missing));
}

/** Redis answers a client too many with the reason and hangs up; what the client has sent by then costs it the answer. */
const withLikelyReason = (error: Error): Error =>
  /\b(EPIPE|ECONNRESET)\b|Connection is closed/.test(error.message)
    ? new Error(
        `${error.message}: the connection ended at once, as when Redis has as many clients as its maxclients, or when something else answers there`,
      )
    : error;

/** The last error of a connection while it is not ready: ioredis' own errors do not say why there is none. */
export function lastErrorOf(redis: Redis): () => Error | undefined {
  let last: Error | undefined;
  redis.on('error', (error) => {
    last = withLikelyReason(error);
  });
  redis.on('ready', () => {
    last = undefined;
  });
  return () => last;
}

/**
 * Connects a lazy client.
 * @throws the first `error` event, which has the reason, if it is not connected within `timeoutMs`
 */
export async function connected(redis: Redis, timeoutMs: number): Promise<void> {
  if (redis.status === 'ready') return;
  let reason: Error | undefined;
  const onError = (error: Error) => {
    reason ??= withLikelyReason(error);
  };
  redis.on('error', onError);
  try {
    const connecting: Promise<unknown> = redis.status === 'wait' ? redis.connect() : redis.ping();
    await withDeadline(timeoutMs, connecting);
  } catch (error) {
    throw reason ?? withLikelyReason(error as Error);
  } finally {
    redis.off('error', onError);
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
