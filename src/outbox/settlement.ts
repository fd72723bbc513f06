import type { OutboxEvent, Receipt } from '../event.ts';
import {
  FIRST,
  IS_FREE,
  LIVE,
  MS,
  OF_AGGREGATE,
  type OutboxOptions,
  orderOf,
  STILL_LIVE,
} from './conditions.ts';
import { type Pool, type Queryable, transaction } from './database.ts';
import { eventsOf } from './event-of-row.ts';

/** Leased rows become published or dead, and what waited behind them is leased; or they wait for another attempt. */

/** How many have left that came for themselves. */
const LEFT = `SELECT count(*) FILTER (WHERE chained IS DISTINCT FROM 'before')::int AS "left" FROM leaving`;

export function createSettlement(pool: Pool, options: OutboxOptions) {
  const { streamName, claimLeaseMs, statementTimeoutMs, maxEventBytes } = options;
  const { ordered, held, earlier } = orderOf(options);

  /**
   * Its turn has come, or is over. A crash of PostgreSQL may undo a claim whose job is there, and runs all the same; then
   * its row is as it was before. A lease says at once that it is not so.
   */
  const inTurn = (row: string) =>
    `(${row}.published OR ${row}.dead_lettered_at IS NOT NULL OR ${row}.next_attempt_at < 'infinity'
      OR NOT ${earlier(row, 'live')})`;

  /**
   * Leases the first live row of each aggregate in `leaving`, once those rows have left it. A row that
   * is leased already keeps its place: the aggregate flows on when that one is acknowledged.
   * Fails when the payload of one of them cannot be printed; then it is done without, and the claim finds out which.
   */
  const promote = `
    heads AS (
      SELECT head.id
      FROM (SELECT DISTINCT aggregate_type, aggregate_id FROM leaving) a
      CROSS JOIN LATERAL (
        SELECT n.id, n.aggregate_type, n.aggregate_id, n.next_attempt_at FROM identity.outbox n
        WHERE ${LIVE('n')} AND ${OF_AGGREGATE('n', 'a')} AND n.id <> ALL (ARRAY(SELECT id FROM leaving))
        ${FIRST('n')}
      ) head
      WHERE ${IS_FREE('head')}
      ${held ? `AND NOT ${earlier('head', 'dead')}` : ''}
    ), promoted AS (
      UPDATE identity.outbox o SET next_attempt_at = now() + $3 ${MS}
      FROM heads WHERE o.id = heads.id
        AND ${STILL_LIVE('o')} AND ${IS_FREE('o')}
      RETURNING o.*
    ) SELECT * FROM (${LEFT}) leavers
      LEFT JOIN (${eventsOf('promoted', maxEventBytes)}) successors ON true`;

  /** What `promote` selects: how many rows have left, and their successors. */
  type Promoted = Partial<OutboxEvent> & { left: number };
  const successorsIn = (rows: readonly Promoted[]): OutboxEvent[] =>
    rows.flatMap(({ left: _, ...event }) => (event.id ? [event as OutboxEvent] : []));

  /** Gives their receipts to the rows whose turn has come; how many there were, and what was leased then. */
  async function publish(tx: Queryable, receipts: readonly Receipt[], promoting: boolean) {
    const ids = receipts.map((it) => it.id);
    const entryIds = receipts.map((it) => it.entryId);
    const chained = receipts.map((it) => it.chained ?? null);
    const isDue = `CASE r.chained WHEN 'before' THEN ${STILL_LIVE('o')} WHEN 'after' THEN true ELSE ${inTurn('o')} END`;
    // The clock's time, not the transaction's: one that began early may have waited for the row before.
    const update = ([id, entry, chain]: string[]) => `
      UPDATE identity.outbox o
      SET published = true, published_at = coalesce(CASE WHEN o.published THEN o.published_at END, clock_timestamp()),
          next_attempt_at = NULL, stream_entry_id = r.entry_id, dead_lettered_at = NULL
      FROM unnest(${id}::bigint[], ${entry}::text[], ${chain}::text[]) AS r (id, entry_id, chained)
      WHERE o.id = r.id ${ordered ? `AND ${isDue}` : ''}`;
    if (!ordered || !promoting) {
      const { rows } = await tx.query(
        `WITH leaving AS (${update(['$1', '$2', '$3'])} RETURNING r.chained) ${LEFT}`,
        [ids, entryIds, chained],
      );
      return { left: rows[0]?.left ?? ids.length, successors: [] };
    }
    const { rows } = await tx.query<Promoted>({
      name: `relay-publish-${options.deadLetterPolicy}-${maxEventBytes}`,
      text: `WITH leaving AS (${update(['$2', '$4', '$5'])} RETURNING o.id, o.aggregate_type, o.aggregate_id, r.chained),
             ${promote}`,
      values: [streamName, ids, claimLeaseMs, entryIds, chained],
    });
    return { left: rows[0]?.left ?? ids.length, successors: successorsIn(rows) };
  }

  async function liveOf(tx: Queryable, receipts: readonly Receipt[], lock = ''): Promise<Receipt[]> {
    const { rows } = await tx.query<{ id: string }>(
      `SELECT o.id::text AS "id" FROM identity.outbox o WHERE o.id = ANY ($1::bigint[]) AND ${STILL_LIVE('o')} ${lock}`,
      [receipts.map((it) => it.id)],
    );
    const live = new Set(rows.map((row) => row.id));
    return receipts.filter((it) => live.has(it.id));
  }

  return {
    /**
     * Acknowledges appended events and leases the next row of each of their aggregates, whose jobs the
     * caller adds after the commit. A row that was already published gets its receipt renewed. One that was dead is
     * so no more: an operator had its job retried.
     *
     * In order, receipts are given in the order of the entries: should Redis lose some, those with receipts are
     * appended again first. So a row gets none yet while an earlier one of its aggregate has none: `onEarly` is told
     * its id.
     */
    async markPublished(
      tx: Queryable,
      receipts: readonly Receipt[],
      promoting = true,
      onEarly: (ids: readonly string[]) => void = () => {},
    ): Promise<OutboxEvent[]> {
      const first = await publish(tx, receipts, promoting);
      const own = receipts.filter((it) => it.chained !== 'before');
      if (!ordered || first.left >= own.length) return first.successors;
      // Whoever leases one of them just now is waited for.
      const rest = await liveOf(tx, own, 'FOR UPDATE');
      if (rest.length === 0) return first.successors;
      const second = await publish(tx, rest, promoting);
      if (second.left < rest.length) onEarly((await liveOf(tx, rest)).map((it) => it.id));
      const marked = new Set(rest.map((it) => it.id));
      return [...first.successors.filter((it) => !marked.has(it.id)), ...second.successors];
    },

    /**
     * Marks a row dead and, unless dead rows hold their aggregate, leases its successor. Nothing happens
     * to a row that is published or dead already.
     */
    async markDead(
      tx: Queryable,
      dead: { id: string; attempts: number; reason: string; entryId: string },
      promoting = true,
    ): Promise<OutboxEvent[]> {
      const bury = (id: string, attempts: string, reason: string, entryId: string) => `
        UPDATE identity.outbox o
        SET dead_lettered_at = now(), next_attempt_at = 'infinity', attempts = ${attempts}, error_message = ${reason},
            stream_entry_id = ${entryId}
        WHERE o.id = ${id} AND ${STILL_LIVE('o')}`;
      if (!ordered || held || !promoting) {
        await tx.query(bury('$1', '$2', '$3', '$4'), [dead.id, dead.attempts, dead.reason, dead.entryId]);
        return [];
      }
      const { rows } = await tx.query<Promoted>({
        name: `relay-bury-${maxEventBytes}`,
        text: `WITH leaving AS (${bury('ANY ($2::bigint[])', '$4', '$5', '$6')} RETURNING o.id, o.aggregate_type, o.aggregate_id, NULL AS chained),
               ${promote}`,
        values: [streamName, [dead.id], claimLeaseMs, dead.attempts, dead.reason, dead.entryId],
      });
      return successorsIn(rows);
    },

    /**
     * Adds the jobs of those of these rows that are live still, under their locks: none of them is published meanwhile.
     * An event that another pod had brought along may be, as soon as its row is leased here; its job is gone then, and
     * would be added anew.
     */
    async whileLive(
      events: readonly OutboxEvent[],
      add: (live: OutboxEvent[]) => Promise<void>,
    ): Promise<void> {
      await transaction(pool, statementTimeoutMs, 'repeatable', async (tx) => {
        const { rows } = await tx.query<{ id: string }>(
          `SELECT o.id::text AS "id" FROM identity.outbox o WHERE o.id = ANY ($1::bigint[]) AND ${STILL_LIVE('o')} FOR SHARE`,
          [events.map((it) => it.id)],
        );
        const live = new Set(rows.map((row) => row.id));
        const some = events.filter((it) => live.has(it.id));
        if (some.length > 0) await add(some);
      });
    },

    /** Mirrors a failed attempt on its row: how many there were, why, and when the next one comes. */
    async recordFailure(failure: {
      id: string;
      attempts: number;
      reason: string;
      retryInMs: number;
    }): Promise<void> {
      await pool.query(
        `UPDATE identity.outbox o
         SET attempts = $2, error_message = $3, next_attempt_at = now() + $4 ${MS}
         -- Not "and leased": an attempt may fail before the lease that started it is committed.
         WHERE o.id = $1 AND ${STILL_LIVE('o')} AND o.attempts < $2`,
        [failure.id, failure.attempts, failure.reason, failure.retryInMs],
      );
    },
  };
}
