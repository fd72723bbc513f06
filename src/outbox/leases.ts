import { type Pool, type Queryable, transaction } from '../connections/database.ts';
import { MS, type OutboxOptions, STILL_LIVE } from './conditions.ts';

/** Leases that have ended, and what the lease reaper makes of their rows. */

/** Leases that one statement ends, at most: 5,000 take the database about 0.3 s. */
const EXPIRED_AT_ONCE = 5_000;

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
  const { streamName, claimLeaseMs, statementTimeoutMs } = options;

  async function expireLeases(db: Pick<Queryable, 'query'>, eventIds: readonly string[]): Promise<void> {
    await db.query(
      `UPDATE identity.outbox o SET next_attempt_at = now()
       WHERE o.event_id = ANY ($1::uuid[]) AND ${STILL_LIVE('o')}
         AND o.next_attempt_at > now() AND o.next_attempt_at < 'infinity'`,
      [eventIds],
    );
  }

  /** In the order of their ids, as acknowledgements lock them. */
  const expireSomeLeases = () =>
    transaction(pool, statementTimeoutMs, 'repeatable', async (tx) => {
      const { rows } = await tx.query<{ leased: number; rows: number }>(
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
    });

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
         WHERE o.event_id = j.event_id AND CASE WHEN o.published THEN false ELSE true END`,
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
      for (let expired = 0; ; ) {
        const { leased, rows } = await expireSomeLeases();
        expired += rows;
        if (leased < EXPIRED_AT_ONCE) return expired;
      }
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
