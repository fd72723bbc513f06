import type { Redis, RedisOptions, Result } from 'ioredis';
import { Packr } from 'msgpackr';
import {
  closesConnection,
  isConnectionLoss,
  isRefusal,
  LARGE_BYTES,
  reasonOf,
  untilConnected,
} from '../connections/refusals.ts';
import { type AppendOutcome, type Failure, inSteps, type OutboxEvent } from '../event.ts';
import { deadLetterFields, pushEnvelope } from './envelope.ts';
import { type Epoch, epochId } from './epoch.ts';
import { lastEntriesKeyOf } from './epoch-script.ts';
import { GATE, type Gate, gateScript, letterScript, MEMORY_TTL_S } from './gate-script.ts';

export type { Gate } from './gate-script.ts';

const packr = new Packr({ useRecords: false });

/** What one call takes at most, and LARGE_BYTES: Redis does nothing else meanwhile. */
const CALL_ENTRIES = 64;
/** Streams that are known to be there, at most; then they are learnt anew. */
const KNOWN_STREAMS_MAX = 10_000;
/** Events that are remembered to be in their stream: the latest so many at least, and twice as many at most. */
const KNOWN_EVENTS = 4_000;
/** A network that fails does not fail by one event so often in a row. */
const LOSSES_OF_A_REFUSAL = 3;
/** Events that are remembered so, at most. */
const LOST_AT_KEPT = 1_000;
/** Between the question about a job and the append no more time passes than this, or nothing is appended. */
const FACTS_TRUE_FOR_MS = 5_000;

declare module 'ioredis' {
  interface RedisCommander<Context> {
    appendInOrder(
      numberOfKeys: number,
      ...keysAndArgs: (string | Buffer)[]
    ): Result<(string | string[])[], Context>;
    appendLetter(...keysAndArgs: (string | Buffer)[]): Result<string, Context>;
  }
}

/**
 * What another server says of an event's job: when it was made, whether it has ended, and how many of its attempts have
 * failed. Null when there is none.
 */
export type JobFacts = readonly [madeAt: string, hasEnded: boolean, failures: number] | null;

export type StreamOptions = Readonly<{
  dlqStreamName: string;
  /** Approximate length at which a stream is trimmed; 0 = never. */
  streamMaxLen: number;
  dlqMaxLen: number;
  /** Redis key of an event's publish job. */
  jobKey: (eventId: string) => string;
  /** Prefix of the idempotency keys, where the jobs are on another server. */
  memoryPrefix: string;
  /** Redis key of the epoch's name. */
  epochKey: string;
  /** Why the topic can never be the key of a stream of events, or null. Rows can name any topic. */
  topicProblem: (topic: string) => string | null;
}>;

/** Redis key that remembers an event's entry, where the jobs are on another server. */
export const memoryKeyOf =
  ({ memoryPrefix }: Pick<StreamOptions, 'memoryPrefix'>) =>
  (eventId: string): string =>
    `${memoryPrefix}:entry:${eventId}`;

/**
 * What the append connection must be: it neither queues nor resends across a reconnect, so that an append of
 * unknown fate is asked again instead of overtaking what came after it.
 */
export const APPEND_CONNECTION: RedisOptions = {
  enableOfflineQueue: false,
  autoResendUnfulfilledCommands: false,
  maxRetriesPerRequest: 0,
};

/** How an event is to be appended. */
export type Appending = Readonly<{
  epoch: string;
  gate: Gate;
  /** When the job that this run belongs to was made, ms since the epoch. */
  madeAt: number;
}>;

/** An entry on its way to Redis. */
type Request = Readonly<{
  event: OutboxEvent;
  epoch: string;
  /** What the script takes for it. */
  entry: (string | number | JobFacts | false)[];
  bytes: number;
  resolve: (answer: string) => void;
  reject: (error: Error) => void;
}>;

/** Parts of an entry that are filled in when it is sent; see gate-script.ts. */
const STREAM_AT = 0;
const FACTS_AT = 5;
/** An entry without its payload has no more bytes, about. */
const ENVELOPE_BYTES = 600;

export type Streams = ReturnType<typeof createStreams>;

export function createStreams(deps: {
  redis: Redis;
  epoch: Epoch;
  options: StreamOptions;
  /** Asks another server about the jobs of these events, where the jobs are on another server. */
  jobFacts?: ((eventIds: readonly string[]) => Promise<JobFacts[]>) | undefined;
  /** Told of each stream of events at its first entry in an epoch. */
  onFirstEntry?: (stream: string) => void;
}) {
  const { redis, epoch: epochs, options, jobFacts } = deps;
  const hasTwoServers = jobFacts !== undefined;
  redis.defineCommand('appendInOrder', { lua: gateScript(hasTwoServers) });
  redis.defineCommand('appendLetter', { numberOfKeys: 5, lua: letterScript(hasTwoServers) });
  const memoryKey = hasTwoServers ? memoryKeyOf(options) : options.jobKey;
  const lastEntriesKey = lastEntriesKeyOf(options.epochKey);
  const trimming = trimmedTo(options.streamMaxLen);
  const letterKey = (eventId: string, madeAt: number): string =>
    hasTwoServers ? `${options.memoryPrefix}:dead:${eventId}:${madeAt}` : options.jobKey(eventId);

  /** Good for one epoch: what was appended then is there as long as it lasts. */
  let known = {
    epoch: '',
    streams: new Set<string>(),
    events: new Set<string>(),
    olderEvents: new Set<string>(),
  };
  /** Who waits for the append of an event, by its id. */
  const waiting = new Map<string, (() => void)[]>();
  /** Large events at whose appends the connection was lost, and how often in a row. */
  const lostAt = new Map<string, number>();
  /** By the epoch that they belong to. */
  let requested = new Map<string, Request[]>();

  function knownIn(epoch: string): typeof known {
    if (known.epoch !== epoch || known.streams.size >= KNOWN_STREAMS_MAX)
      known = { epoch, streams: new Set(), events: new Set(), olderEvents: new Set() };
    return known;
  }

  /** The event is in its stream: the one behind it may go on. */
  function rememberAppended(epoch: string, eventId: string): void {
    const now = knownIn(epoch);
    now.events.add(eventId);
    if (now.events.size >= KNOWN_EVENTS) {
      now.olderEvents = now.events;
      now.events = new Set();
    }
    wakeUp(eventId);
  }

  function wakeUp(eventId: string): void {
    const callbacks = waiting.get(eventId);
    if (callbacks === undefined) return;
    waiting.delete(eventId);
    for (const resume of callbacks) resume();
  }

  /** What is requested in one iteration of the event loop goes to Redis together. */
  function request(event: OutboxEvent, { epoch, gate, madeAt }: Appending): Promise<string> {
    return new Promise((resolve, reject) => {
      if (requested.size === 0) setImmediate(callAll);
      const letter = hasTwoServers && letterKey(event.eventId, madeAt);
      const entry = [0, event.eventId, String(madeAt), GATE[gate], event.after ?? '', false, false, letter];
      entry.push(...trimming, '*');
      pushEnvelope(event, entry);
      const bytes = ENVELOPE_BYTES + event.payload.length;
      const one: Request = { event, epoch, entry: entry as Request['entry'], bytes, resolve, reject };
      const others = requested.get(epoch);
      if (others) others.push(one);
      else requested.set(epoch, [one]);
    });
  }

  function callAll(): void {
    const all = requested;
    requested = new Map();
    for (const [epoch, ofEpoch] of all) {
      // Their jobs may have begun in another order.
      ofEpoch.sort(
        ({ event: a }, { event: b }) => a.id.length - b.id.length || (a.id < b.id ? -1 : a.id > b.id ? 1 : 0),
      );
      for (const some of inSteps(ofEpoch, CALL_ENTRIES, LARGE_BYTES)) void call(epoch, some);
    }
  }

  async function call(epoch: string, some: readonly Request[]): Promise<void> {
    try {
      if (jobFacts !== undefined) {
        await fillInFacts(some, jobFacts);
        assertLasts(epoch);
      }
      const streams: string[] = [];
      for (const { event, entry } of some) {
        const known = streams.indexOf(event.topic);
        entry[STREAM_AT] = known < 0 ? streams.push(event.topic) : known + 1;
      }
      const entries = packr.pack(some.map((it) => it.entry));
      const answers = await redis.appendInOrder(
        2 + streams.length,
        ...[options.epochKey, lastEntriesKey, ...streams],
        ...[epoch, epochId(epoch), options.dlqStreamName, memoryKey(''), entries],
      );
      const cascaded = answers[some.length] as string[];
      for (let i = 0; i < cascaded.length; i += 2) rememberAppended(epoch, cascaded[i] as string);
      some.forEach((it, i) => {
        lostAt.delete(it.event.eventId);
        it.resolve(String(answers[i]));
      });
    } catch (error) {
      // One that may not be appended can stop the whole call. Who was appended all the same is remembered.
      if (some.length > 1 && outcomeOfError(error as Error).status === 'refused') {
        for (const one of some) void call(epoch, [one]);
        return;
      }
      const reason = refusalByLoss(some, error as Error) ?? (error as Error);
      for (const it of some) it.reject(reason);
    }
  }

  /** A large entry is in a call by itself. When the connection is lost at it again and again, it is refused. */
  function refusalByLoss([first]: readonly Request[], error: Error): Error | undefined {
    if (first === undefined || first.bytes < LARGE_BYTES || !isConnectionLoss(error)) return undefined;
    const { event, bytes } = first;
    const losses = (lostAt.get(event.eventId) ?? 0) + 1;
    if (lostAt.size >= LOST_AT_KEPT) lostAt.clear();
    lostAt.set(event.eventId, losses);
    return losses < LOSSES_OF_A_REFUSAL ? undefined : refusal(closesConnection(bytes));
  }

  async function fillInFacts(some: readonly Request[], ask: NonNullable<typeof jobFacts>): Promise<void> {
    const askedAt = Date.now();
    const eventIds = [...new Set(some.flatMap(({ event }) => [event.eventId, event.after ?? []].flat()))];
    const facts = await ask(eventIds);
    if (Date.now() - askedAt > FACTS_TRUE_FOR_MS) throw new Error('what is known of the jobs is out of date');
    const known = new Map(eventIds.map((eventId, i) => [eventId, facts[i] as JobFacts]));
    for (const { event, entry } of some) {
      entry[FACTS_AT] = known.get(event.eventId) ?? false;
      entry[FACTS_AT + 1] = known.get(event.after ?? '') ?? false;
    }
  }

  /**
   * While the jobs were asked about, the streams' server may have been started anew with older data, in which the
   * name of this epoch is found again.
   */
  function assertLasts(epoch: string): void {
    if (epochs.current() !== epoch) throw new Error(NOT_KNOWN.reason);
  }

  /** An answer that is no success. */
  function outcomeOf(answer: string, epoch: string): AppendOutcome {
    switch (answer) {
      case '':
        return { status: 'gone' };
      case '*':
        return { status: 'ask-rows' };
      case '~':
        return { status: 'early' };
      case '<':
      case '<!':
        return { status: 'behind', failedBefore: answer === '<!' };
      case '?':
        epochs.endFor(epoch);
        return NOT_KNOWN;
      case '!':
        epochs.invalidate();
        return NOT_KNOWN;
      default:
        if (answer.startsWith('-')) return failed(refusal(answer.slice(1)));
        return { status: 'refused', reason: 'Redis gave no stream id in answer to the append' };
    }
  }

  /** A reply that is not a stream id must never pass for success. */
  const entryIdOf = (answer: string): string | undefined => /^[+=^](\d+-\d+)$/.exec(answer)?.[1];

  function failed(error: Error): AppendOutcome {
    if (DEMOTED.test(error.message)) epochs.invalidate();
    return outcomeOfError(error);
  }

  async function appendDeadLetter(
    failure: Failure,
    madeAt: number | null,
  ): Promise<AppendOutcome | PublishedAfterAll> {
    const { event } = failure;
    const epoch = await epochs.known();
    if (epoch === undefined) return NOT_KNOWN;
    try {
      const [facts] = (await jobFacts?.([event.eventId])) ?? [];
      if (jobFacts !== undefined) assertLasts(epoch);
      const answer = await redis.appendLetter(
        ...[options.epochKey, lastEntriesKey, options.dlqStreamName],
        ...[memoryKey(event.eventId), letterKey(event.eventId, madeAt ?? 0)],
        ...[epoch, epochId(epoch), event.eventId, event.topic, madeAt === null ? '0' : '1', String(madeAt)],
        packr.pack(facts ?? false),
        ...[...trimmedTo(options.dlqMaxLen), '*', ...deadLetterFields(event, failure)],
      );
      const entryId = entryIdOf(answer);
      if (entryId === undefined) return outcomeOf(answer, epoch);
      if (answer.startsWith('^')) return { status: 'published', entryId, epoch };
      return { status: answer.startsWith('=') ? 'remembered' : 'appended', entryId, epoch };
    } catch (error) {
      return failed(error as Error);
    }
  }

  return {
    /**
     * Appends the event to the stream of its topic, once and in its order. Never throws.
     * The fields are those of the envelope; see envelope.ts.
     */
    async publish(event: OutboxEvent, appending: Appending): Promise<AppendOutcome> {
      const { epoch } = appending;
      try {
        const answer = await request(event, appending);
        const entryId = entryIdOf(answer);
        if (entryId === undefined) return outcomeOf(answer, epoch);
        const { streams } = knownIn(epoch);
        if (!streams.has(event.topic)) {
          deps.onFirstEntry?.(event.topic);
          streams.add(event.topic);
        }
        rememberAppended(epoch, event.eventId);
        return { status: answer.startsWith('=') ? 'remembered' : 'appended', entryId, epoch };
      } catch (error) {
        return failed(error as Error);
      }
    },

    /** Whether this pod knows that the event was appended in this epoch. */
    isAppended: (eventId: string, epoch: string): boolean =>
      known.epoch === epoch && (known.events.has(eventId) || known.olderEvents.has(eventId)),

    /** Resolves when this pod learns that the event was appended, or after `ms`. */
    appendOf(eventIds: readonly string[], ms: number): Promise<void> {
      return new Promise((resolve) => {
        const resume = () => {
          clearTimeout(timer);
          resolve();
        };
        const timer = setTimeout(() => {
          for (const eventId of eventIds) {
            const left = waiting.get(eventId)?.filter((it) => it !== resume) ?? [];
            if (left.length === 0) waiting.delete(eventId);
            else waiting.set(eventId, left);
          }
          resolve();
        }, ms);
        for (const eventId of eventIds) {
          const others = waiting.get(eventId);
          if (others) others.push(resume);
          else waiting.set(eventId, [resume]);
        }
      });
    },

    /**
     * Appends the event to the dead-letter stream, once for each job. Never throws. Answers `published` with its entry
     * when the job remembers that it was appended: it is not dead. A large payload that the server does not take stays
     * in the table.
     *
     * @param madeAt of the failed job; null where the row says that the letter is lost, and there may be no job
     */
    async deadLetter(failure: Failure, madeAt: number | null): Promise<AppendOutcome | PublishedAfterAll> {
      const { event, reason } = failure;
      const outcome = await appendDeadLetter(failure, madeAt);
      const isTaken = outcome.status !== 'refused' && outcome.status !== 'unavailable';
      if (isTaken || event.payload.length < LARGE_BYTES) return outcome;
      await untilConnected(redis);
      return appendDeadLetter({ ...failure, event: { ...event, payload: 'null', withheld: reason } }, madeAt);
    },

    /** Whether a job that was made then may be older than what is remembered of it: row and stream are asked first. */
    mayHaveForgotten: (madeAt: number): boolean =>
      hasTwoServers && Date.now() - madeAt > (MEMORY_TTL_S - MARGIN_S) * 1_000,
  };
}

/** The event has an entry in its stream: it must not be given up. */
export type PublishedAfterAll = { status: 'published'; entryId: string; epoch: string };

/** Clocks of pods differ by less. */
const MARGIN_S = 300;

/** XADD's argument that keeps a stream at about `maxLen` entries; 0 = never trim. */
export const trimmedTo = (maxLen: number): string[] => (maxLen === 0 ? [] : ['MAXLEN', '~', String(maxLen)]);

export const NOT_KNOWN = {
  status: 'unavailable',
  reason:
    'Redis may have lost entries, or PostgreSQL rows; nothing is appended until table and streams were compared',
} satisfies AppendOutcome;

/** As ioredis has what Redis answers instead of a reply. */
const refusal = (message: string) => Object.assign(new Error(message), { name: 'ReplyError' });

/** The server is no master any more: it may come back with another one's data. */
const DEMOTED = /\b(READONLY|MASTERDOWN)\b/;

export function outcomeOfError(error: Error): AppendOutcome & { status: 'refused' | 'unavailable' } {
  return { status: isRefusal(error) ? 'refused' : 'unavailable', reason: reasonOf(error) };
}
