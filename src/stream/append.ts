import type { Redis, RedisOptions, Result } from 'ioredis';
import type { AppendOutcome, OutboxEvent } from '../event.ts';
import { deadLetterFields, envelopeFields } from './envelope.ts';

/**
 * Appends an entry and remembers its id in the publish job's own hash, atomically; run again, it answers
 * what it remembers. The memory needs no time window: it lives and dies with the job. Hash gone: the job was
 * finished elsewhere or Redis lost it, so nothing is appended and the row decides. So it does when the job is not as
 * it should be: a dead letter is that of a job that has failed for good, not of one that was made again meanwhile; an
 * entry is that of one that has not. Another epoch: Redis may have lost
 * what was appended before, so nothing is appended now.
 *
 * KEYS: stream, job hash, epoch. ARGV: epoch, field of the hash, 1 if the job must have ended, else 0, then what XADD takes after the key.
 * Answers the id, `=id` when it was remembered, nothing when the job is gone, `!` in another epoch, `?` when the
 * stream was to be there and is not; after the id `|` and that of the dead letter that the job had before somebody
 * retried it. One flat string and two reads in one command: 14 µs of Redis instead of 19 with
 * an array, HGET and EXISTS (a bare XADD takes 6).
 */
const APPEND_ONCE = `
if redis.call('GET', KEYS[3]) ~= ARGV[1] then return '!' end
local job = redis.call('HMGET', KEYS[2], ARGV[2], 'timestamp', 'finishedOn', 'relay:dlq')
local letter = ARGV[3] == '0' and not job[3] and job[4] and '|' .. job[4] or ''
if job[1] then return '=' .. job[1] .. letter end
if not job[2] or (job[3] and '1' or '0') ~= ARGV[3] then return '' end
local id = redis.call('XADD', KEYS[1], unpack(ARGV, 4))
if not id then return '?' end
redis.call('HSET', KEYS[2], ARGV[2], id)
return id .. letter`;

/** Fields of the job's hash that are ours. BullMQ keeps and ignores them. */
export const ENTRY = 'relay:entry';
export const DEAD_LETTER_ENTRY = 'relay:dlq';

/** Streams that are known to be there, at most; then they are learnt anew. */
const KNOWN_STREAMS = 10_000;

declare module 'ioredis' {
  interface RedisCommander<Context> {
    appendOnce(stream: string, jobHash: string, epochKey: string, ...args: string[]): Result<string, Context>;
  }
}

export type StreamOptions = Readonly<{
  dlqStreamName: string;
  /** Approximate length at which a stream is trimmed; 0 = never. */
  streamMaxLen: number;
  dlqMaxLen: number;
  /** Redis key of an event's publish job. */
  jobKey: (eventId: string) => string;
  /** Redis key of the epoch's name. */
  epochKey: string;
  /** Told of each stream of events at its first entry in an epoch. */
  onFirstEntry?: (stream: string) => void;
}>;

/** What an append has to do with epochs; see epoch.ts. */
type Epochs = Readonly<{
  known(): Promise<string | undefined>;
  doubt(): void;
  doubtAll(epoch: string): void;
}>;

export type Stream = ReturnType<typeof createStream>;

/**
 * What the append connection must be: it neither queues nor resends across a reconnect, so that an append of
 * unknown fate is asked again instead of overtaking what came after it.
 */
export const APPEND_CONNECTION: RedisOptions = {
  enableOfflineQueue: false,
  autoResendUnfulfilledCommands: false,
  maxRetriesPerRequest: 0,
  enableAutoPipelining: true,
};

export function createStream(redis: Redis, epochs: Epochs, options: StreamOptions) {
  redis.defineCommand('appendOnce', { numberOfKeys: 3, lua: APPEND_ONCE });

  /** Streams that had an entry in this epoch: one of them that is not there any more was lost. */
  let known = { epoch: '', streams: new Set<string>() };

  async function appendOnce(
    stream: string,
    maxLen: number,
    event: OutboxEvent,
    field: string,
    fields: string[],
  ): Promise<AppendOutcome> {
    const epoch = await epochs.known();
    if (epoch === undefined) return NOT_KNOWN;
    if (known.epoch !== epoch || known.streams.size >= KNOWN_STREAMS) known = { epoch, streams: new Set() };
    const { streams } = known;
    const hasEnded = field === DEAD_LETTER_ENTRY ? '1' : '0';
    const xadd = [...(streams.has(stream) ? ['NOMKSTREAM'] : []), ...trimmedTo(maxLen), '*', ...fields];
    try {
      const job = options.jobKey(event.eventId);
      const reply = await redis.appendOnce(stream, job, options.epochKey, epoch, field, hasEnded, ...xadd);
      const [answer = '', letter] = String(reply).split('|');
      const outcome = outcomeOf(answer, epoch);
      // The event is dead no more. If this fails, its row says so all the same.
      if (letter !== undefined) await redis.xdel(options.dlqStreamName, letter).catch(() => {});
      if (outcome.status === 'appended') {
        if (!streams.has(stream) && field === ENTRY) options.onFirstEntry?.(stream);
        streams.add(stream);
      } else if (outcome.status === 'lost') {
        if (outcome.isStream) epochs.doubtAll(epoch);
        else epochs.doubt();
        return NOT_KNOWN;
      }
      return outcome;
    } catch (error) {
      if (DEMOTED.test((error as Error).message)) epochs.doubt();
      return outcomeOfError(error as Error);
    }
  }

  return {
    /** Appends the event to the stream of its topic, once. Never throws. */
    publish: (event: OutboxEvent): Promise<AppendOutcome> =>
      appendOnce(event.topic, options.streamMaxLen, event, ENTRY, envelopeFields(event)),

    /** Appends the event to the dead-letter stream, once. Never throws. */
    deadLetter: (event: OutboxEvent, failure: { reason: string; attempts: number; failedAt: Date }) =>
      appendOnce(
        options.dlqStreamName,
        options.dlqMaxLen,
        event,
        DEAD_LETTER_ENTRY,
        deadLetterFields(event, failure),
      ),
  };
}

/** XADD's argument that keeps a stream at about `maxLen` entries; 0 = never trim. */
export const trimmedTo = (maxLen: number): string[] => (maxLen === 0 ? [] : ['MAXLEN', '~', String(maxLen)]);

const NOT_KNOWN: AppendOutcome = {
  status: 'unavailable',
  reason: 'Redis may have lost entries; nothing is appended before they are restored',
};

/** A reply that is not a stream id must never pass for success. */
function outcomeOf(reply: string, epoch: string): AppendOutcome | { status: 'lost'; isStream: boolean } {
  if (reply === '') return { status: 'job-gone' };
  if (reply === '!' || reply === '?') return { status: 'lost', isStream: reply === '?' };
  const [, remembered, entryId] = /^(=?)(\d+-\d+)$/.exec(reply) ?? [];
  if (entryId === undefined) {
    return { status: 'refused', reason: 'Redis gave no stream id in answer to the append' };
  }
  return { status: remembered ? 'already-appended' : 'appended', entryId, epoch };
}

/** The server is no master any more: it may come back with another one's data. */
const DEMOTED = /\b(READONLY|MASTERDOWN)\b/;

/** Replies by which Redis refuses everybody, whatever the event. */
const NOBODY_NOW =
  /^(OOM|LOADING|READONLY|MASTERDOWN|CLUSTERDOWN|TRYAGAIN|BUSY|NOREPLICAS|MISCONF|UNBLOCKED|NOAUTH|WRONGPASS)/;

export function outcomeOfError(error: Error): AppendOutcome & { status: 'refused' | 'unavailable' } {
  // Redis says where in the script it refused: before the refusal up to version 6, after it since 7.
  const reason = error.message
    .replace(/^ERR Error running script.*?@user_script:\s*\d+:\s*-?/, '')
    .replace(/ script: [0-9a-f]{40}, on @user_script:\d+\.?$/, '')
    .slice(0, 500);
  const answered = error.name === 'ReplyError';
  return { status: answered && !NOBODY_NOW.test(reason) ? 'refused' : 'unavailable', reason };
}
