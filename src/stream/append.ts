import type { Redis, RedisOptions, Result } from 'ioredis';
import { Packr } from 'msgpackr';
import { type AppendOutcome, inSteps, type OutboxEvent, type Receipt } from '../event.ts';
import { deadLetterFields, envelopeFields } from './envelope.ts';
import type { Markers } from './markers.ts';
import { type Answer, ENTRY_ID, type NotYet, precedingOf, type Turns } from './turn.ts';

/**
 * Appends entries and remembers the id of each in its publish job's own hash, atomically; run again, it answers
 * what it remembers. The memory needs no time window: it lives and dies with the job. Hash gone: the job was
 * finished elsewhere or Redis lost it, so nothing is appended and the row decides. So it does when the job is not as
 * it should be: a dead letter is that of a job that has failed for good, not of one that was made again meanwhile; an
 * entry is that of one that has not. Another epoch: Redis may have lost what was appended before, so nothing is appended
 * now. Other jobs that come first have appended nothing yet, though they have not failed for good: it is not the entry's
 * turn. One that comes first is gone: the rows say whether it is.
 *
 * KEYS: epoch, then of each entry its stream and job hash. ARGV: epoch, then the entries as MessagePack, of each the
 * field of the hash, 1 if the job must have ended, else 0, the hashes of the jobs that come first, and what XADD takes
 * after the key.
 * Answers for each entry the id, `=id` when it was remembered, nothing when the job is gone, `!` in another epoch, `?`
 * when the stream was to be there and is not, `~` when it is not its turn, `*` when that is for the rows to say, or `-`
 * and the reason why Redis refused it. After the id `|` and that of the dead letter that the job had before somebody
 * retried it, if any; after that, and after `~` and `*`, for each job that comes first `|` and its entry, `dead`, `due`,
 * `retry` (due, and failed before) or `gone`.
 *
 * One call for many entries, with one argument: a call for each costs this process 25 µs and Redis 8 µs more per
 * entry, and an argument for each field 3 µs and 5 kB of garbage more.
 */
const APPEND_ONCE = `
local answers = {}
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  for i = 2, #KEYS, 2 do answers[i / 2] = '!' end
  return answers
end
for n, entry in ipairs(cmsgpack.unpack(ARGV[2])) do
  local stream, hash, field, ended = KEYS[2 * n], KEYS[2 * n + 1], entry[1], entry[2]
  local job = redis.call('HMGET', hash, field, 'timestamp', 'finishedOn', 'relay:dlq')
  local more = '|' .. (ended == 0 and not job[3] and job[4] or '')
  local first, waits, gone = '', false, false
  for _, other in ipairs(entry[3]) do
    local it = redis.call('HMGET', other, field, 'timestamp', 'finishedOn', 'atm')
    first = first .. '|' .. (it[1] or it[3] and 'dead' or it[2] and (it[4] and 'retry' or 'due') or 'gone')
    waits = waits or not it[1] and it[2] and not it[3]
    gone = gone or not it[1] and not it[2]
  end
  more = more .. first
  if job[1] then answers[n] = '=' .. job[1] .. more
  elseif not job[2] or (job[3] and 1 or 0) ~= ended then answers[n] = ''
  elseif waits then answers[n] = '~' .. first
  elseif gone then answers[n] = '*' .. first
  else
    local id = redis.pcall('XADD', stream, unpack(entry, 4))
    if not id then answers[n] = '?'
    elseif type(id) == 'table' then answers[n] = '-' .. id.err
    else
      redis.call('HSET', hash, field, id)
      answers[n] = id .. more
    end
  end
end
return answers`;

const packr = new Packr({ useRecords: false });

/** What one call takes at most: Redis does nothing else meanwhile. */
const CALL_LIMIT = 64;
const CALL_BYTES = 256 * 1024;

/** Fields of the job's hash that are ours. BullMQ keeps and ignores them. */
export const ENTRY = 'relay:entry';
export const DEAD_LETTER_ENTRY = 'relay:dlq';

/** Streams that are known to be there, at most; then they are learnt anew. */
const KNOWN_STREAMS = 10_000;

declare module 'ioredis' {
  interface RedisCommander<Context> {
    appendOnce(numberOfKeys: number, ...keysAndArgs: (string | Buffer)[]): Result<string[], Context>;
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
  /** Redis key that remembers an event's entry, where the jobs are on another server; see markers.ts. */
  markerKey?: (eventId: string) => string;
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
};

/** An entry on its way to Redis. */
type Appending = Readonly<{
  /** `outbox.id` */
  id: string;
  keys: readonly [stream: string, jobHash: string];
  /** What the script takes for it. */
  entry: readonly (string | number | readonly string[])[];
  bytes: number;
  resolve: (answer: string) => void;
  reject: (error: Error) => void;
}>;

/** @param markers where the jobs are on another server */
export function createStream(
  redis: Redis,
  epochs: Epochs,
  turns: Turns,
  options: StreamOptions,
  markers?: Markers,
) {
  redis.defineCommand('appendOnce', { lua: APPEND_ONCE });

  /** Streams that had an entry in this epoch: one of them that is not there any more was lost. */
  let known = { epoch: '', streams: new Set<string>() };
  /** By the epoch that they belong to. */
  let appending = new Map<string, Appending[]>();

  /** What is asked for in one turn of the loop goes to Redis together. */
  function ask(
    epoch: string,
    asked: Pick<Appending, 'id' | 'keys'>,
    field: string,
    hasEnded: boolean,
    first: readonly string[],
    xadd: string[],
  ): Promise<string> {
    return new Promise((resolve, reject) => {
      if (appending.size === 0) setImmediate(callAll);
      const bytes = xadd.reduce((sum, it) => sum + it.length, 0);
      const one = { ...asked, entry: [field, hasEnded ? 1 : 0, first, ...xadd], bytes, resolve, reject };
      const others = appending.get(epoch);
      if (others) others.push(one);
      else appending.set(epoch, [one]);
    });
  }

  function callAll(): void {
    const all = appending;
    appending = new Map();
    for (const [epoch, ofEpoch] of all) {
      // Their jobs may have begun in another order, by what each had to wait for.
      ofEpoch.sort((a, b) => a.id.length - b.id.length || (a.id < b.id ? -1 : 1));
      for (const some of inSteps(ofEpoch, CALL_LIMIT, CALL_BYTES)) void call(epoch, some);
    }
  }

  async function call(epoch: string, some: readonly Appending[]): Promise<void> {
    const keys = [options.epochKey, ...some.flatMap((it) => it.keys)];
    try {
      const entries = packr.pack(some.map((it) => it.entry));
      const answers = await redis.appendOnce(keys.length, ...keys, epoch, entries);
      some.forEach((it, i) => {
        it.resolve(String(answers[i]));
      });
      for (const it of some) turns.answered(it.id);
    } catch (error) {
      // One that may not be appended can stop the whole call. Who was appended all the same is remembered.
      if (some.length > 1 && outcomeOfError(error as Error).status === 'refused') {
        for (const one of some) void call(epoch, [one]);
      } else for (const it of some) it.reject(error as Error);
    }
  }

  async function answerOf(
    event: OutboxEvent,
    stream: string,
    epoch: string,
    hasEnded: boolean,
    xadd: string[],
  ): Promise<Answer | NotYet> {
    if (markers) return { reply: await markers.append(event, stream, epoch, hasEnded, xadd), first: [] };
    const asked = { id: event.id, keys: [stream, options.jobKey(event.eventId)] as const };
    if (hasEnded) return { reply: await ask(epoch, asked, DEAD_LETTER_ENTRY, true, [], xadd), first: [] };
    return turns.inTurn(event, (first) => {
      const jobs = first.map((it) => options.jobKey(it.eventId));
      return ask(epoch, asked, ENTRY, false, jobs, xadd);
    });
  }

  async function appendOnce(
    stream: string,
    maxLen: number,
    event: OutboxEvent,
    field: string,
    fields: string[],
  ): Promise<AppendOutcome> {
    const epoch = await epochs.known();
    if (epoch === undefined) return NOT_KNOWN;
    if (await turns.mayBeAhead(event, epoch)) return AHEAD;
    if (known.epoch !== epoch || known.streams.size >= KNOWN_STREAMS) known = { epoch, streams: new Set() };
    const { streams } = known;
    const hasEnded = field === DEAD_LETTER_ENTRY;
    const xadd = [...(streams.has(stream) ? ['NOMKSTREAM'] : []), ...trimmedTo(maxLen), '*', ...fields];
    try {
      const asked = await answerOf(event, stream, epoch, hasEnded, xadd);
      if ('status' in asked) return asked;
      const { reply, first } = asked;
      if (reply.startsWith('-')) throw refusal(reply.slice(1));
      const [answer = '', letter, ...places] = reply.split('|');
      const outcome = outcomeOf(answer, epoch, precedingOf(event, epoch, first, places));
      // The event is dead no more. If this fails, its row says so all the same.
      if (letter) await redis.xdel(options.dlqStreamName, letter).catch(() => {});
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

const AHEAD: AppendOutcome = {
  status: 'unavailable',
  reason: 'Redis may have lost entries that come before it in its aggregate; it waits for them',
};

/** As ioredis has what Redis answers instead of a reply. */
const refusal = (message: string) => Object.assign(new Error(message), { name: 'ReplyError' });

/** A reply that is not a stream id must never pass for success. */
function outcomeOf(
  reply: string,
  epoch: string,
  preceding: readonly Receipt[],
): AppendOutcome | { status: 'lost'; isStream: boolean } {
  if (reply === '') return { status: 'job-gone' };
  if (reply === '!' || reply === '?') return { status: 'lost', isStream: reply === '?' };
  const remembered = reply.startsWith('=');
  const entryId = remembered ? reply.slice(1) : reply;
  if (!ENTRY_ID.test(entryId)) {
    return { status: 'refused', reason: 'Redis gave no stream id in answer to the append' };
  }
  return { status: remembered ? 'already-appended' : 'appended', entryId, epoch, preceding };
}

/** The server is no master any more: it may come back with another one's data. */
const DEMOTED = /\b(READONLY|MASTERDOWN)\b/;

/** Replies by which Redis refuses everybody, whatever the event. */
const NOBODY_NOW =
  /^(OOM|LOADING|READONLY|MASTERDOWN|CLUSTERDOWN|MOVED|ASK|TRYAGAIN|BUSY|NOREPLICAS|MISCONF|UNBLOCKED|NOAUTH|WRONGPASS)/;

export function outcomeOfError(error: Error): AppendOutcome & { status: 'refused' | 'unavailable' } {
  // Redis says where in the script it refused: before the refusal up to version 6, after it since 7.
  const reason = error.message
    .replace(/^ERR Error running script.*?@user_script:\s*\d+:\s*-?/, '')
    .replace(/ script: [0-9a-f]{40}, on @user_script:\d+\.?$/, '')
    .slice(0, 500);
  const answered = error.name === 'ReplyError';
  return { status: answered && !NOBODY_NOW.test(reason) ? 'refused' : 'unavailable', reason };
}
