import type { Redis } from 'ioredis';
import type { RelayConfig } from '../config/config.ts';
import { NotReadyError } from '../lifecycle.ts';
import { type Owner, readOwner } from '../outbox/owner.ts';
import { listeningPods } from '../outbox/wakeup.ts';
import { type Finding, failed, failedFor, ok, RequirementError } from '../requirement.ts';
import { errorText } from '../telemetry/logger.ts';
import { asking, type Pool } from './database.ts';

/**
 * A queue in Redis belongs to one database. If two databases used it, the relay of each would take the other's jobs, whose
 * events have no row there. The first relay that comes writes its database to the key `<prefix>:<name>:owner`: on the Redis
 * of the queues, and on that of the streams if it is another server. Relays with different queues may share streams.
 */

type QueueName = Pick<RelayConfig, 'queuePrefix' | 'queueName'>;

export const ownerKey = ({ queuePrefix, queueName }: QueueName): string =>
  `${queuePrefix}:${queueName}:owner`;

/** What the key names where something else was written to it: a database that nobody has. "relay own" replaces it. */
const UNREADABLE: Owner = { token: '', database: 'unknown', system: '' };

/** The owner of the queue on this Redis; null if there is none. */
export async function ownerOf(redis: Redis, queue: QueueName): Promise<Owner | null> {
  const text = await redis.get(ownerKey(queue));
  if (text === null) return null;
  try {
    return { ...UNREADABLE, ...(JSON.parse(text) as Owner) };
  } catch {
    return UNREADABLE;
  }
}

export const describeOwner = ({ database, system }: Owner): string =>
  `database "${database}"${system && ` (system_identifier ${system})`}`;

/** An empty `system` matches any: the role may not read the identifier of its server. */
export const isSame = (a: Owner, b: Owner): boolean =>
  a.token === b.token &&
  a.database === b.database &&
  (a.system === b.system || a.system === '' || b.system === '');

/** Why a queue with the owner `there` cannot be used, and what to do; null if it can. */
function problemOf(mine: Owner, there: Owner, queue: QueueName): string | null {
  if (isSame(mine, there)) return null;
  const which =
    there.token === mine.token ? 'from which this one was restored, copied or renamed' : 'not to this one';
  return (
    `queue "${queue.queueName}" (prefix "${queue.queuePrefix}") on this Redis belongs to ${describeOwner(there)}, ${which}: ` +
    `RELAY_DATABASE_URL leads to ${describeOwner(mine)}. Give this relay a RELAY_QUEUE_NAME or RELAY_QUEUE_PREFIX of its own, ` +
    'or another Redis or database number (RELAY_REDIS_URL, RELAY_STREAM_REDIS_URL); if this database takes the place of that one, ' +
    'stop the relay of that one and run "relay own"'
  );
}

/** Deadline of one query. */
const ASK_MS = 5_000;

/**
 * Whether the queue on this Redis belongs to this database, or is free and no pod works on the table: pods with another Redis
 * or another queue would be a second relay for the same rows. Changes nothing.
 */
export async function isOurs(pool: Pool, redis: Redis, queue: QueueName): Promise<Finding> {
  const { mine, there, problem } = await compareOwners(pool, redis, queue);
  if (problem) return failed(problem);
  if (there) return ok(`queue "${queue.queueName}" belongs to ${describeOwner(mine)}`);
  const elsewhere = await listeningPods(asking(pool, ASK_MS));
  if (elsewhere.length === 0) return ok(`queue "${queue.queueName}" is free for ${describeOwner(mine)}`);
  // Soon, if Redis was emptied: those pods write their database to it again.
  return failedFor(
    'soon',
    `pods are at work on this table (${[...new Set(elsewhere)].map((it) => it || 'local socket').join(', ')}), and queue "${queue.queueName}" (prefix "${queue.queuePrefix}") on this Redis is not theirs: all pods of a table need the same Redis and queue; see RELAY_REDIS_URL, RELAY_STREAM_REDIS_URL, RELAY_QUEUE_NAME and RELAY_QUEUE_PREFIX, or stop those pods first`,
  );
}

/**
 * @param claims whether this database becomes the owner where there is none
 * @throws {RequirementError} if the queue on this Redis belongs to another database
 * @throws {NotReadyError} if a server does not answer
 */
export async function assertOurs(pool: Pool, redis: Redis, queue: QueueName, claims = false): Promise<void> {
  const { problem } = await compareOwners(pool, redis, queue, claims).catch((error) => {
    throw new NotReadyError(`PostgreSQL or Redis does not tell whose the queue is: ${errorText(error)}`, {
      cause: error,
    });
  });
  if (problem) throw new RequirementError(problem);
}

/**
 * Makes this database the owner of the queue on this Redis, if it has none.
 * @throws {RequirementError} if it belongs to another database
 * @throws {NotReadyError} if a server does not answer
 */
export const becomeOwner = (pool: Pool, redis: Redis, queue: QueueName): Promise<void> =>
  assertOurs(pool, redis, queue, true);

/** This database, the owner of the queue on this Redis, and why the queue cannot be used. */
async function compareOwners(pool: Pool, redis: Redis, queue: QueueName, claims = false) {
  const mine = await readOwner(asking(pool, ASK_MS));
  if (claims) await redis.set(ownerKey(queue), JSON.stringify(mine), 'NX');
  const there = await ownerOf(redis, queue);
  return { mine, there, problem: there && problemOf(mine, there, queue) };
}
