import { asking, type Pool } from '../connections/database.ts';
import type { Aggregate } from '../event.ts';
import { FIRST, LIVE, OF_AGGREGATE, type OutboxOptions, PARKED, SAME_ID, STILL_LIVE } from './conditions.ts';
import { printableType, storedType } from './event-of-row.ts';
import { orderOf } from './order.ts';

/** Frees parked rows, and answers what earlier rows of its aggregate an event waits for. */

/**
 * What the rows say of an event that has a job.
 * - `over`: published, discarded or gone
 * - `first`: no earlier event of its aggregate is to be published
 * - `early`: those that are have their jobs
 * - `unclaimed`: one of them has none, or none that is committed
 * - `behind`: one of them waits for a retry, or is dead where dead rows hold their aggregate
 */
export type Standing = Readonly<{
  kind: 'over' | 'first' | 'early' | 'unclaimed' | 'behind';
  /** Of an early event: the `event_id` of the live row right before; null if the row is not in its window. */
  after: string | null;
}>;

/** Of an event without a row. */
export const OVER: Standing = { kind: 'over', after: null };

export function createParked(pool: Pool, options: OutboxOptions) {
  const db = asking(pool, options.statementTimeoutMs);
  const order = orderOf(options);
  const variant = `${options.deadLetterPolicy}-${order.window}`;

  return {
    /**
     * Frees the first parked row of each aggregate whose window has room; the next claim leases the others with it. Called
     * after each commit that parked a row, or finished one that others waited for. Two such transactions may not see each
     * other, but the refill after the later commit sees both.
     *
     * @returns how many rows became fresh, and how many of the aggregates have parked rows
     */
    async refill(aggregates: readonly Aggregate[]): Promise<{ fresh: number; waiting: number }> {
      // PostgreSQL plans for a long list where it is computed, so it is computed only where types are escaped.
      const isEscaped = aggregates.some((it) => it.aggregateType.startsWith('\\x'));
      const types = isEscaped ? `array(SELECT ${storedType('t')} FROM unnest($1::text[]) t)` : '$1::text[]';
      const { rows } = await db.query<{ fresh: number; waiting: number }>({
        name: `relay-refill-${variant}${isEscaped ? '-escaped' : ''}`,
        // Most aggregates have no parked row, and the index of parked rows tells that at once. LATERAL asks for one
        // aggregate after the other: the planner made of EXISTS a join with all parked rows (100 aggregates beside
        // 100,000 parked rows: 4 s instead of 1 ms).
        text: `WITH waiting AS MATERIALIZED (
             SELECT a.* FROM unnest(${types}, $2::uuid[]) AS a (aggregate_type, aggregate_id)
             CROSS JOIN LATERAL (
               SELECT p.id FROM identity.outbox p
               WHERE ${LIVE('p')} AND ${PARKED('p')} AND ${OF_AGGREGATE('p', 'a')} ${FIRST('p')}
             ) parked
           ), freed AS (
             UPDATE identity.outbox o SET next_attempt_at = NULL
             FROM (
               SELECT locked.id FROM waiting a CROSS JOIN LATERAL (${order.refillable('a')}) first
               CROSS JOIN LATERAL (
                 SELECT l.id FROM identity.outbox l WHERE l.id = first.id FOR UPDATE SKIP LOCKED
               ) locked
             ) first
             WHERE ${SAME_ID('o', 'first')} AND ${STILL_LIVE('o')} AND ${PARKED('o')} RETURNING 1
           ) SELECT (SELECT count(*) FROM freed)::int AS fresh, (SELECT count(*) FROM waiting)::int AS waiting`,
        values: [aggregates.map((it) => it.aggregateType), aggregates.map((it) => it.aggregateId)],
      });
      return rows[0] ?? { fresh: 0, waiting: 0 };
    },

    /**
     * What the rows say of these events. `before` is the event right before in its aggregate. The caller gives it only
     * where it knows that no earlier event became live since: when `before` is published, the event is `first`.
     */
    async standingOf(
      events: readonly Readonly<{ eventId: string; before: string | null }>[],
    ): Promise<ReadonlyMap<string, Standing>> {
      const { rows } = await db.query<Standing & { eventId: string }>({
        name: `relay-standing-${options.ordering}-${variant}`,
        text: `WITH own AS MATERIALIZED (
             SELECT o.*, coalesce((
                 SELECT CASE WHEN b.published THEN b.dead_lettered_at IS NULL AND b.stream_entry_id IS NOT NULL END
                 FROM identity.outbox b WHERE b.event_id = a.before), false) AS is_next
             FROM unnest($1::uuid[], $2::uuid[]) AS a (event_id, before) CROSS JOIN LATERAL (
               SELECT o.id, o.event_id, o.published, o.aggregate_type, o.aggregate_id
               FROM identity.outbox o WHERE o.event_id = a.event_id LIMIT 1
             ) o
           ), heads AS MATERIALIZED (
             SELECT a.aggregate_type, a.aggregate_id, h.*
             FROM (SELECT DISTINCT aggregate_type, aggregate_id FROM own WHERE NOT published AND NOT is_next) a
             CROSS JOIN LATERAL (${order.ordered ? order.heads('a') : 'SELECT NULL::uuid[] AS live, NULL::bigint AS first_id, NULL::bigint AS unclaimed_id, NULL::bigint AS failed_id'}) h
           )
           SELECT own.event_id AS "eventId",
             CASE WHEN own.published THEN 'over' WHEN own.is_next THEN 'first' WHEN h.failed_id < own.id THEN 'behind'
                  WHEN h.unclaimed_id < own.id THEN 'unclaimed' WHEN h.first_id < own.id THEN 'early'
                  ELSE 'first' END AS "kind",
             h.live[array_position(h.live, own.event_id) - 1] AS "after"
           FROM own LEFT JOIN heads h ON h.aggregate_type = own.aggregate_type AND h.aggregate_id = own.aggregate_id`,
        values: [events.map((it) => it.eventId), events.map((it) => it.before)],
      });
      const found = new Map(rows.map(({ eventId, ...standing }) => [eventId, standing]));
      return new Map(events.map(({ eventId }) => [eventId, found.get(eventId) ?? OVER]));
    },

    /**
     * The next aggregates, by key, that have parked rows. It steps through the index from one aggregate to the next, so the
     * number of parked rows does not matter.
     */
    async parkedAggregates(after: Aggregate | null, limit: number): Promise<Aggregate[]> {
      const next = (from: string) => `
          SELECT p.aggregate_type, p.aggregate_id FROM identity.outbox p
          WHERE ${LIVE('p')} AND ${PARKED('p')} AND (p.aggregate_type, p.aggregate_id) > ${from}
          ORDER BY p.aggregate_type, p.aggregate_id LIMIT 1`;
      const { rows } = await db.query<Aggregate>(
        `WITH RECURSIVE walk AS (
             (${next(`(${storedType('$1::text')}, $2::uuid)`)})
             UNION ALL
             SELECT step.* FROM walk w CROSS JOIN LATERAL (${next('(w.aggregate_type, w.aggregate_id)')}) step
           )
           SELECT ${printableType('aggregate_type')} AS "aggregateType", aggregate_id AS "aggregateId" FROM walk LIMIT $3`,
        [after?.aggregateType ?? '', after?.aggregateId ?? '00000000-0000-0000-0000-000000000000', limit],
      );
      return rows;
    },

    /** Without ordering nothing waits for anything: frees rows that an earlier configuration parked. */
    async unparkAll(limit: number): Promise<number> {
      const { rowCount } = await db.query(
        `UPDATE identity.outbox o SET next_attempt_at = NULL
           FROM (SELECT p.id FROM identity.outbox p WHERE ${LIVE('p')} AND ${PARKED('p')}
                 ORDER BY p.aggregate_type, p.aggregate_id, p.id LIMIT $1 FOR UPDATE SKIP LOCKED) parked
           WHERE o.id = parked.id`,
        [limit],
      );
      return rowCount ?? 0;
    },
  };
}
