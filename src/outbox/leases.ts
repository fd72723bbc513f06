import { asking, type Pool, type Queryable } from '../connections/database.ts';
import type { OutboxEvent } from '../event.ts';
import { ATTEMPTS, ENTRY_ID, MS, type OutboxOptions, STILL_LIVE, TOPIC } from './conditions.ts';
import { printable, printableType } from './event-of-row.ts';

/** Ends leases, finds rows whose lease has ended, and changes them for the lease reaper. */

/** Leases that one statement ends, at most: 5,000 take the database about 0.3 s. */
const EXPIRED_AT_ONCE = 5_000;

/**
 * A row whose lease has ended. `isDead`: Redis lost its dead letter. `knownLetter`: the dead letter that it had before it was
 * replayed. `endedAt`: when the lease ended, to the microsecond.
 */
export type ExpiredRow = Pick<
  OutboxEvent,
  'id' | 'eventId' | 'aggregateType' | 'aggregateId' | 'topic' | 'attempts'
> &
  Readonly<{
    isDead: boolean;
    knownLetter: string | null;
    endedAt: string;
  }>;

const EXPIRED = (row: string) =>
  `NOT ${row}.published AND ${row}.next_attempt_at < 'infinity' AND ${row}.next_attempt_at <= now()`;
const ENDED_AT = (row: string) =>
  `to_char(${row}.next_attempt_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US')`;

export function createLeases(pool: Pool, options: OutboxOptions) {
  const { streamName, claimLeaseMs, statementTimeoutMs } = options;
  const db = asking(pool, statementTimeoutMs);

  async function expireLeases(tx: Queryable, eventIds: readonly string[]): Promise<void> {
    await tx.query(
      `UPDATE identity.outbox o SET next_attempt_at = now()
       WHERE o.event_id = ANY ($1::uuid[]) AND ${STILL_LIVE('o')}
         AND o.next_attempt_at > now() AND o.next_attempt_at < 'infinity'`,
      [eventIds],
    );
  }

  /** In the order of the rows' ids, since acknowledgements lock rows in that order too. */
  async function expireSomeLeases() {
    const { rows } = await db.query<{ leased: number; rows: number }>(
      `WITH leased AS MATERIALIZED (
           SELECT o.id FROM identity.outbox o
           WHERE NOT o.published AND o.next_attempt_at < 'infinity' AND o.next_attempt_at > now() AND o.attempts = 0
           ORDER BY o.next_attempt_at LIMIT ${EXPIRED_AT_ONCE}
         ), expired AS (
           UPDATE identity.outbox o SET next_attempt_at = now() FROM (SELECT id FROM leased ORDER BY id) l
           WHERE o.id = l.id AND CASE WHEN o.published THEN false
             ELSE o.next_attempt_at < 'infinity' AND o.next_attempt_at > now() AND o.attempts = 0 END
           RETURNING 1
         ) SELECT (SELECT count(*) FROM leased)::int AS leased, (SELECT count(*) FROM expired)::int AS rows`,
    );
    return rows[0] ?? { leased: 0, rows: 0 };
  }

  return {
    /** Rows whose lease has ended, the longest overdue first. */
    async expired(limit: number): Promise<ExpiredRow[]> {
      const { rows } = await db.query<ExpiredRow>(
        `SELECT o.id::text AS "id", o.event_id AS "eventId", ${printableType('o.aggregate_type')} AS "aggregateType",
                  o.aggregate_id AS "aggregateId", ${printable(TOPIC('o', '$1'))} AS "topic",
                  o.dead_lettered_at IS NOT NULL AS "isDead", ${ENTRY_ID('o')} AS "knownLetter",
                  ${ATTEMPTS('o')} AS "attempts", ${ENDED_AT('o')} AS "endedAt"
           FROM identity.outbox o WHERE ${EXPIRED('o')} ORDER BY o.next_attempt_at LIMIT $2`,
        [streamName, limit],
      );
      return rows;
    },

    /** Locks the rows that have not changed since they were read, and are not locked. Answers their event ids. */
    async lockExpired(tx: Queryable, rows: readonly ExpiredRow[]): Promise<ReadonlySet<string>> {
      const { rows: locked } = await tx.query<{ eventId: string }>(
        `SELECT o.event_id AS "eventId"
         FROM unnest($1::bigint[], $2::uuid[], $3::text[]) AS r (id, event_id, ended_at)
         CROSS JOIN LATERAL (
           SELECT o.event_id FROM identity.outbox o
           WHERE o.id = r.id AND o.event_id = r.event_id
             AND CASE WHEN o.published THEN false ELSE ${ENDED_AT('o')} = r.ended_at END
           FOR UPDATE SKIP LOCKED
         ) o`,
        [rows.map((it) => it.id), rows.map((it) => it.eventId), rows.map((it) => it.endedAt)],
      );
      return new Set(locked.map((it) => it.eventId));
    },

    /** Makes rows fresh whose jobs are gone: the claim takes them again, in their order. */
    async returnToFresh(tx: Queryable, eventIds: readonly string[]): Promise<void> {
      await tx.query(
        `UPDATE identity.outbox o SET next_attempt_at = NULL
         WHERE o.event_id = ANY ($1::uuid[]) AND ${STILL_LIVE('o')}`,
        [eventIds],
      );
    },

    /**
     * Gives rows another lease. It also records failed attempts of their jobs that a pod could not record before it died.
     */
    async extendLeases(
      tx: Queryable,
      jobs: readonly Readonly<{ eventId: string; attempts: number; reason: string }>[],
    ): Promise<void> {
      await tx.query(
        `UPDATE identity.outbox o
         SET next_attempt_at = now() + $4 ${MS}, attempts = greatest(o.attempts, j.attempts),
             error_message = CASE WHEN j.attempts > o.attempts THEN j.reason
                                  WHEN j.attempts > 0 THEN coalesce(o.error_message, j.reason)
                                  ELSE o.error_message END
         FROM unnest($1::uuid[], $2::int[], $3::text[]) AS j (event_id, attempts, reason)
         WHERE o.event_id = j.event_id AND CASE WHEN o.published THEN false ELSE true END`,
        [
          jobs.map((it) => it.eventId),
          jobs.map((it) => it.attempts),
          jobs.map((it) => it.reason),
          claimLeaseMs,
        ],
      );
    },

    /** Ends leases now, so that the lease reaper asks what became of the jobs. */
    expireLeases,
    expireLeasesOf: (eventIds: readonly string[]): Promise<void> =>
      expireLeases(asking(pool, statementTimeoutMs, 'durable'), eventIds),

    /**
     * Ends every lease, since Redis may have lost the jobs. Rows that wait for a retry keep theirs: it ends when the retry
     * is due.
     * @returns how many leases ended
     */
    async expireAllLeases(): Promise<number> {
      for (let expired = 0; ; ) {
        const { leased, rows } = await expireSomeLeases();
        expired += rows;
        if (leased < EXPIRED_AT_ONCE) return expired;
      }
    },

    /** Those of the events whose row is live: it exists, and is neither published nor dead. */
    async liveOf(eventIds: readonly string[]): Promise<string[]> {
      const { rows } = await db.query<{ eventId: string }>(
        `SELECT o.event_id AS "eventId" FROM identity.outbox o
         WHERE o.event_id = ANY ($1::uuid[]) AND ${STILL_LIVE('o')}`,
        [eventIds],
      );
      return rows.map((row) => row.eventId);
    },
  };
}
