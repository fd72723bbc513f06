import type { QueryConfig } from 'pg';
import type { Pool } from './database.ts';
import { RESULT_TYPES } from './result-types.ts';
import { withSession } from './session.ts';

/**
 * Locks between pods are those of empty tables. An advisory lock takes no right: any log-in could hold the relay up. Like
 * those they write no row, and end with their transaction.
 */
export type TableLock = Readonly<{
  table: string;
  /**
   * `ROW SHARE` goes with itself and not with `EXCLUSIVE`, which goes with neither. `ACCESS SHARE` is what every SELECT
   * takes: only what empties, rewrites or alters a table excludes it.
   */
  mode: 'ACCESS SHARE' | 'ROW SHARE' | 'EXCLUSIVE';
  /** How long it is waited for; 0: not at all. */
  waitMs: number;
}>;

/** One pod claims at a time. Others do meanwhile; none does for so long. */
export const CLAIM_LOCK: TableLock = {
  table: 'identity.relay_claim_lock',
  mode: 'EXCLUSIVE',
  waitMs: 10_000,
};

/** One process deletes old rows at a time. */
export const PRUNE_LOCK: TableLock = { table: 'identity.relay_prune_lock', mode: 'EXCLUSIVE', waitMs: 0 };

/** Shared by what rests on an epoch; what waits until all of that has ended has it alone. */
export const epochLock = (mode: TableLock['mode'], waitMs: number): TableLock => ({
  table: 'identity.relay_epoch_lock',
  mode,
  waitMs,
});

/**
 * The outbox itself, for a transaction that asks of which generation it is and then reads rows: nobody empties the table
 * or writes it anew in between.
 */
export const outboxLock = (waitMs: number): TableLock => ({
  table: 'identity.outbox',
  mode: 'ACCESS SHARE',
  waitMs,
});

/** What PostgreSQL answers when the lock was not to be had in time. */
export const LOCK_NOT_AVAILABLE = '55P03';

export const lockStatement = ({ table, mode, waitMs }: TableLock): string =>
  `LOCK TABLE ${table} IN ${mode} MODE${waitMs === 0 ? ' NOWAIT' : ''}`;

/** Another session has kept a lock of the relay for too long. */
export class LockHeldError extends Error {
  override readonly name = 'LockHeldError';
  /** Whether one transaction is known to have had it all the time; else other pods may have had it meanwhile. */
  readonly isHeldThroughout: boolean;
  constructor({ table, waitMs }: TableLock, holder: Holder | undefined) {
    super(
      `waited ${waitMs / 1_000} s for the lock on ${table}` +
        (holder === undefined
          ? ', which is free by now'
          : `, which process ${holder.pid} of PostgreSQL holds (application "${holder.application}", role ${holder.role}, address ${holder.address}): ` +
            `find out what it does; SELECT pg_terminate_backend(${holder.pid}) ends it`),
    );
    this.isHeldThroughout = holder?.isHeldThroughout ?? false;
  }
}

type Session = Readonly<{ pid: number; application: string; role: string; address: string }>;
type Holder = Session & Readonly<{ isHeldThroughout: boolean }>;

/** By table: the transaction that had its lock when that was last asked, and since when it is known to have it. */
const lastHolders = new Map<string, Readonly<{ transaction: string; since: number }>>();

/** When this transaction was first seen to hold the lock, by `performance.now()`. */
function seenSince(table: string, transaction: string): number {
  const last = lastHolders.get(table);
  if (last?.transaction === transaction) return last.since;
  const since = performance.now();
  lastHolders.set(table, { transaction, since });
  return since;
}

/**
 * Who has a lock that excludes others, the longest first. How long is hidden of a session of another role, which may be
 * another pod's: of that counts how long it was seen here.
 */
async function holderOf(pool: Pool, { table, mode, waitMs }: TableLock): Promise<Holder | undefined> {
  const { rows } = await withSession(pool, (client) =>
    client.query<Session & { transaction: string; isOld: boolean | null }>({
      text: `SELECT l.pid, l.pid || ' ' || l.virtualtransaction AS transaction, coalesce(a.application_name, '') AS application, coalesce(a.usename, '') AS role,
               coalesce(a.client_addr::text, 'local') AS address,
               a.xact_start < clock_timestamp() - $2 * interval '1 millisecond' AS "isOld"
             FROM pg_locks l LEFT JOIN pg_stat_activity a USING (pid)
             WHERE l.relation = to_regclass($1) AND l.granted AND l.pid <> pg_backend_pid()
               AND l.mode <> ALL ($3::text[])
               AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
             ORDER BY a.xact_start LIMIT 1`,
      values: [table, waitMs, HARMLESS[mode]],
      types: RESULT_TYPES,
      query_timeout: ANSWER_MS,
    } as QueryConfig),
  );
  const [holder] = rows;
  if (holder === undefined) return undefined;
  const seenMs = performance.now() - seenSince(table, holder.transaction);
  return { ...holder, isHeldThroughout: holder.isOld ?? seenMs >= waitMs };
}

/** One of these locks was not to be had: what to say of it. */
export async function heldBy(
  pool: Pool,
  locks: readonly [TableLock, ...TableLock[]],
): Promise<LockHeldError> {
  for (const lock of locks) {
    const holder = await holderOf(pool, lock).catch(() => undefined);
    if (holder !== undefined) return new LockHeldError(lock, holder);
  }
  return new LockHeldError(locks[0], undefined);
}

/** @throws {LockHeldError} when one session has had a lock that pods need for longer than they wait for it */
export async function assertLocksPass(pool: Pool): Promise<void> {
  const { waitMs } = CLAIM_LOCK;
  for (const lock of [CLAIM_LOCK, epochLock('ROW SHARE', waitMs), outboxLock(waitMs)]) {
    const holder = await holderOf(pool, lock);
    if (holder?.isHeldThroughout) throw new LockHeldError(lock, holder);
  }
}

const HARMLESS_TO_SHARES = [
  ...['AccessShareLock', 'RowShareLock', 'RowExclusiveLock'],
  ...['ShareUpdateExclusiveLock', 'ShareLock', 'ShareRowExclusiveLock'],
];
/** The modes of others that a lock does not wait for. */
const HARMLESS: Readonly<Record<TableLock['mode'], readonly string[]>> = {
  'ACCESS SHARE': [...HARMLESS_TO_SHARES, 'ExclusiveLock'],
  'ROW SHARE': HARMLESS_TO_SHARES,
  EXCLUSIVE: ['AccessShareLock'],
};
const ANSWER_MS = 5_000;
