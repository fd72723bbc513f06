import { asking, type Pool, type Queryable } from '../connections/database.ts';
import { sqlState } from '../connections/pool-health.ts';
import type { OutboxEvent } from '../event.ts';
import { MS, type OutboxOptions, SAME_EVENT, STILL_LIVE } from './conditions.ts';

/**
 * Marks rows published or dead, records failed attempts, and parks rows. The statements name a row by `id` and `event_id`:
 * after a failover or TRUNCATE ... RESTART IDENTITY another event may have the same `id`.
 */

/** A row by its id, and by the event that it must hold. */
export type RowName = Pick<OutboxEvent, 'id' | 'eventId'>;

/** An event that was appended. `entryId`: the id of its entry, e.g. `1700000000000-0`. */
export type PublishedEvent = RowName & Readonly<{ entryId: string }>;

/** An event that is given up. `entryId`: of its dead letter. */
export type DeadEvent = RowName & Readonly<{ attempts: number; reason: string; entryId: string }>;

/**
 * Whether a statement on many rows may have failed by one of them: a constraint (SQLSTATE 23) or a trigger (P0, or what it
 * runs into: 22, 38, 39, 44) refuses its change. Then the rows are changed in smaller batches, and the others go on.
 */
export const rowMayBeAtFault = (error: unknown): boolean =>
  /^(22|23|38|39|44|P0)/.test(sqlState(error) ?? '');

export function createFinalize(pool: Pool, options: OutboxOptions) {
  return {
    /**
     * Marks rows published, in the order of their ids, so that two overlapping acknowledgements cannot deadlock. A row that
     * is published already gets this entry id. A row that is discarded, or holds another event, stays as it is.
     */
    async markPublished(tx: Queryable, events: readonly PublishedEvent[]): Promise<void> {
      await tx.query({
        name: 'relay-publish',
        // clock_timestamp(), not now(): the transaction may have begun long before, and waited.
        text: `UPDATE identity.outbox o
               SET published = true, published_at = coalesce(CASE WHEN o.published THEN o.published_at END, clock_timestamp()),
                   next_attempt_at = NULL, stream_entry_id = r.entry_id, dead_lettered_at = NULL
               FROM unnest($1::bigint[], $2::uuid[], $3::text[]) AS r (id, event_id, entry_id)
               WHERE ${SAME_EVENT('o', 'r')}
                 AND CASE WHEN o.published THEN o.dead_lettered_at IS NULL ELSE true END`,
        values: [events.map((it) => it.id), events.map((it) => it.eventId), events.map((it) => it.entryId)],
      });
    },

    /**
     * Marks a row dead. A row that is published, discarded, or has its dead letter stays as it is. A dead letter that Redis
     * lost and that is written again gets a new time: the next comparison only looks for entries since a certain time.
     *
     * @returns whether the row was marked; false where it stays as it is
     */
    async markDead(tx: Queryable, dead: DeadEvent): Promise<boolean> {
      const { rowCount } = await tx.query(
        `UPDATE identity.outbox o
         SET dead_lettered_at = clock_timestamp(), next_attempt_at = 'infinity',
             attempts = $3, error_message = $4, stream_entry_id = $5
         WHERE o.id = $1 AND o.event_id = $2
           AND CASE WHEN o.published THEN false ELSE o.dead_lettered_at IS NULL OR o.stream_entry_id IS NULL END`,
        [dead.id, dead.eventId, dead.attempts, dead.reason, dead.entryId],
      );
      return rowCount !== 0;
    },

    /** Records a failed attempt on its row: how many there were, why, and when the next one comes. */
    async recordFailure(
      failure: RowName & Readonly<{ attempts: number; reason: string; retryInMs: number }>,
    ): Promise<void> {
      await asking(pool, options.statementTimeoutMs, 'durable').query(
        `UPDATE identity.outbox o
           SET attempts = $3, error_message = $4, next_attempt_at = now() + $5 ${MS}
           -- Whether the row is leased is not asked: an attempt may fail before its claim has committed.
           WHERE o.id = $1 AND o.event_id = $2 AND ${STILL_LIVE('o')} AND o.attempts <= $3`,
        [failure.id, failure.eventId, failure.attempts, failure.reason, failure.retryInMs],
      );
    },

    /**
     * Parks rows whose jobs were released. `failed` are the events right before them that have failed: their rows get
     * `attempts` of at least 1. Otherwise refill would free the parked rows at once.
     */
    async park(eventIds: readonly string[], failed: readonly string[]): Promise<void> {
      await asking(pool, options.statementTimeoutMs).query(
        // `is_leased` is read from the locked row. A job may be released before its claim has committed: then this
        // statement still sees a fresh row in its snapshot, waits for the lock, and gets the leased row.
        `WITH named AS MATERIALIZED (
             SELECT o.id FROM unnest($1::uuid[] || $2::uuid[]) AS a (event_id)
             CROSS JOIN LATERAL (SELECT o.id FROM identity.outbox o WHERE o.event_id = a.event_id LIMIT 1) o
             ORDER BY o.id
           ), locked AS MATERIALIZED (
             SELECT l.* FROM named CROSS JOIN LATERAL (
               SELECT o.id, o.event_id = ANY ($2::uuid[]) AS failed,
                 ${STILL_LIVE('o')} AND o.next_attempt_at < 'infinity' AS is_leased
               FROM identity.outbox o WHERE o.id = named.id FOR UPDATE
             ) l
           )
           UPDATE identity.outbox o
           SET attempts = CASE WHEN locked.failed THEN greatest(o.attempts, 1) ELSE o.attempts END,
               next_attempt_at = CASE WHEN o.event_id = ANY ($1::uuid[]) THEN 'infinity' ELSE o.next_attempt_at END
           FROM locked WHERE o.id = locked.id AND locked.is_leased`,
        [eventIds, failed],
      );
    },
  };
}
