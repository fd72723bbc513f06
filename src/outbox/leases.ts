import { MS, type OutboxOptions, STILL_LIVE } from './conditions.ts';
import type { Pool, Queryable } from './database.ts';

/** Leases that have ended, and what the lease reaper makes of their rows. */

/**
 * A row whose lease has ended: nothing was heard of its job. `isDead`: its dead letter is to be written once more.
 * `knownLetter`: the dead letter of before its replay.
 */
export type ExpiredRow = Readonly<{
  id: string;
  eventId: string;
  aggregateType: string;
  aggregateId: string;
  topic: string;
  isDead: boolean;
  knownLetter: string | null;
  attempts: number;
}>;

export function createLeases(pool: Pool, options: OutboxOptions) {
  const { streamName, claimLeaseMs } = options;

  async function expireLeases(db: Pick<Queryable, 'query'>, eventIds: readonly string[]): Promise<void> {
    await db.query(
      `UPDATE identity.outbox o SET next_attempt_at = now()
       WHERE o.event_id = ANY ($1::uuid[]) AND ${STILL_LIVE('o')}
         AND o.next_attempt_at > now() AND o.next_attempt_at < 'infinity'`,
      [eventIds],
    );
  }

  return {
    /** Rows whose lease has ended, the longest overdue first; locked until the transaction ends. */
    async lockExpired(tx: Queryable, limit: number): Promise<ExpiredRow[]> {
      const { rows } = await tx.query<ExpiredRow>(
        `SELECT id::text AS "id", event_id AS "eventId", aggregate_type AS "aggregateType",
                aggregate_id AS "aggregateId", coalesce(topic, $1) AS "topic",
                dead_lettered_at IS NOT NULL AS "isDead", stream_entry_id AS "knownLetter", attempts AS "attempts"
         FROM identity.outbox
         WHERE NOT published AND next_attempt_at < 'infinity' AND next_attempt_at <= now()
         ORDER BY next_attempt_at LIMIT $2 FOR UPDATE SKIP LOCKED`,
        [streamName, limit],
      );
      return rows;
    },

    /** The job of each of these rows is gone: the claim takes them again, in their order. */
    async returnToFresh(tx: Queryable, eventIds: readonly string[]): Promise<void> {
      await tx.query(
        `UPDATE identity.outbox o SET next_attempt_at = NULL
         WHERE o.event_id = ANY ($1::uuid[]) AND ${STILL_LIVE('o')}`,
        [eventIds],
      );
    },

    /**
     * The job of each of these rows is there: the reaper asks again after another lease. Failures that a pod could not
     * mirror before it died are mirrored now.
     */
    async extendLeases(
      tx: Queryable,
      jobs: readonly Readonly<{ eventId: string; attempts: number; reason: string }>[],
    ): Promise<void> {
      await tx.query(
        `UPDATE identity.outbox o
         SET next_attempt_at = now() + $4 ${MS}, attempts = greatest(o.attempts, j.attempts),
             error_message = CASE WHEN j.attempts > o.attempts THEN j.reason ELSE o.error_message END
         FROM unnest($1::uuid[], $2::int[], $3::text[]) AS j (event_id, attempts, reason)
         WHERE o.event_id = j.event_id AND NOT o.published`,
        [
          jobs.map((it) => it.eventId),
          jobs.map((it) => it.attempts),
          jobs.map((it) => it.reason),
          claimLeaseMs,
        ],
      );
    },

    /** These leases end now, so that the reaper asks what became of the jobs. */
    expireLeases,
    expireLeasesOf: (eventIds: readonly string[]): Promise<void> => expireLeases(pool, eventIds),

    /**
     * Redis may have lost jobs: every lease ends now. Rows that wait for a retry go on waiting: their time comes.
     * @returns how many leases ended
     */
    async expireAllLeases(): Promise<number> {
      const { rowCount } = await pool.query(
        `UPDATE identity.outbox SET next_attempt_at = now()
         WHERE NOT published AND next_attempt_at < 'infinity' AND next_attempt_at > now() AND attempts = 0`,
      );
      return rowCount ?? 0;
    },

    /** Of these events, those whose row is live: neither published, nor dead, nor gone. */
    async liveOf(eventIds: readonly string[]): Promise<string[]> {
      const { rows } = await pool.query<{ eventId: string }>(
        `SELECT o.event_id AS "eventId" FROM identity.outbox o
         WHERE o.event_id = ANY ($1::uuid[]) AND ${STILL_LIVE('o')}`,
        [eventIds],
      );
      return rows.map((row) => row.eventId);
    },
  };
}
