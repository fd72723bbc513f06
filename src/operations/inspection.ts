import { counted, isUuid, type OutboxEvent } from '../event.ts';
import {
  type DeadLetter,
  type DeadLetterFilter,
  type DeadLetterPlace,
  type DeadRows,
  NUMBERS_AND_IDS,
  type RowState,
} from '../outbox/dead-rows.ts';
import type { JobView, Queues } from '../queue/queues.ts';
import type { DeadEntries, DeadEntry } from '../streams/dead-entries.ts';
import { fromCursor, toCursor } from './cursor.ts';

/** Dead letters, as operators read them: rows where they are there, entries of the dead-letter stream where they are gone. */

export type ListedDeadLetter = DeadLetter & Readonly<{ pruned: boolean }>;

export type ListOptions = Readonly<{
  limit?: number;
  /** `next` of an earlier call with the same filter. */
  after?: string;
  pruned?: boolean;
  /** Entries of the dead-letter stream examined, at most: where few match, there may be a `next` all the same. */
  look?: number;
}>;

/** Everything that is known of an event. Times are ISO 8601. */
type DeadLetterDetails = Readonly<{
  event: OutboxEvent;
  /** `pruned`: the row is gone, the rest is from the dead-letter stream. */
  state: RowState | 'pruned';
  attempts: number;
  error: string | null;
  timeline: readonly Readonly<{ at: string; what: string }>[];
  /** Id of its entry in the stream of its topic, of a published event. */
  entryId: string | null;
  /** Id of its last entry in the dead-letter stream, if that is there. Publishing after all, and discarding, take it away. */
  dlqEntryId: string | null;
  /** Its job in BullMQ, if that is there. */
  job: JobView | null;
}>;

/** Reads alone; changes nothing. */
export function createInspection(deps: {
  rows: DeadRows;
  entries: DeadEntries;
  queues: Pick<Queues, 'view'>;
}) {
  const { rows, entries, queues } = deps;

  async function list(
    filter: DeadLetterFilter,
    { limit = 50, after, pruned = false, look }: ListOptions = {},
  ): Promise<{ letters: ListedDeadLetter[]; next: string | null }> {
    if (pruned) return listPruned(filter, limit, after, look);
    const place = after === undefined ? null : fromCursor<DeadLetterPlace>(after, ['at', 'id']);
    const found = await rows.page(filter, place, limit);
    const last = found.length < limit ? undefined : found.at(-1);
    return {
      letters: found.map(({ id: _, ...letter }) => ({ ...letter, pruned: false })),
      next: last === undefined ? null : toCursor({ at: last.deadLetteredAt, id: last.id }),
    };
  }

  async function listPruned(filter: DeadLetterFilter, limit: number, after?: string, look?: number) {
    const letters: ListedDeadLetter[] = [];
    let next: string | null = null;
    for await (const page of prunedPages(filter, after, look)) {
      for (const entry of page.entries) {
        letters.push(letterOf(entry));
        if (letters.length === limit) return { letters, next: toCursor({ entryId: entry.entryId }) };
      }
      next = page.next;
    }
    return { letters, next };
  }

  /**
   * Entries whose row is gone, the oldest first, in bounded pages; `next`: where to go on after that one, or null.
   * @param look entries examined, at most
   */
  async function* prunedPages(
    filter: DeadLetterFilter,
    after?: string,
    look = Number.POSITIVE_INFINITY,
  ): AsyncGenerator<Readonly<{ entries: DeadEntry[]; next: string | null }>> {
    let last: string | null =
      after === undefined ? null : fromCursor<{ entryId: string }>(after, ['entryId']).entryId;
    let left = look;
    do {
      const page = await entries.page(last, left);
      const known = await rows.existing(page.entries.map((entry) => entry.eventId).filter(isUuid));
      const seen = new Set<string>();
      const found = page.entries.filter(({ eventId }) => {
        if (known.has(eventId) || seen.has(eventId)) return false;
        seen.add(eventId);
        return true;
      });
      last = page.last;
      left -= page.looked;
      yield {
        entries: found.filter((entry) => matches(filter, entry)),
        next: last === null ? null : toCursor({ entryId: last }),
      };
    } while (last !== null && left > 0);
  }

  async function show(eventId: string): Promise<DeadLetterDetails | null> {
    const [row, job, entry] = await Promise.all([
      rows.details(eventId),
      queues.view(eventId),
      entries.read(eventId),
    ]);
    const dlqEntryId = entry?.entryId ?? null;
    if (row !== null) {
      const { event, state, error } = row;
      const discarded = `discarded by ${row.discardedBy ?? 'SQL'}: ${row.discardReason ?? 'no reason given'}`;
      const timeline = inOrderOfTime([
        [event.occurredAt, 'created'],
        [job?.lastStartedAt, 'last attempt begun'],
        [job?.failedAt, 'last attempt failed, none is left'],
        [row.deadLetteredAt, `dead-lettered after ${counted(event.attempts, 'attempt')}`],
        [row.replayedAt, 'replayed'],
        [row.publishedAt, state === 'discarded' ? discarded : 'published'],
        [row.nextAttemptAt, 'next look, or attempt'],
      ]);
      const entryId = state === 'published' ? row.entryId : null;
      return { event, state, attempts: event.attempts, error, timeline, entryId, dlqEntryId, job };
    }
    if (entry === null) return null;
    const { attempts, error } = entry;
    const timeline = inOrderOfTime([
      [entry.occurredAt, 'created'],
      [entry.failedAt, `dead-lettered after ${counted(attempts, 'attempt')}`],
    ]);
    return {
      event: eventOf(entry),
      state: 'pruned',
      attempts,
      error,
      timeline,
      entryId: null,
      dlqEntryId,
      job,
    };
  }

  return { list, show, prunedPages };
}

function inOrderOfTime(moments: readonly [string | null | undefined, string][]) {
  return moments
    .flatMap(([at, what]) => (at ? [{ at, what }] : []))
    .toSorted((a, b) => (a.at < b.at ? -1 : a.at > b.at ? 1 : 0));
}

const NUMBERS = new RegExp(NUMBERS_AND_IDS, 'g');

function matches(filter: DeadLetterFilter, entry: DeadEntry): boolean {
  const { eventType, topic, aggregateType, aggregateId, error, since, until } = filter;
  const failedAt = Date.parse(entry.failedAt);
  return (
    (eventType === undefined || entry.eventType === eventType) &&
    (topic === undefined || entry.topic === topic) &&
    (aggregateType === undefined || entry.aggregateType === aggregateType) &&
    (aggregateId === undefined || entry.aggregateId === aggregateId.toLowerCase()) &&
    (error === undefined ||
      [entry.error, entry.error.replaceAll(NUMBERS, '#')].some((it) =>
        it.toLowerCase().includes(error.toLowerCase()),
      )) &&
    (since === undefined || failedAt >= Date.parse(since)) &&
    (until === undefined || failedAt <= Date.parse(until))
  );
}

function letterOf(entry: DeadEntry): ListedDeadLetter {
  const { payload: _, withheld: __, occurredAt: createdAt, failedAt: deadLetteredAt, ...rest } = entry;
  return { ...rest, createdAt, deadLetteredAt, pruned: true };
}

function eventOf(entry: DeadEntry): OutboxEvent {
  const { eventId, eventType, aggregateType, aggregateId, topic, payload, withheld, occurredAt, attempts } =
    entry;
  const about = { eventId, eventType, aggregateType, aggregateId, topic };
  return { id: '', ...about, payload, withheld, occurredAt, attempts, tenantId: null, correlationId: null };
}
