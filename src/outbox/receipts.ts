import type { OutboxEvent, Receipt } from '../event.ts';
import { type Pool, type Queryable, transaction } from './database.ts';
import { eventsOf, payloadMayBeAtFault } from './event-of-row.ts';

/**
 * Rows whose entry is in Redis, as their receipt `stream_entry_id` says: published ones in their stream, dead ones in
 * the dead-letter stream. Should Redis lose entries, the receipts tell which.
 */

/** A row with a receipt. */
export type SettledRow = Readonly<{
  id: string;
  /** Key of its stream; null for the dead-letter stream. */
  topic: string | null;
  entryId: string;
  /** When it was published or given up, as the database prints it. */
  settledAt: string;
  /** Stored bytes of the payload. */
  bytes: number;
}>;

/** A row whose entry is in the stream of its topic; with the time of `settledAt` in microseconds, to compare. */
export type PublishedRow = SettledRow & Readonly<{ topic: string; settledUs: string }>;

/** An event to be appended again; of a dead row with what its dead letter says. */
export type SettledEvent = OutboxEvent &
  Readonly<{ errorMessage: string | null; deadLetteredAt: Date | null; entryId: string }>;

/** Which published events are meant; what is left out does not matter. */
export type PublishedFilter = Readonly<{
  topic?: string;
  eventType?: string;
  aggregateType?: string;
  /** uuid */
  aggregateId?: string;
}>;

/** Place of a row in the order of settling. */
export type SettledPlace = Readonly<{ settledAt: string; id: string }>;

export type Receipts = ReturnType<typeof createReceipts>;

/** Spells "rlay", "setl". */
const SETTLING = '1919705465, 1936028780';
/** The database's clock may step back this far, e.g. when a replica takes over, and nothing is overlooked. */
const CLOCK_STEP_MS = 5_000;

const SETTLED_AT = 'coalesce(o.dead_lettered_at, o.published_at)';

export function createReceipts(
  pool: Pool,
  options: Readonly<{ streamName: string; maxEventBytes: number; statementTimeoutMs: number }>,
) {
  const { streamName, maxEventBytes, statementTimeoutMs } = options;
  const read = <T>(work: (tx: Queryable) => Promise<T>) =>
    transaction(pool, statementTimeoutMs, 'repeatable', work);

  const select = (ids: readonly string[], printing: boolean): Promise<SettledEvent[]> =>
    read(async (tx) => {
      const { rows } = await tx.query<SettledEvent>(
        `WITH settled AS (
           SELECT * FROM identity.outbox
           WHERE id = ANY ($2::bigint[]) AND stream_entry_id IS NOT NULL AND (published OR dead_lettered_at IS NOT NULL)
         ) ${eventsOf('settled', maxEventBytes, {
           columns: `o.error_message AS "errorMessage", o.dead_lettered_at AS "deadLetteredAt",
                     o.stream_entry_id AS "entryId",`,
           ...(!printing && { printed: 'false', otherwise: 'o.error_message' }),
         })}`,
        [streamName, ids],
      );
      return rows.toSorted((a, b) => (BigInt(a.id) < BigInt(b.id) ? -1 : 1));
    });

  /**
   * The events of these rows, in order of id; rows that have no receipt any more are left out, and those that are
   * neither published nor dead: a replayed one keeps the receipt of its dead letter. Of a row that cannot be printed (it
   * is dead for that) the payload is withheld, as it was the first time.
   */
  async function events(ids: readonly string[]): Promise<SettledEvent[]> {
    try {
      return await select(ids, true);
    } catch (error) {
      if (!payloadMayBeAtFault(error)) throw error;
      if (ids.length === 1) return select(ids, false);
      const found: SettledEvent[] = [];
      for (const id of ids) found.push(...(await events([id])));
      return found;
    }
  }

  return {
    /** A transaction that gives receipts: until it ends, `given` waits for it. */
    giving: <T>(work: (tx: Queryable) => Promise<T>) =>
      transaction(pool, statementTimeoutMs, 'durable', work, {
        lock: `pg_advisory_xact_lock_shared(${SETTLING})`,
      }),

    /** Resolves when every such transaction that has begun is committed, and can be seen, or undone. */
    async given(): Promise<void> {
      await read((tx) => tx.query(`SELECT pg_advisory_xact_lock(${SETTLING})`));
    },

    /** The database's time, to the microsecond. */
    async time(): Promise<string> {
      const { rows } = await pool.query<{ now: string }>('SELECT clock_timestamp()::text AS now');
      return (rows[0] as { now: string }).now;
    },

    /** Where a comparison begins: `windowMs` ago, or at `intactUntil` if that is later. */
    async comparedFrom(windowMs: number, intactUntil: string | null): Promise<string> {
      const { rows } = await pool.query<{ since: string }>(
        `SELECT greatest(now() - $1 * interval '1 millisecond',
                         $2::timestamptz - $3 * interval '1 millisecond')::text AS since`,
        [windowMs, intactUntil, CLOCK_STEP_MS],
      );
      return (rows[0] as { since: string }).since;
    },

    /** The rows after that place up to `until`, in the order in which they were settled. */
    rows: (after: SettledPlace, until: string, limit: number): Promise<SettledRow[]> =>
      read(async (tx) => {
        const { rows } = await tx.query<SettledRow>(
          `SELECT o.id::text AS "id", CASE WHEN o.dead_lettered_at IS NULL THEN coalesce(o.topic, $1) END AS "topic",
                  o.stream_entry_id AS "entryId", ${SETTLED_AT}::text AS "settledAt",
                  pg_column_size(o.payload) AS "bytes"
           FROM identity.outbox o
           WHERE o.stream_entry_id IS NOT NULL AND (${SETTLED_AT}, o.id) > ($2::timestamptz, $3::bigint)
             AND ${SETTLED_AT} <= $4::timestamptz
           ORDER BY ${SETTLED_AT}, o.id LIMIT $5`,
          [streamName, after.settledAt, after.id, until, limit],
        );
        return rows;
      }),

    /** Of the same rows, those that are in the stream of their topic and match. */
    published: (
      filter: PublishedFilter,
      after: SettledPlace,
      until: string,
      limit: number,
    ): Promise<PublishedRow[]> =>
      read(async (tx) => {
        const { rows } = await tx.query<PublishedRow>(
          `SELECT o.id::text AS "id", coalesce(o.topic, $1) AS "topic", o.stream_entry_id AS "entryId",
                  ${SETTLED_AT}::text AS "settledAt", pg_column_size(o.payload) AS "bytes",
                  round(extract(epoch FROM ${SETTLED_AT}) * 1000000)::bigint::text AS "settledUs"
           FROM identity.outbox o
           WHERE o.stream_entry_id IS NOT NULL AND (${SETTLED_AT}, o.id) > ($2::timestamptz, $3::bigint)
             AND ${SETTLED_AT} <= $4::timestamptz AND o.published AND o.dead_lettered_at IS NULL
             AND ($6::text IS NULL OR coalesce(o.topic, $1) = $6) AND ($7::text IS NULL OR o.event_type = $7)
             AND ($8::text IS NULL OR o.aggregate_type = $8) AND ($9::uuid IS NULL OR o.aggregate_id = $9)
           ORDER BY ${SETTLED_AT}, o.id LIMIT $5`,
          [
            ...[streamName, after.settledAt, after.id, until, limit],
            ...[filter.topic, filter.eventType, filter.aggregateType, filter.aggregateId],
          ],
        );
        return rows;
      }),

    events,

    /** The entries were appended again. A receipt that somebody else has renewed meanwhile stays as it is. */
    async renew(receipts: readonly (Receipt & Readonly<{ lostId: string }>)[]): Promise<void> {
      await pool.query(
        `UPDATE identity.outbox o SET stream_entry_id = r.entry_id
         FROM unnest($1::bigint[], $2::text[], $3::text[]) AS r (id, entry_id, lost_id)
         WHERE o.id = r.id AND o.stream_entry_id = r.lost_id`,
        [receipts.map((it) => it.id), receipts.map((it) => it.entryId), receipts.map((it) => it.lostId)],
      );
    },
  };
}
