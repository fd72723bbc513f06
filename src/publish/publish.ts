import pLimit from 'p-limit';
import type { RelayConfig } from '../config/config.ts';
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

/** Delay of an event that no pod could publish now. */
const POSTPONE_MS = 1_000;
/** First delay of an early event; each further delay is twice as long. */
const EARLY_DELAY_MS = 50;
/** How long an early event keeps its worker slot: its predecessor is usually in progress. */
const EARLY_HOLD_MS = 60;
/** Interval at which an early event asks the script again: another pod may append its predecessor. */
const EARLY_RETRY_MS = 10;
/**
 * An early event whose job was started so often, which takes about 2 s, asks the rows as well. Without this, each job
 * behind a failed event is released only after the job before it (45 s for a full window, measured).
 */
const EARLY_STARTS = 6;
/** Share of RELAY_MAX_IN_FLIGHT that delayed retries may take up. Beyond it, retries wait on their rows, without jobs. */
const RETRIES_SHARE = 0.25;
/** Failures written at the same time. Each takes a session of the pool; claims and acknowledgements need some too. */
const WRITTEN_AT_ONCE = 4;

type PublishOptions = Pick<RelayConfig, 'publishTimeoutMs' | 'maxInFlight'>;

/** Result of a job that ended without an append: the row of its event is to be parked, behind the event `after`. */
export type Released = Readonly<{ failedBefore: boolean; after: string | null }>;

type PublishRun = Run<OutboxEvent>;

/** The job's event, or null where the job holds none: other programs may add jobs to the queue. */
const eventOf = ({ id, data }: PublishRun): OutboxEvent | null =>
  isEvent(data) && data.eventId === id ? data : null;

/**
 * One attempt to publish one event: check, append in order, decide; then acknowledge, retry, park or dead-letter.
 *
 * BullMQ calls `process` for the attempt. It calls `onCompleted` or `onFailed` after the job has ended in Redis: only then
 * is a released row parked, and a failed attempt written to its row.
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
  tally: Tally;
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
        return { kind: 'completed', result: { failedBefore: outcome.failedBefore, after: outcome.after } };
      case 'wait':
        return { kind: 'delayed', ms: Math.min(POSTPONE_MS, EARLY_DELAY_MS * 2 ** (run.starts - 1)) };
      case 'postpone':
        reportPostponed(about, outcome.reason);
        return { kind: 'delayed', ms: POSTPONE_MS };
      case 'retry':
      case 'give-up':
        // Waits for a free writer, so that events fail no faster than their failures can be written.
        await writing(() => {});
        return { kind: 'failed', reason: outcome.reason, isFinal: outcome.kind === 'give-up' };
    }
  }

  async function attempt(event: OutboxEvent, run: PublishRun, expiresAt: number): Promise<Attempt> {
    // Outside the guard: an event that is published alone must not make the others wait for the epoch.
    await epochs.known();
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
        return { kind: 'release', failedBefore: outcome.failedBefore, after: outcome.after ?? null };
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
    const outcome = await deps.tracing.append(event, (traced) => throughGate(traced, run));
    if (outcome.status !== 'refused') return outcome;
    const reason = await deps.check.refusedEverything(event, outcome.reason);
    return reason === null ? outcome : { status: 'unavailable', reason };
  }

  /** Appends when the gate lets the event pass. While the event is early, it asks again, for EARLY_HOLD_MS at most. */
  async function throughGate(event: OutboxEvent, run: PublishRun): Promise<AppendOutcome> {
    const holdUntil = performance.now() + (run.stalls > 0 ? 0 : EARLY_HOLD_MS);
    const predecessor = event.after ?? null;
    let answer: { epoch: string; gate: Gate; after: string | null } | undefined;
    for (;;) {
      const epoch = epochs.current();
      if (epoch === undefined) return NOT_KNOWN;
      if (streams.mayHaveForgotten(run.madeAt)) {
        const entryId = (await deps.lookup.find(event.topic, [event.eventId])).get(event.eventId);
        if (entryId !== undefined) return { status: 'remembered', entryId, epoch };
      }
      // On the first run of a job of this epoch, `after` still names the predecessor. Later runs ask the rows.
      const isFirst = event.epoch === epochId(epoch) && run.failures === 0 && run.stalls === 0;
      if (answer?.epoch !== epoch) answer = undefined;
      const after = answer ? answer.after : isFirst ? predecessor : null;
      const gate = answer?.gate ?? (isFirst ? gateOf(after, epoch) : 'ask');
      const placed = after === predecessor ? event : { ...event, after };
      const outcome = await streams.publish(placed, { epoch, gate, madeAt: run.madeAt });
      const isLongEarly = outcome.status === 'early' && run.starts >= EARLY_STARTS && answer === undefined;
      if (outcome.status === 'ask-rows' || isLongEarly) {
        const standing = await deps.rows.standingOf(event.eventId, isFirst ? predecessor : null);
        if (standing.kind === 'over') return { status: 'over' };
        if (standing.kind === 'early') {
          if (standing.after !== null && standing.after !== after) {
            answer = { epoch, gate: 'after', after: standing.after };
            continue;
          }
          // The event before has a lease and no job. Its lease may have hours left, and what waits for it takes up room.
          if (outcome.status === 'ask-rows' && standing.after !== null && run.starts >= EARLY_STARTS)
            await outbox.expireLeasesOf([standing.after]);
          return { status: 'early' };
        }
        // The claim that leased both rows may not have committed yet, or the predecessor is fresh and the next claim takes
        // it: the event stays early.
        if (standing.kind === 'unclaimed' && isFirst && run.starts < EARLY_STARTS) return { status: 'early' };
        answer = { epoch, gate: standing.kind === 'first' ? 'open' : 'release', after: null };
      } else if (outcome.status === 'early' && performance.now() < holdUntil) {
        await streams.untilAppended([event.eventId, after as string], EARLY_RETRY_MS);
      } else return outcome.status === 'behind' ? { ...outcome, after } : outcome;
    }
  }

  const gateOf = (after: string | null, epoch: string): Gate =>
    after === null || streams.isAppended(after, epoch) ? 'open' : 'after';

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

  /** This run has ended its job in Redis. Only now may the row be parked: a parked row may get another job. */
  function onCompleted(run: PublishRun, released: Released | null): void {
    if (released === null || run.data === null) return;
    deps.parker.park({ ...run.data, after: released.after }, released.failedBefore);
  }

  /** BullMQ calls this after every failed attempt. It must not throw: that would end the process. */
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
        // An operator who retries the job from a dashboard gets a run of it: its crashes count from 0 again.
        if (run.stalls > 0) await guard.clear(eventId, Date.now() + options.publishTimeoutMs);
        return;
      }
      await outbox.recordFailure({ id, eventId, attempts, reason, retryInMs });
      const about = { topic: brief(event.topic), attempt: attempts, reason, retryInMs };
      tally.info(eventId, about, 'publishing failed; retries are scheduled');
      // Fresh events must always find room. When retries take up more than their share of the jobs in Redis, this
      // job is removed: the row's lease ends when the retry is due, and then the event gets a new job. The count includes
      // this job, so events that fail at the same time see each other.
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
    /** Resolves when every failure that BullMQ has reported is written. */
    drain: async (): Promise<void> => {
      await Promise.all(handlers);
    },
  };
}

/** Interval of the log line about postponed events: an outage postpones thousands a second. */
const REPORT_INTERVAL_MS = 10_000;

function createPostponedReport(logger: Logger): (about: Record<string, unknown>, reason: string) => void {
  let reportedAt = Number.NEGATIVE_INFINITY;
  let events = 0;
  return (about, reason) => {
    logger.debug({ ...about, reason, retryInMs: POSTPONE_MS }, 'event postponed');
    events++;
    if (performance.now() - reportedAt < REPORT_INTERVAL_MS) return;
    logger.warn({ events, reason }, 'cannot publish now; events are postponed');
    reportedAt = performance.now();
    events = 0;
  };
}
