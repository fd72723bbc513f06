import type { Redis } from 'ioredis';
import { script } from '../connections/redis-script.ts';
import { compareEntryIds } from '../event.ts';
import { STREAM_FUNCTIONS } from './epoch-script.ts';

/** A stream as its operators see it: how long it is, who reads it, and how far behind each of them is. */
export type StreamFigures = Readonly<{
  stream: string;
  /** Entries. */
  length: number;
  /** The first groups of the stream, as Redis lists them; at most 10. */
  groups: GroupFigures[];
  /** Groups that are left out. */
  moreGroups: number;
}>;

type GroupFigures = Readonly<{
  group: string;
  consumers: number;
  /** Entries that were delivered and not acknowledged. */
  pending: number;
  /** Entries in the stream that were not delivered yet. */
  lag: number;
  /** Entries from the first that is not acknowledged to the end of the stream: what trimming must spare. */
  unacknowledged: number;
  /** Whether `lag` is an estimate, by the times of the entries: Redis tells it from version 7, and not always. */
  isEstimate: boolean;
}>;

const MAX_GROUPS = 10;

/**
 * All that is asked of one stream, without its payloads: entries are large, their ids are not. No answer for a key
 * that is no stream.
 *
 * KEYS: stream. ARGV: groups, at most. Answers length, last id ever, first id, number of groups, then of each group:
 * name, consumers, pending, last delivered id, lag ('' where Redis does not tell it), first pending id.
 */
const INSPECT = `
if redis.call('TYPE', KEYS[1]).ok ~= 'stream' then return {} end
${STREAM_FUNCTIONS}
local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
local groups = redis.call('XINFO', 'GROUPS', KEYS[1])
local answer = {
  tostring(redis.call('XLEN', KEYS[1])),
  fieldsOf(redis.call('XINFO', 'STREAM', KEYS[1]))['last-generated-id'],
  first and first[1] or '',
  tostring(#groups)
}
for i = 1, math.min(#groups, tonumber(ARGV[1])) do
  local group = fieldsOf(groups[i])
  local pending = group.pending > 0 and redis.call('XPENDING', KEYS[1], group.name) or {}
  for _, value in ipairs({group.name, group.consumers, group.pending, group['last-delivered-id']}) do
    answer[#answer + 1] = tostring(value)
  end
  answer[#answer + 1] = group.lag and tostring(group.lag) or ''
  answer[#answer + 1] = pending[2] or ''
end
return answer`;

/** Answers for those of the keys that are streams and may be read. */
export function createStreamInspector(
  redis: Redis,
): (streams: readonly string[]) => Promise<StreamFigures[]> {
  const inspectStream = script<string[]>(redis, 'inspectStream', INSPECT, 1);

  async function inspect(stream: string): Promise<StreamFigures[]> {
    const reply = await inspectStream(stream, MAX_GROUPS).catch((error: Error) => {
      // Redis refuses this one; anything else is trouble with all of them.
      if (error.name === 'ReplyError') return [];
      throw error;
    });
    const [length, last, first, count, ...rest] = reply;
    if (length === undefined || last === undefined || first === undefined) return [];
    const extent = { length: Number(length), last, first };
    const groups: GroupFigures[] = [];
    for (let i = 0; i < rest.length; i += 6) groups.push(groupOf(rest.slice(i, i + 6), extent));
    return [{ stream, length: extent.length, groups, moreGroups: Number(count) - groups.length }];
  }

  return async (streams) => (await Promise.all(streams.map(inspect))).flat();
}

type Extent = Readonly<{ length: number; first: string; last: string }>;

function groupOf(reply: readonly string[], extent: Extent): GroupFigures {
  const [group = '', consumers, pendingText, delivered = '0-0', lagText = '', firstPending = ''] = reply;
  const pending = Number(pendingText);
  const isEstimate = lagText === '';
  // What was trimmed before the group read it counts as lag for Redis; it cannot be read any more.
  const lag = isEstimate ? entriesAfter(delivered, extent) : Math.min(Number(lagText), extent.length);
  const atLeast = Math.min(lag + pending, extent.length);
  const unacknowledged =
    firstPending === ''
      ? lag
      : Math.max(atLeast, Math.min(extent.length, entriesAfter(firstPending, extent) + 1));
  return { group, consumers: Number(consumers), pending, lag, unacknowledged, isEstimate };
}

/** Entries after that id, as if the stream had been written evenly: exact at its ends, and one command at any length. */
export function entriesAfter(id: string, { length, first, last }: Extent): number {
  if (length === 0 || compareEntryIds(id, last) >= 0) return 0;
  if (compareEntryIds(id, first) < 0) return length;
  const [from, at, to] = [first, id, last].map((it) => Number(it.split('-')[0]));
  const share = to === from ? 1 : ((to as number) - (at as number)) / ((to as number) - (from as number));
  // Not the entry itself, and there is a later one.
  return Math.max(1, Math.min(length - 1, Math.round(share * (length - 1))));
}
