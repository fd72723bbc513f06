import { randomBytes, randomUUID } from 'node:crypto';
import type { Redis, Result } from 'ioredis';
import { NotReadyError } from '../lifecycle.ts';
import type { Logger } from '../telemetry/logger.ts';

/**
 * An epoch is a time in which Redis has lost nothing. Its name stands in a key of Redis and is given with every
 * append, whose script refuses when it finds another one. So after a restart, a failover, FLUSHALL or a stream that
 * vanished nothing is appended before one pod has compared table and streams, has made unpublished what is missing,
 * and has begun the next epoch.
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
 * What is to be compared before the next epoch begins: `intactUntil` is the time of the database (ISO 8601) up to which
 * nothing can have been lost; null when that is not known.
 */
export type Loss = Readonly<{ intactUntil: string | null }>;

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
      intactKey: string,
      notesKey: string,
      ...args: [epoch: string, at: string, cursor: string]
    ): Result<[number, string], Context>;
    beginEpoch(
      epochKey: string,
      intactKey: string,
      checkerKey: string,
      ...args: [guard: string, epoch: string, at: string]
    ): Result<number, Context>;
  }
}

/**
 * Answers whether the epoch lasts, and stamps it with the time: everything before is there as long as the stamp is.
 * The server's identity is asked for in here, since a stamp on data that was rolled back would hide what is missing.
 * Some of the noted streams are looked at as well (see gate-script.ts): without appends nobody else would miss one.
 *
 * KEYS: epoch, intact, notes. ARGV: epoch, database time ('' = no stamp), cursor into the notes.
 * Answers 0 when another epoch or server is there, 1 when the epoch lasts, 2 when a stream is lost; and the next cursor.
 */
const STAMP = `
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return {0, '0'} end
local run = string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
local history = string.match(redis.call('INFO', 'replication'), 'master_replid:(%w+)')
if string.find(ARGV[1], run .. '/' .. history .. ':', 1, true) ~= 1 then return {0, '0'} end
local notes = redis.call('HSCAN', KEYS[3], ARGV[3], 'COUNT', 100)
for i = 1, #notes[2], 2 do
  if redis.pcall('XLEN', notes[2][i]) == 0 then
    local info, latest = redis.pcall('XINFO', 'STREAM', notes[2][i]), '0-0'
    for j = 1, #info, 2 do
      if info[j] == 'last-generated-id' then latest = info[j + 1] end
    end
    local ms, sequence = string.match(latest, '(%d+)-(%d+)')
    local noted_ms, noted_sequence = string.match(notes[2][i + 1], '(%d+)-(%d+)')
    if tonumber(ms) < tonumber(noted_ms)
        or ms == noted_ms and tonumber(sequence) < tonumber(noted_sequence) then return {2, '0'} end
  end
end
if ARGV[2] ~= '' then redis.call('SET', KEYS[2], ARGV[2]) end
return {1, notes[1]}`;

/** KEYS: epoch, intact, checker. ARGV: guard, new epoch, database time. */
const BEGIN = `
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
redis.call('SET', KEYS[2], ARGV[3])
redis.call('DEL', KEYS[3])
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

const keysOf = (key: string) => ({
  checker: `${key}:checker`,
  intact: `${key}:intact`,
  notes: `${key}:notes`,
});

/**
 * Ends the epoch, runs `recover` while nothing is appended, and begins the next one. The caller has the checker's key.
 * @param isLost whether the connection was lost meanwhile: then no epoch begins
 * @returns the new epoch, or undefined when another pod has gone on
 */
async function renewEpoch(
  deps: Pick<EpochDeps, 'redis' | 'key' | 'databaseTime' | 'recover'>,
  server: string,
  isLost: () => boolean,
): Promise<string | undefined> {
  const { redis, key } = deps;
  const keys = keysOf(key);
  redis.defineCommand('beginEpoch', { numberOfKeys: 3, lua: BEGIN });
  const guard = `${COMPARING}${randomUUID()}`;
  const renewal = setInterval(() => {
    redis.pexpire(keys.checker, CHECKER_TTL_MS).catch(() => {});
  }, CHECKER_RENEWAL_MS);
  try {
    const intactUntil = await redis.get(keys.intact);
    // From here on no earlier append is confirmed, by any pod.
    await redis.set(key, guard);
    await redis.del(keys.notes);
    await deps.recover({ intactUntil });
    const next = `${server}:${randomBytes(9).toString('base64url')}`;
    const now = await deps.databaseTime();
    if (isLost()) return undefined;
    const begun = await redis.beginEpoch(key, keys.intact, keys.checker, guard, next, now);
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
  deps: Pick<EpochDeps, 'redis' | 'key' | 'databaseTime' | 'recover'> & Readonly<{ timeoutMs: number }>,
): Promise<void> {
  const { redis, key, timeoutMs } = deps;
  const endsAt = Date.now() + timeoutMs;
  for (;;) {
    const server = await identityOf(redis);
    if (server === null) throw new NotReadyError('this Redis is a replica: it takes no appends');
    if (await redis.set(keysOf(key).checker, randomUUID(), 'PX', CHECKER_TTL_MS, 'NX')) {
      if ((await renewEpoch(deps, server, () => false)) !== undefined) return;
    }
    if (Date.now() >= endsAt)
      throw new NotReadyError('another process compares table and streams; try again when it has ended');
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

type EpochDeps = {
  redis: Redis;
  /** Prefix of the keys. */
  key: string;
  databaseTime: () => Promise<string>;
  recover: (loss: Loss) => Promise<void>;
  /** What that is, for the log. */
  recovering?: string;
  logger: Logger;
};

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
  /** Counts connections, so that no answer of one is taken for an answer of the next. */
  let connection = 0;
  let finding: Promise<void> | undefined;
  let ended: string | undefined;
  let cursor = '0';
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
    if (ended !== undefined) {
      // However long ago the entries of the lost stream were written, they are compared: no stamp any more.
      if ((await redis.get(key)) === ended) await redis.del(keys.intact, key);
      ended = undefined;
    }
    const server = await identityOf(redis);
    if (server === null) return; // a replica takes no appends
    const found = await redis.get(key);
    if (connection !== mine) return;
    if (found?.startsWith(`${server}:`)) return take(found);
    const isChecker = await redis.set(keys.checker, randomUUID(), 'PX', CHECKER_TTL_MS, 'NX');
    if (!isChecker) return;
    // The checker before this one may have begun the next epoch since.
    const begun = await redis.get(key);
    if (begun?.startsWith(`${server}:`)) {
      await redis.del(keys.checker);
      if (connection === mine) take(begun);
      return;
    }
    logger.info(
      { known: found !== null },
      `Redis is new here, or was restarted, replaced or emptied: ${recovering}`,
    );
    const next = await renewEpoch(deps, server, () => connection !== mine);
    if (next !== undefined && connection === mine) take(next);
  }

  async function look(): Promise<void> {
    const known = epoch;
    if (known === undefined) {
      if (redis.status === 'ready') find();
      return;
    }
    // Without the database nothing is stamped: more is compared, should Redis fail now.
    const now = await deps.databaseTime().catch(() => '');
    if (epoch !== known) return;
    const [found, next] = await redis.stampEpoch(key, keys.intact, keys.notes, known, now, cursor);
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
