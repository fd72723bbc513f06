import { asking, type Pool, type Queryable, transaction } from '../connections/database.ts';
import type { OutboxEvent } from '../event.ts';
import { DEAD, ENTRY_ID, type OutboxOptions, TOPIC } from './conditions.ts';
import { eventsOf, payloadMayBeAtFault, printable, printableType, storedType } from './event-of-row.ts';

/**
 * Dead rows, as operators list, replay and discard them. Nothing here reads published or live rows, but for those that
 * are asked for by their event id.
 */

/** Which dead letters are meant; what is left out does not matter. */
export type DeadLetterFilter = Readonly<{
  eventType?: string;
  /** Key of the stream that the event was for. */
  topic?: string;
  aggregateType?: string;
  /** uuid */
  aggregateId?: string;
  /** Part of the error message, in any case; of that with `#` for numbers and ids as well, as groups have it. */
  error?: string;
  /** Given up at or after, and at or before; ISO 8601. */
  since?: string;
  until?: string;
}>;

/** A dead letter in a list: everything but the payload. Times are ISO 8601. */
export type DeadLetter = Pick<
  OutboxEvent,
  'eventId' | 'eventType' | 'aggregateType' | 'aggregateId' | 'topic' | 'attempts'
> &
  Readonly<{
    error: string;
    createdAt: string;
    deadLetteredAt: string;
    /** Its entry in the dead-letter stream, which may have been trimmed since. */
    entryId: string | null;
  }>;

/** Place of a dead letter in the order of time. */
export type DeadLetterPlace = Readonly<{ at: string; id: string }>;

/** Dead letters of one reason; numbers and ids in the text are written `#`. */
export type DeadLetterGroup = Readonly<{
  error: string;
  count: number;
  first: string;
  last: string;
  /** The latest of them. */
  example: string;
  eventTypes: string[];
}>;

/** A dead row on its way back, or out. */
export type DeadRow = Pick<OutboxEvent, 'id' | 'eventId' | 'aggregateType' | 'aggregateId'>;

/** The same with the stream that it was for, and the id of its last dead letter. */
export type LockedRow = DeadRow & Readonly<{ topic: string; entryId: string | null }>;

/** Place of a row in the order of aggregates: within each, that of its rows. */
export type AggregatePlace = Pick<OutboxEvent, 'aggregateType' | 'aggregateId' | 'id'>;

/** Where the row is that an event has; see table.ts. */
export type RowState =
  | 'fresh'
  | 'leased'
  | 'retrying'
  | 'due'
  | 'parked'
  | 'published'
  | 'dead'
  | 'discarded';

/** A row in any state, with its event as consumers would get it. Times are ISO 8601. */
type RowDetails = Readonly<{
  event: OutboxEvent;
  state: RowState;
  error: string | null;
  nextAttemptAt: string | null;
  deadLetteredAt: string | null;
  replayedAt: string | null;
  publishedAt: string | null;
  entryId: string | null;
  discardReason: string | null;
  discardedBy: string | null;
}>;

/** An event whose row is gone, as its entry in the dead-letter stream tells it. */
type LostRow = Pick<
  OutboxEvent,
  'eventId' | 'eventType' | 'aggregateType' | 'aggregateId' | 'topic' | 'payload' | 'occurredAt'
>;

export type DeadRows = ReturnType<typeof createDeadRows>;

const EVERY_TYPE_SHOWN = 10;
const ERROR_SHOWN = 300;
/**
 * Texts are cut where they are read: the relay writes no error of more than 2,000 characters, but a role that may write to
 * the table can put 40 MB there, and in a list of a thousand rows these would all be in the memory of one pod.
 */
const MOST_CHARACTERS = 2_000;
const cut = (text: string, characters = MOST_CHARACTERS) => `left((${text})::text, ${characters})`;
/** In the language of both PostgreSQL and JavaScript. */
export const NUMBERS_AND_IDS = '[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|[0-9]+';
const folded = (text: string) => `regexp_replace(${text}, '${NUMBERS_AND_IDS}', '#', 'g')`;

/** What has become of a row, as RowState. */
const STATE = (row: string) =>
  `CASE WHEN ${row}.published AND ${row}.dead_lettered_at IS NOT NULL THEN 'discarded'
        WHEN ${row}.published THEN 'published'
        WHEN ${row}.dead_lettered_at IS NOT NULL THEN 'dead'
        WHEN ${row}.next_attempt_at IS NULL THEN 'fresh'
        WHEN ${row}.next_attempt_at = 'infinity' THEN 'parked'
        WHEN ${row}.next_attempt_at <= now() THEN 'due'
        WHEN ${row}.attempts > 0 THEN 'retrying' ELSE 'leased' END`;

/** Asked of a row that is looked up by its id: no partial index shall seem to answer it. See STILL_LIVE in conditions.ts. */
const STILL_DEAD = (row: string) =>
  `CASE WHEN ${row}.published THEN false ELSE ${row}.dead_lettered_at IS NOT NULL END`;
const iso = (time: string) => `to_char(${time} AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')`;
/** Infinity is no time to print. */
const isoOrNull = (time: string) => `CASE WHEN isfinite(${time}) THEN ${iso(time)} END`;

/** Whether `o` is dead, and matches a filter. */
const MATCHING = `${DEAD('o')}
  AND ($2::text IS NULL OR o.event_type = $2) AND ($3::text IS NULL OR coalesce(o.topic, $1) = $3)
  AND ($4::text IS NULL OR o.aggregate_type = $4) AND ($5::uuid IS NULL OR o.aggregate_id = $5)
  AND ($6::text IS NULL OR strpos(lower(${cut('o.error_message')}), lower($6)) > 0
       OR strpos(lower(${folded(cut('o.error_message'))}), lower($6)) > 0)
  AND o.dead_lettered_at >= coalesce($7::timestamptz, '-infinity')
  AND o.dead_lettered_at <= coalesce($8::timestamptz, 'infinity')`;

/**
 * All that match. In an order that only the index on dead rows has: the platform's index on `published` looks as
 * good to the planner, and holds every row that waits (122,000 were read to find none, seen in the test of plans).
 */
const allMatching = (direction: 'ASC' | 'DESC', bound: string) =>
  `(SELECT o.* FROM identity.outbox o WHERE ${MATCHING}
    ORDER BY o.dead_lettered_at ${direction}, o.id ${direction} ${bound}) o`;

export function createDeadRows(
  pool: Pool,
  options: Pick<OutboxOptions, 'streamName' | 'maxEventBytes' | 'statementTimeoutMs'>,
) {
  const { streamName, maxEventBytes, statementTimeoutMs } = options;
  const db = asking(pool, statementTimeoutMs, 'durable');
  const read = async <T extends object>(text: string, values: unknown[]): Promise<T[]> =>
    (await db.query<T>(text, values)).rows;

  /** What the parameters of MATCHING are; others come after them. */
  const valuesOf = (it: DeadLetterFilter): unknown[] => [
    ...[streamName, it.eventType, it.topic, it.aggregateType, it.aggregateId, it.error, it.since, it.until],
  ];

  async function details(eventId: string, printing: boolean): Promise<RowDetails[]> {
    const rows = await read<OutboxEvent & Omit<RowDetails, 'event'>>(
      `WITH wanted AS (SELECT * FROM identity.outbox WHERE event_id = $2::uuid)
         ${eventsOf('wanted', maxEventBytes, {
           columns: `${STATE('o')} AS "state",
             ${cut('o.error_message')} AS "error", ${isoOrNull('o.next_attempt_at')} AS "nextAttemptAt",
             ${iso('o.dead_lettered_at')} AS "deadLetteredAt", ${iso('o.replayed_at')} AS "replayedAt",
             ${iso('o.published_at')} AS "publishedAt", ${ENTRY_ID('o')} AS "entryId",
             ${cut('o.discard_reason')} AS "discardReason", ${cut('o.discarded_by')} AS "discardedBy",`,
           ...(!printing && { printed: 'false', otherwise: cut('o.error_message') }),
         })}`,
      [streamName, eventId],
    );
    return rows.map((row) => {
      const { state, error, nextAttemptAt, deadLetteredAt, replayedAt, publishedAt, ...rest } = row;
      const { entryId, discardReason, discardedBy, ...event } = rest;
      const times = { nextAttemptAt, deadLetteredAt, replayedAt, publishedAt };
      return { event, state, error, ...times, entryId, discardReason, discardedBy };
    });
  }

  return {
    /** Runs `work` on rows that `lock` holds until it is committed: when it returns, no crash can undo it. */
    transaction: <T>(work: (tx: Queryable) => Promise<T>): Promise<T> =>
      transaction(pool, statementTimeoutMs, 'durable', work),

    /** Dead letters that match, the latest first, from that place on. */
    page: (
      filter: DeadLetterFilter,
      after: DeadLetterPlace | null,
      limit: number,
    ): Promise<(DeadLetter & Readonly<{ id: string }>)[]> =>
      read(
        `SELECT o.id::text AS "id", o.event_id AS "eventId", ${printable(cut('o.event_type', 200))} AS "eventType",
                ${printableType(cut('o.aggregate_type', 200))} AS "aggregateType", o.aggregate_id AS "aggregateId",
                ${printable(cut('coalesce(o.topic, $1)', 512))} AS "topic", o.attempts AS "attempts",
                ${cut("coalesce(o.error_message, '')")} AS "error", ${iso('o.created_at')} AS "createdAt",
                ${iso('o.dead_lettered_at')} AS "deadLetteredAt", ${ENTRY_ID('o')} AS "entryId"
         FROM identity.outbox o
         WHERE ${MATCHING} ${after ? 'AND (o.dead_lettered_at, o.id) < ($10::timestamptz, $11::bigint)' : ''}
         ORDER BY o.dead_lettered_at DESC, o.id DESC LIMIT $9`,
        [...valuesOf(filter), limit, ...(after ? [after.at, after.id] : [])],
      ),

    /**
     * The same, counted by reason, the most frequent first.
     * @param look of the latest that match at most so many are counted
     */
    groups: (
      filter: DeadLetterFilter,
      limit = 100,
      look = Number.MAX_SAFE_INTEGER,
    ): Promise<DeadLetterGroup[]> =>
      read(
        `SELECT g.error, g.count, ${iso('g.first')} AS "first", ${iso('g.last')} AS "last",
                (SELECT event_id FROM identity.outbox WHERE id = g.example) AS "example", g.types AS "eventTypes"
         FROM (SELECT left(${folded(cut("coalesce(o.error_message, '')"))}, ${ERROR_SHOWN}) AS error,
                      count(*)::int AS count, min(o.dead_lettered_at) AS first, max(o.dead_lettered_at) AS last,
                      max(o.id) AS example,
                      (array_agg(DISTINCT ${printable(cut('o.event_type', 200))}))[1:${EVERY_TYPE_SHOWN}] AS types
               FROM ${allMatching('DESC', 'LIMIT $10')} GROUP BY 1) g
         ORDER BY g.count DESC, g.error LIMIT $9`,
        [...valuesOf(filter), limit, look],
      ),

    async count(filter: DeadLetterFilter): Promise<number> {
      const [counted] = await read<{ n: number }>(
        `SELECT count(*)::int AS n FROM ${allMatching('ASC', 'OFFSET 0')}`,
        valuesOf(filter),
      );
      return counted?.n ?? 0;
    },

    /** The event's row, whatever its state; a payload that cannot be printed is withheld. Null when there is none. */
    async details(eventId: string): Promise<RowDetails | null> {
      const rows = await details(eventId, true).catch((error) => {
        if (!payloadMayBeAtFault(error)) throw error;
        return details(eventId, false);
      });
      return rows[0] ?? null;
    },

    /** Dead rows that match, in the order of their aggregates, after that place. */
    inOrder: (filter: DeadLetterFilter, after: AggregatePlace | null, limit: number): Promise<DeadRow[]> => {
      const place = `(${storedType('$10::text')}, $11::uuid, $12::bigint)`;
      return read(
        `SELECT ${DEAD_ROW} FROM identity.outbox o
         WHERE ${MATCHING} ${after ? `AND (o.aggregate_type, o.aggregate_id, o.id) > ${place}` : ''}
         ORDER BY o.aggregate_type, o.aggregate_id, o.id LIMIT $9`,
        [...valuesOf(filter), limit, ...(after ? [after.aggregateType, after.aggregateId, after.id] : [])],
      );
    },

    /** The rows of these events in the order of their aggregates, each with its state. */
    ofEvents: (eventIds: readonly string[]): Promise<(DeadRow & Readonly<{ state: RowState }>)[]> =>
      read(
        `SELECT ${DEAD_ROW}, ${STATE('o')} AS "state" FROM identity.outbox o
         WHERE o.event_id = ANY ($1::uuid[]) ORDER BY o.aggregate_type, o.aggregate_id, o.id`,
        [eventIds],
      ),

    /**
     * Locks those of the rows that are dead, in the order of their aggregates. Waits for the transactions that have them: if rows
     * were skipped, the later ones of their aggregate would get ahead of them.
     */
    async lock(tx: Queryable, ids: readonly string[]): Promise<LockedRow[]> {
      const { rows } = await tx.query<LockedRow>(
        `SELECT ${DEAD_ROW}, ${printable(TOPIC('o', '$2'))} AS "topic", ${ENTRY_ID('o')} AS "entryId"
         FROM identity.outbox o WHERE o.id = ANY ($1::bigint[]) AND ${STILL_DEAD('o')}
         ORDER BY o.aggregate_type, o.aggregate_id, o.id FOR UPDATE`,
        [ids, streamName],
      );
      return rows;
    },

    /**
     * Dead rows are fresh again, with all their attempts. Those in `asked` expire instead: the lease reaper asks first
     * what became of their jobs.
     */
    async revive(tx: Queryable, ids: readonly string[], asked: readonly string[]): Promise<void> {
      await tx.query(
        `UPDATE identity.outbox o
         SET dead_lettered_at = NULL, attempts = 0, replayed_at = now(),
             next_attempt_at = CASE WHEN o.id = ANY ($2::bigint[]) THEN now() END
         WHERE o.id = ANY ($1::bigint[]) AND ${STILL_DEAD('o')}`,
        [ids, asked],
      );
    },

    /**
     * Dead rows are given up for good. Out of the way as if they were published, they hold nobody; without an entry id,
     * since their dead letters are taken away.
     */
    async discard(tx: Queryable, ids: readonly string[], reason: string, by: string): Promise<void> {
      await tx.query(
        `UPDATE identity.outbox o
         SET published = true, published_at = now(), next_attempt_at = NULL, stream_entry_id = NULL,
             discard_reason = $2, discarded_by = $3
         WHERE o.id = ANY ($1::bigint[]) AND ${STILL_DEAD('o')}`,
        [ids, reason, by],
      );
    },

    /** Of these events, those that have a row. */
    async existing(eventIds: readonly string[]): Promise<Set<string>> {
      const rows = await read<{ eventId: string }>(
        `SELECT event_id AS "eventId" FROM identity.outbox WHERE event_id = ANY ($1::uuid[])`,
        [eventIds],
      );
      return new Set(rows.map((row) => row.eventId));
    },

    /**
     * Writes the row of an event anew, unless it has one: it goes behind all rows of its aggregate.
     * @returns whether it was written
     * @throws when PostgreSQL does not take what the entry says, or the role may not insert
     */
    async insert(lost: LostRow): Promise<boolean> {
      const { rowCount } = await db.query(
        `INSERT INTO identity.outbox
             (event_id, event_type, aggregate_type, aggregate_id, topic, payload, created_at, replayed_at)
           VALUES ($1::uuid, $2, $3, $4::uuid, $5, $6::jsonb, $7::timestamptz, now()) ON CONFLICT (event_id) DO NOTHING`,
        [
          ...[lost.eventId, lost.eventType, lost.aggregateType, lost.aggregateId, lost.topic],
          ...[lost.payload, lost.occurredAt],
        ],
      );
      return rowCount === 1;
    },

    /** How many rows are fresh, up to `limit`. */
    async fresh(limit: number): Promise<number> {
      const [counted] = await read<{ n: number }>(
        `SELECT count(*)::int AS n FROM (
           SELECT FROM identity.outbox o WHERE NOT o.published AND o.next_attempt_at IS NULL LIMIT $1) x`,
        [limit],
      );
      return counted?.n ?? 0;
    },
  };
}

const DEAD_ROW = `o.id::text AS "id", o.event_id AS "eventId", ${printableType('o.aggregate_type')} AS "aggregateType",
  o.aggregate_id AS "aggregateId"`;
