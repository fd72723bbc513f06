import type { Redis } from 'ioredis';
import { Packr } from 'msgpackr';
import type { RelayConfig } from '../config/config.ts';
import { script } from '../connections/redis-script.ts';
import { closesConnection, isConnectionLoss, LARGE_BYTES, untilConnected } from '../connections/refusals.ts';
import { type AppendOutcome, byId, type Failure, inSteps, type OutboxEvent } from '../event.ts';
import {
  entryIdOf,
  NOT_KNOWN,
  outcomeOf,
  outcomeOfError,
  outcomeOfFailure,
  refusal,
} from './append-outcome.ts';
import { deadLetterFields, pushEnvelope } from './envelope.ts';
import { type Epoch, epochId } from './epoch.ts';
import { keysOf } from './epoch-script.ts';
import { GATE, type Gate, gateScript, letterScript, MEMORY_TTL_S } from './gate-script.ts';
import { createKnownAppends } from './known-appends.ts';

const packr = new Packr({ useRecords: false });

/** Entries in one call, at most, and at most LARGE_BYTES of them: Redis does nothing else during a call. */
const CALL_ENTRIES = 64;
/**
 * So many losses of the connection in a row, each at the append of the same large event, mean that something refuses this
 * event: a network that fails does not choose it each time.
 */
const LOSSES_OF_A_REFUSAL = 3;
/** Large events whose losses are counted, at most. */
const LOST_AT_KEPT = 1_000;
/** Longest time between the question about a job and the append: what the answer said may be wrong later. */
const FACTS_TRUE_FOR_MS = 5_000;

/** The clocks of two pods differ by less than this. */
const MARGIN_S = 300;

/**
 * What the Redis of the queues says of an event's job, where the streams are on another server: when it was made, whether
 * it has ended, and how many of its attempts have failed. Null when there is no job.
 */
export type JobFacts = readonly [madeAt: string, hasEnded: boolean, failures: number] | null;

export type StreamOptions = Pick<RelayConfig, 'dlqStreamName' | 'streamMaxLen' | 'dlqMaxLen'> &
  Readonly<{
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

/** How an event is to be appended. */
export type Appending = Readonly<{
  epoch: string;
  gate: Gate;
  /** When the job that this run belongs to was made, Unix time in ms. */
  madeAt: number;
}>;

/** The event has an entry in its stream: it must not be given up. */
export type PublishedAfterAll = { status: 'published'; entryId: string; epoch: string };

/** An append that waits for the next call of the script. */
type Request = Readonly<{
  event: OutboxEvent;
  epoch: string;
  /** The array that gate-script.ts describes. */
  entry: (string | number | JobFacts | false)[];
  bytes: number;
  resolve: (answer: string) => void;
  reject: (error: Error) => void;
}>;

/** Positions in an entry that are filled in right before the call; see gate-script.ts. */
const STREAM_AT = 0;
const FACTS_AT = 5;
/** Approximate upper bound of an entry without its payload. */
const ENVELOPE_BYTES = 600;
const bytesOf = ({ payload }: OutboxEvent): number => ENVELOPE_BYTES + payload.length;

export type Streams = ReturnType<typeof createStreams>;

export function createStreams(deps: {
  redis: Redis;
  epoch: Pick<Epoch, 'current' | 'known' | 'invalidate' | 'endFor'>;
  options: StreamOptions;
  /** Asks another server about the jobs of these events, where the jobs are on another server. */
  jobFacts?: ((eventIds: readonly string[]) => Promise<JobFacts[]>) | undefined;
  /** Told of each stream of events at its first entry in an epoch. */
  onFirstEntry?: (stream: string) => void;
}) {
  const { redis, epoch: epochs, options, jobFacts } = deps;
  const hasTwoServers = jobFacts !== undefined;
  const appendInOrder = script<(string | string[])[]>(redis, 'appendInOrder', gateScript(hasTwoServers));
  const appendLetter = script<string>(redis, 'appendLetter', letterScript(hasTwoServers), 5);
  const memoryKey = hasTwoServers ? memoryKeyOf(options) : options.jobKey;
  const { lastEntries } = keysOf(options.epochKey);
  const trimming = trimmedTo(options.streamMaxLen);
  const known = createKnownAppends();
  const letterKey = (eventId: string, madeAt: number): string =>
    hasTwoServers ? `${options.memoryPrefix}:dead:${eventId}:${madeAt}` : options.jobKey(eventId);

  /** How often in a row the connection was lost at the append of a large event, or of its dead letter, by its id. */
  const lostAt = new Map<string, number>();
  /** What the next iteration of the event loop sends, by epoch. */
  let requested = new Map<string, Request[]>();

  /** Appends that are requested in one iteration of the event loop go to Redis in one call. */
  function request(event: OutboxEvent, { epoch, gate, madeAt }: Appending): Promise<string> {
    return new Promise((resolve, reject) => {
      if (requested.size === 0) setImmediate(callAll);
      const letter = hasTwoServers && letterKey(event.eventId, madeAt);
      const entry = [0, event.eventId, String(madeAt), GATE[gate], event.after ?? '', false, false, letter];
      entry.push(...trimming, '*');
      pushEnvelope(event, entry);
      const bytes = bytesOf(event);
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
      // The jobs may have begun in another order.
      ofEpoch.sort((a, b) => byId(a.event, b.event));
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
        const index = streams.indexOf(event.topic);
        entry[STREAM_AT] = index < 0 ? streams.push(event.topic) : index + 1;
      }
      const entries = packr.pack(some.map((it) => it.entry));
      const answers = await appendInOrder(
        2 + streams.length,
        ...[options.epochKey, lastEntries, ...streams],
        ...[epoch, epochId(epoch), options.dlqStreamName, memoryKey(''), entries],
      );
      const cascaded = answers[some.length] as string[];
      for (let i = 0; i < cascaded.length; i += 2) known.addEvent(epoch, cascaded[i] as string);
      some.forEach((it, i) => {
        lostAt.delete(it.event.eventId);
        it.resolve(String(answers[i]));
      });
    } catch (error) {
      // A refusal of one event can end the whole script. Each event is tried by itself; a job whose event was appended
      // before the script ended remembers its entry.
      if (some.length > 1 && outcomeOfError(error as Error).status === 'refused') {
        for (const one of some) void call(epoch, [one]);
        return;
      }
      const reason = refusalByLoss(some[0]?.event, error as Error) ?? (error as Error);
      for (const it of some) it.reject(reason);
    }
  }

  /** A large entry has a call of its own. It counts as refused when the connection is lost there again and again. */
  function refusalByLoss(event: OutboxEvent | undefined, error: Error): Error | undefined {
    if (event === undefined || !isConnectionLoss(error)) return undefined;
    const bytes = bytesOf(event);
    if (bytes < LARGE_BYTES) return undefined;
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
    const byEvent = new Map(eventIds.map((eventId, i) => [eventId, facts[i] as JobFacts]));
    for (const { event, entry } of some) {
      entry[FACTS_AT] = byEvent.get(event.eventId) ?? false;
      entry[FACTS_AT + 1] = byEvent.get(event.after ?? '') ?? false;
    }
  }

  /**
   * While the pod asked the other server about the jobs, the streams' server may have restarted with older data, in which
   * the key has the name of this epoch again.
   */
  function assertLasts(epoch: string): void {
    if (epochs.current() !== epoch) throw new Error(NOT_KNOWN.reason);
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
      const answer = await appendLetter(
        ...[options.epochKey, lastEntries, options.dlqStreamName],
        ...[memoryKey(event.eventId), letterKey(event.eventId, madeAt ?? 0)],
        ...[epoch, epochId(epoch), event.eventId, event.topic, madeAt === null ? '0' : '1', String(madeAt)],
        packr.pack(facts ?? false),
        ...[...trimmedTo(options.dlqMaxLen), '*', ...deadLetterFields(event, failure)],
      );
      lostAt.delete(event.eventId);
      const entryId = entryIdOf(answer);
      if (entryId === undefined) return outcomeOf(answer, epoch, epochs);
      if (answer.startsWith('^')) return { status: 'published', entryId, epoch };
      return { status: answer.startsWith('=') ? 'remembered' : 'appended', entryId, epoch };
    } catch (error) {
      return outcomeOfFailure(refusalByLoss(event, error as Error) ?? (error as Error), epochs);
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
        if (entryId === undefined) return outcomeOf(answer, epoch, epochs);
        if (known.addStream(epoch, event.topic)) deps.onFirstEntry?.(event.topic);
        known.addEvent(epoch, event.eventId);
        return { status: answer.startsWith('=') ? 'remembered' : 'appended', entryId, epoch };
      } catch (error) {
        return outcomeOfFailure(error as Error, epochs);
      }
    },

    /** See known-appends.ts. */
    isAppended: known.hasEvent,
    untilAppended: known.untilAppended,

    /**
     * Appends the event to the dead-letter stream, once for each job. Never throws. Answers `published` with the event's
     * entry when the job remembers one. If Redis refuses a large payload, the dead letter goes without it.
     *
     * @param madeAt of the failed job; null for a dead row whose letter is lost: there may be no job any more
     */
    async deadLetter(failure: Failure, madeAt: number | null): Promise<AppendOutcome | PublishedAfterAll> {
      const { event, reason } = failure;
      const outcome = await appendDeadLetter(failure, madeAt);
      if (outcome.status !== 'refused' || bytesOf(event) < LARGE_BYTES) return outcome;
      await untilConnected(redis);
      return appendDeadLetter({ ...failure, event: { ...event, payload: 'null', withheld: reason } }, madeAt);
    },

    /**
     * Whether the idempotency key of a job that was made then may have expired: before such a job appends, the pod looks
     * for the event in its stream.
     */
    mayHaveForgotten: (madeAt: number): boolean =>
      hasTwoServers && Date.now() - madeAt > (MEMORY_TTL_S - MARGIN_S) * 1_000,
  };
}

/** XADD's argument that keeps a stream at about `maxLen` entries; 0 = never trim. */
export const trimmedTo = (maxLen: number): string[] => (maxLen === 0 ? [] : ['MAXLEN', '~', String(maxLen)]);
