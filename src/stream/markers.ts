import type { Redis, Result } from 'ioredis';
import type { OutboxEvent } from '../event.ts';

/**
 * The memory of an append where queue and streams are on different servers: a key beside the stream, since the job's
 * hash is out of reach of the script that appends.
 *
 * That the job is there is asked just before, of the other server, and may be untrue by then. An entry is appended
 * once all the same, as its marker is that of the event, whichever job asks. A marker ends by itself; a job that is so
 * old that its marker may have ended is not believed before row and stream were looked at. A dead letter is that of
 * one job: an event that was replayed may die again.
 */
export type Markers = ReturnType<typeof createMarkers>;

/** What is known of an event's job. Times are ms since the epoch. */
export type JobTimes = Readonly<{ madeAt: number; endedAt: number | null }>;

/** Renewed whenever somebody asks. About 150 bytes of Redis for each event of that time. */
export const MARKER_TTL_S = 3_600;
/** Clocks of pods differ by less. */
const MARGIN_S = 300;
/** Between what was asked of the job and the append no more time passes than this, or nothing is appended. */
const TRUE_FOR_MS = 5_000;

/**
 * KEYS: stream, marker, epoch, marker of the dead letter. ARGV: epoch, lifetime (s), 1 if an entry is appended, 0 if a
 * dead letter, then what XADD takes after the key. Answers as APPEND_ONCE does (append.ts).
 */
const APPEND_MARKED = `
if redis.call('GET', KEYS[3]) ~= ARGV[1] then return '!' end
local there = redis.call('GET', KEYS[2])
local letter = ARGV[3] == '1' and redis.call('GET', KEYS[4])
letter = letter and '|' .. letter or ''
if there then
  redis.call('EXPIRE', KEYS[2], ARGV[2])
  return '=' .. there .. letter
end
local id = redis.call('XADD', KEYS[1], unpack(ARGV, 4))
if not id then return '?' end
redis.call('SET', KEYS[2], id, 'EX', ARGV[2])
return id .. letter`;

declare module 'ioredis' {
  interface RedisCommander<Context> {
    appendMarked(
      stream: string,
      marker: string,
      epochKey: string,
      letterMarker: string,
      ...args: string[]
    ): Result<string, Context>;
  }
}

/** @param prefix of the keys: `<RELAY_QUEUE_PREFIX>:<RELAY_QUEUE_NAME>` */
export const entryMarkerOf = (prefix: string) => (eventId: string) => `${prefix}:entry:${eventId}`;

/** @param redis the append connection */
export function createMarkers(
  redis: Redis,
  deps: Readonly<{
    prefix: string;
    epochKey: string;
    /** Of the other server; null when the event has no job. */
    job: (eventId: string) => Promise<JobTimes | null>;
    /** Whether the event's row waits for nothing any more. */
    isSettled: (eventId: string) => Promise<boolean>;
    /** The event's entry among the latest of that stream, if it is there. */
    find: (stream: string, eventId: string) => Promise<string | undefined>;
  }>,
) {
  redis.defineCommand('appendMarked', { numberOfKeys: 4, lua: APPEND_MARKED });
  const entryMarker = entryMarkerOf(deps.prefix);

  return {
    /** What the script of the one server answers, from two. */
    async append(
      { eventId }: OutboxEvent,
      stream: string,
      epoch: string,
      isDeadLetter: boolean,
      xadd: readonly string[],
    ): Promise<string> {
      const askedAt = Date.now();
      const job = await deps.job(eventId);
      if (job === null || (job.endedAt !== null) !== isDeadLetter) return '';
      if (askedAt - (job.endedAt ?? job.madeAt) > (MARKER_TTL_S - MARGIN_S) * 1_000) {
        if (await deps.isSettled(eventId)) return '';
        const there = await deps.find(stream, eventId);
        if (there !== undefined) return `=${there}`;
      }
      if (Date.now() - askedAt > TRUE_FOR_MS) throw new Error('what is known of the job is out of date');
      const letterMarker = `${deps.prefix}:dead:${eventId}:${job.madeAt}`;
      const marker = isDeadLetter ? letterMarker : entryMarker(eventId);
      const args = [epoch, String(MARKER_TTL_S), isDeadLetter ? '0' : '1', ...xadd];
      return redis.appendMarked(stream, marker, deps.epochKey, letterMarker, ...args);
    },
  };
}
