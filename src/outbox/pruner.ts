import type pg from 'pg';
import { type Pool, type Queryable, transaction } from '../connections/database.ts';
import { LockHeldError, PRUNE_LOCK } from '../connections/table-lock.ts';
import { errorText } from '../telemetry/logger.ts';
import { FINALIZED_AT } from './conditions.ts';

/**
 * Deletes old published rows. Two indexes find them in the order of their time. Rows with an entry id are in the index by
 * which rows are compared with streams. Rows without one (another system published them) are in an index that the relay's
 * own rows never enter. So no backlog and no younger rows are read, and publishing costs nothing more.
 */

/** `with-entry`: published by the relay. `without-entry`: published by another system before. */
type PrunableKind = 'with-entry' | 'without-entry';
export const PRUNABLE_KINDS: readonly PrunableKind[] = ['with-entry', 'without-entry'];

/** A row's place in the order in which its kind is read. */
type PrunePlace = Readonly<{ at: string; id: string }>;
export const FIRST_PLACE: PrunePlace = { at: '-infinity', id: '0' };

export type PruneStep = Readonly<{
  kind: PrunableKind;
  after: PrunePlace;
  /** Time of the database. Rows published before it are deleted. */
  before: string;
  /** Most rows to read. */
  limit: number;
  /** Deletes nothing, but counts what would be deleted. */
  dryRun?: boolean;
}>;

/** A row that the database refused to delete, because of a foreign key, a trigger or row level security. */
export type KeptRow = Readonly<{ id: string; reason: string }>;

type Removal = Readonly<{ deleted: number; kept: readonly KeptRow[] }>;

/** `next`: where the next step begins; null at the end. */
export type PruneResult = Removal & Readonly<{ next: PrunePlace | null }>;

const WALKS: Record<PrunableKind, { at: string; condition: string }> = {
  'with-entry': {
    at: FINALIZED_AT('o'),
    condition: 'o.stream_entry_id IS NOT NULL',
  },
  'without-entry': {
    at: 'coalesce(o.published_at, o.created_at)',
    condition: 'o.published AND o.stream_entry_id IS NULL',
  },
};

/**
 * Dead and discarded rows, and those that an operator skipped, are kept, whatever their age. The CASE keeps the planner from
 * using the platform's index on `published`; the conditions of WALKS choose the index.
 */
const PRUNABLE = 'CASE WHEN o.published THEN o.dead_lettered_at IS NULL ELSE false END';

/** When to try a kept row again. */
const KEPT_FOR_MS = 3_600_000;
/** Most kept rows that are remembered. */
const KEPT_MAX = 10_000;

/** SQLSTATE classes of errors that no row causes: connection, permission on the table, resources, shutdown. */
const BY_NO_ROW = /^(08|25|28|3D|3F|42|53|57P|58)/;
const mayBeByRow = (error: unknown): error is Error => {
  const { code } = error as Partial<pg.DatabaseError>;
  return typeof code === 'string' && code.length === 5 && !BY_NO_ROW.test(code);
};
const SILENTLY =
  'it was not deleted, and there was no error: a trigger, a rule or row level security keeps it';

export function createPruner(pool: Pool, { statementTimeoutMs }: Readonly<{ statementTimeoutMs: number }>) {
  /** Ids of kept rows, and until when (Unix time in ms) they are not tried. */
  const kept = new Map<string, number>();

  function keptNow(): string[] {
    for (const [id, until] of kept) if (until <= Date.now()) kept.delete(id);
    return [...kept.keys()];
  }

  function keep(rows: readonly KeptRow[]): void {
    for (const { id } of rows) if (kept.size < KEPT_MAX) kept.set(id, Date.now() + KEPT_FOR_MS);
  }

  /** Reads the next rows, and returns the ids of those to delete. */
  async function look(tx: Queryable, step: PruneStep): Promise<{ ids: string[]; next: PrunePlace | null }> {
    const { at, condition } = WALKS[step.kind];
    const { rows } = await tx.query<{ ids: string[]; looked: number; last: [string, string] | null }>({
      name: `relay-prune-look-${step.kind}`,
      text: `WITH looked AS MATERIALIZED (
         SELECT o.id, ${at} AS at, ${PRUNABLE} AS prunable FROM identity.outbox o
         WHERE ${condition} AND (${at}, o.id) > ($1::timestamptz, $2::bigint) AND ${at} < $3::timestamptz
         ORDER BY ${at}, o.id LIMIT $4
       )
       SELECT array(SELECT id::text FROM looked WHERE prunable AND id <> ALL ($5::bigint[])) AS ids,
              (SELECT count(*) FROM looked)::int AS looked,
              (SELECT json_build_array(at::text, id::text) FROM looked ORDER BY at DESC, id DESC LIMIT 1) AS last`,
      values: [step.after.at, step.after.id, step.before, step.limit, keptNow()],
    });
    const [{ ids, looked, last }] = rows as [(typeof rows)[number]];
    const isEnd = looked < step.limit || last === null;
    return { ids, next: isEnd ? null : { at: last[0], id: last[1] } };
  }

  /** Deletes those of these rows that are still prunable. */
  async function remove(tx: Queryable, ids: readonly string[]): Promise<Removal> {
    const { rowCount } = await tx.query({
      name: 'relay-prune',
      text: `DELETE FROM identity.outbox o WHERE o.id = ANY ($1::bigint[]) AND ${PRUNABLE}`,
      values: [ids],
    });
    const deleted = rowCount ?? 0;
    if (deleted === ids.length) return { deleted, kept: [] };
    // A statement of its own: it sees which rows others have changed or deleted meanwhile, and nothing keeps those.
    const { rows } = await tx.query<{ id: string }>(
      `SELECT o.id::text AS id FROM identity.outbox o WHERE o.id = ANY ($1::bigint[]) AND ${PRUNABLE}`,
      [ids],
    );
    return { deleted, kept: rows.map(({ id }) => ({ id, reason: SILENTLY })) };
  }

  /**
   * Runs `work` in a transaction if no other process deletes. The commit does not wait for the disk: if a crash of PostgreSQL
   * undoes it, the rows are deleted again.
   */
  const alone = <T>(work: (tx: Queryable) => Promise<T>): Promise<T | 'busy'> =>
    transaction(pool, statementTimeoutMs, 'repeatable', work, { locks: [PRUNE_LOCK] }).catch((error) => {
      if (error instanceof LockHeldError) return 'busy';
      throw error;
    });

  /**
   * Called when the deletion of these rows failed, because of one row or because all together took too long. Deletes by
   * halves, each in a transaction of its own, until the rows at fault are found.
   */
  async function removeByHalves(ids: readonly string[]): Promise<Removal | 'busy'> {
    try {
      return await alone((tx) => remove(tx, ids));
    } catch (error) {
      const [id] = ids;
      if (!mayBeByRow(error) || id === undefined) throw error;
      if (ids.length === 1) return { deleted: 0, kept: [{ id, reason: errorText(error) }] };
      const middle = Math.ceil(ids.length / 2);
      const first = await removeByHalves(ids.slice(0, middle));
      const second = first === 'busy' ? first : await removeByHalves(ids.slice(middle));
      if (first === 'busy' || second === 'busy') return 'busy';
      return { deleted: first.deleted + second.deleted, kept: [...first.kept, ...second.kept] };
    }
  }

  return {
    /**
     * Reads the next rows and deletes the prunable ones in one short transaction, unless another process deletes. A row that
     * the database keeps is not tried again for an hour; the others are deleted.
     */
    async step(step: PruneStep): Promise<PruneResult | 'busy'> {
      if (step.dryRun) {
        const { ids, next } = await transaction(pool, statementTimeoutMs, 'repeatable', (tx) =>
          look(tx, step),
        );
        return { deleted: ids.length, kept: [], next };
      }
      let found = { ids: [] as string[], next: null as PrunePlace | null };
      let removal: Removal | 'busy';
      try {
        removal = await alone(async (tx) => {
          found = await look(tx, step);
          return found.ids.length === 0 ? { deleted: 0, kept: [] } : remove(tx, found.ids);
        });
      } catch (error) {
        if (!mayBeByRow(error) || found.ids.length === 0) throw error;
        removal = await removeByHalves(found.ids);
      }
      if (removal === 'busy') return 'busy';
      keep(removal.kept);
      return { ...removal, next: found.next };
    },
  };
}
