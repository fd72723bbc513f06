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
  /** The same pool for a caller that holds a session while it waits for another one: `others` sessions stay free. */
  leaving?(others: number): Pool;
  /** The generation that transactions must belong to. */
  generation?: Generation;
  /** The pool that this one is a view of. What transactions learn behind one view counts for all views of that pool. */
  base?: object;
}>;

/**
 * Planner settings of the relay's transactions. Every statement of the relay walks along one partial index, row by row, and
 * the planner must choose that plan. Three reasons why it would not by itself, each seen:
 *
 * - Stale statistics. An adopted table had only published rows when it was last analysed, then a million rows came: the
 *   planner fetched and sorted the whole backlog.
 * - Another index. Beside the platform's index on `aggregate_id` alone, every acknowledgement read all 100,000 rows that
 *   its aggregate had parked, to sort them by id (incrementally, which has a setting of its own).
 * - A kept plan. The plan of an acknowledgement, made while the table was empty, joined the events with the whole table:
 *   12 ms for 23 events beside 17,000 published rows instead of 0.8, until autovacuum ran.
 *
 * `jit` is off too: before version 18 PostgreSQL gives a plan that needs what is off here such a high cost that it compiles
 * the plan each time (3.4 s for a claim of 100 rows, seen with version 15).
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
 * How PostgreSQL reads and prints values, and which rows it shows, whatever a role, a database or the owner of a pool has
 * set: the relay keeps positions in the order of published rows as text. Other settings stay as they are, since triggers of
 * other teams run in these transactions.
 */
const VALUES: Readonly<Record<string, string>> = {
  array_nulls: 'on',
  DateStyle: 'ISO, YMD',
  IntervalStyle: 'postgres',
  TimeZone: 'UTC',
  bytea_output: 'hex',
  extra_float_digits: '1',
  row_security: 'on',
  standard_conforming_strings: 'on',
};
/** Puts pg_catalog first: no other schema can replace a function that the relay's statements call. */
const SEARCH_PATH =
  "pg_catalog.concat_ws(', ', 'pg_catalog', nullif(pg_catalog.current_setting('search_path'), ''))";

/**
 * Since version 17 a role may have a limit for whole transactions, which ends the session. The deadlines here take its
 * place. Older versions do not know the setting.
 */
const NO_TRANSACTION_TIMEOUT =
  "CASE WHEN pg_catalog.current_setting('transaction_timeout', true) <> '0' THEN pg_catalog.set_config('transaction_timeout', '0', true) END";
/** A role or database may have switched off the wait for the disk; of the other settings each waits at least for that. */
const DURABLE =
  "CASE WHEN pg_catalog.current_setting('synchronous_commit') = 'off' THEN pg_catalog.set_config('synchronous_commit', 'on', true) END";

/**
 * Pools whose statements have no names any more. A named statement is planned once per connection: 0.5 ms less for each
 * acknowledgement. Behind a pooler that changes the connection with each transaction (PgBouncer before 1.21) a name may be
 * unknown, or taken: the first such error puts the pool here.
 */
const withoutNames = new WeakSet<object>();

/**
 * - `durable`: when it returns, a crash of PostgreSQL cannot undo it
 * - `repeatable`: a crash may undo it, and doing it again is harmless. The commit does not wait for the disk, which takes
 *   about 3 ms (measured). A claim must be durable: a crash could undo the lease of an event that was appended, and if its
 *   job had been removed, nothing would know of its entry.
 */
type Durability = 'durable' | 'repeatable';

type TransactionOptions = Readonly<{
  /** Taken in this order at the beginning. The wait for each is as long as that for the first. */
  locks?: readonly [TableLock, ...TableLock[]];
  /**
   * Plans do not depend on parameters, so a named statement is planned once. The LIMIT of a claim is a parameter: PostgreSQL
   * would plan each claim anew, which takes 900 µs.
   */
  generic?: boolean;
  /** How long the transaction may idle between two statements, while `work` does something else. */
  idleMs?: number;
}>;

/**
 * Runs `work` in one transaction. Each statement and each pause between two has a deadline, on the server and here: neither
 * a hung statement nor a dead network holds row locks for ever. All settings are those of this transaction alone, so it
 * works on pools of other programs and behind PgBouncer.
 *
 * If the session is sick (see pool-health.ts), it leaves the pool with its error, and `work` runs once more on another
 * session. It does not run again after the COMMIT was sent, nor where no answer came: the deadline has passed already.
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

/** Adds `query` to the pool: each statement runs in a transaction of its own. */
export const asking = (
  pool: Pool,
  deadlineMs: number,
  durability: Durability = 'repeatable',
): Pool & Queryable => ({
  connect: () => pool.connect(),
  ...(pool.leaving && { leaving: pool.leaving }),
  base: pool.base ?? pool,
  query: ((statement: string, values?: unknown[]) =>
    transaction(pool, deadlineMs, durability, (tx) => tx.query(statement, values))) as Queryable['query'],
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
  const { generation, base = pool } = pool;
  const client = await pool.connect();
  // A connection that breaks between two statements emits only this event. Without a listener it would end the process.
  client.on('error', nextStatementFails);
  const settings = {
    ...(durability === 'repeatable' && { synchronous_commit: 'off' }),
    // The deadline of the lock comes first: its error says that a lock was waited for.
    statement_timeout:
      locks === undefined ? deadlineMs : Math.max(deadlineMs, locks[0].waitMs + LOCK_MARGIN_MS),
    lock_timeout: locks?.[0].waitMs ?? 0,
    idle_in_transaction_session_timeout: idleMs,
    ...VALUES,
    ...PLANNER,
    plan_cache_mode: generic ? 'force_generic_plan' : 'auto',
  };
  // One statement sets all of them: a round trip is what a transaction costs.
  const set = [
    ...Object.entries(settings).map(([name, value]) => `pg_catalog.set_config('${name}', '${value}', true)`),
    `pg_catalog.set_config('search_path', ${SEARCH_PATH}, true)`,
    NO_TRANSACTION_TIMEOUT,
    ...(durability === 'durable' ? [DURABLE] : []),
  ];
  /** What is asked for once the locks are held. */
  const asked = [
    // A statement waits for rows until its own deadline.
    ...(locks ? [`pg_catalog.set_config('lock_timeout', '0', true)`] : []),
    // While the transaction waited for a lock, the table may have been emptied and filled again.
    ...(generation ? [`${generation.sql()} AS generation`] : []),
  ];
  // The isolation level is named, since the default may be stricter: then the same statements would fail now and then.
  const begin = [
    'BEGIN ISOLATION LEVEL READ COMMITTED',
    `SELECT ${set.join(', ')}`,
    ...(locks ?? []).map(lockStatement),
    ...(asked.length > 0 ? [`SELECT ${asked.join(', ')}`] : []),
  ].join('; ');
  const beginDeadlineMs = Math.max(deadlineMs, (locks?.[0].waitMs ?? 0) * (locks?.length ?? 0));

  /** The first error of this session: later errors follow from it. */
  let ownError: unknown;
  let isCommitting = false;
  async function ask({ name, ...query }: pg.QueryConfig, answerMs = deadlineMs): Promise<pg.QueryResult> {
    const kept = name !== undefined && !withoutNames.has(base);
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
      // The result counts only if the transaction belongs to the accepted generation.
      const [result] = await Promise.all([ask(query), begun]);
      return result;
    }) as Queryable['query'],
  };
  try {
    begun = ask({ text: begin }, beginDeadlineMs).then((results) => {
      const answers = results as unknown as pg.QueryResult<{ generation: string }>[];
      generation?.assert(answers.at(-1)?.rows[0]?.generation ?? '');
    });
    // A pipelined connection sends BEGIN together with the first statement, which saves a round trip.
    if (isPipelined(client) && locks?.[0].mode !== 'EXCLUSIVE') begun.catch(nextStatementFails);
    else await begun;
    const result = await work(tx);
    await begun;
    isCommitting = true;
    await tx.query('COMMIT');
    // `work` may have caught an error that shows that the session is sick.
    giveBack(ownError !== undefined && isSick(ownError) ? (ownError as Error) : null);
    return { kind: 'done', result };
  } catch (error) {
    if (STATEMENT_FORGOTTEN.has(sqlState(ownError) ?? '')) withoutNames.add(base);
    const isSessionSick = ownError !== undefined && isSick(ownError);
    if (error instanceof OtherGenerationError && error.isBehind) giveBack(error);
    else giveBack(isSessionSick ? (ownError as Error) : await rollBack());
    if (locks !== undefined && sqlState(ownError) === LOCK_NOT_AVAILABLE)
      return { kind: 'failed', error: await heldBy(pool, locks), isWorthAnother: false };
    // 25P02 only says that an earlier statement failed: throw the error of that one.
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
      client.off('error', nextStatementFails); // from the release on the pool listens
    }
    // A session that is thrown away may emit one more error while it ends (57P01), so it keeps its listener.
    else client.release(error);
  }
}

const LOCK_MARGIN_MS = 500;

/** The server enforces its deadline. If it sends no answer within this time after that, it is gone. */
const ANSWER_MS = 1_000;

/** Whether the connection takes several statements at a time. That of an embedding program's pool may take one. */
const isPipelined = (client: pg.ClientBase): boolean => (client as { pipeline?: boolean }).pipeline === true;
