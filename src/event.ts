/**
 * The vocabulary that crosses the borders between stages. Imports nothing.
 */

/** One row of `identity.outbox` on its way to a stream; also the data of its publish job. */
export type OutboxEvent = Readonly<{
  /** `outbox.id`, a bigint as decimal text. Gives the order within an aggregate. */
  id: string;
  /** `outbox.event_id`, a uuid. Also the id of the publish job. */
  eventId: string;
  eventType: string;
  aggregateType: string;
  /** uuid */
  aggregateId: string;
  /** Key of the stream: the row's topic, or RELAY_STREAM_NAME where that is null. */
  topic: string;
  /** JSON text exactly as PostgreSQL printed it; never parsed and re-serialised on its way. `null` if withheld. */
  payload: string;
  /**
   * Why the row's payload, and all but the beginning of its longer texts, were left in the table: such an event
   * cannot be published. Null where nothing was; absent from jobs of a pod that did not know of it yet.
   */
  withheld?: string | null;
  /** `outbox.created_at` as ISO 8601 in UTC with microseconds; `infinity` and `-infinity` as they are. */
  occurredAt: string;
  /** The payload's `tenant_id` if that is a text of 1 to 200 characters, or null. */
  tenantId: string | null;
  /** The payload's `correlation_id` likewise, or null. */
  correlationId: string | null;
  /** Failed attempts before this job was made (a job that Redis lost continues where it was). */
  attempts: number;
  /**
   * The trace that the event belongs to, and the span that comes before: its producer's, as the row's headers or its
   * payload's metadata say; then that of each step on its way. Absent from jobs of a pod that did not know of it yet.
   */
  trace?: TraceContext | null;
  /** Absent where nothing was read ahead. */
  chain?: Chain;
}>;

/** The job belongs to events of one aggregate that were read together, after the first of them was leased. */
export type Chain = Readonly<{
  /** Of that reading, by one pod: what it read behind an event is good for the job that has the same. */
  reading: string;
  /** Of what was appended, one after the other, before this event's job was added; the rows may not say so yet. */
  receipts: readonly Receipt[];
  /** In which these were appended. */
  epoch: string;
  /** What comes after those and before this event, and had its jobs together with it or just before. */
  after: readonly EventName[];
  /** What comes behind this event and had its jobs together with it. */
  rest: readonly EventName[];
  /** The first of those that had their jobs together: it brings the next ones along. */
  leads: boolean;
}>;

export type EventName = Pick<OutboxEvent, 'id' | 'eventId'>;

/** W3C Trace Context. */
export type TraceContext = Readonly<{
  /** e.g. `00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01` */
  traceparent: string;
  /** At most 512 characters where it comes from a row. */
  tracestate?: string;
}>;

/** Where one event's entry is, after it was appended. */
export type Receipt = Readonly<{
  id: string;
  /** Stream id that Redis answered, e.g. `1700000000000-0`. */
  entryId: string;
  /**
   * `after`: its job was added before those before it in its aggregate had their receipts, which come with it.
   * `before`: such a one; it may have its receipt by now.
   */
  chained?: 'after' | 'before';
}>;

/** Whether any of some rows waits for something, and whether that is its next attempt after one that failed. */
export type Waiting = 'none' | 'some' | 'for-retry';

/** What became of one append to a stream. Every reply of Redis ends in exactly one of these. */
export type AppendOutcome =
  /**
   * `epoch`: the entry is good for as long as Redis loses nothing, which would end its epoch. `preceding`: of what the
   * event's chain has before it, in that order; the rows may not say so yet.
   */
  | { status: 'appended'; entryId: string; epoch: string; preceding: readonly Receipt[] }
  /** An earlier run of the same job had appended it: nothing was written now. */
  | { status: 'already-appended'; entryId: string; epoch: string; preceding: readonly Receipt[] }
  /** The job's own hash is gone: finished elsewhere, or lost by Redis. The row decides. */
  | { status: 'job-gone' }
  /** Redis refused this very event (wrong type, no permission): it takes the retry road. */
  | { status: 'refused'; reason: string }
  /** What comes before it in its aggregate is not in its stream yet. */
  | { status: 'early' }
  /** The same, and it will not be for long: it was refused, and waits to be tried again. */
  | { status: 'behind-retry' }
  /** Redis can take nothing now (unreachable, loading, read-only, full): not the event's fault. */
  | { status: 'unavailable'; reason: string };

/** What one attempt to publish came to, as far as its job is concerned. */
export type Attempt =
  /** Nothing is left to do for the job. */
  | { kind: 'done' }
  /** Refused: BullMQ's backoff, and after the last attempt the dead-letter stream. */
  | { kind: 'retry'; reason: string }
  /** Nobody can publish now: again soon, at no cost to the event's attempts. */
  | { kind: 'postpone'; reason: string }
  /** Its turn has not come: very soon, then less and less often, at no cost. */
  | { kind: 'wait' }
  /** No attempt can ever succeed: the dead-letter stream at once. */
  | { kind: 'give-up'; reason: string };

/** One run of a job. */
export type Run = Readonly<{
  /** None of this job was ever begun before. */
  isFirst: boolean;
  /** Since its job was added, an attempt with the same event, or one before it, may have failed and been made again. */
  isLate: boolean;
}>;

/** Runs `work` when its turn has come; throws what it throws, or without running it when it may not run. */
export type InTurn = <T>(work: () => Promise<T>) => Promise<T>;

/** A text of the row, which may be of any length, as it may stand in a log line, a reason or the name of a job. */
export const brief = (text: string): string => (text.length > 200 ? `${text.slice(0, 200)}...` : text);

/** The items in their order, in steps of not too many of them, nor of too many bytes; a large one is a step by itself. */
export function inSteps<T extends Readonly<{ bytes: number }>>(
  items: readonly T[],
  maxItems: number,
  maxBytes: number,
): T[][] {
  const steps: T[][] = [];
  let bytes = Number.POSITIVE_INFINITY;
  for (const item of items) {
    bytes += item.bytes;
    if (bytes > maxBytes || steps.at(-1)?.length === maxItems) {
      steps.push([]);
      bytes = item.bytes;
    }
    steps.at(-1)?.push(item);
  }
  return steps;
}
