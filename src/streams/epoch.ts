/**
 * An epoch is a time in which neither Redis nor PostgreSQL has lost anything. A key in Redis holds its name. Every append
 * names its epoch, and the append script refuses when the key holds another one. So after a restart, a failover,
 * FLUSHALL or the loss of a stream nothing is appended until one process has compared table and streams, has made
 * unpublished what is missing, and has begun the next epoch.
 *
 * This file ends an epoch and begins the next one. epoch-watch.ts tells a pod which epoch it is in.
 */
import { randomBytes, randomUUID } from 'node:crypto';
import type { Redis } from 'ioredis';
import { script } from '../connections/redis-script.ts';
import type { DatabaseState } from '../event.ts';
import { NotReadyError, pause } from '../lifecycle.ts';
import { BEGIN, identityOf, keysOf } from './epoch-script.ts';

/** What a pod knows of the epoch; see epoch-watch.ts. */
export type Epoch = Readonly<{
  start(): void;
  stop(): Promise<void>;
  /** The epoch in which the pod may append now. Undefined while the pod does not know whether anything was lost. */
  current(): string | undefined;
  /** The same, after a short wait if the pod does not know it yet: most interruptions are short. */
  known(): Promise<string | undefined>;
  /** Why the pod knows none, for operators. */
  reason(): string;
  /**
   * Each transaction that rests on an append asks this before it commits.
   * @throws {EpochOverError} when Redis may have lost what was appended in that epoch
   * @throws when Redis does not answer
   */
  confirm(epoch: string): Promise<void>;
  /** The caller has seen Redis contradict the epoch: the pod asks Redis again before it appends. */
  invalidate(): void;
  /** The caller has found that a stream of that epoch is lost: the epoch ends for all pods. */
  endFor(epoch: string): void;
}>;

/** The last part of an epoch's name. It is unique, and short enough to stand in every memory of an append. */
export const epochId = (epoch: string): string => epoch.slice(epoch.lastIndexOf(':') + 1);

/** Redis may have lost the entry since it was appended. */
export class EpochOverError extends Error {
  override readonly name = 'EpochOverError';
  constructor() {
    super('Redis may have lost the entry after the append; the event is published again if so');
  }
}

/**
 * What is to be compared before the next epoch begins.
 * - `checkpoint`: time of the database (ISO 8601) up to which Redis has lost nothing; null when that is not known
 * - `forgotten`: the database is of another generation, so its rows may be older than the streams
 * - `confirm`: each transaction that rests on the comparison asks this before it commits. It throws {EpochOverError} when
 *   another process has begun to compare: Redis may have lost more meanwhile
 */
export type Loss = Readonly<{
  checkpoint: string | null;
  forgotten: boolean;
  confirm: () => Promise<void>;
}>;

export type RenewalDeps = Readonly<{
  redis: Redis;
  /** Key of the epoch's name, and prefix of the keys beside it. */
  key: string;
  /**
   * Asks the database about itself. `known` is the generation whose rows were looked up last, null where there is none.
   * Rejects when the database does not answer, takes no writes, or is a primary of before a failover.
   */
  database: (known: string | null) => Promise<DatabaseState>;
  /** Rejects when the queue on this Redis belongs to another database. */
  assertOwner: () => Promise<void>;
  /** Compares table and streams, and makes unpublished what is missing. After a failure it is run again. */
  recover: (loss: Loss) => Promise<void>;
}>;

/** Builds of before wrote the checkpoint as their session printed times, which others may not read, or read as another. */
const IS_TIME = /^\d{4}-\d\d-\d\d[ T]/;
/** What the epoch's key begins with while a process compares table and streams. */
const COMPARING = 'checking:';
/** When the comparing process dies, another one may begin after this time. */
export const CHECKER_TTL_MS = 4_000;
const CHECKER_RENEWAL_MS = 1_000;
/** Interval at which a process that waits for another one's comparison asks for its result. */
export const RETRY_MS = 100;

/**
 * Whether a pod, or `relay verify --repair`, compares table and streams now.
 * @throws when Redis does not answer
 */
export const isComparing = async (redis: Redis, epochKey: string): Promise<boolean> =>
  (await redis.get(epochKey))?.startsWith(COMPARING) === true;

/**
 * Ends the epoch, runs `recover` while nothing is appended, and begins the next one. The caller holds the checker's key.
 * @param server its identity, with which the name of the epoch begins
 * @param generation of the database; null where the caller leaves it to the pods whether the database has forgotten rows
 * @param isLost whether the connection was lost meanwhile: then no epoch begins
 * @returns the new epoch, or undefined when none was begun
 */
export async function renewEpoch(
  deps: RenewalDeps,
  server: string,
  generation: string | null,
  isLost: () => boolean,
): Promise<string | undefined> {
  const { redis, key } = deps;
  const keys = keysOf(key);
  const begin = script<number>(redis, 'beginEpoch', BEGIN, 4);
  const token = `${COMPARING}${randomUUID()}`;
  const renewal = setInterval(() => {
    redis.pexpire(keys.checker, CHECKER_TTL_MS).catch(() => {});
  }, CHECKER_RENEWAL_MS);
  try {
    const [checkpoint = null, lookedUp = null] = await redis.mget(keys.checkpoint, keys.generation);
    // This ends the epoch: from here on no pod confirms an append that was made before.
    await redis.set(key, token);
    // Asked once more: if Redis is emptied and given to another database from here on, the token is gone, and no epoch begins.
    await deps.assertOwner();
    await redis.del(keys.lastEntries);
    const confirm = async () => {
      if ((await redis.get(key)) !== token) throw new EpochOverError();
    };
    await deps.recover({
      checkpoint: checkpoint !== null && IS_TIME.test(checkpoint) ? checkpoint : null,
      forgotten: generation !== null && generation !== lookedUp,
      confirm,
    });
    const next = `${server}:${randomBytes(9).toString('base64url')}`;
    const { now, generation: after } = await deps.database(generation ?? lookedUp);
    if (isLost() || (generation !== null && generation !== after)) return undefined;
    const begun = await begin(
      ...[key, keys.checkpoint, keys.checker, keys.generation, token, next, now, generation ?? ''],
    );
    return begun === 1 ? next : undefined;
  } finally {
    clearInterval(renewal);
  }
}

/**
 * For operators: ends the epoch, runs `recover`, and begins the next epoch. The pods wait meanwhile.
 * @throws {NotReadyError} when another process compares table and streams for longer than `timeoutMs`
 */
export async function endEpoch(deps: RenewalDeps & Readonly<{ timeoutMs: number }>): Promise<void> {
  const { redis, key, timeoutMs } = deps;
  await deps.assertOwner();
  const endsAt = Date.now() + timeoutMs;
  for (;;) {
    const server = await identityOf(redis);
    if (server === null) throw new NotReadyError('this Redis is a replica: it takes no appends');
    if (await redis.set(keysOf(key).checker, randomUUID(), 'PX', CHECKER_TTL_MS, 'NX')) {
      if ((await renewEpoch(deps, server, null, () => false)) !== undefined) return;
    }
    if (Date.now() >= endsAt)
      throw new NotReadyError('another process compares table and streams; try again when it has ended');
    await pause(RETRY_MS);
  }
}

/**
 * Makes the next pod begin as on a Redis that it has never seen: it compares everything in RELAY_RESYNC_WINDOW, and
 * looks up every row that is not published in its stream.
 */
export async function forgetEpoch(redis: Redis, key: string): Promise<void> {
  const keys = keysOf(key);
  await redis.del(key, keys.checkpoint, keys.generation);
}
