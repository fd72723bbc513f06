import type { Waiting } from '../event.ts';
import {
  type Aggregate,
  FIRST,
  LIVE,
  MS,
  OF_AGGREGATE,
  type OutboxOptions,
  orderOf,
  STILL_LIVE,
} from './conditions.ts';
import { type Pool, type Queryable, transaction } from './database.ts';

/** Leased rows become due, and somebody looks what became of their jobs. */

/** A due row: nothing was heard of its job until its lease ended. A replayed one has its dead letter's receipt yet. */
export type DueRow = Readonly<{ id: string; eventId: string; topic: string; entryId: string | null }>;

export function createLeases(pool: Pool, options: OutboxOptions) {
  const { streamName, claimLeaseMs, statementTimeoutMs } = options;
  const { ordered } = orderOf(options);

  return {
    /** Rows whose lease has ended, the longest overdue first; locked until the transaction ends. */
    async lockDue(tx: Queryable, limit: number): Promise<DueRow[]> {
      const { rows } = await tx.query<DueRow>(
        `SELECT id::text AS "id", event_id AS "eventId", coalesce(topic, $1) AS "topic",
                stream_entry_id AS "entryId" FROM identity.outbox
         WHERE NOT published AND next_attempt_at < 'infinity' AND next_attempt_at <= now()
         ORDER BY next_attempt_at LIMIT $2 FOR UPDATE SKIP LOCKED`,
        [streamName, limit],
      );
      return rows;
    },

    /** The job of each of these rows is gone: the next claim takes them again, in their order. */
    async returnToFresh(tx: Queryable, ids: readonly string[]): Promise<void> {
      await tx.query(
        `UPDATE identity.outbox o SET next_attempt_at = NULL WHERE o.id = ANY ($1::bigint[]) AND ${STILL_LIVE('o')}`,
        [ids],
      );
    },

    /** The job of each of these rows is alive: look again after another lease. */
    async extendLease(tx: Queryable, ids: readonly string[]): Promise<void> {
      await tx.query(
        `UPDATE identity.outbox o SET next_attempt_at = now() + $2 ${MS}
         WHERE o.id = ANY ($1::bigint[]) AND ${STILL_LIVE('o')}`,
        [ids, claimLeaseMs],
      );
    },

    /**
     * The jobs of these events are gone, or that of what follows them never was there, since a pod died before it added
     * it: somebody has to look, so their leases end now, and in order that of the first row of each of their aggregates.
     */
    async endLeasesOf(events: readonly (Aggregate & Readonly<{ id: string }>)[]): Promise<void> {
      const heads = `
        UNION ALL SELECT head.id, false FROM unnest($2::text[], $3::uuid[]) AS a (aggregate_type, aggregate_id)
        CROSS JOIN LATERAL (
          SELECT n.id, n.aggregate_id FROM identity.outbox n WHERE ${LIVE('n')} AND ${OF_AGGREGATE('n', 'a')} ${FIRST('n')}
        ) head`;
      await transaction(pool, statementTimeoutMs, 'repeatable', (tx) =>
        tx.query(
          `UPDATE identity.outbox o SET next_attempt_at = now()
           FROM (SELECT unnest($1::bigint[]) AS id, true AS is_meant ${ordered ? heads : ''}) jobless
           WHERE o.id = jobless.id AND ${STILL_LIVE('o')} AND (o.attempts = 0 OR is_meant)
             AND o.next_attempt_at > now() AND o.next_attempt_at < 'infinity'`,
          [
            events.map((it) => it.id),
            ...(ordered ? [events.map((it) => it.aggregateType), events.map((it) => it.aggregateId)] : []),
          ],
        ),
      );
    },

    /**
     * Redis may have lost jobs: every lease ends now, so that somebody looks. What waits for a retry goes on waiting:
     * its time comes. Returns how many leases ended.
     */
    async endLeases(): Promise<number> {
      const { rowCount } = await pool.query(
        `UPDATE identity.outbox SET next_attempt_at = now()
         WHERE NOT published AND next_attempt_at < 'infinity' AND next_attempt_at > now() AND attempts = 0`,
      );
      return rowCount ?? 0;
    },

    /** Of these events, those whose row waits for something yet: neither published, nor dead, nor gone. */
    async unsettled(eventIds: readonly string[]): Promise<string[]> {
      const { rows } = await pool.query<{ eventId: string }>(
        `SELECT o.event_id AS "eventId" FROM identity.outbox o WHERE o.event_id = ANY ($1::uuid[]) AND ${STILL_LIVE('o')}`,
        [eventIds],
      );
      return rows.map((row) => row.eventId);
    },

    /** Whether any of these rows waits for something, neither published, nor dead, nor gone; and whether for a retry. */
    async waiting(ids: readonly string[]): Promise<Waiting> {
      const { rows } = await pool.query<{ retrying: boolean | null }>(
        `SELECT bool_or(o.attempts > 0) AS retrying FROM identity.outbox o
         WHERE o.id = ANY ($1::bigint[]) AND ${STILL_LIVE('o')}`,
        [ids],
      );
      const { retrying = null } = rows[0] ?? {};
      if (retrying === null) return 'none';
      return retrying ? 'for-retry' : 'some';
    },
  };
}
