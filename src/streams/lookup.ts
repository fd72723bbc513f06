import type { Redis } from 'ioredis';
import { script } from '../connections/redis-script.ts';
import { compareEntryIds, isEntryId } from '../event.ts';
import type { StreamOptions } from './append.ts';
import { orRefusal } from './append-outcome.ts';
import { keysOf, STREAM_FUNCTIONS } from './epoch-script.ts';
import { LAST_ENTRIES_MAX } from './gate-script.ts';

/** Finds entries in streams. It only reads, except that it remembers the last entry of a stream (gate-script.ts). */

/** Of a dead letter, as the relay writes it. */
const ATTEMPTS = /^\d{1,6}$/;

/**
 * Answers the type of the stream's key, the id before which everything was trimmed on purpose, 1 if that id was trimmed
 * too, else 0, and the positions of the entries that are not there, or are another event's.
 *
 * Everything before the stream's first entry was trimmed. If the stream is empty, as XTRIM and XDEL may leave it,
 * everything up to its last generated id was. If the stream is gone, nothing was. The script remembers the last generated
 * id: if the stream vanishes later, the pods notice, though nothing was appended since.
 *
 * KEYS: stream, last entries. ARGV: 1 to remember the last entry, else 0, then pairs of entry id and event id.
 */
const ABSENT = `
${STREAM_FUNCTIONS}
local kind = redis.call('TYPE', KEYS[1]).ok
if kind ~= 'stream' and kind ~= 'none' then return {kind} end
local before, inclusive = '0-0', '0'
if kind == 'stream' then
  local latest = fieldsOf(redis.call('XINFO', 'STREAM', KEYS[1]))['last-generated-id']
  local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
  if first then before = first[1] else before, inclusive = latest, '1' end
  if ARGV[1] == '1' and latest ~= '0-0' then redis.call('HSET', KEYS[2], KEYS[1], latest) end
end
local answer = {kind, before, inclusive}
for i = 2, #ARGV, 2 do
  local entry = redis.pcall('XRANGE', KEYS[1], ARGV[i], ARGV[i])[1]
  if not entry or entry[2][1] ~= 'event_id' or entry[2][2] ~= ARGV[i + 1] then
    answer[#answer + 1] = tostring(i / 2)
  end
end
return answer`;

/**
 * One step back through a stream. It remembers the stream's last entry, unless there is one already: what is found here
 * marks rows published, and without a last entry no pod would notice that the stream is lost.
 *
 * KEYS: stream, last entries. ARGV: id to begin at (`+`, or `(` and an id that is not meant), how many entries. Answers pairs of
 * entry id and event id.
 */
const STEP_BACK = `
if redis.call('TYPE', KEYS[1]).ok ~= 'stream' then return {} end
local answer = {}
for _, entry in ipairs(redis.call('XREVRANGE', KEYS[1], ARGV[1], '-', 'COUNT', ARGV[2])) do
  answer[#answer + 1] = entry[1]
  answer[#answer + 1] = entry[2][1] == 'event_id' and entry[2][2] or ''
end
if ARGV[1] == '+' and answer[1] and redis.call('HEXISTS', KEYS[2], KEYS[1]) == 0
    and redis.call('HLEN', KEYS[2]) < ${LAST_ENTRIES_MAX} then
  redis.pcall('HSET', KEYS[2], KEYS[1], answer[1])
end
return answer`;

/** Entries in one step. Redis copies them whole: 0.2 ms for small ones, 10 MB where each has 100 kB. */
const FIND_STEP = 100;
/** How many entries back a search goes. */
const FIND_LIMIT = 50_000;

/** Redis refuses to let the relay read a stream in which it has entries. */
export class UnreadableError extends Error {
  override readonly name = 'UnreadableError';
}

/** An entry by its id and its event. */
type NamedEntry = Readonly<{ entryId: string; eventId: string }>;

/** Those of some entries that are not in their stream. */
type Absent<T> = Readonly<{
  /** Lost: they should be there. */
  lost: T[];
  /** Before the stream's first entry: trimmed on purpose. */
  trimmed: number;
  /** The key holds something else, or is none that the relay may read: nothing can be said. */
  unreadable: boolean;
}>;

export type Lookup = ReturnType<typeof createLookup>;

export function createLookup(
  redis: Redis,
  options: Pick<StreamOptions, 'dlqStreamName' | 'epochKey' | 'topicProblem'>,
) {
  const absentEntries = script<string[]>(redis, 'absentEntries', ABSENT, 2);
  const stepBack = script<string[]>(redis, 'stepBack', STEP_BACK, 2);
  const { lastEntries } = keysOf(options.epochKey);

  /** Rows can name any key. The relay does not read a key that can never be a stream of events. */
  const mayBeStream = (stream: string): boolean =>
    stream === options.dlqStreamName || options.topicProblem(stream) === null;

  /**
   * The stream's entries from its end back, in steps. A key that the relay has no right to has none, unless the relay has
   * appended there: then the right was taken from it.
   * @throws {UnreadableError} in that case
   */
  async function* back(stream: string): AsyncGenerator<NamedEntry[]> {
    for (let from = '+'; ; ) {
      const answer = await orRefusal(stepBack(stream, lastEntries, from, FIND_STEP));
      if (!Array.isArray(answer) && (await redis.hexists(lastEntries, stream)) === 1)
        throw new UnreadableError(`Redis refuses to let the relay read ${stream}: ${answer.reason}`);
      if (!Array.isArray(answer) || answer.length === 0) return;
      const step: NamedEntry[] = [];
      for (let i = 0; i < answer.length; i += 2)
        step.push({ entryId: answer[i] as string, eventId: answer[i + 1] as string });
      yield step;
      from = `(${answer.at(-2)}`;
    }
  }

  /** Walks from the stream's end back, until `take` answers false. */
  async function search(
    stream: string,
    eventIds: readonly string[],
    take: (eventId: string, entryId: string) => boolean,
  ): Promise<void> {
    const wanted = new Set(eventIds);
    let looked = 0;
    for await (const step of back(stream)) {
      for (const { entryId, eventId } of step) if (wanted.has(eventId) && !take(eventId, entryId)) return;
      looked += FIND_STEP;
      if (looked >= FIND_LIMIT) return;
    }
  }

  /**
   * Looks for the entries of these events among the stream's latest.
   * @returns the id of each one's last entry, of those that are there
   * @throws {UnreadableError} when it cannot be said now whether they are there
   * @throws when Redis does not answer
   */
  async function find(stream: string, eventIds: readonly string[]): Promise<Map<string, string>> {
    const found = new Map<string, string>();
    const take = (eventId: string, entryId: string) => {
      if (!found.has(eventId)) found.set(eventId, entryId);
      return found.size < eventIds.length;
    };
    if (eventIds.length > 0) await search(stream, eventIds, take);
    return found;
  }

  /** What a dead letter says; null where the entry is gone, or none of the relay's: others may write to this stream. */
  async function letter(entryId: string): Promise<{ attempts: number; reason: string } | null> {
    const [entry] = await redis.xrange(options.dlqStreamName, entryId, entryId);
    const [, texts = []] = entry ?? [];
    const field = (name: string) => texts.find((_, i) => i % 2 === 1 && texts[i - 1] === name) ?? '';
    if (!ATTEMPTS.test(field('attempts'))) return null;
    return { attempts: Number(field('attempts')), reason: field('error_message') };
  }

  return {
    find,
    letter,

    /**
     * The entries of a stream from its end back to `sinceMs` (time of Redis), in pages of `size` or a few more. An event may
     * have several. A stream that cannot be read has none.
     * @throws when Redis does not answer
     */
    async *walkBack(stream: string, sinceMs: number, size: number): AsyncGenerator<NamedEntry[]> {
      if (!mayBeStream(stream)) return;
      let entries: NamedEntry[] = [];
      for await (const step of back(stream)) {
        entries.push(...step);
        if (Number(step.at(-1)?.entryId.split('-')[0]) < sinceMs) break;
        if (entries.length < size) continue;
        yield entries;
        entries = [];
      }
      if (entries.length > 0) yield entries;
    },

    /**
     * Which of these entries are not in the stream. `remembering`: see ABSENT.
     * @throws when Redis does not answer
     */
    async absent<T extends NamedEntry>(
      stream: string,
      entries: readonly T[],
      remembering: boolean,
    ): Promise<Absent<T>> {
      if (!mayBeStream(stream)) return { lost: [], trimmed: 0, unreadable: true };
      const pairs = entries.flatMap(({ entryId, eventId }) => [entryId, eventId]);
      const answer = await orRefusal(absentEntries(stream, lastEntries, remembering ? '1' : '0', ...pairs));
      // It has the relay's entries, whichever they are: see back.
      if (!Array.isArray(answer) && remembering) await redis.hsetnx(lastEntries, stream, '0-0');
      const [kind, before = '0-0', inclusive, ...positions] = Array.isArray(answer) ? answer : [];
      if (kind !== 'stream' && kind !== 'none') return { lost: [], trimmed: 0, unreadable: true };
      const missing = positions.map((place) => entries[Number(place) - 1] as T);
      // A text that is no entry id was not trimmed.
      const isTrimmed = (id: string) =>
        isEntryId(id) && compareEntryIds(id, before) < (inclusive === '1' ? 1 : 0);
      const lost = missing.filter(({ entryId }) => !isTrimmed(entryId));
      return { lost, trimmed: missing.length - lost.length, unreadable: false };
    },

    /** The dead letters of each event, the last one first. */
    async findAllDeadLetters(eventIds: readonly string[]): Promise<Map<string, string[]>> {
      const found = new Map<string, string[]>();
      const take = (eventId: string, entryId: string) => {
        found.set(eventId, [...(found.get(eventId) ?? []), entryId]);
        return true;
      };
      if (eventIds.length > 0) await search(options.dlqStreamName, eventIds, take);
      return found;
    },

    /**
     * The dead letters of these events, with what they say.
     * @param known dead letters that are not meant, by event id: a replayed event has its old one
     * @throws when Redis does not answer
     */
    async findDeadLetters(eventIds: readonly string[], known: ReadonlyMap<string, string | null>) {
      const found = new Map<string, { entryId: string; attempts: number; reason: string }>();
      for (const [eventId, entryId] of await find(options.dlqStreamName, eventIds)) {
        if (entryId === known.get(eventId)) continue;
        const said = await letter(entryId);
        if (said !== null) found.set(eventId, { entryId, ...said });
      }
      return found;
    },
  };
}
