import { randomUUID } from 'node:crypto';
import type { Redis, Result } from 'ioredis';
import type { Logger } from '../logger.ts';
import { notesOf } from './restore.ts';

/**
 * An epoch is a time in which Redis has lost nothing. Its name stands in a key of Redis and is given with every
 * append, whose script refuses when it finds another one. So after a restart, a failover, FLUSHALL or a stream that
 * vanished nothing new is appended before somebody has compared table and streams, restored what is missing, and
 * begun the next epoch.
 *
 * A pod takes the epoch that it finds only if it names the server that it is connected to, and forgets it when the
 * connection closes: data that was rolled back brings an old name back, on a server that has started anew.
 */
export type Epoch = Readonly<{
  start(): void;
  stop(): Promise<void>;
  /** The epoch in which an append may be sent now. Undefined while it is not known whether Redis lost anything. */
  current(): string | undefined;
  /** The same, waited for a moment: most interruptions are short. */
  known(): Promise<string | undefined>;
  /**
   * To be asked before the commit of whatever rests on an append.
   * @throws {EpochOverError} when what was appended in that epoch may be lost
   * @throws when Redis does not answer
   */
  confirm(epoch: string): Promise<void>;
  /** Redis contradicts what is known: it is asked again before the next append. */
  doubt(): void;
  /** A stream that was there in that epoch is gone: it ends for all pods. */
  doubtAll(epoch: string): void;
}>;

/** Redis may have lost the entry since it was appended. */
export class EpochOverError extends Error {
  override readonly name = 'EpochOverError';
  constructor() {
    super('Redis may have lost the entry after the append; the event is published again if so');
  }
}

/** What is to be compared before the next epoch begins. */
export type Loss = Readonly<{
  /** Time of the database (ISO 8601) up to which nothing can have been lost; null when that is not known. */
  intactUntil: string | null;
  /** What the epoch's key holds meanwhile: scripts that restore entries are given it. */
  guard: string;
}>;

/** What the epoch's key begins with while table and streams are compared. */
const COMPARING = 'checking:';

/**
 * Whether somebody is comparing table and streams now.
 * @throws when Redis does not answer
 */
export const isComparing = async (redis: Redis, epochKey: string): Promise<boolean> =>
  (await redis.get(epochKey))?.startsWith(COMPARING) === true;

declare module 'ioredis' {
  interface RedisCommander<Context> {
    stampEpoch(epochKey: string, intactKey: string, epoch: string, at: string): Result<number, Context>;
    beginEpoch(
      epochKey: string,
      intactKey: string,
      checkerKey: string,
      notesKey: string,
      ...args: [guard: string, epoch: string, at: string]
    ): Result<number, Context>;
  }
}

/**
 * Answers whether the epoch lasts, and stamps it with the time: everything before is there as long as the stamp is.
 * The server's identity is asked for in here, since a stamp on data that was rolled back would hide what is missing.
 *
 * KEYS: epoch, intact. ARGV: epoch, database time ('' = no stamp).
 */
const STAMP = `
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
local run = string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
local history = string.match(redis.call('INFO', 'replication'), 'master_replid:(%w+)')
if string.find(ARGV[1], run .. '/' .. history .. ':', 1, true) ~= 1 then return 0 end
if ARGV[2] ~= '' then redis.call('SET', KEYS[2], ARGV[2]) end
return 1`;

/** KEYS: epoch, intact, checker, notes. ARGV: guard, new epoch, database time. */
const BEGIN = `
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
redis.call('SET', KEYS[2], ARGV[3])
redis.call('DEL', KEYS[3], KEYS[4])
return 1`;

/** How often Redis is asked whether it is still the same; also how much has to be compared after a restart. */
const LOOK_INTERVAL_MS = 2_000;
/** Between two looks at what another pod's comparison has come to. */
const RETRY_MS = 100;
const RETRY_AFTER_ERROR_MS = 500;
/** A pod that dies in mid-comparison is replaced after so long. */
const CHECKER_TTL_MS = 4_000;
const CHECKER_RENEWAL_MS = 1_000;
/** An append waits so long for the epoch before its event is postponed. */
const KNOWN_TIMEOUT_MS = 2_000;

/**
 * @param redis the append connection: what is known ends with it
 * @param restore compares table and streams and appends what is missing; run again after any failure
 */
export function createEpoch(deps: {
  redis: Redis;
  /** Prefix of the keys. */
  key: string;
  databaseTime: () => Promise<string>;
  restore: (loss: Loss) => Promise<void>;
  /** What that is, for the log. */
  restoring?: string;
  logger: Logger;
}): Epoch {
  const { redis, key, logger, restoring = 'comparing what was published with what is there' } = deps;
  const checkerKey = `${key}:checker`;
  const intactKey = `${key}:intact`;
  const notesKey = notesOf(key);
  redis.defineCommand('stampEpoch', { numberOfKeys: 2, lua: STAMP });
  redis.defineCommand('beginEpoch', { numberOfKeys: 4, lua: BEGIN });

  let stopped = true;
  let epoch: string | undefined;
  /** Counts connections, so that no answer of one is taken for an answer of the next. */
  let connection = 0;
  let finding: Promise<void> | undefined;
  let doubted: string | undefined;
  let timer: NodeJS.Timeout | undefined;
  let looking: Promise<void> = Promise.resolve();
  let wakeSleeper = (): void => {};
  const waiting = new Set<() => void>();

  function take(found: string): void {
    epoch = found;
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

  /** Until an epoch is known, or the connection is gone: then `ready` begins again. */
  function find(): void {
    if (stopped || finding !== undefined) return;
    const mine = connection;
    finding = (async () => {
      while (!stopped && epoch === undefined && connection === mine) {
        try {
          await identify(mine);
          if (epoch === undefined) await sleep(RETRY_MS);
        } catch (error) {
          if (connection !== mine) break;
          logger.warn(
            { err: error },
            'cannot tell whether Redis has lost anything; nothing is appended until then',
          );
          await sleep(RETRY_AFTER_ERROR_MS);
        }
      }
    })().finally(() => {
      finding = undefined;
      if (!stopped && epoch === undefined && redis.status === 'ready') find();
    });
  }

  async function identify(mine: number): Promise<void> {
    if (doubted !== undefined) {
      // However long ago the entries of the missing stream were written, they are compared: no stamp any more.
      if ((await redis.get(key)) === doubted) await redis.del(intactKey, key);
      doubted = undefined;
    }
    const server = await identityOf(redis);
    if (server === null) return; // a replica takes no appends
    const found = await redis.get(key);
    if (connection !== mine) return;
    if (found?.startsWith(`${server}:`)) return take(found);
    const isChecker = await redis.set(checkerKey, randomUUID(), 'PX', CHECKER_TTL_MS, 'NX');
    if (isChecker) await check(server, found, mine);
  }

  async function check(server: string, found: string | null, mine: number): Promise<void> {
    const guard = `${COMPARING}${randomUUID()}`;
    const renewal = setInterval(() => {
      redis.pexpire(checkerKey, CHECKER_TTL_MS).catch(() => {});
    }, CHECKER_RENEWAL_MS);
    try {
      const intactUntil = await redis.get(intactKey);
      // From here on no receipt of an earlier append is confirmed, by any pod.
      await redis.set(key, guard);
      logger.info(
        { intactUntil, known: found !== null },
        `Redis is new here, or was restarted, replaced or emptied: ${restoring}`,
      );
      await deps.restore({ intactUntil, guard });
      const next = `${server}:${randomUUID()}`;
      const now = await deps.databaseTime();
      if (connection !== mine) return;
      const begun = await redis.beginEpoch(key, intactKey, checkerKey, notesKey, guard, next, now);
      if (begun === 1 && connection === mine) take(next);
    } finally {
      clearInterval(renewal);
    }
  }

  async function look(): Promise<void> {
    const known = epoch;
    if (known === undefined) {
      if (redis.status === 'ready') find();
      return;
    }
    // Without the database nothing is stamped: more is compared, should Redis fail now.
    const now = await deps.databaseTime().catch(() => '');
    if (epoch === known && (await redis.stampEpoch(key, intactKey, known, now)) !== 1) forget();
  }

  function lookAgain(): void {
    looking = look()
      .catch(() => {}) // no answer: the connection's own trouble, of which its owner tells
      .finally(() => {
        if (!stopped) timer = setTimeout(lookAgain, LOOK_INTERVAL_MS);
      });
  }

  async function sleep(ms: number): Promise<void> {
    await new Promise<void>((resolve) => {
      const alarm = setTimeout(resolve, ms);
      wakeSleeper = () => {
        clearTimeout(alarm);
        resolve();
      };
    });
  }

  return {
    start() {
      if (!stopped) return;
      stopped = false;
      redis.on('close', onClose);
      redis.on('ready', onReady);
      if (redis.status === 'ready') find();
      timer = setTimeout(lookAgain, LOOK_INTERVAL_MS);
    },
    async stop() {
      stopped = true;
      clearTimeout(timer);
      wakeSleeper();
      redis.off('close', onClose);
      redis.off('ready', onReady);
      for (const resume of waiting) resume();
      waiting.clear();
      await Promise.all([looking, finding]);
    },
    current: () => epoch,
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
    async confirm(of) {
      if (epoch !== of) throw new EpochOverError();
      const found = await redis.get(key);
      if (found === of && epoch === of) return;
      if (epoch === of) forget();
      throw new EpochOverError();
    },
    doubt() {
      if (epoch !== undefined) forget();
    },
    doubtAll(of) {
      if (epoch !== of) return;
      doubted = of;
      forget();
    },
  };
}

/**
 * Of the server and its history: a restart changes the first, a failover (also to and fro) the second. Null for a
 * replica, and for a server that is loading its data.
 */
async function identityOf(redis: Redis): Promise<string | null> {
  const [server, replication] = await Promise.all([redis.info('server'), redis.info('replication')]);
  const runId = /^run_id:(\w+)/m.exec(server)?.[1];
  const history = /^master_replid:(\w+)/m.exec(replication)?.[1];
  if (runId === undefined || history === undefined) throw new Error('Redis does not tell its run_id');
  return /^role:master/m.test(replication) ? `${runId}/${history}` : null;
}
