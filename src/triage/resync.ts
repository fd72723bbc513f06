import { inSteps, type OutboxEvent, type Receipt } from '../event.ts';
import type { Logger } from '../logger.ts';

/** Rows compared in one step. */
const PAGE_ROWS = 1_000;
/**
 * Lost rows that are held before any is restored, at most. They come by the time of their acknowledgement, which may
 * be minutes after the append where the database was away, and after that of a successor: in the order of their old
 * entries they are in the order of their stream.
 */
const HELD_ROWS = 100_000;
/** Stored bytes of the payloads that are appended again in one step; compressed, they may be several times as long. */
const STEP_BYTES = 4 << 20;

type Place = Readonly<{ settledAt: string; id: string }>;
type Row = Place & Readonly<{ topic: string | null; entryId: string; bytes: number }>;
type Outcome = { status: 'restored'; entryId: string } | { status: 'refused'; reason: string };
type Event = OutboxEvent &
  Readonly<{ errorMessage: string | null; deadLetteredAt: Date | null; entryId: string }>;

/** Rows with a receipt, by what was found in their stream. */
export type Found = {
  rows: number;
  /** Not in the stream, though it should be. */
  lost: number;
  /** Of these, appended again. */
  restored: number;
  /** Before the stream's first entry: trimmed on purpose. */
  trimmed: number;
  /** Lost, and Redis refuses to take them; or their stream's key holds something else, or must not be read. */
  refused: number;
};

const NOTHING: Found = { rows: 0, lost: 0, restored: 0, trimmed: 0, refused: 0 };

/** Of all streams together. */
export function totals(comparison: Comparison): Found {
  const sum = { ...NOTHING };
  for (const found of comparison.values()) {
    for (const what of Object.keys(sum) as (keyof Found)[]) sum[what] += found[what];
  }
  return sum;
}

/** By stream, in the order in which they were met. */
export type Comparison = ReadonlyMap<string, Found>;

export type ComparisonRange = Readonly<{
  /** Times of the database. */
  since: string;
  until: string;
  /** Only this stream. */
  stream?: string;
  /** What the epoch's key must hold, to append what is missing; left out: only compares. */
  guard?: string;
  onProgress?: (at: string, found: Comparison) => void;
}>;

/**
 * Compares rows with streams and appends again what is missing, in the order of the rows, in bounded steps. It may be
 * cut off anywhere and run again: a row keeps its old receipt until its new entry is there, and an entry that was
 * restored is not restored twice.
 */
export function createResync(deps: {
  dlqStreamName: string;
  rows: (after: Place, until: string, limit: number) => Promise<Row[]>;
  events: (ids: string[]) => Promise<Event[]>;
  renew: (receipts: (Receipt & { lostId: string })[]) => Promise<void>;
  absent: (
    stream: string,
    entryIds: string[],
    restoring: boolean,
  ) => Promise<{ lost: string[]; trimmed: number; unreadable: boolean }>;
  /** Both throw when Redis can take nothing now: then the whole comparison has to be run again. */
  restoreEntry: (event: OutboxEvent, guard: string) => Promise<Outcome>;
  restoreDeadLetter: (
    event: OutboxEvent,
    failure: { reason: string; attempts: number; failedAt: Date },
    guard: string,
  ) => Promise<Outcome>;
  logger: Logger;
}) {
  const streamOf = (row: Row) => row.topic ?? deps.dlqStreamName;

  return async function compare(range: ComparisonRange): Promise<Comparison> {
    const found = new Map<string, Found>();
    const held: Row[] = [];
    let after: Place = { settledAt: range.since, id: '-1' };
    for (;;) {
      const page = await deps.rows(after, range.until, PAGE_ROWS);
      held.push(...(await lostOf(page, range, found)));
      const last = page.length < PAGE_ROWS ? undefined : page.at(-1);
      if (range.guard === undefined) held.length = 0;
      else if (last === undefined || held.length > HELD_ROWS) {
        held.sort(byEntry);
        const due = held.splice(0, last === undefined ? held.length : HELD_ROWS / 2);
        for (const step of inSteps(due, PAGE_ROWS, STEP_BYTES)) await restore(step, range.guard, found);
      }
      range.onProgress?.(page.at(-1)?.settledAt ?? after.settledAt, found);
      if (last === undefined) return found;
      after = last;
    }
  };

  async function lostOf(
    page: readonly Row[],
    range: ComparisonRange,
    found: Map<string, Found>,
  ): Promise<Row[]> {
    const byStream = groupedBy(page, streamOf);
    const lost = await Promise.all(
      [...byStream].map(async ([stream, rows]) => {
        if (range.stream !== undefined && stream !== range.stream) return [];
        const absent = await deps.absent(
          stream,
          rows.map((row) => row.entryId),
          range.guard !== undefined,
        );
        const sum = found.get(stream) ?? { ...NOTHING };
        found.set(stream, sum);
        sum.rows += rows.length;
        sum.lost += absent.lost.length;
        sum.trimmed += absent.trimmed;
        if (absent.unreadable) sum.refused += rows.length;
        const ids = new Set(absent.lost);
        return rows.filter((row) => ids.has(row.entryId));
      }),
    );
    return lost.flat();
  }

  async function restore(rows: readonly Row[], guard: string, found: Map<string, Found>): Promise<void> {
    const lostIds = new Map(rows.map((row) => [row.id, row.entryId]));
    // What an operator replays meanwhile is not missing: it is published by its job, or was just now.
    const events = (await deps.events([...lostIds.keys()])).filter(
      (event) => event.entryId === lostIds.get(event.id),
    );
    const missing = new Set(events.map((event) => event.id));
    for (const row of rows) {
      const sum = found.get(streamOf(row));
      if (sum && !missing.has(row.id)) sum.lost--;
    }
    const renewed: (Receipt & { lostId: string })[] = [];
    // One after the other within an aggregate, so that none overtakes one that is refused.
    const aggregates = groupedBy(events, (event) => `${event.aggregateId} ${event.aggregateType}`);
    const done = await Promise.allSettled(
      [...aggregates.values()].map(async (ofAggregate) => {
        for (const [index, event] of ofAggregate.entries()) {
          const sum = found.get(event.deadLetteredAt === null ? event.topic : deps.dlqStreamName);
          const outcome = await restoreOne(event, guard);
          if (outcome.status === 'refused') {
            if (sum) sum.refused += ofAggregate.length - index;
            const { eventId, topic } = event;
            deps.logger.error(
              { eventId, topic, reason: outcome.reason },
              'Redis refuses an entry that it had lost; "relay verify --repair" tries again',
            );
            return;
          }
          renewed.push({ id: event.id, entryId: outcome.entryId, lostId: lostIds.get(event.id) as string });
          if (sum) sum.restored++;
        }
      }),
    );
    if (renewed.length > 0) await deps.renew(renewed);
    for (const one of done) if (one.status === 'rejected') throw one.reason;
  }

  function restoreOne(event: Event, guard: string): Promise<Outcome> {
    if (event.deadLetteredAt === null) {
      // Published once, it is above a limit that was lowered since.
      if (event.withheld) return Promise.resolve({ status: 'refused', reason: event.withheld });
      return deps.restoreEntry(event, guard);
    }
    const { errorMessage, attempts, deadLetteredAt } = event;
    return deps.restoreDeadLetter(
      event,
      { reason: errorMessage ?? '', attempts, failedAt: deadLetteredAt },
      guard,
    );
  }
}

/** By the ids of their entries, `<ms>-<sequence>`. */
function byEntry(a: Row, b: Row): number {
  const [ms = 0, sequence = 0] = a.entryId.split('-').map(Number);
  const [otherMs = 0, otherSequence = 0] = b.entryId.split('-').map(Number);
  return ms - otherMs || sequence - otherSequence;
}

function groupedBy<T>(items: readonly T[], key: (item: T) => string): Map<string, T[]> {
  const groups = new Map<string, T[]>();
  for (const item of items) {
    const group = groups.get(key(item));
    if (group) group.push(item);
    else groups.set(key(item), [item]);
  }
  return groups;
}
