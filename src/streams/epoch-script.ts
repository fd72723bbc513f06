/** What an epoch is made of in Redis: its keys, the identity of the server in its name, and the scripts that keep it. */
import type { Redis } from 'ioredis';
import type { KeyTypes } from '../connections/key-types.ts';

/** Follows the epoch's key in that of the hash of appended events: scripts make the one from the other. */
export const APPENDED_SUFFIX = ':appended';

/** The keys beside `epochKey`, which has the epoch's name. */
export const keysOf = (epochKey: string) => ({
  /** The time of the database up to which Redis has lost nothing; a pod writes it again and again. */
  checkpoint: `${epochKey}:checkpoint`,
  /** Held by the process that compares table and streams. */
  checker: `${epochKey}:checker`,
  /** The generation of the database whose rows were looked up in their streams. */
  generation: `${epochKey}:generation`,
  /** The hash that has the last entry of each stream in the epoch. */
  lastEntries: `${epochKey}:last-entries`,
  /** The hash of appended events; see gate-script.ts. */
  appended: epochKey + APPENDED_SUFFIX,
});

/** The types of `epochKey` and of the keys beside it. */
export function epochKeyTypes(epochKey: string): KeyTypes {
  const { lastEntries, appended, ...others } = keysOf(epochKey);
  const strings = Object.fromEntries(
    [epochKey, ...Object.values(others)].map((key) => [key, 'string'] as const),
  );
  return { ...strings, [lastEntries]: 'hash', [appended]: 'hash' };
}

/**
 * Identity of the server and of its history: a restart changes the first, a failover (also to and fro) the second. Null
 * for a replica, and for a server that is loading its data.
 */
export async function identityOf(redis: Redis): Promise<string | null> {
  const [server, replication] = await Promise.all([redis.info('server'), redis.info('replication')]);
  const runId = /^run_id:(\w+)/m.exec(server)?.[1];
  const history = /^master_replid:(\w+)/m.exec(replication)?.[1];
  if (runId === undefined || history === undefined) throw new Error('Redis does not tell its run_id');
  return /^role:master/m.test(replication) ? `${runId}/${history}` : null;
}

/** Functions for scripts: whether an entry id is below another one, and what XINFO answers, by field. */
export const STREAM_FUNCTIONS = `
local function isBelow(a, b)
  local ams, aseq = string.match(a, '(%d+)-(%d+)')
  local bms, bseq = string.match(b, '(%d+)-(%d+)')
  if not ams or not bms then return false end
  if ams ~= bms then return tonumber(ams) < tonumber(bms) end
  return tonumber(aseq) < tonumber(bseq)
end
local function fieldsOf(flat)
  local fields = {}
  for i = 1, #flat, 2 do fields[flat[i]] = flat[i + 1] end
  return fields
end`;

/**
 * A function for scripts: whether a stream that once had the entry `last` is lost. It is, if all ids that it ever gave are
 * lower: it was deleted, or another one, or an older copy, was put in its place. Trimming lowers no id.
 */
export const IS_LOST_STREAM = `
${STREAM_FUNCTIONS}
local function isLostStream(stream, last)
  local info = redis.pcall('XINFO', 'STREAM', stream)
  local greatest = not info.err and fieldsOf(info)['last-generated-id']
  -- Of a key that is no stream, or must not be read, nothing is known.
  if not greatest then return redis.pcall('XLEN', stream) == 0 end
  return isBelow(greatest, last)
end`;

/** Streams with entries that one stamp examines, at most. */
const INSPECTED_MAX = 10;

/**
 * Answers whether the epoch lasts. If it does, it writes the checkpoint: as long as this is there, so is every entry that
 * was appended before. The script asks for the server's identity itself, since a checkpoint on data that was rolled back
 * would hide what is missing. It also examines some of the streams that have a last entry (see gate-script.ts): where
 * nothing is appended to a stream, nothing else notices that it is lost.
 *
 * KEYS: epoch, checkpoint, last entries. ARGV: epoch, database time ('' = no checkpoint), cursor into the last entries, number
 * of the stamp: of streams that have entries it examines some, others at the next stamp. XINFO copies their first and last
 * entry (200 streams with entries of 1 MB: 246 ms).
 * Answers 0 when another epoch or server is there, 1 when the epoch lasts, 2 when a stream is lost; and the next cursor.
 */
export const STAMP = `
${IS_LOST_STREAM}
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return {0, '0'} end
local run = string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
local history = string.match(redis.call('INFO', 'replication'), 'master_replid:(%w+)')
if string.find(ARGV[1], run .. '/' .. history .. ':', 1, true) ~= 1 then return {0, '0'} end
local last_entries = redis.call('HSCAN', KEYS[3], ARGV[3], 'COUNT', 100)
local step = math.ceil(#last_entries[2] / 2 / ${INSPECTED_MAX})
for i = 1, #last_entries[2], 2 do
  local stream = last_entries[2][i]
  local isInspected = (i + 1) / 2 % step == tonumber(ARGV[4]) % step or redis.pcall('XLEN', stream) == 0
  if isInspected and isLostStream(stream, last_entries[2][i + 1]) then return {2, '0'} end
end
if ARGV[2] ~= '' then redis.call('SET', KEYS[2], ARGV[2]) end
return {1, last_entries[1]}`;

/**
 * Ends the epoch if it lasts: another pod may have ended it, and have begun to compare, or the next epoch. Without a
 * checkpoint the next comparison goes back as far as RELAY_RESYNC_WINDOW.
 *
 * KEYS: epoch, checkpoint. ARGV: epoch.
 */
export const END = `
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1], KEYS[2]) end
return 1`;

/**
 * Begins the next epoch, unless another process has begun to compare since. Answers 1 if it has begun.
 *
 * KEYS: epoch, checkpoint, checker, generation. ARGV: token, new epoch, database time, generation ('' = as it is).
 */
export const BEGIN = `
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
redis.call('SET', KEYS[2], ARGV[3])
redis.call('DEL', KEYS[3])
if ARGV[4] ~= '' then redis.call('SET', KEYS[4], ARGV[4]) end
return 1`;
