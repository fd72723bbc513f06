/**
 * What events cost, counted: independent of how busy the machine is. Statements by pg_stat_statements, rows by
 * pg_stat_user_tables, calls to Redis by MONITOR, which tells those of clients from those within scripts.
 */
import { Redis } from 'ioredis';
import type pg from 'pg';
import { pause } from './servers.ts';

export type Counts = Readonly<{
  /** Claims, acknowledgements, and whatever else is no transaction control. */
  statements: Readonly<{ claim: number; acknowledge: number; other: number }>;
  /** BEGIN, settings, locks, the generation: what came with them. */
  control: number;
  commits: number;
  /** Written by these statements, commit records excluded. */
  walBytes: number;
  redis: Readonly<{
    /** Calls of clients, by command. */
    calls: Readonly<Record<string, number>>;
    callsTotal: number;
    /** Commands that scripts ran. */
    withinScripts: number;
    /** Times that a worker looked for a job, whether there was one or not. */
    looks: number;
    /** Times that the server found something to read on a connection: round trips, where calls are pipelined. */
    reads: number;
  }>;
  /** Statements that are no claim and no acknowledgement: their texts, for whoever wonders. */
  others: readonly Readonly<{ calls: number; query: string }>[];
}>;

type Counter = Readonly<{ read(): Promise<Counts> }>;

/** Until what was done is in the statistics of a backend that has not ended. */
const STATISTICS_DEADLINE_MS = 15_000;

/**
 * Begins to count what `role` does in PostgreSQL, and in Redis whoever is not to be ignored. MONITOR costs Redis as much as a command does, so times that are measured meanwhile are none.
 */
export async function startCounting(
  servers: Readonly<{
    pool: pg.Pool;
    redisUrl: string;
    role: string;
    /** Connections that are none of the contender's. */
    ignore?: readonly Redis[];
  }>,
): Promise<Counter> {
  const { pool, redisUrl, role, ignore = [] } = servers;
  const redis = new Redis(redisUrl);
  const ours = new Set<string>();
  for (const it of [redis, ...ignore]) {
    ours.add(/\baddr=(\S+)/.exec(String(await it.client('INFO')))?.[1] ?? '');
  }
  const monitor = await redis.monitor();
  const calls: Record<string, number> = {};
  let withinScripts = 0;
  let looks = 0;
  let byUs = 0;
  const count = (_time: string, args: string[], source: string) => {
    if (ours.has(source)) {
      byUs++;
      return;
    }
    const command = String(args[0]).toLowerCase();
    if (source === 'lua') {
      withinScripts++;
      if (command === 'rpoplpush') looks++;
    } else calls[command] = (calls[command] ?? 0) + 1;
  };
  monitor.on('monitor', count);
  await pool.query('SELECT pg_stat_statements_reset()');
  const readsBefore = await reads();

  return {
    async read() {
      const readsAfter = await reads();
      const { rows } = await pool.query<{ query: string; calls: number; wal: number; utility: boolean }>(
        `SELECT query, calls::int, wal_bytes::float8 AS wal
           FROM pg_stat_statements s JOIN pg_roles r ON r.oid = s.userid WHERE r.rolname = $1`,
        [role],
      );
      // What is still on its way from MONITOR.
      await pause(100);
      monitor.disconnect();
      redis.disconnect();
      const kinds = { claim: 0, acknowledge: 0, other: 0, control: 0, commits: 0 };
      const others: { calls: number; query: string }[] = [];
      let walBytes = 0;
      for (const row of rows) {
        const kind = kindOf(row.query);
        kinds[kind] += row.calls;
        walBytes += row.wal;
        if (kind === 'other')
          others.push({ calls: row.calls, query: row.query.replaceAll(/\s+/g, ' ').slice(0, 160) });
      }
      const { control, commits, ...statements } = kinds;
      const callsTotal = Object.values(calls).reduce((sum, n) => sum + n, 0);
      return {
        ...{ statements, control, commits, walBytes },
        redis: { calls, callsTotal, withinScripts, looks, reads: readsAfter - readsBefore - byUs },
        others: others.sort((a, b) => b.calls - a.calls),
      };
    },
  };

  async function reads(): Promise<number> {
    return Number(/^total_reads_processed:(\d+)/m.exec(await redis.info('stats'))?.[1]);
  }
}

function kindOf(query: string): 'claim' | 'acknowledge' | 'other' | 'control' | 'commits' {
  if (/^\s*(COMMIT|END)\b/i.test(query)) return 'commits';
  if (/^\s*(BEGIN|START|SET|RESET|ROLLBACK|SAVEPOINT|RELEASE)\b/i.test(query)) return 'control';
  if (/^\s*(SELECT pg_catalog\.set_config\(|LOCK TABLE identity\.)/i.test(query)) return 'control';
  // The generation, which each transaction is asked for.
  if (/^\s*SELECT CASE WHEN pg_is_in_recovery\(\)/i.test(query)) return 'control';
  if (/\bpublished = (true|\$\d+), published_at\b/i.test(query)) return 'acknowledge';
  // The relay's refill frees parked rows for the next claim.
  if (/\bfreed AS\b/i.test(query)) return 'other';
  if (/\bUPDATE\b/i.test(query) && /\bSKIP LOCKED\b/i.test(query)) return 'claim';
  return 'other';
}

export type RowWrites = Readonly<{ inserted: number; updated: number; deleted: number; hot: number }>;

/** Rows of the outbox written so far: exact when those who wrote them have disconnected. */
export async function rowWrites(pool: pg.Pool): Promise<RowWrites> {
  const { rows } = await pool.query(
    `SELECT n_tup_ins::int AS inserted, n_tup_upd::int AS updated, n_tup_del::int AS deleted, n_tup_hot_upd::int AS hot
       FROM pg_stat_user_tables WHERE relid = 'identity.outbox'::regclass`,
  );
  return rows[0];
}

/** Waits until the contender's sessions have ended: then its row writes are all counted. */
export async function sessionsEnded(pool: pg.Pool, role: string): Promise<void> {
  const deadline = Date.now() + STATISTICS_DEADLINE_MS;
  for (;;) {
    const { rows } = await pool.query('SELECT count(*)::int AS n FROM pg_stat_activity WHERE usename = $1', [
      role,
    ]);
    if (rows[0].n === 0) return;
    if (Date.now() > deadline) throw new Error(`${rows[0].n} sessions of ${role} do not end`);
    await pause(50);
  }
}
