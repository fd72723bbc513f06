import { randomUUID } from 'node:crypto';
import { script } from '../connections/redis-script.ts';
import { loop, pause } from '../lifecycle.ts';
import type { Logger } from '../telemetry/logger.ts';
import {
  CHECKER_TTL_MS,
  type Epoch,
  EpochOverError,
  RETRY_MS,
  type RenewalDeps,
  renewEpoch,
} from './epoch.ts';
import { END, identityOf, keysOf, STAMP } from './epoch-script.ts';

/** Interval between two checkpoints. After a restart of Redis, this much is compared at least. */
const STAMP_INTERVAL_MS = 2_000;
const RETRY_AFTER_ERROR_MS = 500;
/** Interval at which the same reason is logged again. */
const REPORT_INTERVAL_MS = 10_000;
/** How long an append waits for the epoch before its event is postponed. */
const KNOWN_TIMEOUT_MS = 2_000;

/** Names of earlier epochs that a pod remembers, at most. */
const EARLIER_KEPT = 1_000;

const NOT_COMPARED = 'Redis may have lost entries, or PostgreSQL rows: they are looked for';

type EpochDeps = RenewalDeps &
  Readonly<{
    /** Told which generation of the database the epoch rests on. */
    accept?: (generation: string) => void;
    /** What `recover` does, for the log. */
    recovering?: string;
    logger: Logger;
  }>;

/**
 * Tells a pod which epoch it is in, and renews the epoch where that has to be.
 *
 * The pod takes the epoch that it finds only if this names the server that the pod is connected to. It forgets the epoch
 * when the connection closes: a server that starts with older data brings an old name back. Beside the name stands the
 * generation of the database (connections/generation.ts) whose rows were looked up in their streams. A pod that is
 * connected to another generation ends the epoch, and first looks up what that one may have forgotten.
 *
 * @param deps.redis the append connection: what is known of the epoch ends with it
 */
export function createEpoch(deps: EpochDeps): Epoch {
  const { redis, key, logger, recovering = 'comparing what was published with what is there' } = deps;
  const keys = keysOf(key);
  const stampEpoch = script<[number, string]>(redis, 'stampEpoch', STAMP, 3);
  const endInRedis = script<number>(redis, 'endEpoch', END, 2);

  let stopped = true;
  let epoch: string | undefined;
  /** The generation that the epoch rests on. */
  let restsOn: string | undefined;
  let reason = NOT_COMPARED;
  let reportedAt = Number.NEGATIVE_INFINITY;
  /** Counts connections, so that an answer of one is never taken for an answer of the next. */
  let connection = 0;
  let finding: Promise<void> | undefined;
  /** An epoch in which a stream was lost. It is still to be ended in Redis. */
  let ended: string | undefined;
  /** The epoch that the pod took last, and earlier ones. If an earlier one is there again, so is older data (SWAPDB). */
  let latest: string | undefined;
  const earlier = new Set<string>();
  /** Where the next stamp goes on among the streams that have a last entry. */
  let cursor = '0';
  let stampCount = 0;
  /** Ends the pauses of `find`. */
  let stopping = new AbortController();
  const waiting = new Set<() => void>();

  function take(found: string, generation: string): void {
    epoch = found;
    if (latest !== undefined && latest !== found) {
      if (earlier.size >= EARLIER_KEPT) earlier.clear();
      earlier.add(latest);
    }
    latest = found;
    restsOn = generation;
    reason = NOT_COMPARED;
    reportedAt = Number.NEGATIVE_INFINITY;
    deps.accept?.(generation);
    for (const resume of waiting) resume();
    waiting.clear();
  }

  function forget(): void {
    epoch = undefined;
    if (redis.status === 'ready') find();
  }

  const onClose = () => {
    connection++;
    epoch = undefined;
  };
  const onReady = () => find();

  /** Tries until the pod knows an epoch, or the connection is gone: then `ready` begins again. */
  function find(): void {
    if (stopped || finding !== undefined) return;
    const mine = connection;
    finding = (async () => {
      while (!stopped && epoch === undefined && connection === mine) {
        try {
          await takeOrRenew(mine);
          if (epoch === undefined) await pause(RETRY_MS, stopping.signal);
        } catch (error) {
          if (connection !== mine) break;
          report(error as Error);
          await pause(RETRY_AFTER_ERROR_MS, stopping.signal);
        }
      }
    })().finally(() => {
      finding = undefined;
      if (!stopped && epoch === undefined && redis.status === 'ready') find();
    });
  }

  function report(error: Error): void {
    if (error.message === reason && performance.now() - reportedAt < REPORT_INTERVAL_MS) return;
    reason = error.message;
    reportedAt = performance.now();
    logger.warn(
      { err: error },
      'cannot tell whether Redis or PostgreSQL has lost anything; nothing is appended until then',
    );
  }

  /** Takes the epoch in Redis if it is good here. If not, and no other process compares, renews it. */
  async function takeOrRenew(mine: number): Promise<void> {
    if (ended !== undefined) {
      await endInRedis(key, keys.checkpoint, ended);
      ended = undefined;
    }
    const server = await identityOf(redis);
    if (server === null) return; // a replica takes no appends
    // Redis may have been emptied since the start: the database that asks first owns the queue.
    await deps.assertOwner();
    const [found, lookedUp = null] = await redis.mget(key, keys.generation);
    const { generation: here } = await deps.database(lookedUp);
    if (connection !== mine) return;
    const isGood = (name?: string | null): name is string =>
      name?.startsWith(`${server}:`) === true && !earlier.has(name);
    if (isGood(found) && lookedUp === here) return take(found, here);
    const isChecker = await redis.set(keys.checker, randomUUID(), 'PX', CHECKER_TTL_MS, 'NX');
    if (!isChecker) return;
    // The previous holder of the checker's key may have begun the next epoch since.
    const [begun, lookedUpNow] = await redis.mget(key, keys.generation);
    if (isGood(begun) && lookedUpNow === here) {
      await redis.del(keys.checker);
      if (connection === mine) take(begun, here);
      return;
    }
    if (isGood(begun) && lookedUpNow)
      logger.warn(
        { generation: here, before: lookedUpNow },
        `PostgreSQL was restarted, promoted, replaced or restored, or the table was emptied or rewritten: ${recovering}`,
      );
    else
      logger.info(
        {},
        `Redis is new here, or was restarted, replaced or emptied, or a stream was deleted: ${recovering}`,
      );
    deps.accept?.(here);
    const next = await renewEpoch(deps, server, here, () => connection !== mine);
    if (next !== undefined && connection === mine) take(next, here);
  }

  /** Asks both servers whether the epoch lasts, and writes the checkpoint. */
  async function stamp(): Promise<void> {
    const known = epoch;
    if (known === undefined) {
      if (redis.status === 'ready') find();
      return;
    }
    // Without the database's time the checkpoint stays where it is: more is compared, should Redis fail now.
    const { now, generation } = await deps
      .database(restsOn ?? null)
      .catch(() => ({ now: '', generation: restsOn }));
    if (epoch !== known) return;
    if (generation !== restsOn) return forget();
    const [found, next] = await stampEpoch(
      key,
      keys.checkpoint,
      keys.lastEntries,
      known,
      now,
      cursor,
      stampCount++,
    );
    cursor = next;
    if (found === 2) endFor(known);
    else if (found !== 1) forget();
  }

  // When Redis gives no answer, the owner of the connection reports that.
  const stamps = loop(() => stamp().catch(() => {}), STAMP_INTERVAL_MS);

  function endFor(epochName: string): void {
    if (epoch !== epochName) return;
    ended = epochName;
    forget();
  }

  return {
    start() {
      if (!stopped) return;
      stopped = false;
      stopping = new AbortController();
      redis.on('close', onClose);
      redis.on('ready', onReady);
      stamps.start();
    },
    async stop() {
      stopped = true;
      stopping.abort();
      redis.off('close', onClose);
      redis.off('ready', onReady);
      for (const resume of waiting) resume();
      waiting.clear();
      await Promise.all([stamps.stop(), finding]);
    },
    current: () => epoch,
    reason: () => reason,
    async known() {
      if (epoch !== undefined || stopped) return epoch;
      await new Promise<void>((resolve) => {
        const giveUp = setTimeout(() => resume(), KNOWN_TIMEOUT_MS);
        const resume = () => {
          clearTimeout(giveUp);
          waiting.delete(resume);
          resolve();
        };
        waiting.add(resume);
      });
      return epoch;
    },
    async confirm(epochName) {
      if (epoch !== epochName) throw new EpochOverError();
      const found = await redis.get(key);
      if (found === epochName && epoch === epochName) return;
      if (epoch === epochName) forget();
      throw new EpochOverError();
    },
    invalidate() {
      if (epoch !== undefined) forget();
    },
    endFor,
  };
}
