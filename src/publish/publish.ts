import pLimit from 'p-limit';
import { type AppendOutcome, type Attempt, brief, isEvent, type OutboxEvent } from '../event.ts';
import type { Acknowledger } from '../finalize/acknowledger.ts';
import type { DeadLetters } from '../finalize/dead-letter.ts';
import type { RemoveJobs } from '../finalize/job-removal.ts';
import { withDeadline } from '../lifecycle.ts';
import type { Outbox } from '../outbox/outbox.ts';
import type { Queues } from '../queue/queues.ts';
import type { FailedRun, Fate, Run } from '../queue/workers.ts';
import type { Streams } from '../streams/append.ts';
import { NOT_KNOWN } from '../streams/append-outcome.ts';
import { type Epoch, epochId } from '../streams/epoch.ts';
import type { Gate } from '../streams/gate-script.ts';
import type { Lookup } from '../streams/lookup.ts';
import { errorText, type Logger } from '../telemetry/logger.ts';
import type { Metrics } from '../telemetry/metrics.ts';
import type { Tally } from '../telemetry/tally.ts';
import type { Tracing } from '../telemetry/tracing.ts';
import type { EventCheck } from './event-check.ts';
import type { Parker } from './parker.ts';
import { CrashLimitError, type PoisonGuard } from './poison-guard.ts';
import type { RowQuestions } from './row-questions.ts';

/** How soon an event is tried again when nobody could publish it. */
const POSTPONE_MS = 1_000;
/** How soon one that is early; then twice that, and so on. */
const EARLY_DELAY_MS = 50;
/** An early event holds a worker's place for so long: what comes before it is in progress. */
const EARLY_HOLD_MS = 60;
/** Another pod may append what comes before it: the script is asked again so often. */
const EARLY_RETRY_MS = 10;
/**
 * One that was begun so often, about 2 s, asks the rows as well: behind a failed event each job would be released only
 * after the one before it (45 s for a full window, measured).
 */
const EARLY_STARTS = 6;
/** Of the jobs in Redis, retries that wait take up so many at most; beyond, they wait on their rows. */
const RETRIES_SHARE = 0.25;
/** Failures that are written at once: each takes a connection of the pool, and claims and acknowledgements need some as well. */
const WRITTEN_AT_ONCE = 4;

export type PublishOptions = Readonly<{
  publishTimeoutMs: number;
  maxInFlight: number;
}>;

/** What the job of an event that is not published answers to the worker: its row is to be parked. */
export type Released = Readonly<{ failedBefore: boolean }>;

type PublishRun = Run<OutboxEvent>;

/** The job's event, or null where it has none: anybody who may use the queue's Redis may add jobs. */
const eventOf = ({ id, data }: PublishRun): OutboxEvent | null =>
  isEvent(data) && data.eventId === id ? data : null;

/**
 * One attempt to publish one event: check, append in order, decide; then acknowledge, retry, park or dead-letter. The
 * job's fate is decided first, and what follows from its end comes after it has ended in Redis.
 */
export function createPublish(deps: {
  streams: Pick<Streams, 'publish' | 'isAppended' | 'untilAppended' | 'mayHaveForgotten'>;
  lookup: Pick<Lookup, 'find'>;
  epoch: Pick<Epoch, 'known' | 'current'>;
  outbox: Pick<Outbox, 'expireLeasesOf' | 'recordFailure'>;
  rows: RowQuestions;
  queues: Pick<Queues, 'inFlight'>;
  removeJobs: RemoveJobs;
  check: EventCheck;
  guard: PoisonGuard;
  acknowledger: Pick<Acknowledger, 'acknowledge'>;
  deadLetters: Pick<DeadLetters, 'bury'>;
  parker: Parker;
  metrics: Pick<Metrics, 'attempted' | 'published'>;
  tracing: Pick<Tracing, 'publish' | 'append'>;
  /** The event of this topic was published: for the heartbeat. */
  onPublished: (topic: string) => void;
  options: PublishOptions;
  tally: Omit<Tally, 'stop'>;
  logger: Logger;
}) {
  const { streams, epoch: epochs, outbox, guard, options, tally, logger } = deps;
  const reportPostponed = createPostponedReport(logger);
  const writing = pLimit(WRITTEN_AT_ONCE);
  const handlers = new Set<Promise<void>>();

  /** The worker's processor. */
  async function process(run: PublishRun): Promise<Fate<Released | null>> {
    const event = eventOf(run);
    if (event === null) {
      tally.warn(
        run.id,
        {},
        'publish jobs hold no event: Redis lost it, or they are not the relay’s; ignored',
      );
      return { kind: 'completed', result: null };
    }
    const about = {
      eventId: event.eventId,
      topic: brief(event.topic),
      attempt: event.attempts + run.failures + 1,
    };
    const startedAt = performance.now();
    const expiresAt = Date.now() + options.publishTimeoutMs;
    const outcome = await deps.tracing.publish(event, about.attempt, (traced) =>
      withDeadline(options.publishTimeoutMs, attempt(traced, run, expiresAt)).catch(
        (error: Error): Attempt => ({
          kind: error instanceof CrashLimitError ? 'give-up' : 'postpone',
          reason: error.message,
        }),
      ),
    );
    deps.metrics.attempted(event, outcome, (performance.now() - startedAt) / 1_000);
    switch (outcome.kind) {
      case 'done':
        logger.debug(about, 'event published');
        return { kind: 'completed', result: null };
      case 'release':
        logger.debug(about, 'an earlier event of the aggregate waits; this one waits on its row');
        return { kind: 'completed', result: { failedBefore: outcome.failedBefore } };
      case 'wait':
        return { kind: 'delayed', ms: Math.min(POSTPONE_MS, EARLY_DELAY_MS * 2 ** (run.starts - 1)) };
      case 'postpone':
        reportPostponed(about, outcome.reason);
        return { kind: 'delayed', ms: POSTPONE_MS };
      case 'retry':
      case 'give-up':
        // Resolves when the failures before are written, or just being: no more events fail than can be written.
        await writing(() => {});
        return { kind: 'failed', reason: outcome.reason, isFinal: outcome.kind === 'give-up' };
    }
  }

  async function attempt(event: OutboxEvent, run: PublishRun, expiresAt: number): Promise<Attempt> {
    // Not within the guard: it is no time to wait for that.
    if (epochs.current() === undefined) await epochs.known();
    const work = () => checkAndAppend(event, run);
    const outcome =
      run.stalls > 0
        ? await guard.alone(event.eventId, expiresAt, work)
        : await guard.together(expiresAt, work);
    switch (outcome.status) {
      case 'appended':
      case 'remembered':
        return acknowledge(event, outcome.entryId, outcome.epoch);
      case 'over':
        return { kind: 'done' };
      case 'gone':
        tally.warn(event.eventId, {}, 'jobs vanished before their appends; their rows decide');
        await outbox.expireLeasesOf([event.eventId]).catch((error) => {
          logger.debug({ err: error, eventId: event.eventId }, 'the lease reaper asks when the lease ends');
        });
        return { kind: 'done' };
      case 'behind':
        return { kind: 'release', failedBefore: outcome.failedBefore };
      case 'early':
      case 'ask-rows':
        return { kind: 'wait' };
      case 'refused':
        return { kind: 'retry', reason: outcome.reason };
      case 'invalid':
        return { kind: 'give-up', reason: outcome.reason };
      case 'unavailable':
        return { kind: 'postpone', reason: outcome.reason };
    }
  }

  type Outcome = AppendOutcome | { status: 'invalid'; reason: string };

  /** The part in which an event can harm its pod. */
  async function checkAndAppend(event: OutboxEvent, run: PublishRun): Promise<Outcome> {
    const problem = deps.check.problemOf(event);
    if (problem !== null) return { status: 'invalid', reason: problem };
    const outcome = await deps.tracing.append(event, (traced) => appendInOrder(traced, run));
    if (outcome.status !== 'refused') return outcome;
    const reason = await deps.check.refusedEverything(event, outcome.reason);
    return reason === null ? outcome : { status: 'unavailable', reason };
  }

  /** Appends when the gate lets the event pass; asks again for a moment while it is early. */
  async function appendInOrder(event: OutboxEvent, run: PublishRun): Promise<AppendOutcome> {
    const holdUntil = performance.now() + (run.stalls > 0 ? 0 : EARLY_HOLD_MS);
    let asked: { epoch: string; gate: Gate } | undefined;
    for (;;) {
      const epoch = epochs.current();
      if (epoch === undefined) return NOT_KNOWN;
      if (streams.mayHaveForgotten(run.madeAt)) {
        const entryId = (await deps.lookup.find(event.topic, [event.eventId])).get(event.eventId);
        if (entryId !== undefined) return { status: 'remembered', entryId, epoch };
      }
      // Made in this epoch, and no attempt failed or was cut off: what was before it then is before it now.
      const isFirst = event.epoch === epochId(epoch) && run.failures === 0 && run.stalls === 0;
      const before = isFirst ? event.after : undefined;
      const gate = asked?.epoch === epoch ? asked.gate : isFirst ? gateOf(event, epoch) : 'ask';
      const outcome = await streams.publish(event, { epoch, gate, madeAt: run.madeAt });
      const isLongEarly = outcome.status === 'early' && run.starts >= EARLY_STARTS;
      if (outcome.status === 'ask-rows' || isLongEarly) {
        const standing = await deps.rows.standingOf(event.eventId, before ?? null);
        if (standing === 'over' || standing === 'early') return { status: standing };
        // Its claim may not have committed yet, or the claim takes what comes before it in a moment.
        if (standing === 'unclaimed' && isFirst && run.starts < EARLY_STARTS) return { status: 'early' };
        asked = { epoch, gate: standing === 'first' ? 'open' : 'release' };
      } else if (outcome.status === 'early' && performance.now() < holdUntil) {
        await streams.untilAppended([event.eventId, event.after as string], EARLY_RETRY_MS);
      } else return outcome;
    }
  }

  const gateOf = ({ after }: OutboxEvent, epoch: string): Gate =>
    !after || streams.isAppended(after, epoch) ? 'open' : 'after';

  async function acknowledge(event: OutboxEvent, entryId: string, epoch: string): Promise<Attempt> {
    try {
      await deps.acknowledger.acknowledge({ event, entryId, epoch });
    } catch (error) {
      return { kind: 'postpone', reason: `appended, but its row could not be marked: ${errorText(error)}` };
    }
    deps.metrics.published(event, entryId);
    deps.onPublished(event.topic);
    return { kind: 'done' };
  }

  /** The job has ended in Redis, by this run of it: only now may its row be parked, and get another job. */
  function onCompleted(run: PublishRun, released: Released | null): void {
    if (released !== null && run.data !== null) deps.parker.park(run.data, released.failedBefore);
  }

  /** BullMQ tells of every failed attempt. A listener that throws would end the process. */
  function onFailed(run: FailedRun<OutboxEvent>): void {
    const handled = writing(() => recordFailure(run)).finally(() => handlers.delete(handled));
    handlers.add(handled);
  }

  async function recordFailure(run: FailedRun<OutboxEvent>): Promise<void> {
    const { failedForGoodAt, retryInMs, madeAt } = run;
    const event = eventOf(run);
    if (event === null) return;
    const { id, eventId } = event;
    const attempts = event.attempts + run.failures;
    const reason = run.error.message;
    try {
      if (failedForGoodAt !== null) {
        await deps.deadLetters.bury({ event, attempts, reason, failedAt: failedForGoodAt, madeAt });
        // Who retries it from a dashboard means it: it is started again.
        if (run.stalls > 0) await guard.clear(eventId, Date.now() + options.publishTimeoutMs);
        return;
      }
      await outbox.recordFailure({ id, eventId, attempts, reason, retryInMs });
      const about = { topic: brief(event.topic), attempt: attempts, reason, retryInMs };
      tally.info(eventId, about, 'publishing failed; retries are scheduled');
      // Fresh events must always find room: when retries take up more than their share of the jobs in Redis, this
      // one waits on its row, whose lease ends when its time has come. Counted after it was added, so that any
      // number that fail at once all see themselves.
      const { delayed } = await deps.queues.inFlight();
      if (delayed > Math.floor(options.maxInFlight * RETRIES_SHARE)) await deps.removeJobs([event]);
    } catch (err) {
      tally.error(
        eventId,
        { err },
        'cannot record failed attempts on their rows; the lease reaper does when their leases end',
      );
    }
  }

  return {
    process,
    onCompleted,
    onFailed,
    /** Resolves when every failure that was told of is recorded. */
    drain: async (): Promise<void> => {
      await Promise.all(handlers);
    },
  };
}

/** An outage postpones thousands of events a second: one line when it begins, and one in so long while it lasts. */
const REPORT_INTERVAL_MS = 10_000;

function createPostponedReport(logger: Logger): (about: Record<string, unknown>, reason: string) => void {
  let reportedAt = 0;
  let events = 0;
  return (about, reason) => {
    logger.debug({ ...about, reason, retryInMs: POSTPONE_MS }, 'event postponed');
    events++;
    if (Date.now() - reportedAt < REPORT_INTERVAL_MS) return;
    logger.warn({ events, reason }, 'cannot publish now; events are postponed');
    reportedAt = Date.now();
    events = 0;
  };
}
