import type { QueryConfig } from 'pg';
import type { Pool } from './database.ts';
import { RESULT_TYPES } from './result-types.ts';
import { withSession } from './session.ts';

/**
 * Pods exclude each other by locks on empty tables. Advisory locks need no right, so any role could block the relay with
 * one. Like advisory locks, table locks write no row and end with their transaction.
 */
export type TableLock = Readonly<{
  table: string;
  /**
   * Several transactions may hold `ROW SHARE`, but none beside `EXCLUSIVE`. Every SELECT takes `ACCESS SHARE`: only
   * statements that empty, rewrite or alter the table exclude it. Every change of a row takes `ROW EXCLUSIVE`, which CREATE
   * INDEX excludes as well.
   */
  mode: 'ACCESS SHARE' | 'ROW SHARE' | 'ROW EXCLUSIVE' | 'EXCLUSIVE';
  /** How long a transaction waits for the lock; 0: not at all. */
  waitMs: number;
}>;

/** One pod claims at a time. No claim job takes as long as the wait. */
export const CLAIM_LOCK: TableLock = {
  table: 'identity.relay_claim_lock',
  mode: 'EXCLUSIVE',
  waitMs: 10_000,
};

/** One process deletes old rows at a time. */
export const PRUNE_LOCK: TableLock = { table: 'identity.relay_prune_lock', mode: 'EXCLUSIVE', waitMs: 0 };

/**
 * Transactions that rest on an epoch share it (`ROW SHARE`). `EXCLUSIVE` waits until all of them have ended.
 */
export const epochLock = (mode: TableLock['mode'], waitMs: number): TableLock => ({
  table: 'identity.relay_epoch_lock',
  mode,
  waitMs,
});

/**
 * The outbox itself, for a transaction that reads its generation and then rows: no other transaction can empty or rewrite
 * the table in between.
 */
export const outboxLock = (waitMs: number): TableLock => ({
  table: 'identity.outbox',
  mode: 'ACCESS SHARE',
  waitMs,
});

/** SQLSTATE when a lock was not available in time. */
export const LOCK_NOT_AVAILABLE = '55P03';

export const lockStatement = ({ table, mode, waitMs }: TableLock): string =>
  `LOCK TABLE ${table} IN ${mode} MODE${waitMs === 0 ? ' NOWAIT' : ''}`;

/** Another session has kept a lock of the relay for too long. */
export class LockHeldError extends Error {
  override readonly name = 'LockHeldError';
  /** Whether one transaction is known to have held the lock all the time. If not, pods may have held it one after another. */
  readonly isHeldThroughout: boolean;
  constructor({ table, waitMs }: TableLock, holder: Holder | undefined) {
    super(
      `waited ${waitMs / 1_000} s for the lock on ${table}` +
        (holder === undefined
          ? ', which is free by now'
          : `, which process ${holder.pid} of PostgreSQL ${holder.isGranted ? 'holds' : 'waits for, with all others behind it'} (application "${holder.application}", role ${holder.role}, address ${holder.address}): ` +
            `find out what it does; SELECT pg_terminate_backend(${holder.pid}) ends it`),
    );
    this.isHeldThroughout = holder?.isHeldThroughout ?? false;
  }
}

type Session = Readonly<{
  pid: number;
  application: string;
  role: string;
  address: string;
  /** Otherwise it waits, and all that ask later wait behind it. */
  isGranted: boolean;
}>;
type Holder = Session & Readonly<{ isHeldThroughout: boolean }>;

/** By table: the transaction that held its lock at the last check, and since when this pod has seen it hold the lock. */
type LastHolders = Map<string, Readonly<{ transaction: string; since: number }>>;

/** Of each pool: an embedding program may run relays on several databases. */
const lastHoldersOf = new WeakMap<object, LastHolders>();

/** When this transaction was first seen to hold the lock, by `performance.now()`. */
function seenSince(pool: Pool, table: string, transaction: string): number {
  const { base = pool } = pool;
  const lastHolders: LastHolders = lastHoldersOf.get(base) ?? new Map();
  lastHoldersOf.set(base, lastHolders);
  const last = lastHolders.get(table);
  if (last?.transaction === transaction) return last.since;
  const since = performance.now();
  lastHolders.set(table, { transaction, since });
  return since;
}

/**
 * The session that has held a conflicting lock for the longest time. PostgreSQL hides how long a session of another role
 * (maybe another pod's) has run its transaction: for that session it counts how long this pod has seen it. Of the outbox it
 * is also one that waits, as ALTER TABLE does behind a long SELECT: for the other locks pods wait regularly, never for this one.
 */
async function holderOf(pool: Pool, { table, mode, waitMs }: TableLock): Promise<Holder | undefined> {
  const { rows } = await withSession(pool, (client) =>
    client.query<Session & { transaction: string; isOld: boolean | null }>({
      text: `SELECT l.pid, l.pid || ' ' || l.virtualtransaction AS transaction, coalesce(a.application_name, '') AS application, coalesce(a.usename, '') AS role,
               coalesce(a.client_addr::text, 'local') AS address, l.granted AS "isGranted",
               a.xact_start < clock_timestamp() - $2 * interval '1 millisecond' AS "isOld"
             FROM pg_locks l LEFT JOIN pg_stat_activity a USING (pid)
             WHERE l.relation = to_regclass($1) AND (l.granted OR $4) AND l.pid <> pg_backend_pid()
               AND l.mode <> ALL ($3::text[])
               AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
             ORDER BY l.granted DESC, a.xact_start LIMIT 1`,
      values: [table, waitMs, HARMLESS[mode], mode === 'ROW EXCLUSIVE'],
      types: RESULT_TYPES,
      query_timeout: ANSWER_MS,
    } as QueryConfig),
  );
  const [holder] = rows;
  if (holder === undefined) return undefined;
  const seenMs = performance.now() - seenSince(pool, table, holder.transaction);
  return { ...holder, isHeldThroughout: holder.isOld ?? seenMs >= waitMs };
}

/** The error for locks of which one was not available: it names the holder. */
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

/** What every change of a row takes. */
const rowChanges = (waitMs: number): TableLock => ({ ...outboxLock(waitMs), mode: 'ROW EXCLUSIVE' });

/** After a wait of `waitedMs`: the error that names the session that lets no row be changed; undefined where there is none. */
export async function rowsHeldBy(pool: Pool, waitedMs: number): Promise<LockHeldError | undefined> {
  const lock = rowChanges(waitedMs);
  const holder = await holderOf(pool, lock).catch(() => undefined);
  return holder && new LockHeldError(lock, holder);
}

/** @throws {LockHeldError} when one session has held a lock for longer than pods wait for it */
export async function assertNoLockHeldTooLong(pool: Pool): Promise<void> {
  const { waitMs } = CLAIM_LOCK;
  for (const lock of [CLAIM_LOCK, epochLock('ROW SHARE', waitMs), rowChanges(waitMs)]) {
    const holder = await holderOf(pool, lock);
    if (holder?.isHeldThroughout) throw new LockHeldError(lock, holder);
  }
}

const HARMLESS_TO_ROW_CHANGES = [
  'AccessShareLock',
  'RowShareLock',
  'RowExclusiveLock',
  'ShareUpdateExclusiveLock',
];
const HARMLESS_TO_SHARES = [...HARMLESS_TO_ROW_CHANGES, 'ShareLock', 'ShareRowExclusiveLock'];
/** Modes that other sessions may hold without making a lock of this mode wait. */
const HARMLESS: Readonly<Record<TableLock['mode'], readonly string[]>> = {
  'ACCESS SHARE': [...HARMLESS_TO_SHARES, 'ExclusiveLock'],
  'ROW SHARE': HARMLESS_TO_SHARES,
  'ROW EXCLUSIVE': HARMLESS_TO_ROW_CHANGES,
  EXCLUSIVE: ['AccessShareLock'],
};
const ANSWER_MS = 5_000;
