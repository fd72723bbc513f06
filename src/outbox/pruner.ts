import { type Pool, type Queryable, transaction } from '../connections/database.ts';

/**
 * Deleting published rows that are old enough. They are found by two indexes, in the order of their time: those with
 * a receipt by the index that compares receipts with streams, those without (another system published them) by one
 * that the relay's own rows never enter. So neither a backlog nor younger rows are read, and publishing pays nothing.
 */

/** `receipted`: published by the relay. `unreceipted`: by another system, before. */
export type PrunableKind = 'receipted' | 'unreceipted';
export const PRUNABLE_KINDS: readonly PrunableKind[] = ['receipted', 'unreceipted'];

/** Place of a row in the order of its kind. */
export type PrunePlace = Readonly<{ at: string; id: string }>;
export const FIRST_PLACE: PrunePlace = { at: '-infinity', id: '0' };

export type PruneStep = Readonly<{
  kind: PrunableKind;
  after: PrunePlace;
  /** Time of the database: rows published before may go. */
  before: string;
  /** Rows looked at, at most. */
  limit: number;
  /** Deletes nothing: tells what would be deleted. */
  dryRun?: boolean;
}>;

export type PruneResult = Readonly<{
  deleted: number;
  /** Where the next step begins; null: there is nothing further. */
  next: PrunePlace | null;
}>;

/** Spells "rlay", "prun". */
const PRUNING = '1919705465, 1886549358';

const WALKS: Record<PrunableKind, { at: string; condition: string }> = {
  receipted: {
    at: 'coalesce(o.dead_lettered_at, o.published_at)',
    condition: 'o.stream_entry_id IS NOT NULL',
  },
  unreceipted: {
    at: 'coalesce(o.published_at, o.created_at)',
    condition: 'o.published AND o.stream_entry_id IS NULL',
  },
};

/**
 * Neither dead nor discarded, nor skipped by an operator: such rows are kept, whatever their age. Asked of rows that
 * were found by other means, so put in a way that no index (the platform has one on `published`) seems to answer.
 */
const PRUNABLE = 'CASE WHEN o.published THEN o.dead_lettered_at IS NULL ELSE false END';

export function createPruner(pool: Pool, { statementTimeoutMs }: Readonly<{ statementTimeoutMs: number }>) {
  async function look(tx: Queryable, step: PruneStep): Promise<PruneResult> {
    const { at, condition } = WALKS[step.kind];
    const { rows } = await tx.query<{ deleted: number; looked: number; last: [string, string] | null }>({
      name: `relay-prune-${step.kind}-${step.dryRun === true}`,
      text: `WITH looked AS MATERIALIZED (
         SELECT o.id, ${at} AS at, ${PRUNABLE} AS prunable FROM identity.outbox o
         WHERE ${condition} AND (${at}, o.id) > ($1::timestamptz, $2::bigint) AND ${at} < $3::timestamptz
         ORDER BY ${at}, o.id LIMIT $4
       ), gone AS (
         ${
           step.dryRun
             ? 'SELECT FROM looked WHERE prunable'
             : `DELETE FROM identity.outbox o
                WHERE o.id = ANY (ARRAY(SELECT id FROM looked WHERE prunable)) AND ${PRUNABLE} RETURNING o.id`
         }
       )
       SELECT (SELECT count(*) FROM gone)::int AS deleted, (SELECT count(*) FROM looked)::int AS looked,
              (SELECT json_build_array(at::text, id::text) FROM looked ORDER BY at DESC, id DESC LIMIT 1) AS last`,
      values: [step.after.at, step.after.id, step.before, step.limit],
    });
    const [{ deleted, looked, last }] = rows as [(typeof rows)[number]];
    const isEnd = looked < step.limit || last === null;
    return { deleted, next: isEnd ? null : { at: last[0], id: last[1] } };
  }

  return {
    /**
     * One short transaction: looks at the next rows and deletes those that may go, unless another process is doing so.
     * Done again after a crash of PostgreSQL, should that undo it.
     */
    step: (step: PruneStep): Promise<PruneResult | 'busy'> =>
      transaction(pool, statementTimeoutMs, 'repeatable', async (tx) => {
        if (step.dryRun) return look(tx, step);
        const { rows } = await tx.query(`SELECT pg_try_advisory_xact_lock(${PRUNING}) AS mine`);
        return rows[0].mine ? look(tx, step) : 'busy';
      }),

    /** The database's time so long ago. */
    async ago(ms: number): Promise<string> {
      const { rows } = await pool.query<{ at: string }>(
        `SELECT (now() - $1 * interval '1 millisecond')::text AS at`,
        [ms],
      );
      return (rows[0] as { at: string }).at;
    },
  };
}
