import type { OutboxEvent } from '../event.ts';
import {
  type Aggregate,
  byId,
  FIRST,
  IS_FREE,
  LIVE,
  OF_AGGREGATE,
  type OutboxOptions,
  orderOf,
  STILL_LIVE,
} from './conditions.ts';
import { type Pool, transaction } from './database.ts';
import { eventsOf } from './event-of-row.ts';

/** Rows that wait behind others of their aggregate: read ahead, and found when there is nobody left to wait for. */

export function createParked(pool: Pool, options: OutboxOptions) {
  const { streamName, statementTimeoutMs, maxEventBytes } = options;
  const { behind } = orderOf(options);

  return {
    /**
     * What comes after each of these in its aggregate and waits, the next few: `limit` of them and `maxBytes` at most.
     * Only read.
     */
    async readAhead(
      after: readonly (Aggregate & Readonly<{ id: string }>)[],
      limit: number,
      maxBytes: number,
    ): Promise<OutboxEvent[]> {
      return transaction(pool, statementTimeoutMs, 'repeatable', async (tx) => {
        const { rows } = await tx.query<OutboxEvent>({
          name: `relay-ahead-${maxEventBytes}`,
          text: `WITH ahead AS (
            SELECT o.* FROM unnest($2::text[], $3::uuid[], $4::bigint[]) AS a (aggregate_type, aggregate_id, id)
            CROSS JOIN LATERAL (
              SELECT n.id, sum(n.bytes) OVER ahead AS bytes, bool_and(${IS_FREE('n')} AND n.attempts = 0) OVER ahead AS free
              FROM (
                SELECT n.id, n.aggregate_id, n.next_attempt_at, n.attempts, pg_column_size(n.payload) AS bytes
                FROM identity.outbox n WHERE ${LIVE('n')} AND ${OF_AGGREGATE('n', 'a')} AND n.id > a.id
                ORDER BY n.aggregate_id, n.id LIMIT $5
              ) n
              WINDOW ahead AS (ORDER BY n.aggregate_id, n.id)
            ) ranked
            JOIN identity.outbox o ON o.id = ranked.id
            WHERE ranked.free AND ranked.bytes <= $6
          ) ${eventsOf('ahead', maxEventBytes)}`,
          values: [
            ...[streamName, after.map((it) => it.aggregateType), after.map((it) => it.aggregateId)],
            ...[after.map((it) => it.id), limit, maxBytes],
          ],
        });
        return rows.sort(byId);
      });
    },

    /**
     * Un-parks the first row of each given aggregate where nothing is left for it to wait for. Needed since
     * a row may be parked behind another at the very moment when that one is acknowledged, each transaction
     * blind to the other: whichever commits second finds it here. Returns how many rows became fresh.
     */
    async releaseOrphans(aggregates: readonly Aggregate[]): Promise<number> {
      return transaction(pool, statementTimeoutMs, 'repeatable', async (tx) => {
        const { rowCount } = await tx.query({
          name: `relay-release-${options.ordering}-${options.deadLetterPolicy}`,
          // Most aggregates have no parked row, which their own index says at once.
          text: `UPDATE identity.outbox o SET next_attempt_at = NULL
           FROM (
             SELECT parked.id
             FROM unnest($1::text[], $2::uuid[]) AS a (aggregate_type, aggregate_id)
             CROSS JOIN LATERAL (
               SELECT n.id, n.aggregate_type, n.aggregate_id FROM identity.outbox n
               WHERE ${LIVE('n')} AND n.next_attempt_at = 'infinity' AND ${OF_AGGREGATE('n', 'a')} ${FIRST('n')}
             ) parked
             WHERE NOT (${behind('parked')})
           ) orphan
           WHERE o.id = orphan.id AND ${STILL_LIVE('o')} AND o.next_attempt_at = 'infinity'`,
          values: [aggregates.map((it) => it.aggregateType), aggregates.map((it) => it.aggregateId)],
        });
        return rowCount ?? 0;
      });
    },

    /**
     * The next aggregates, by key, that have parked rows: steps from one to the next in the index, however
     * many rows each has parked.
     */
    async parkedAggregates(after: Aggregate | null, limit: number): Promise<Aggregate[]> {
      return transaction(pool, statementTimeoutMs, 'repeatable', async (tx) => {
        const next = (from: string) => `
          SELECT p.aggregate_type, p.aggregate_id FROM identity.outbox p
          WHERE ${LIVE('p')} AND p.next_attempt_at = 'infinity' AND (p.aggregate_type, p.aggregate_id) > ${from}
          ORDER BY p.aggregate_type, p.aggregate_id LIMIT 1`;
        const { rows } = await tx.query<Aggregate>(
          `WITH RECURSIVE walk AS (
             (${next('($1::text, $2::uuid)')})
             UNION ALL
             SELECT step.* FROM walk w CROSS JOIN LATERAL (${next('(w.aggregate_type, w.aggregate_id)')}) step
           )
           SELECT aggregate_type AS "aggregateType", aggregate_id AS "aggregateId" FROM walk LIMIT $3`,
          [after?.aggregateType ?? '', after?.aggregateId ?? '00000000-0000-0000-0000-000000000000', limit],
        );
        return rows;
      });
    },

    /** Without ordering nothing waits for anything: un-parks rows that an earlier configuration parked. */
    async unparkAll(limit: number): Promise<number> {
      const { rowCount } = await pool.query(
        `UPDATE identity.outbox o SET next_attempt_at = NULL
         FROM (SELECT p.id FROM identity.outbox p WHERE ${LIVE('p')} AND p.next_attempt_at = 'infinity'
               LIMIT $1 FOR UPDATE SKIP LOCKED) parked
         WHERE o.id = parked.id`,
        [limit],
      );
      return rowCount ?? 0;
    },
  };
}
