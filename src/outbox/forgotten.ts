import { asking, type Pool, type Queryable } from '../connections/database.ts';
import { isUuid } from '../event.ts';
import { DEAD, FINALIZED_AT, LIVE, type OutboxOptions, STILL_LIVE } from './conditions.ts';
import type { AggregatePlace } from './dead-rows.ts';
import { printable, printableType, storedType } from './event-of-row.ts';

/** Statements for the time after PostgreSQL may have forgotten what became of rows; see recovery/forgotten-entries.ts. */

/** Rows whose topics one statement reads. */
const PAGE_ROWS = 10_000;
/** How many of the latest published rows tell how far the table knows. Several, since one may be from another Redis. */
const LATEST_ROWS = 1_000;

/** An entry of a stream. Other programs may have written it, so its event id may be any text. */
type Entry = Readonly<{ eventId: string; entryId: string }>;

/** The last entry of each event; `$1` and `$2` of the statement. */
function byEvent(entries: readonly Entry[]): [eventIds: string[], entryIds: string[]] {
  const last = new Map<string, string>();
  for (const { eventId, entryId } of entries)
    if (isUuid(eventId) && !last.has(eventId)) last.set(eventId, entryId);
  return [[...last.keys()], [...last.values()]];
}

export function createForgotten(pool: Pool, options: OutboxOptions) {
  const { streamName, statementTimeoutMs } = options;
  const db = asking(pool, statementTimeoutMs);

  async function topicsOf(condition: (row: string) => string, after: AggregatePlace | null) {
    const from = after
      ? `AND (o.aggregate_type, o.aggregate_id, o.id) > (${storedType('$2::text')}, $3, $4)`
      : '';
    const { rows } = await db.query<{ topics: string[] | null; last: AggregatePlace | null }>(
      `WITH page AS MATERIALIZED (
           SELECT coalesce(o.topic, $1) AS topic, o.aggregate_type, o.aggregate_id, o.id FROM identity.outbox o
           WHERE ${condition('o')} ${from} ORDER BY o.aggregate_type, o.aggregate_id, o.id LIMIT ${PAGE_ROWS}
         ) SELECT (SELECT array_agg(DISTINCT ${printable('topic')}) FROM page) AS topics,
             (SELECT json_build_object('aggregateType', ${printableType('p.aggregate_type')}, 'aggregateId', p.aggregate_id, 'id', p.id::text)
              FROM (SELECT * FROM page OFFSET ${PAGE_ROWS - 1} LIMIT 1) p) AS last`,
      [streamName, ...(after ? [after.aggregateType, after.aggregateId, after.id] : [])],
    );
    return rows[0] ?? { topics: null, last: null };
  }

  return {
    /** The streams of all rows that are not published. */
    async unpublishedTopics(): Promise<string[]> {
      const topics = new Set<string>();
      for (const condition of [LIVE, DEAD]) {
        let after: AggregatePlace | null = null;
        do {
          const page: { topics: string[] | null; last: AggregatePlace | null } = await topicsOf(
            condition,
            after,
          );
          for (const topic of page.topics ?? []) topics.add(topic);
          after = page.last;
        } while (after !== null);
      }
      return [...topics];
    },

    /**
     * Time of Redis (ms since 1970) up to which the table knows entries: that of the oldest entry among the rows that were
     * published last. 0 where there are none.
     */
    async latestEntryMs(): Promise<number> {
      const { rows } = await db.query<{ ms: string | null }>(
        `SELECT min(split_part(o.stream_entry_id, '-', 1)::bigint)::text AS ms FROM (
             SELECT o.stream_entry_id FROM identity.outbox o WHERE o.stream_entry_id IS NOT NULL
             ORDER BY ${FINALIZED_AT('o')} DESC, o.id DESC LIMIT ${LATEST_ROWS}
           ) o WHERE o.stream_entry_id ~ '^[0-9]{1,15}-[0-9]+$'`,
      );
      return Number(rows[0]?.ms ?? 0);
    },

    /**
     * Marks published, with their entry, the rows of these events that have this topic and are not published. Dead rows
     * too: PostgreSQL may have forgotten that an operator replayed them.
     * @returns how many rows
     */
    async markFound(tx: Queryable, topic: string, entries: readonly Entry[]): Promise<number> {
      const { rowCount } = await tx.query(
        `WITH locked AS MATERIALIZED (
           SELECT o.id, o.event_id, named.entry_id FROM (
             SELECT o.id, f.entry_id FROM unnest($1::uuid[], $2::text[]) AS f (event_id, entry_id)
             CROSS JOIN LATERAL (SELECT o.id, o.published, o.topic FROM identity.outbox o WHERE o.event_id = f.event_id LIMIT 1) o
             WHERE CASE WHEN o.published THEN false ELSE coalesce(o.topic, $3) = $4 END ORDER BY o.id
           ) named CROSS JOIN LATERAL (
             SELECT l.id, l.event_id FROM identity.outbox l WHERE l.id = named.id FOR UPDATE
           ) o
         )
         UPDATE identity.outbox o
         SET published = true, published_at = clock_timestamp(), next_attempt_at = NULL, stream_entry_id = locked.entry_id,
             dead_lettered_at = NULL
         FROM locked WHERE o.id = locked.id AND o.event_id = locked.event_id AND CASE WHEN o.published THEN false ELSE true END`,
        [...byEvent(entries), streamName, topic],
      );
      return rowCount ?? 0;
    },

    /**
     * Locks the live rows of events that have these dead letters: PostgreSQL has forgotten that they were given up. It skips
     * events that were replayed after their dead letter.
     */
    async lockUngiven(
      tx: Queryable,
      letters: readonly Entry[],
    ): Promise<{ id: string; eventId: string; entryId: string }[]> {
      const { rows } = await tx.query<{ id: string; eventId: string; entryId: string }>(
        // Named first, each by its event id: a join in the order of the ids walked along the whole table, and compared each of
        // its rows with each letter (100 letters beside 100,000 rows: 1.1 s).
        `WITH named AS MATERIALIZED (
           SELECT o.id, f.entry_id FROM unnest($1::uuid[], $2::text[]) AS f (event_id, entry_id)
           CROSS JOIN LATERAL (SELECT o.id FROM identity.outbox o WHERE o.event_id = f.event_id LIMIT 1) o ORDER BY o.id
         )
         SELECT locked.id::text AS "id", locked.event_id AS "eventId", named.entry_id AS "entryId"
         FROM named CROSS JOIN LATERAL (
           SELECT o.id, o.event_id FROM identity.outbox o
           WHERE o.id = named.id AND ${STILL_LIVE('o')} AND o.stream_entry_id IS DISTINCT FROM named.entry_id
             AND (o.replayed_at IS NULL
                  OR to_timestamp(split_part(named.entry_id, '-', 1)::bigint / 1000.0) > o.replayed_at)
           FOR UPDATE
         ) locked`,
        byEvent(letters),
      );
      return rows;
    },
  };
}
