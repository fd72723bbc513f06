import type pg from 'pg';
import { type Generation, OtherGenerationError } from './generation.ts';
import { isNoAnswer, isSick, STATEMENT_FORGOTTEN, sqlState } from './pool-health.ts';
import { RESULT_TYPES } from './result-types.ts';
import { nextStatementFails } from './session.ts';
import { heldBy, LOCK_NOT_AVAILABLE, lockStatement, type TableLock } from './table-lock.ts';

/** What the statements need of a connection; node-postgres' Client and PoolClient have it. */
export type Queryable = Pick<pg.ClientBase, 'query'>;

/** What the relay needs of a node-postgres pool: sessions. Every statement runs in `transaction`. */
export type Pool = Readonly<{
  connect(): Promise<pg.PoolClient>;
  /** The same for those who hold a session while they wait for another: they get one where so many others are left. */
  leaving?(others: number): Pool;
  /** What its transactions must belong to. */
  generation?: Generation;
}>;

/**
 * Every statement of the relay is a walk along one partial index. Stale statistics (an adopted table whose
 * rows were all published when it was last analysed, then a burst of a million) make the planner prefer to
 * fetch and sort the whole backlog; within our own transactions these plans are off the table. Fresh ones are no
 * better: beside the platform's index on `aggregate_id` alone, every acknowledgement read all 100,000 rows that
 * its aggregate had parked, to sort them by id (incrementally, which is a setting of its own). And a plan is kept: that
 * of an acknowledgement, made while the table was empty, joined the appended events with all of it, 12 ms for 23 of them beside
 * 17,000 published rows instead of 0.8, until autovacuum came by. Rows are looked up one by one.
 *
 * No compilation either: before version 18 a plan that cannot do without what is off here counts as so dear that
 * PostgreSQL compiles it each time it is planned (3.4 s for a claim of 100 rows, seen with version 15).
 */
const PLANNER: Readonly<Record<string, string>> = {
  enable_indexscan: 'on',
  enable_nestloop: 'on',
  enable_seqscan: 'off',
  enable_bitmapscan: 'off',
  enable_sort: 'off',
  enable_hashjoin: 'off',
  enable_mergejoin: 'off',
  enable_incremental_sort: 'off',
  jit: 'off',
};

/**
 * How values are read and printed, whatever a role, a database or the owner of a pool has set: the order of
 * published rows is kept as text. What is not here is not ours to change: triggers of others run in these transactions.
 */
const PRINTED: Readonly<Record<string, string>> = {
  DateStyle: 'ISO, YMD',
  IntervalStyle: 'postgres',
  TimeZone: 'UTC',
  bytea_output: 'hex',
  extra_float_digits: '1',
  standard_conforming_strings: 'on',
};
/** What a function of the relay's statements means is not decided by a schema that comes first. */
const SEARCH_PATH =
  "pg_catalog.concat_ws(', ', 'pg_catalog', nullif(pg_catalog.current_setting('search_path'), ''))";

/**
 * A named statement is planned once per connection: 0.5 ms less for each acknowledgement. A pooler that hands out
 * another connection with each transaction (PgBouncer before 1.21) makes the name unknown, or known already: then
 * we do without names from there on.
 */
let statementsKept = true;

/**
 * - `durable`: when it returns, a crash of PostgreSQL cannot undo it
 * - `repeatable`: a crash may undo it, and doing it again is harmless. Spares the disk's answer, about 3 ms on the machine
 *   where this was tried. A claim is not: if a crash undid the lease of an event that was appended, and its job was removed,
 *   nobody would know of its entry.
 */
export type Durability = 'durable' | 'repeatable';

/** For claims: PostgreSQL would plan each of them anew, 900 µs, since its LIMIT is a parameter. */
export const GENERIC = { generic: true } as const;

type TransactionOptions = Readonly<{
  /** Taken in this order before anything else is done, each waited for as long as the first one. */
  locks?: readonly [TableLock, ...TableLock[]];
  /** Statements are planned whatever their parameters are: those that are named, once. */
  generic?: boolean;
  /** How long the transaction may idle between two statements, i.e. `work` be busy with other things. */
  idleMs?: number;
}>;

/**
 * Runs `work` in one transaction, with a deadline on each statement and on idling in between, on the server
 * as well as here: neither a hung statement nor a dead network holds row locks for ever. For this transaction alone:
 * it works on pools that belong to someone else and behind PgBouncer.
 *
 * A session that cannot do it (see pool-health.ts) is given back with its error, and another one does all of it again,
 * once: `work` is run twice then, as it is when its owner tries again. Not after the COMMIT was sent, and not where no
 * answer came: that took its time already.
 */
export async function transaction<T>(
  pool: Pool,
  deadlineMs: number,
  durability: Durability,
  work: (tx: Queryable) => Promise<T>,
  options: TransactionOptions = {},
): Promise<T> {
  const attempt = () => attemptTransaction(pool, deadlineMs, durability, work, options);
  const first = await attempt();
  if (first.kind === 'failed' && !first.isWorthAnother) throw first.error;
  const last = first.kind === 'failed' ? await attempt() : first;
  if (last.kind === 'failed') throw last.error;
  return last.result;
}

/** The pool, which also runs single statements, each in a transaction of its own. */
export const asking = (pool: Pool, deadlineMs: number): Pool & Queryable => ({
  connect: () => pool.connect(),
  ...(pool.leaving && { leaving: pool.leaving }),
  query: ((text: string, values?: unknown[]) =>
    transaction(pool, deadlineMs, 'repeatable', (tx) => tx.query(text, values))) as Queryable['query'],
});

type Attempt<T> =
  | Readonly<{ kind: 'done'; result: T }>
  | Readonly<{ kind: 'failed'; error: unknown; isWorthAnother: boolean }>;

async function attemptTransaction<T>(
  pool: Pool,
  deadlineMs: number,
  durability: Durability,
  work: (tx: Queryable) => Promise<T>,
  options: TransactionOptions,
): Promise<Attempt<T>> {
  const { locks, generic = false, idleMs = deadlineMs + 1_000 } = options;
  const { generation } = pool;
  const client = await pool.connect();
  // A connection that breaks between two statements says so by this event alone, and unheard it ends the process.
  client.on('error', nextStatementFails);
  const settings = {
    ...(durability === 'repeatable' && { synchronous_commit: 'off' }),
    // The lock's own deadline comes first: it says what was waited for.
    statement_timeout:
      locks === undefined ? deadlineMs : Math.max(deadlineMs, locks[0].waitMs + LOCK_MARGIN_MS),
    lock_timeout: locks?.[0].waitMs ?? 0,
    idle_in_transaction_session_timeout: idleMs,
    ...PRINTED,
    ...PLANNER,
    plan_cache_mode: generic ? 'force_generic_plan' : 'auto',
  };
  // One statement for all of them: they are what a transaction costs.
  const set = Object.entries(settings).map(
    ([name, value]) => `pg_catalog.set_config('${name}', '${value}', true)`,
  );
  /** When the locks are there. */
  const asked = [
    // Rows are waited for as long as a statement may take.
    ...(locks ? [`pg_catalog.set_config('lock_timeout', '0', true)`] : []),
    // While a lock was waited for, the table may have been emptied and filled again.
    ...(generation ? [`${generation.sql()} AS generation`] : []),
  ];
  // The level is said, not left to the database's default: under a stricter one the same statements would fail by chance.
  const begin = [
    'BEGIN ISOLATION LEVEL READ COMMITTED',
    `SELECT ${set.join(', ')}, pg_catalog.set_config('search_path', ${SEARCH_PATH}, true)`,
    ...(locks ?? []).map(lockStatement),
    ...(asked.length > 0 ? [`SELECT ${asked.join(', ')}`] : []),
  ].join('; ');
  const beginDeadlineMs = Math.max(deadlineMs, (locks?.[0].waitMs ?? 0) * (locks?.length ?? 0));

  /** The first error of this session: those after it follow from it. */
  let ownError: unknown;
  let isCommitting = false;
  async function ask({ name, ...query }: pg.QueryConfig, answerMs = deadlineMs): Promise<pg.QueryResult> {
    const kept = name !== undefined && statementsKept;
    try {
      return await client.query({
        ...query,
        ...(kept && { name }),
        types: RESULT_TYPES,
        query_timeout: answerMs + ANSWER_MS,
      } as pg.QueryConfig);
    } catch (error) {
      ownError ??= error;
      throw error;
    }
  }
  let begun: Promise<unknown> = Promise.resolve();
  const tx: Queryable = {
    query: (async (statement: string | pg.QueryConfig, values?: unknown[]) => {
      const query =
        typeof statement === 'string' ? { text: statement, ...(values && { values }) } : statement;
      // Nothing is believed of a transaction that belongs to another generation.
      const [result] = await Promise.all([ask(query), begun]);
      return result;
    }) as Queryable['query'],
  };
  try {
    begun = ask({ text: begin }, beginDeadlineMs).then((results) => {
      const answers = results as unknown as pg.QueryResult<{ generation: string }>[];
      generation?.assert(answers.at(-1)?.rows[0]?.generation ?? '');
    });
    // Sent together with the first statement where the connection can do that: a round trip less.
    if (isPipelined(client) && locks?.[0].mode !== 'EXCLUSIVE') begun.catch(nextStatementFails);
    else await begun;
    const result = await work(tx);
    await begun;
    isCommitting = true;
    await tx.query('COMMIT');
    // Of what `work` went back from, a session may be sick all the same.
    giveBack(ownError !== undefined && isSick(ownError) ? (ownError as Error) : null);
    return { kind: 'done', result };
  } catch (error) {
    if (STATEMENT_FORGOTTEN.has(sqlState(ownError) ?? '')) statementsKept = false;
    const isSessionSick = ownError !== undefined && isSick(ownError);
    if (error instanceof OtherGenerationError && error.isBehind) giveBack(error);
    else giveBack(isSessionSick ? (ownError as Error) : await rollBack());
    if (locks !== undefined && sqlState(ownError) === LOCK_NOT_AVAILABLE)
      return { kind: 'failed', error: await heldBy(pool, locks), isWorthAnother: false };
    // Where the BEGIN failed, what came after it says only that.
    const told = ownError !== undefined && sqlState(error) === '25P02' ? ownError : error;
    return {
      kind: 'failed',
      error: told,
      isWorthAnother: isSessionSick && !isCommitting && !isNoAnswer(ownError),
    };
  }

  async function rollBack(): Promise<Error | null> {
    try {
      await client.query({ text: 'ROLLBACK', query_timeout: ANSWER_MS } as pg.QueryConfig);
      return null;
    } catch (error) {
      return error as Error;
    }
  }

  function giveBack(error: Error | null): void {
    if (error === null) {
      client.release();
      client.off('error', nextStatementFails); // since the release the pool listens
    }
    // Thrown away, it may still have a last word (57P01 while it ends): it keeps its listener.
    else client.release(error);
  }
}

const LOCK_MARGIN_MS = 500;

/** The server's deadline comes first; when it says nothing for so long after that, it is not there. */
const ANSWER_MS = 1_000;

/** A connection of a pool that is not ours may take one statement at a time only. */
const isPipelined = (client: pg.ClientBase): boolean => (client as { pipeline?: boolean }).pipeline === true;
