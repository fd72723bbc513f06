/** The types that all parts share. Imports nothing. */

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
  /** JSON text exactly as PostgreSQL printed it; the relay never parses and prints it again. `null` if withheld. */
  payload: string;
  /**
   * Why the claim left the payload, and all but the beginning of longer texts, in the table: such an event cannot be
   * published. Null if it left nothing; absent from jobs of older builds.
   */
  withheld?: string | null;
  /** `outbox.created_at` as ISO 8601 in UTC with microseconds; `infinity` and `-infinity` as they are. */
  occurredAt: string;
  /** The payload's `tenant_id` if that is a text of 1 to 200 characters, or null. */
  tenantId: string | null;
  /** The payload's `correlation_id` likewise, or null. */
  correlationId: string | null;
  /** Failed attempts before this job was made: the successor of a job that Redis lost goes on counting. */
  attempts: number;
  /**
   * The trace that the event belongs to, and the parent span: first its producer's, from the row's headers or the payload's
   * metadata, then that of the step before. Absent from jobs of older builds.
   */
  trace?: TraceContext | null;
  /**
   * Predecessor: `event_id` of the live row right before this one in its aggregate when its job was made, or null. The gate
   * lets this event pass when the predecessor is in its stream. Absent from jobs of older builds.
   */
  after?: string | null;
  /** Epoch in which its job was made (streams/epoch.ts). Absent as `after` is. */
  epoch?: string;
}>;

const UUID = /^[\da-f]{8}(-[\da-f]{4}){3}-[\da-f]{12}$/i;
export const isUuid = (text: string): boolean => UUID.test(text);
const TEXTS = ['eventType', 'aggregateType', 'aggregateId', 'topic', 'payload', 'occurredAt'] as const;
const TEXTS_OR_NULL = ['tenantId', 'correlationId', 'withheld', 'epoch'] as const;

/** Whether the data of a job is an event. If not, a statement for many events would fail because of it. */
export function isEvent(data: unknown): data is OutboxEvent {
  if (typeof data !== 'object' || data === null) return false;
  const it = data as Partial<Record<keyof OutboxEvent, unknown>>;
  const isId = (value: unknown) => typeof value === 'string' && isUuid(value);
  return (
    isId(it.eventId) &&
    typeof it.id === 'string' &&
    /^-?\d{1,19}$/.test(it.id) &&
    Number.isSafeInteger(it.attempts) &&
    TEXTS.every((name) => typeof it[name] === 'string') &&
    TEXTS_OR_NULL.every((name) => typeof (it[name] ?? '') === 'string') &&
    (it.after === undefined || it.after === null || isId(it.after)) &&
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

/** Outcome of one try to append an event: of the script, or of the rows. */
export type AppendOutcome =
  /** It was appended. Its entry is in the stream as long as the epoch lasts. */
  | { status: 'appended'; entryId: string; epoch: string }
  /** An earlier run of the same job had appended it: this run appended nothing. */
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
  | { status: 'behind'; failedBefore: boolean; after?: string | null }
  /** Redis refused this event (wrong type, no permission): it is retried. */
  | { status: 'refused'; reason: string }
  /** Redis takes nothing now (unreachable, loading, read-only, full): the attempt does not count. */
  | { status: 'unavailable'; reason: string };

/** What one attempt to publish means for its job. */
export type Attempt =
  /** Nothing is left to do for the job. */
  | { kind: 'done' }
  /** The job ends without an append, and then its row is parked. */
  | { kind: 'release'; failedBefore: boolean; after: string | null }
  /** The attempt failed: BullMQ's backoff, and after the last attempt the dead-letter stream. */
  | { kind: 'retry'; reason: string }
  /** No pod can publish now: the job runs again soon, and the attempt does not count. */
  | { kind: 'postpone'; reason: string }
  /** The event before it is on its way: the job runs again very soon, then less and less often. Does not count. */
  | { kind: 'wait' }
  /** No attempt can ever succeed: the event is dead-lettered at once. */
  | { kind: 'give-up'; reason: string };

/** An event that is given up, and why. */
export type Failure = Readonly<{ event: OutboxEvent; attempts: number; reason: string; failedAt: Date }>;

/** Order of rows by `id`, a bigint as text. */
export const byId = (a: Pick<OutboxEvent, 'id'>, b: Pick<OutboxEvent, 'id'>): number =>
  a.id.length - b.id.length || (a.id < b.id ? -1 : a.id > b.id ? 1 : 0);

/** Of an entry of a stream: `<ms>-<sequence>`. */
export const isEntryId = (text: string): boolean => /^\d+-\d+$/.test(text);

/** Order of entry ids. A text that is none counts as `0-0`. */
export function compareEntryIds(a: string, b: string): number {
  const numbersOf = (id: string) => (isEntryId(id) ? id.split('-').map(BigInt) : []);
  const [[ms = 0n, sequence = 0n], [otherMs = 0n, otherSequence = 0n]] = [numbersOf(a), numbersOf(b)];
  const difference = ms - otherMs || sequence - otherSequence;
  return difference < 0n ? -1 : Number(difference > 0n);
}

/** Cuts a text of a row, which may have any length, for a log line, a reason or the name of a job. */
export const brief = (text: string): string => (text.length > 200 ? `${text.slice(0, 200)}...` : text);

/** `1 entry`, `2 entries`: a count with its noun. */
export const counted = (count: number, noun: string, plural = `${noun}s`): string =>
  `${count} ${count === 1 ? noun : plural}`;

/** Splits items into steps of at most `maxItems` and `maxBytes`, in their order. An item above `maxBytes` is a step of its own. */
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
