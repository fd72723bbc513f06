import type pg from 'pg';
import { isNoAnswer } from './pool-health.ts';

/** What the statements need of a connection; node-postgres' Client and PoolClient have it. */
export type Queryable = Pick<pg.ClientBase, 'query'>;

/** What the relay needs of a node-postgres pool. */
export type Pool = Pick<pg.Pool, 'connect' | 'query'>;

/**
 * Every statement of the relay is a walk along one partial index. Stale statistics (an adopted table whose
 * rows were all published when it was last analysed, then a burst of a million) make the planner prefer to
 * fetch and sort the whole backlog; within our own transactions these plans are off the table. Fresh ones are no
 * better: beside the platform's index on `aggregate_id` alone, every acknowledgement read all 100,000 rows that
 * its aggregate had parked, to sort them by id (incrementally, which is a setting of its own). And a plan is kept: that
 * of an acknowledgement, made while the table was empty, joined the receipts with all of it, 12 ms for 23 receipts beside
 * 17,000 published rows instead of 0.8, until autovacuum came by. Rows are looked up one by one.
 *
 * No compilation either: before version 18 a plan that cannot do without what is off here counts as so dear that
 * PostgreSQL compiles it each time it is planned (3.4 s for a claim of 100 rows, seen with version 15).
 */
const PLANNER: Readonly<Record<string, string>> = {
  enable_seqscan: 'off',
  enable_bitmapscan: 'off',
  enable_sort: 'off',
  enable_hashjoin: 'off',
  enable_mergejoin: 'off',
  enable_incremental_sort: 'off',
  jit: 'off',
};

/**
 * A named statement is planned once per connection: 0.5 ms less for each acknowledgement. A pooler that hands out
 * another connection with each transaction (PgBouncer before 1.21) makes the name unknown, or known already: then
 * we do without names from there on. The transaction it happened to is tried again by its owner.
 */
let statementsKept = true;
const STATEMENT_FORGOTTEN = new Set(['26000', '42P05']);

/**
 * - `durable`: when it returns, a crash of PostgreSQL cannot undo it
 * - `repeatable`: a crash may undo it, and doing it again is harmless. Spares the disk's answer, about 3 ms on the machine
 *   where this was tried. A claim is not: if a crash undid the lease of an event that was appended, and its job was removed,
 *   nobody would know of its entry.
 */
export type Durability = 'durable' | 'repeatable';

/** For claims: PostgreSQL would plan each of them anew, 900 µs, since its LIMIT is a parameter. */
export const GENERIC = { generic: true } as const;

/**
 * Runs `work` in one transaction, with a deadline on each statement and on idling in between, on the server
 * as well as here: neither a hung statement nor a dead network holds row locks for ever. For this transaction alone:
 * it works on pools that belong to someone else and behind PgBouncer.
 *
 * A connection that failed is thrown away: what it still had in flight is unknown.
 *
 * @param statementMs a shorter deadline for each statement, on the server alone
 */
export async function transaction<T>(
  pool: Pool,
  deadlineMs: number,
  durability: Durability,
  work: (tx: Queryable) => Promise<T>,
  options: Readonly<{
    /** A lock to begin with, as an expression: at no further statement, and under no deadline on the server. */
    lock?: string;
    /** Statements are planned whatever their parameters are: those that are named, once. */
    generic?: boolean;
    /** How long the transaction may idle between two statements, i.e. `work` be busy with other things. */
    idleMs?: number;
  }> = {},
): Promise<T> {
  const { lock, generic = false, idleMs = deadlineMs + 1_000 } = options;
  const client = await pool.connect();
  // A connection that breaks between two statements says so by this event alone, and unheard it ends the process.
  client.on('error', nextStatementFails);
  const settings = {
    ...(durability === 'repeatable' && { synchronous_commit: 'off' }),
    statement_timeout: deadlineMs,
    idle_in_transaction_session_timeout: idleMs,
    ...PLANNER,
    ...(generic && { plan_cache_mode: 'force_generic_plan' }),
  };
  // One statement for all of them: they are what a transaction costs.
  const set = Object.entries(settings).map(([name, value]) => `set_config('${name}', '${value}', true)`);
  const begin = `BEGIN ISOLATION LEVEL READ COMMITTED; SELECT ${[...set, ...(lock ? [lock] : [])].join(', ')}`;
  const tx: Queryable = {
    query: ((statement: string | pg.QueryConfig, values?: unknown[]) => {
      const { name, ...query }: pg.QueryConfig =
        typeof statement === 'string' ? { text: statement, ...(values && { values }) } : statement;
      const kept = name !== undefined && statementsKept;
      return client.query({
        ...query,
        ...(kept && { name }),
        query_timeout: deadlineMs + ANSWER_MS,
      } as pg.QueryConfig);
    }) as Queryable['query'],
  };
  try {
    // Said, not left to the database's default: under a stricter level the same statements would fail by chance.
    const begun = tx.query(begin);
    // Sent together with the first statement where the connection can do that: a round trip less.
    if (isPipelined(client)) begun.catch(nextStatementFails);
    else await begun;
    const result = await work(tx);
    await begun;
    await tx.query('COMMIT');
    giveBack();
    return result;
  } catch (error) {
    if (STATEMENT_FORGOTTEN.has((error as pg.DatabaseError).code ?? '')) statementsKept = false;
    const failure = isNoAnswer(error) ? error : await rollBack();
    if (failure === null) giveBack();
    // Thrown away, it may still have a last word (57P01 while it ends): it keeps its listener.
    else client.release(failure);
    throw error;
  }

  async function rollBack(): Promise<Error | null> {
    try {
      await client.query({ text: 'ROLLBACK', query_timeout: ANSWER_MS } as pg.QueryConfig);
      return null;
    } catch (error) {
      return error as Error;
    }
  }

  function giveBack(): void {
    client.release();
    client.off('error', nextStatementFails); // since the release the pool listens
  }
}

const nextStatementFails = (): void => {};

/** The server's deadline comes first; when it says nothing for so long after that, it is not there. */
const ANSWER_MS = 1_000;

/** A connection of a pool that is not ours may take one statement at a time only. */
const isPipelined = (client: pg.ClientBase): boolean => (client as { pipeline?: boolean }).pipeline === true;
