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
  /**
   * `event_id` of the live row right before this one in its aggregate when its job was made, or null: the gate lets
   * this event pass when that one is in its stream. Absent from jobs of a build that did not know the gate.
   */
  after?: string | null;
  /** Epoch in which its job was made (streams/epoch.ts). Absent as `after` is. */
  epoch?: string;
}>;

const UUID = /^[\da-f]{8}(-[\da-f]{4}){3}-[\da-f]{12}$/i;
const TEXTS = ['eventType', 'aggregateType', 'aggregateId', 'topic', 'payload', 'occurredAt'] as const;
const TEXTS_OR_NULL = ['tenantId', 'correlationId', 'withheld', 'epoch'] as const;

/** Whether the data of a job is an event: statements for many events would fail by one that is none. */
export function isEvent(data: unknown): data is OutboxEvent {
  if (typeof data !== 'object' || data === null) return false;
  const it = data as Partial<Record<keyof OutboxEvent, unknown>>;
  const isUuid = (value: unknown) => typeof value === 'string' && UUID.test(value);
  return (
    isUuid(it.eventId) &&
    typeof it.id === 'string' &&
    /^-?\d{1,19}$/.test(it.id) &&
    Number.isSafeInteger(it.attempts) &&
    TEXTS.every((name) => typeof it[name] === 'string') &&
    TEXTS_OR_NULL.every((name) => typeof (it[name] ?? '') === 'string') &&
    (it.after === undefined || it.after === null || isUuid(it.after)) &&
    typeof (it.trace ?? {}) === 'object'
  );
}

/**
 * What the database says of itself: its time, to the microsecond, and its generation
 * (connections/generation.ts).
 */
export type DatabaseState = Readonly<{ now: string; generation: string }>;

/** W3C Trace Context. */
export type TraceContext = Readonly<{
  /** e.g. `00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01` */
  traceparent: string;
  /** At most 512 characters where it comes from a row. */
  tracestate?: string;
}>;

/** An aggregate's name: events of one aggregate are published in the order of their rows. */
export type Aggregate = Readonly<{ aggregateType: string; aggregateId: string }>;

/** Map key of an aggregate. */
export const aggregateKey = ({ aggregateType, aggregateId }: Aggregate): string =>
  `${aggregateId} ${aggregateType}`;

/** What became of one append to a stream. Every reply of Redis ends in exactly one of these. */
export type AppendOutcome =
  /** Its entry is good for as long as Redis loses nothing, which would end the epoch. */
  | { status: 'appended'; entryId: string; epoch: string }
  /** An earlier run of the same job had appended it: nothing was written now. */
  | { status: 'remembered'; entryId: string; epoch: string }
  /** Its job is gone: finished elsewhere, or lost by Redis. The row decides. */
  | { status: 'gone' }
  /** The rows say that nothing is to be published: the event is published, discarded or gone. */
  | { status: 'over' }
  /** The rows must say whether an earlier event of the aggregate is still to be published. */
  | { status: 'ask-rows' }
  /** The event before it in its aggregate is not in its stream yet. */
  | { status: 'early' }
  /**
   * The event before it waits for a retry, or for another one. The job is released: no run of it appends any more.
   * `failedBefore`: the event right before it has failed, which its row may not say yet.
   */
  | { status: 'behind'; failedBefore: boolean }
  /** Redis refused this very event (wrong type, no permission): it takes the retry road. */
  | { status: 'refused'; reason: string }
  /** Redis can take nothing now (unreachable, loading, read-only, full): not the event's fault. */
  | { status: 'unavailable'; reason: string };

/** What one attempt to publish came to, as far as its job is concerned. */
export type Attempt =
  /** Nothing is left to do for the job. */
  | { kind: 'done' }
  /** The job ends without an append, and then its row is parked. */
  | { kind: 'release'; failedBefore: boolean }
  /** Refused: BullMQ's backoff, and after the last attempt the dead-letter stream. */
  | { kind: 'retry'; reason: string }
  /** Nobody can publish now: again soon, at no cost to the event's attempts. */
  | { kind: 'postpone'; reason: string }
  /** The event before it is on its way: very soon, then less and less often, at no cost. */
  | { kind: 'wait' }
  /** No attempt can ever succeed: the dead-letter stream at once. */
  | { kind: 'give-up'; reason: string };

/** An event that is given up, and why. */
export type Failure = Readonly<{ event: OutboxEvent; attempts: number; reason: string; failedAt: Date }>;

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
