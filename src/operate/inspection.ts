import type { OutboxEvent } from '../event.ts';
import type {
  DeadLetter,
  DeadLetterFilter,
  DeadLetterPlace,
  DeadRows,
  RowState,
} from '../outbox/dead-rows.ts';
import type { JobView, Queues } from '../queue/queues.ts';
import type { DeadEntries, DeadEntry } from '../stream/dead-entries.ts';
import { fromCursor, toCursor } from './cursor.ts';

/** Dead letters, looked at: rows where they are there, entries of the dead-letter stream where they are gone. */

export type ListedDeadLetter = DeadLetter & Readonly<{ pruned: boolean }>;

/** Everything that is known of an event. Times are ISO 8601. */
export type DeadLetterDetails = Readonly<{
  event: OutboxEvent;
  /** `pruned`: the row is gone, the rest is from the dead-letter stream. */
  state: RowState | 'pruned';
  attempts: number;
  error: string | null;
  timeline: readonly Readonly<{ at: string; what: string }>[];
  /** Id of its last entry in the dead-letter stream, if that is there. */
  dlqEntryId: string | null;
  /** Its job in BullMQ, if that is there. */
  job: JobView | null;
}>;

/** Reads alone; changes nothing. */
export function createInspection(deps: { rows: DeadRows; entries: DeadEntries; jobs: Pick<Queues, 'view'> }) {
  const { rows, entries, jobs } = deps;

  async function list(
    filter: DeadLetterFilter,
    {
      limit = 50,
      after,
      pruned = false,
    }: Readonly<{ limit?: number; after?: string; pruned?: boolean }> = {},
  ): Promise<{ letters: ListedDeadLetter[]; next: string | null }> {
    if (pruned) return listPruned(filter, limit, after);
    const place = after === undefined ? null : fromCursor<DeadLetterPlace>(after, ['at', 'id']);
    const found = await rows.page(filter, place, limit);
    const last = found.length < limit ? undefined : found.at(-1);
    return {
      letters: found.map(({ id: _, ...letter }) => ({ ...letter, pruned: false })),
      next: last === undefined ? null : toCursor({ at: last.deadLetteredAt, id: last.id }),
    };
  }

  async function listPruned(filter: DeadLetterFilter, limit: number, after?: string) {
    const letters: ListedDeadLetter[] = [];
    for await (const entry of prunedEntries(filter, after)) {
      letters.push(letterOf(entry));
      if (letters.length === limit) return { letters, next: toCursor({ entryId: entry.entryId }) };
    }
    return { letters, next: null };
  }

  /** Entries whose row is gone, the oldest first. */
  async function* prunedEntries(filter: DeadLetterFilter, after?: string): AsyncGenerator<DeadEntry> {
    let last: string | null =
      after === undefined ? null : fromCursor<{ entryId: string }>(after, ['entryId']).entryId;
    do {
      const page = await entries.page(last);
      const known = await rows.existing(page.entries.map((entry) => entry.eventId).filter(isUuid));
      const seen = new Set<string>();
      for (const entry of page.entries) {
        if (known.has(entry.eventId) || seen.has(entry.eventId) || !matches(filter, entry)) continue;
        seen.add(entry.eventId);
        yield entry;
      }
      last = page.last;
    } while (last !== null);
  }

  async function show(eventId: string): Promise<DeadLetterDetails | null> {
    const [row, job, entry] = await Promise.all([
      rows.details(eventId),
      jobs.view(eventId),
      entries.read(eventId),
    ]);
    const dlqEntryId = entry?.entryId ?? null;
    if (row !== null) {
      const { event, state, error } = row;
      const discarded = `discarded by ${row.discardedBy ?? 'SQL'}: ${row.discardReason ?? 'no reason given'}`;
      const timeline = inOrderOfTime([
        [event.occurredAt, 'created'],
        [job?.lastStartedAt, 'last attempt begun'],
        [row.deadLetteredAt, `dead-lettered after ${event.attempts} attempts`],
        [row.replayedAt, 'replayed'],
        [row.publishedAt, state === 'discarded' ? discarded : 'published'],
        [row.nextAttemptAt, 'next look, or attempt'],
      ]);
      return { event, state, attempts: event.attempts, error, timeline, dlqEntryId, job };
    }
    if (entry === null) return null;
    const { attempts, error } = entry;
    const timeline = inOrderOfTime([
      [entry.occurredAt, 'created'],
      [entry.failedAt, `dead-lettered after ${attempts} attempts`],
    ]);
    return { event: eventOf(entry), state: 'pruned', attempts, error, timeline, dlqEntryId, job };
  }

  return { list, show, prunedEntries };
}

const UUID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i;
export const isUuid = (text: string): boolean => UUID.test(text);

function inOrderOfTime(moments: readonly [string | null | undefined, string][]) {
  return moments
    .flatMap(([at, what]) => (at ? [{ at, what }] : []))
    .toSorted((a, b) => (a.at < b.at ? -1 : a.at > b.at ? 1 : 0));
}

function matches(filter: DeadLetterFilter, entry: DeadEntry): boolean {
  const { eventType, topic, aggregateType, aggregateId, error, since, until } = filter;
  const failedAt = Date.parse(entry.failedAt);
  return (
    (eventType === undefined || entry.eventType === eventType) &&
    (topic === undefined || entry.topic === topic) &&
    (aggregateType === undefined || entry.aggregateType === aggregateType) &&
    (aggregateId === undefined || entry.aggregateId === aggregateId.toLowerCase()) &&
    (error === undefined || entry.error.toLowerCase().includes(error.toLowerCase())) &&
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
