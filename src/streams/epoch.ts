import { randomBytes, randomUUID } from 'node:crypto';
import type { Redis, Result } from 'ioredis';
import { NotReadyError } from '../lifecycle.ts';
import type { Logger } from '../telemetry/logger.ts';

/**
 * An epoch is a time in which neither Redis nor PostgreSQL has lost anything. Its name stands in a key of Redis and is
 * given with every append, whose script refuses when it finds another one. So after a restart, a failover, FLUSHALL or a
 * stream that vanished nothing is appended before one pod has compared table and streams, has made unpublished what is
 * missing, and has begun the next epoch.
 *
 * A pod takes the epoch that it finds only if it names the server that it is connected to, and forgets it when the
 * connection closes: data that was rolled back brings an old name back, on a server that has started anew. Beside it
 * stands the generation of the database (connections/generation.ts) whose rows were looked up in their streams: a pod
 * that is connected to another one ends the epoch, and looks up first what that one may have forgotten.
 */
export type Epoch = Readonly<{
  start(): void;
  stop(): Promise<void>;
  /** The epoch in which an append may be sent now. Undefined while it is not known whether Redis lost anything. */
  current(): string | undefined;
  /** The same, waited for a moment: most interruptions are short. */
  known(): Promise<string | undefined>;
  /** Why none is known, for operators. */
  reason(): string;
  /**
   * To be asked before the commit of whatever rests on an append.
   * @throws {EpochOverError} when what was appended in that epoch may be lost
   * @throws when Redis does not answer
   */
  confirm(epoch: string): Promise<void>;
  /** Redis contradicts what is known: it is asked again before the next append. */
  invalidate(): void;
  /** A stream that was there in that epoch is lost: the epoch ends for all pods. */
  endFor(epoch: string): void;
}>;

/** Of an epoch's name, what is remembered with entries and jobs: short, and given once. */
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
 * - `checkpoint`: time of the database (ISO 8601) up to which Redis can have lost nothing; null when that is not known
 * - `forgotten`: the database is of another generation, so its rows may be older than the streams
 * - `confirm`: to be asked before the commit of whatever rests on what was found; throws {EpochOverError} when another
 *   pod compares by now, since Redis may have lost it meanwhile
 */
export type Loss = Readonly<{
  checkpoint: string | null;
  forgotten: boolean;
  confirm: () => Promise<void>;
}>;

/** What the database says of itself; see connections/generation.ts. */
export type DatabaseState = Readonly<{ now: string; generation: string }>;

/** What the epoch's key begins with while table and streams are compared. */
const COMPARING = 'checking:';

/**
 * Whether a pod, or `relay verify --repair`, compares table and streams now.
 * @throws when Redis does not answer
 */
export const isComparing = async (redis: Redis, epochKey: string): Promise<boolean> =>
  (await redis.get(epochKey))?.startsWith(COMPARING) === true;

declare module 'ioredis' {
  interface RedisCommander<Context> {
    stampEpoch(
      epochKey: string,
      checkpointKey: string,
      lastEntriesKey: string,
      ...args: [epoch: string, at: string, cursor: string]
    ): Result<[number, string], Context>;
    beginEpoch(
      epochKey: string,
      checkpointKey: string,
      checkerKey: string,
      generationKey: string,
      ...args: [token: string, epoch: string, at: string, generation: string]
    ): Result<number, Context>;
  }
}

/**
 * Answers whether the epoch lasts, and stamps it with the time: everything before is there as long as the stamp is.
 * The server's identity is asked for in here, since a stamp on data that was rolled back would hide what is missing.
 * Some of the streams with a last entry are examined as well (see gate-script.ts): without appends nobody else would miss one.
 *
 * KEYS: epoch, checkpoint, last entries. ARGV: epoch, database time ('' = no stamp), cursor into the last entries.
 * Answers 0 when another epoch or server is there, 1 when the epoch lasts, 2 when a stream is lost; and the next cursor.
 */
const STAMP = `
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return {0, '0'} end
local run = string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
local history = string.match(redis.call('INFO', 'replication'), 'master_replid:(%w+)')
if string.find(ARGV[1], run .. '/' .. history .. ':', 1, true) ~= 1 then return {0, '0'} end
local last_entries = redis.call('HSCAN', KEYS[3], ARGV[3], 'COUNT', 100)
for i = 1, #last_entries[2], 2 do
  if redis.pcall('XLEN', last_entries[2][i]) == 0 then
    local info, latest = redis.pcall('XINFO', 'STREAM', last_entries[2][i]), '0-0'
    for j = 1, #info, 2 do
      if info[j] == 'last-generated-id' then latest = info[j + 1] end
    end
    local ms, sequence = string.match(latest, '(%d+)-(%d+)')
    local last_ms, last_sequence = string.match(last_entries[2][i + 1], '(%d+)-(%d+)')
    if tonumber(ms) < tonumber(last_ms)
        or ms == last_ms and tonumber(sequence) < tonumber(last_sequence) then return {2, '0'} end
  end
end
if ARGV[2] ~= '' then redis.call('SET', KEYS[2], ARGV[2]) end
return {1, last_entries[1]}`;

/** KEYS: epoch, checkpoint, checker, generation. ARGV: token, new epoch, database time, generation ('' = as it is). */
const BEGIN = `
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
redis.call('SET', KEYS[2], ARGV[3])
redis.call('DEL', KEYS[3])
if ARGV[4] ~= '' then redis.call('SET', KEYS[4], ARGV[4]) end
return 1`;

/** How often Redis is asked whether it is still the same; also how much has to be compared after a restart. */
const LOOK_INTERVAL_MS = 2_000;
/** Between two reads of what another pod's comparison has come to. */
const RETRY_MS = 100;
const RETRY_AFTER_ERROR_MS = 500;
/** The same reason is logged again after so long. */
const REPORT_INTERVAL_MS = 10_000;
/** A pod that dies in mid-comparison is replaced after so long. */
const CHECKER_TTL_MS = 4_000;
const CHECKER_RENEWAL_MS = 1_000;
/** An append waits so long for the epoch before its event is postponed. */
const KNOWN_TIMEOUT_MS = 2_000;

const keysOf = (key: string) => ({
  checker: `${key}:checker`,
  generation: `${key}:generation`,
  checkpoint: `${key}:checkpoint`,
  lastEntries: `${key}:last-entries`,
});

/**
 * Ends the epoch, runs `recover` while nothing is appended, and begins the next one. The caller has the checker's key.
 * @param generation of the database; null leaves the question to the pods
 * @param isLost whether the connection was lost meanwhile: then no epoch begins
 * @returns the new epoch, or undefined when another pod has gone on
 */
async function renewEpoch(
  deps: Pick<EpochDeps, 'redis' | 'key' | 'database' | 'recover'>,
  server: string,
  generation: string | null,
  isLost: () => boolean,
): Promise<string | undefined> {
  const { redis, key } = deps;
  const keys = keysOf(key);
  redis.defineCommand('beginEpoch', { numberOfKeys: 4, lua: BEGIN });
  const token = `${COMPARING}${randomUUID()}`;
  const renewal = setInterval(() => {
    redis.pexpire(keys.checker, CHECKER_TTL_MS).catch(() => {});
  }, CHECKER_RENEWAL_MS);
  try {
    const [checkpoint = null, looked = null] = await redis.mget(keys.checkpoint, keys.generation);
    // From here on no earlier append is confirmed, by any pod.
    await redis.set(key, token);
    await redis.del(keys.lastEntries);
    const confirm = async () => {
      if ((await redis.get(key)) !== token) throw new EpochOverError();
    };
    await deps.recover({ checkpoint, forgotten: generation !== null && generation !== looked, confirm });
    const next = `${server}:${randomBytes(9).toString('base64url')}`;
    const { now, generation: after } = await deps.database(generation ?? looked);
    if (isLost() || (generation !== null && generation !== after)) return undefined;
    const begun = await redis.beginEpoch(
      ...[key, keys.checkpoint, keys.checker, keys.generation, token, next, now, generation ?? ''],
    );
    return begun === 1 ? next : undefined;
  } finally {
    clearInterval(renewal);
  }
}

/**
 * Ends the epoch that lasts and begins the next one after `recover`, beside the pods: they wait meanwhile.
 * @throws {NotReadyError} when another process compares table and streams for longer than `timeoutMs`
 */
export async function endEpoch(
  deps: Pick<EpochDeps, 'redis' | 'key' | 'database' | 'assertOwner' | 'recover'> &
    Readonly<{ timeoutMs: number }>,
): Promise<void> {
  const { redis, key, timeoutMs } = deps;
  await deps.assertOwner?.();
  const endsAt = Date.now() + timeoutMs;
  for (;;) {
    const server = await identityOf(redis);
    if (server === null) throw new NotReadyError('this Redis is a replica: it takes no appends');
    if (await redis.set(keysOf(key).checker, randomUUID(), 'PX', CHECKER_TTL_MS, 'NX')) {
      if ((await renewEpoch(deps, server, null, () => false)) !== undefined) return;
    }
    if (Date.now() >= endsAt)
      throw new NotReadyError('another process compares table and streams; try again when it has ended');
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

/**
 * The next pod begins an epoch as on a Redis that it has never seen: everything is compared, and every row that is not
 * published is looked up in its stream.
 */
export async function forgetEpoch(redis: Redis, key: string): Promise<void> {
  const keys = keysOf(key);
  await redis.del(key, keys.checkpoint, keys.generation);
}

/**
 * Begins an epoch with keys of its own and stamps it, as pods do all the time. The caller deletes the keys.
 * @returns its name
 * @throws what Redis has against it
 */
export async function tryEpoch(redis: Redis, key: string, ttlMs: number): Promise<string> {
  const server = await identityOf(redis);
  if (server === null) throw new Error('this Redis is a replica: it takes no appends');
  const epoch = `${server}:trial`;
  await redis.set(key, epoch, 'PX', ttlMs);
  redis.defineCommand('stampEpoch', { numberOfKeys: 3, lua: STAMP });
  const [lasts] = await redis.stampEpoch(
    key,
    keysOf(key).checkpoint,
    keysOf(key).lastEntries,
    epoch,
    '',
    '0',
  );
  if (lasts !== 1)
    throw new Error('Redis is another server each time that it is asked (a proxy in front of several?)');
  return epoch;
}

type EpochDeps = {
  redis: Redis;
  /** Prefix of the keys. */
  key: string;
  /**
   * Asked again and again, with the generation whose rows were looked up last, null where there is none. Rejects when the
   * database does not answer, takes no writes, or is a primary of before a failover.
   */
  database: (known: string | null) => Promise<DatabaseState>;
  /** Rejects when another database has the queue on this Redis. */
  assertOwner?: () => Promise<void>;
  /** Told which generation the epoch rests on. */
  accept?: (generation: string) => void;
  recover: (loss: Loss) => Promise<void>;
  /** What that is, for the log. */
  recovering?: string;
  logger: Logger;
};

const NOT_COMPARED = 'Redis may have lost entries, or PostgreSQL rows: they are looked for';

/**
 * @param redis the append connection: what is known ends with it
 * @param recover compares table and streams and makes unpublished what is missing; run again after any failure
 */
export function createEpoch(deps: EpochDeps): Epoch {
  const { redis, key, logger, recovering = 'comparing what was published with what is there' } = deps;
  const keys = keysOf(key);
  redis.defineCommand('stampEpoch', { numberOfKeys: 3, lua: STAMP });

  let stopped = true;
  let epoch: string | undefined;
  let generation: string | undefined;
  let reason = NOT_COMPARED;
  let reportedAt = Number.NEGATIVE_INFINITY;
  /** Counts connections, so that no answer of one is taken for an answer of the next. */
  let connection = 0;
  let finding: Promise<void> | undefined;
  let ended: string | undefined;
  let cursor = '0';
  let timer: NodeJS.Timeout | undefined;
  let looking: Promise<void> = Promise.resolve();
  let wakeSleeper = (): void => {};
  const waiting = new Set<() => void>();

  function take(found: string, of: string): void {
    epoch = found;
    generation = of;
    reason = NOT_COMPARED;
    reportedAt = Number.NEGATIVE_INFINITY;
    deps.accept?.(of);
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
          report(error as Error);
          await sleep(RETRY_AFTER_ERROR_MS);
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

  async function identify(mine: number): Promise<void> {
    if (ended !== undefined) {
      // However long ago the entries of the lost stream were written, they are compared: no stamp any more.
      if ((await redis.get(key)) === ended) await redis.del(keys.checkpoint, key);
      ended = undefined;
    }
    const server = await identityOf(redis);
    if (server === null) return; // a replica takes no appends
    // Redis may have been emptied since the start: the first that comes has the queue.
    await deps.assertOwner?.();
    const [found, looked = null] = await redis.mget(key, keys.generation);
    const { generation: mineNow } = await deps.database(looked);
    if (connection !== mine) return;
    const isOfServer = (name?: string | null): name is string => name?.startsWith(`${server}:`) === true;
    if (isOfServer(found) && looked === mineNow) return take(found, mineNow);
    const isChecker = await redis.set(keys.checker, randomUUID(), 'PX', CHECKER_TTL_MS, 'NX');
    if (!isChecker) return;
    // The checker before this one may have begun the next epoch since.
    const [begun, lookedNow] = await redis.mget(key, keys.generation);
    if (isOfServer(begun) && lookedNow === mineNow) {
      await redis.del(keys.checker);
      if (connection === mine) take(begun, mineNow);
      return;
    }
    if (isOfServer(begun) && lookedNow)
      logger.warn(
        { generation: mineNow, before: lookedNow },
        `PostgreSQL was restarted, promoted, replaced or restored, or the table was emptied or rewritten: ${recovering}`,
      );
    else
      logger.info(
        { known: found !== null },
        `Redis is new here, or was restarted, replaced or emptied: ${recovering}`,
      );
    deps.accept?.(mineNow);
    const next = await renewEpoch(deps, server, mineNow, () => connection !== mine);
    if (next !== undefined && connection === mine) take(next, mineNow);
  }

  async function look(): Promise<void> {
    const known = epoch;
    if (known === undefined) {
      if (redis.status === 'ready') find();
      return;
    }
    // Without the database nothing is stamped: more is compared, should Redis fail now.
    const { now, ...database } = await deps
      .database(generation ?? null)
      .catch(() => ({ now: '', generation }));
    if (epoch !== known) return;
    if (database.generation !== generation) return forget();
    const [found, next] = await redis.stampEpoch(key, keys.checkpoint, keys.lastEntries, known, now, cursor);
    cursor = next;
    if (found === 2) endFor(known);
    else if (found !== 1) forget();
  }

  function endFor(of: string): void {
    if (epoch !== of) return;
    ended = of;
    forget();
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
    async confirm(of) {
      if (epoch !== of) throw new EpochOverError();
      const found = await redis.get(key);
      if (found === of && epoch === of) return;
      if (epoch === of) forget();
      throw new EpochOverError();
    },
    invalidate() {
      if (epoch !== undefined) forget();
    },
    endFor,
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
