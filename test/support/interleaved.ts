/** Transactions that overlap in a chosen order: each is taken as far as it gets, and ends when the script says so. */
import type pg from 'pg';
import type { Pool } from '../../src/outbox/database.ts';
import type { AdminPool } from './stages.ts';

/** The process died, or its connection did: what the transaction did is undone. */
class Crash extends Error {
  override name = 'Crash';
}

export type Operation = {
  readonly name: string;
  readonly pid: number;
  /** `running` also while it waits for a lock of another; `open`: all is done but the commit. */
  state: 'running' | 'open' | 'ended';
  /** Why it was rolled back. */
  error: Error | undefined;
  end(how: 'commit' | 'crash'): void;
};

/** What an operation works with: one connection as a pool, and where it waits before its commit. */
export type Hands = Readonly<{ pool: Pool; client: pg.PoolClient; commitWhenTold: () => Promise<void> }>;

/** Whoever has not come to its end so soon is asked for whom it waits. */
const PATIENCE_MS = 4;
/** 12 s and more: what is left then never ends. */
const LOOKS_LIMIT = 3_000;

/** @param admin is asked who waits for whom */
export function createInterleaving(admin: AdminPool) {
  let operations: Operation[] = [];
  let somethingChanged = (): void => {};

  /** Starts `work` and returns when it has ended, waits to be committed, or waits for a lock that another holds. */
  async function start(
    name: string,
    pool: pg.Pool,
    work: (hands: Hands) => Promise<void>,
  ): Promise<Operation> {
    const client = await pool.connect();
    const operation: Operation = {
      name,
      pid: (client as pg.PoolClient & { processID: number }).processID,
      ...{ state: 'running', error: undefined, end: () => {} },
    };
    operations.push(operation);
    const commitWhenTold = () =>
      new Promise<void>((resolve, reject) => {
        operation.state = 'open';
        somethingChanged();
        operation.end = (how) => {
          operation.state = 'running';
          operation.end = () => {};
          if (how === 'commit') resolve();
          else reject(new Crash());
        };
      });
    const ended = (error?: Error) => {
      operation.state = 'ended';
      operation.error = error;
      client.release();
      somethingChanged();
    };
    work({ pool: poolOf(client), client, commitWhenTold }).then(() => ended(), ended);
    await settle();
    return operation;
  }

  async function settle(): Promise<void> {
    for (let looks = 0; ; looks++) {
      operations = operations.filter((it) => it.state !== 'ended');
      const running = operations.filter((it) => it.state === 'running');
      if (running.length === 0) return;
      if (looks > LOOKS_LIMIT) throw new Error(`never settles: ${running.map((it) => it.name)}`);
      const inTime = await new Promise((resolve) => {
        const timer = setTimeout(resolve, PATIENCE_MS, false);
        somethingChanged = () => {
          clearTimeout(timer);
          resolve(true);
        };
      });
      if (inTime) continue;
      const { rows } = await admin.query<{ pid: number; blockers: number[] }>(
        'SELECT pid, pg_blocking_pids(pid) AS blockers FROM unnest($1::int[]) AS pid',
        [running.map((it) => it.pid)],
      );
      // Whoever waits, directly or not, for an open one waits for the script; others end by themselves (deadlocks too).
      const waiting = new Set(operations.filter((it) => it.state === 'open').map((it) => it.pid));
      for (const _ of rows) {
        for (const { pid, blockers } of rows) if (blockers.some((it) => waiting.has(it))) waiting.add(pid);
      }
      if (running.every((it) => it.state === 'running' && waiting.has(it.pid))) return;
    }
  }

  return {
    start,
    /** Those that can be committed now. */
    open: () => operations.filter((it) => it.state === 'open'),
    unfinished: () => operations.length,
    async end(operation: Operation, how: 'commit' | 'crash') {
      operation.end(how);
      await settle();
    },
    /** Ends whatever is left, so that its connection can be used again. */
    async abandon() {
      for (let tries = 0; operations.length > 0 && tries < 100; tries++) {
        for (const operation of operations) operation.end('crash');
        await settle();
      }
    },
  };
}

export type Interleaving = ReturnType<typeof createInterleaving>;

/** A pool of this one connection, which stays checked out. */
function poolOf(client: pg.PoolClient): Pool {
  const query = client.query.bind(client);
  return {
    connect: async () => Object.create(client, { query: { value: query }, release: { value: () => {} } }),
    query,
  } as unknown as Pool;
}
