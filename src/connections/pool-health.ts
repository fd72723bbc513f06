import type pg from 'pg';
import type { Logger } from '../telemetry/logger.ts';
import type { Pool } from './database.ts';
import { nextStatementFails } from './session.ts';

/**
 * Sessions that cannot do the relay's work leave the pool, and a pool that gets fewer sessions than it may have works
 * with those.
 *
 * A session is given back with the error that it failed with; by that it is judged. Some errors tell of more than their
 * own session: when a network breaks without a word, when a server becomes a standby, or when a table is altered, every
 * session of the pool is sick and none says so. Each would cost its user a transaction, of a dead network the whole time
 * that an answer is waited for. So the first such error puts all sessions out that were not heard of since.
 */

/** node-postgres has no code for it. */
export const isNoAnswer = (error: unknown): error is Error =>
  error instanceof Error && error.message === 'Query read timeout';

/** SQLSTATE of what a server answered; undefined where the connection failed. */
export const sqlState = (error: unknown): string | undefined => {
  // Errors of the system have a code as well, such as EPIPE.
  const { code, severity } = (error ?? {}) as Partial<pg.DatabaseError>;
  return severity === undefined ? undefined : code;
};

/** The plan of a kept statement does not fit its table any more; or a server in recovery is asked to write. */
const NOT_SUPPORTED = '0A000';
const READ_ONLY = '25006';
/** A pooler that hands out another session with each transaction does not know, or knows already, a kept statement. */
export const STATEMENT_FORGOTTEN = new Set(['26000', '42P05']);

const SICK = new Set([
  ...[NOT_SUPPORTED, READ_ONLY, ...STATEMENT_FORGOTTEN],
  // Shut down, crashed, starting up, its database dropped, idle for too long; in a transaction, too, or that took too long.
  ...['57P01', '57P02', '57P03', '57P04', '57P05', '25P03', '25P04'],
  // Another program's transaction is open in it, or failed in it.
  ...['25001', '25P02'],
]);

/** Whether a session that failed so can do no further work. Of any other error the statement is at fault. */
export function isSick(error: unknown): boolean {
  const state = sqlState(error);
  // Class 08: the connection; class XX: what PostgreSQL keeps of its catalogs in this session does not fit any more.
  return state === undefined || SICK.has(state) || /^(?:08|XX)/.test(state);
}

const tellsOfOthers = (error: unknown): boolean =>
  isNoAnswer(error) || [NOT_SUPPORTED, READ_ONLY].includes(sqlState(error) ?? '');

/** The server, or the limit of the role or the database, allows no further session. */
const TOO_MANY_SESSIONS = '53300';

/** No session that PostgreSQL gives can write. */
export class ReadOnlyError extends Error {
  override readonly name = 'ReadOnlyError';
  readonly code = READ_ONLY;
  readonly severity = 'ERROR';
  constructor(isStandby: boolean) {
    super(
      isStandby
        ? 'no session can write: the server is a standby (see RELAY_DATABASE_URL; promote it, or point to the primary)'
        : 'no session can write: new ones are read-only (default_transaction_read_only of the server, the database or the role)',
    );
  }
}

/** PostgreSQL gives this pod fewer sessions than this takes. */
export class TooFewSessionsError extends Error {
  override readonly name = 'TooFewSessionsError';
}

export type HealthyPool = Pool &
  Readonly<{
    /** Sessions that it may have, and those that PostgreSQL gives it. */
    sessions(): Readonly<{ size: number; granted: number }>;
  }>;

/** Deadline for what a session is asked before it is used again. */
const VERIFY_TIMEOUT_MS = 1_000;
/** Sessions of a pool of others that are put out for one that is asked for, at most. */
const MAX_TRIES = 100;
/** A session is waited for so long: for others to give one back, and for the pool to connect one. */
const WAIT_MS = 3_000;
const CONNECT_MS = 5_000;
/** A pod that got fewer sessions asks for one more this often. */
const GROW_AFTER_MS = 10_000;
/** Sick sessions come by the dozen; they are reported once in so long. */
const REPORT_EVERY_MS = 10_000;

type Waiter = { others: number; admit: () => void };

/**
 * `pool`, of which at most `size` sessions are used at a time, and none that is likely to be sick.
 * @param size where the pool itself has a smaller limit, that counts
 */
export function healthyPool(
  pool: Pool & Readonly<{ options?: Readonly<{ max?: number }>; on?: (...args: never[]) => unknown }>,
  options: Readonly<{ size: number; logger: Logger }>,
): HealthyPool {
  const { logger } = options;
  const size = Math.min(options.size, pool.options?.max ?? options.size);

  const heardAt = new WeakMap<pg.PoolClient, number>();
  /** Connected since this pool is watched: not of a pool's owner, of unknown age. */
  const born = new WeakSet<pg.PoolClient>();
  /** When a session last told of others. */
  let invalidatedAt = Number.NEGATIVE_INFINITY;
  let reportedAt = Number.NEGATIVE_INFINITY;
  (pool.on as ((event: string, heard: (client: pg.PoolClient) => void) => void) | undefined)?.call(
    pool,
    'connect',
    (client) => born.add(client),
  );

  let granted = size;
  let inUse = 0;
  let growsAt = 0;
  let waiting: Waiter[] = [];

  /** Waits for one of the sessions that this pod may use, so that `others` more are left. */
  async function admission(others: number): Promise<void> {
    if (granted < size && granted - inUse <= others && performance.now() >= growsAt) {
      growsAt = performance.now() + GROW_AFTER_MS;
      granted++;
      if (granted === size)
        logger.info({ sessions: size }, 'PostgreSQL gives this pod all its sessions again');
    }
    if (granted <= others)
      throw new TooFewSessionsError(
        `PostgreSQL gives this pod ${granted} of ${size} sessions, and this takes ${others + 1}: raise the connection limit of the role, the database or the server, or lower RELAY_DATABASE_POOL_SIZE of all pods`,
      );
    if (granted - inUse > others) {
      inUse++;
      return;
    }
    await new Promise<void>((resolve, reject) => {
      const waiter: Waiter = {
        others,
        admit() {
          clearTimeout(timer);
          inUse++;
          resolve();
        },
      };
      const timer = setTimeout(() => {
        waiting = waiting.filter((it) => it !== waiter);
        reject(new Error(`no database session became free within ${WAIT_MS / 1_000} s (${granted} in use)`));
      }, WAIT_MS);
      waiting.push(waiter);
    });
  }

  function leave(): void {
    inUse--;
    const next = waiting.find((it) => granted - inUse > it.others);
    if (next === undefined) return;
    waiting = waiting.filter((it) => it !== next);
    next.admit();
  }

  /** With what it has, until it may ask for more. */
  function shrink(error: Error): void {
    const left = Math.max(1, inUse - 1);
    growsAt = performance.now() + GROW_AFTER_MS;
    if (left >= granted) return;
    if (granted === size)
      logger.warn(
        { err: error, sessions: left, of: size },
        'PostgreSQL gives this pod fewer sessions than RELAY_DATABASE_POOL_SIZE: it works with these, and asks for more now and then',
      );
    granted = left;
  }

  async function checkOut(others: number): Promise<pg.PoolClient> {
    for (;;) {
      await admission(others);
      try {
        return await connected();
      } catch (error) {
        const isShort = sqlState(error) === TOO_MANY_SESSIONS;
        const hasOthers = inUse > 1;
        if (isShort) shrink(error as Error);
        leave();
        if (!isShort || !hasOthers) throw error;
      }
    }
  }

  async function connected(): Promise<pg.PoolClient> {
    for (let i = 0; ; i++) {
      const client = await connectWithin(pool, CONNECT_MS);
      // In the case of a session that breaks meanwhile; its user brings a listener of his own.
      client.on('error', nextStatementFails);
      try {
        if (await isSound(client)) {
          watchRelease(client);
          client.off('error', nextStatementFails);
          return client;
        }
      } catch (error) {
        // New ones are no better. Of those that others have used the next may be.
        if (born.has(client) || i >= MAX_TRIES) {
          discard(client);
          throw error;
        }
      }
      discard(client);
    }
  }

  /** @throws why not, where it had to be asked */
  async function isSound(client: pg.PoolClient): Promise<boolean> {
    const heard = heardAt.get(client);
    if (heard !== undefined) return heard > invalidatedAt;
    // New, or its owner's so far.
    if (invalidatedAt === Number.NEGATIVE_INFINITY) return true;
    const { rows } = await client.query({
      text: `SELECT current_setting('transaction_read_only') AS "readOnly", pg_is_in_recovery() AS "isStandby"`,
      query_timeout: VERIFY_TIMEOUT_MS,
    } as pg.QueryConfig);
    if (rows[0].readOnly !== 'off') throw new ReadOnlyError(rows[0].isStandby);
    return true;
  }

  function watchRelease(client: pg.PoolClient): void {
    // Ours until then: the pool puts a new one there each time.
    const release = client.release;
    client.release = (error) => {
      if (error instanceof Error && isSick(error)) {
        report(error);
        if (tellsOfOthers(error)) invalidatedAt = performance.now();
      }
      if (isNoAnswer(error)) discard(client, release);
      else {
        if (!error) heardAt.set(client, performance.now());
        release.call(client, error);
      }
      leave();
    };
  }

  function report(error: Error): void {
    const about = { err: error, othersToo: tellsOfOthers(error) };
    const text = 'a database session can do no further work and leaves the pool; another one does its work';
    if (performance.now() - reportedAt < REPORT_EVERY_MS) logger.debug(about, text);
    else logger.warn(about, text);
    reportedAt = performance.now();
  }

  const leaving = (others: number): HealthyPool => ({
    connect: () => checkOut(others),
    leaving,
    sessions: () => ({ size, granted }),
  });
  return leaving(0);
}

/** A pool of others may wait for ever; one that connects too late is given back. */
function connectWithin(pool: Pool, ms: number): Promise<pg.PoolClient> {
  return new Promise((resolve, reject) => {
    let isLate = false;
    const timer = setTimeout(() => {
      isLate = true;
      reject(new Error(`the pool gave no database session within ${ms / 1_000} s`));
    }, ms);
    pool.connect().then(
      (client) => {
        clearTimeout(timer);
        if (isLate) client.release();
        else resolve(client);
      },
      (error) => {
        clearTimeout(timer);
        reject(error);
      },
    );
  });
}

/** Not by saying goodbye: a dead connection would wait for the answer to that, and its place in the pool with it. */
function discard(client: pg.PoolClient, release = client.release): void {
  (client as unknown as { connection?: { stream?: { destroy(): void } } }).connection?.stream?.destroy();
  release.call(client, true);
}
