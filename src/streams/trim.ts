import type { Redis } from 'ioredis';
import { script } from '../connections/redis-script.ts';
import type { Logger } from '../telemetry/logger.ts';
import { STREAM_FUNCTIONS } from './epoch-script.ts';

/**
 * Trimming what every consumer group of a stream has acknowledged, and warning where the cap, which XADD keeps to
 * (MAXLEN ~), drops what one has not.
 *
 * Needs no more than Redis 6.2: a group's place is its smallest pending id, or what it was delivered last. That last
 * entry stays. So the stream's first entry is never above what every group has acknowledged, and a comparison after a
 * loss does not take for trimmed what was lost; so a group's last entry is there unless another program has trimmed; and
 * the stream never becomes empty. A stream without groups is not touched.
 *
 * Nothing is trimmed unless the epoch lasts: while table and streams are compared, the streams stay as they are.
 *
 * KEYS: stream, list of streams, epoch. ARGV: epoch, cap (entries; 0 = none), entries to trim at most, time (ms), time
 * between two warnings (ms). The list holds for each stream its first entry when we last looked, and when we last
 * warned: of the cap ahead, of entries dropped.
 * Answers nothing in another epoch, else: entries trimmed, length, the group that is near the cap or '', the group
 * that entries were taken from or ''.
 */
const TRIM = `
if redis.call('GET', KEYS[3]) ~= ARGV[1] then return {} end
local stream = KEYS[1]
if redis.call('TYPE', stream).ok ~= 'stream' then
  redis.call('HDEL', KEYS[2], stream)
  return {0, 0, '', ''}
end
${STREAM_FUNCTIONS}
local function first()
  local entry = redis.call('XRANGE', stream, '-', '+', 'COUNT', 1)[1]
  return entry and entry[1] or '0-0'
end

local cap, now, between = tonumber(ARGV[2]), tonumber(ARGV[4]), tonumber(ARGV[5])
local kept = redis.call('HGET', KEYS[2], stream) or ''
local before, near_at, dropped_at = string.match(kept, '(%S+) (%S+) (%S+)')
near_at, dropped_at = tonumber(near_at or 0), tonumber(dropped_at or 0)
local info = fieldsOf(redis.call('XINFO', 'STREAM', stream))
local last, begins = info['last-generated-id'], first()
-- Since the last time another program has taken entries away: the cap, if the stream is that long. If not, maybe a group
-- that deletes what it has read, so that the first entry is always one it was not delivered; but the one we saw is gone.
local shortened = before and before ~= '0-0' and isBelow(before, begins)
local lost = cap > 0 and info.length >= cap and begins or before
local keep, slowest, waits, dropped
for _, flat in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
  local group = fieldsOf(flat)
  local delivered, place = group['last-delivered-id'], group['last-delivered-id']
  local pending = group.pending > 0 and redis.call('XPENDING', stream, group.name)[2]
  if pending and isBelow(pending, place) then place = pending end
  if not keep or isBelow(place, keep) then
    keep, slowest, waits = place, group.name, pending or isBelow(delivered, last)
  end
  if shortened and (isBelow(delivered, lost)
      or (pending and isBelow(pending, begins) and not isBelow(pending, before))) then
    dropped = group.name
  end
end

-- Nothing to do, and nothing to write where Redis has no memory for it.
if not keep and kept == '' then return {0, info.length, '', ''} end
local trimmed, length, near = 0, info.length, false
if keep then
  trimmed = redis.call('XTRIM', stream, 'MINID', '~', keep, 'LIMIT', ARGV[3])
  length = length - trimmed
  if trimmed == 0 and cap > 0 and length >= 0.9 * cap then
    -- Whole nodes alone were trimmed so far, 100 entries each: now it counts.
    length = length - redis.call('XTRIM', stream, 'MINID', keep)
    near = waits and length >= 0.9 * cap and slowest
  end
end
if near and now - near_at >= between then near_at = now else near = '' end
if dropped and now - dropped_at >= between then dropped_at = now else dropped = '' end
redis.call('HSET', KEYS[2], stream, first() .. ' ' .. string.format('%.0f %.0f', near_at, dropped_at))
return {trimmed, length, near, dropped}`;

/** Streams that are looked after, at most; and of these in one run. */
const MOST_STREAMS = 10_000;
const STREAMS_IN_RUN = 1_000;
/** Entries trimmed in one call, which keeps Redis busy for about a millisecond; and calls for one stream in one run. */
const ENTRIES_IN_CALL = 5_000;
const CALLS_IN_RUN = 40;
/** Interval at which the same is said of a stream again, by all pods together. */
const REPEAT_AFTER_MS = 60_000;

/**
 * Whether Redis has answered with an error, maybe for this one stream only; anything else is trouble with all of them. Unlike
 * isRefusal of refusals.ts it includes a full Redis, which goes on trimming.
 */
const isReply = (error: unknown): error is Error => error instanceof Error && error.name === 'ReplyError';

/** @param redis the append connection */
export function createTrimmer(
  redis: Redis,
  options: Readonly<{
    /** Cap of each stream, in entries; 0 = none. */
    streamMaxLen: number;
    epochKey: string;
    /** Redis key of the list of streams: those that the relay has published to, for all pods and across restarts. */
    listKey: string;
    /** The epoch that lasts, as far as is known. */
    epoch: () => string | undefined;
    logger: Logger;
  }>,
) {
  const { streamMaxLen, epochKey, listKey, logger } = options;
  type Trimmed = [trimmed: number, length: number, near: string, dropped: string] | [];
  const trimAcknowledged = script<Trimmed>(redis, 'trimAcknowledged', TRIM, 3);
  /** Streams that are not in the list yet. */
  const unlisted = new Set<string>();
  let cursor = '0';

  async function list(): Promise<void> {
    for (const stream of unlisted) {
      if ((await redis.hlen(listKey)) < MOST_STREAMS) await redis.hsetnx(listKey, stream, '');
      unlisted.delete(stream);
    }
  }

  async function trim(stream: string, goesOn: () => boolean): Promise<number> {
    let sum = 0;
    for (let call = 0; call < CALLS_IN_RUN && goesOn(); call++) {
      const epoch = options.epoch();
      if (epoch === undefined) break;
      const [trimmed = 0, entries, near, dropped] = await trimAcknowledged(
        ...[stream, listKey, epochKey, epoch],
        ...[streamMaxLen, ENTRIES_IN_CALL, Date.now(), REPEAT_AFTER_MS],
      );
      sum += trimmed;
      if (near) {
        logger.warn(
          { stream, group: near, entries, maxlen: streamMaxLen },
          'a consumer group lags so far behind that entries are about to be dropped unread',
        );
      }
      if (dropped) {
        logger.warn(
          { stream, group: dropped, maxlen: streamMaxLen },
          'entries were dropped that a consumer group had not acknowledged',
        );
      }
      if (trimmed === 0) break;
    }
    return sum;
  }

  return {
    /** The relay has published to this stream. */
    remember(stream: string): void {
      if (unlisted.size < MOST_STREAMS) unlisted.add(stream);
    },

    /**
     * Trims the next streams of the list, as far as a run goes.
     * @returns entries that were trimmed
     * @throws when Redis does not answer, or after all others when it has refused one; the next run does it
     */
    async run(goesOn: () => boolean): Promise<number> {
      let refusal: Error | undefined;
      const refused = (what: string) => (error: unknown) => {
        if (!isReply(error)) throw error;
        refusal ??= new Error(`${what}: ${error.message}`, { cause: error });
        return 0;
      };
      await list().catch(refused('cannot list streams'));
      let trimmed = 0;
      for (let seen = 0; seen < STREAMS_IN_RUN && goesOn(); ) {
        const [next, pairs] = await redis.hscan(listKey, cursor, 'COUNT', 100);
        cursor = next;
        seen += pairs.length / 2;
        for (let i = 0; i < pairs.length && goesOn(); i += 2) {
          const stream = pairs[i] as string;
          trimmed += await trim(stream, goesOn).catch(refused(`cannot trim ${stream}`));
        }
        if (cursor === '0') break;
      }
      if (refusal !== undefined) throw refusal;
      return trimmed;
    },
  };
}
