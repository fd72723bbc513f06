import { asking, type Pool, type Queryable } from '../connections/database.ts';
import { byId, type OutboxEvent } from '../event.ts';
import { ENTRY_ID, FINALIZED_AT, type OutboxOptions, SAME_EVENT, TOPIC } from './conditions.ts';
import type { DeadLetterFilter } from './dead-rows.ts';
import { eventsOf, payloadMayBeAtFault } from './event-of-row.ts';

/**
 * Rows that have a `stream_entry_id`: published rows have an entry in their stream, dead rows in the dead-letter stream.
 * By these the relay finds out which entries Redis has lost, and makes their rows unpublished.
 */

/** A row that was published or given up, and its entry. */
export type FinalizedRow = Readonly<{
  id: string;
  eventId: string;
  /** Key of its stream; null for the dead-letter stream. */
  topic: string | null;
  /** Empty where the column holds no entry id: then the entry counts as lost. */
  entryId: string;
  /** When it was published or given up, as the database prints it. */
  finalizedAt: string;
}>;

/** A row whose entry is in the stream of its topic; with the time of `finalizedAt` in microseconds, to compare. */
export type PublishedRow = FinalizedRow &
  Readonly<{
    topic: string;
    finalizedUs: string;
    /** Stored bytes of the payload. */
    bytes: number;
  }>;

/** The event of a published or dead row, with what the row says of its failure. */
type FinalizedEvent = OutboxEvent & Readonly<{ errorMessage: string | null; deadLetteredAt: Date | null }>;

/** Selects published events. A member that is left out selects all. */
export type PublishedFilter = Pick<DeadLetterFilter, 'topic' | 'eventType' | 'aggregateType' | 'aggregateId'>;

/** Place of a row in the order of time. */
export type FinalizedPlace = Readonly<{ finalizedAt: string; id: string }>;

export type Published = ReturnType<typeof createPublished>;

/** How far the database's clock may step back, e.g. when a replica takes over, without a row being overlooked. */
const CLOCK_STEP_MS = 5_000;

const AT = FINALIZED_AT('o');

export function createPublished(
  pool: Pool,
  options: Pick<OutboxOptions, 'streamName' | 'maxEventBytes' | 'statementTimeoutMs'>,
) {
  const { streamName, maxEventBytes, statementTimeoutMs } = options;
  const db = asking(pool, statementTimeoutMs);

  async function select(
    ids: readonly string[],
    condition: string,
    printing: boolean,
  ): Promise<FinalizedEvent[]> {
    const { rows } = await db.query<FinalizedEvent>(
      `WITH finalized AS (
           SELECT * FROM identity.outbox WHERE id = ANY ($2::bigint[]) AND ${condition}
         ) ${eventsOf('finalized', maxEventBytes, {
           columns: `o.error_message AS "errorMessage", o.dead_lettered_at AS "deadLetteredAt",`,
           ...(!printing && { printed: 'false', otherwise: 'o.error_message' }),
         })}`,
      [streamName, ids],
    );
    return rows.sort(byId);
  }

  /** Withholds the payload of a row that PostgreSQL cannot print: the row is dead for that reason. */
  async function eventsWhere(ids: readonly string[], condition: string): Promise<FinalizedEvent[]> {
    try {
      return await select(ids, condition, true);
    } catch (error) {
      if (!payloadMayBeAtFault(error)) throw error;
      if (ids.length === 1) return select(ids, condition, false);
      const found: FinalizedEvent[] = [];
      for (const id of ids) found.push(...(await eventsWhere([id], condition)));
      return found;
    }
  }

  return {
    /** The database's time `ms` ago, to the microsecond. */
    async ago(ms: number): Promise<string> {
      const { rows } = await db.query<{ at: string }>(
        `SELECT (clock_timestamp() - $1 * interval '1 millisecond')::text AS at`,
        [ms],
      );
      return (rows[0] as { at: string }).at;
    },

    /** Where a comparison begins: `windowMs` ago, or at `checkpoint` if that is later. */
    async comparedFrom(windowMs: number, checkpoint: string | null): Promise<string> {
      const { rows } = await db.query<{ since: string }>(
        `SELECT greatest(now() - $1 * interval '1 millisecond',
                           $2::timestamptz - $3 * interval '1 millisecond')::text AS since`,
        [windowMs, checkpoint, CLOCK_STEP_MS],
      );
      return (rows[0] as { since: string }).since;
    },

    /** The rows after that place up to `until`, in the order in which they were published or given up. */
    async finalizedRows(after: FinalizedPlace, until: string, limit: number): Promise<FinalizedRow[]> {
      const { rows } = await db.query<FinalizedRow>(
        `SELECT o.id::text AS "id", o.event_id AS "eventId",
                  CASE WHEN o.dead_lettered_at IS NULL THEN ${TOPIC('o', '$1')} END AS "topic",
                  coalesce(${ENTRY_ID('o')}, '') AS "entryId", ${AT}::text AS "finalizedAt"
           FROM identity.outbox o
           WHERE o.stream_entry_id IS NOT NULL AND (${AT}, o.id) > ($2::timestamptz, $3::bigint)
             AND ${AT} <= $4::timestamptz
           ORDER BY ${AT}, o.id LIMIT $5`,
        [streamName, after.finalizedAt, after.id, until, limit],
      );
      return rows;
    },

    /**
     * Of the same rows, those that are in the stream of their topic and match. Those whose entry id is none are left out:
     * they were not published by a relay, and "relay verify --repair" has them published.
     */
    async publishedRows(
      filter: PublishedFilter,
      after: FinalizedPlace,
      until: string,
      limit: number,
    ): Promise<PublishedRow[]> {
      const { rows } = await db.query<PublishedRow>(
        `SELECT o.id::text AS "id", o.event_id AS "eventId", ${TOPIC('o', '$1')} AS "topic",
                  o.stream_entry_id AS "entryId",
                  ${AT}::text AS "finalizedAt", pg_column_size(o.payload) AS "bytes",
                  round(extract(epoch FROM ${AT}) * 1000000)::bigint::text AS "finalizedUs"
           FROM identity.outbox o
           WHERE o.stream_entry_id IS NOT NULL AND (${AT}, o.id) > ($2::timestamptz, $3::bigint)
             AND ${AT} <= $4::timestamptz AND o.published AND o.dead_lettered_at IS NULL AND (${ENTRY_ID('o')}) IS NOT NULL
             AND ($6::text IS NULL OR coalesce(o.topic, $1) = $6) AND ($7::text IS NULL OR o.event_type = $7)
             AND ($8::text IS NULL OR o.aggregate_type = $8) AND ($9::uuid IS NULL OR o.aggregate_id = $9)
           ORDER BY ${AT}, o.id LIMIT $5`,
        [
          ...[streamName, after.finalizedAt, after.id, until, limit],
          ...[filter.topic, filter.eventType, filter.aggregateType, filter.aggregateId],
        ],
      );
      return rows;
    },

    /** The events of those of these rows that are published or dead and have an entry id, in order of id. */
    finalizedEvents: (ids: readonly string[]): Promise<FinalizedEvent[]> =>
      eventsWhere(
        ids,
        'CASE WHEN stream_entry_id IS NULL THEN false ELSE published OR dead_lettered_at IS NOT NULL END',
      ),

    /** The events of those of these rows that are neither published nor dead with a dead letter, in order of id. */
    unfinishedEvents: (ids: readonly string[]): Promise<FinalizedEvent[]> =>
      eventsWhere(
        ids,
        'CASE WHEN published THEN false ELSE dead_lettered_at IS NULL OR stream_entry_id IS NULL END',
      ),

    /**
     * Makes rows unpublished whose entries Redis has lost. Published rows become fresh; `published_at` stays, and tells the
     * claim that an earlier job may be there. Dead rows lose their entry id and their lease ends, so that the lease reaper
     * writes the dead letter again. A row that has got another entry since stays as it is.
     * @param on default: a transaction of its own
     */
    async unpublish(
      lost: readonly Pick<FinalizedRow, 'id' | 'eventId' | 'entryId'>[],
      on: Queryable = asking(pool, statementTimeoutMs, 'durable'),
    ): Promise<number> {
      const { rowCount } = await on.query({
        name: 'relay-unpublish',
        text: `UPDATE identity.outbox o
                 SET published = false, stream_entry_id = NULL,
                     next_attempt_at = CASE WHEN o.dead_lettered_at IS NOT NULL THEN now() END,
                     attempts = CASE WHEN o.dead_lettered_at IS NOT NULL THEN o.attempts ELSE 0 END,
                     error_message = CASE WHEN o.dead_lettered_at IS NOT NULL THEN o.error_message END
                 FROM unnest($1::bigint[], $2::uuid[], $3::text[]) AS l (id, event_id, entry_id)
                 -- An expression, not the column: with the column the planner reads the whole index of rows with an entry.
                 WHERE ${SAME_EVENT('o', 'l')} AND coalesce(${ENTRY_ID('o')}, '') = l.entry_id
                   AND CASE WHEN o.published THEN o.dead_lettered_at IS NULL ELSE o.dead_lettered_at IS NOT NULL END`,
        values: [lost.map((it) => it.id), lost.map((it) => it.eventId), lost.map((it) => it.entryId)],
      });
      return rowCount ?? 0;
    },
  };
}
