import type pg from 'pg';
import { DeadlineError, withDeadline } from '../lifecycle.ts';
import type { Logger } from '../telemetry/logger.ts';
import type { Pool } from './database.ts';
import type { Outage } from './outage.ts';
import { nextStatementFails } from './session.ts';

/**
 * Removes sick sessions from the pool, and works with fewer sessions where PostgreSQL gives fewer than allowed.
 *
 * The caller releases a session with the error that it failed with, and the error tells whether the session is sick. Some
 * errors concern all sessions of the pool: the network broke, the server became a standby, a table was altered. Each
 * sick session would cost its next user a transaction, and on a dead network the whole timeout. So the first such error
 * removes every session that has not answered since.
 */

/** The server gave no answer in time. node-postgres has no code for that. */
export const isNoAnswer = (error: unknown): error is Error =>
  error instanceof Error && error.message === 'Query read timeout';

/** SQLSTATE of an error that the server sent; undefined where the connection failed. */
export const sqlState = (error: unknown): string | undefined => {
  // Errors of the system have a code as well, such as EPIPE.
  const { code, severity } = (error ?? {}) as Partial<pg.DatabaseError>;
  return severity === undefined ? undefined : code;
};

/** The plan of a named statement does not fit its altered table, or the server is in recovery and takes no writes. */
const NOT_SUPPORTED = '0A000';
export const READ_ONLY = '25006';
/** A statement has taken as long as it may. */
export const TIMED_OUT = '57014';
/** Behind a pooler that changes the session with each transaction, a named statement is unknown, or exists already. */
export const STATEMENT_FORGOTTEN = new Set(['26000', '42P05']);

const SICK = new Set([
  ...[NOT_SUPPORTED, READ_ONLY, ...STATEMENT_FORGOTTEN],
  // Shut down, crashed, starting up, database dropped, idle for too long; transaction idle, or running, for too long.
  ...['57P01', '57P02', '57P03', '57P04', '57P05', '25P03', '25P04'],
  // Another program's transaction is open in it, or failed in it.
  ...['25001', '25P02'],
]);

/** Whether a session with this error can do no further work. After any other error only the statement has failed. */
export function isSick(error: unknown): boolean {
  const state = sqlState(error);
  // Class 08: the connection failed. Class XX: the session's cache of the catalogs is broken.
  return state === undefined || SICK.has(state) || /^(?:08|XX)/.test(state);
}

const tellsOfOthers = (error: unknown): boolean =>
  isNoAnswer(error) || [NOT_SUPPORTED, READ_ONLY].includes(sqlState(error) ?? '');

/** The server, or the limit of the role or the database, allows no further session. */
export const TOO_MANY_SESSIONS = '53300';

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

/** How the error begins of who waited for a session in vain. */
export const NO_SESSION_FREE = 'no database session became free';

/** PostgreSQL gives this pod fewer sessions than the work needs. */
export class TooFewSessionsError extends Error {
  override readonly name = 'TooFewSessionsError';
}

export type HealthyPool = Pool &
  Readonly<{
    base: object;
    /** How many sessions the pool may have, and how many PostgreSQL gives it. */
    sessions(): Readonly<{ size: number; granted: number }>;
    /** Stops listening to the wrapped pool: its owner may go on with it. */
    unwrap(): void;
  }>;

/** Deadline of the check of a session before it is used again. */
const VERIFY_TIMEOUT_MS = 1_000;
/** Sick sessions of an embedding program's pool that one `connect` removes, at most. */
const MAX_TRIES = 100;
/** How long `connect` waits for a free session. */
const WAIT_MS = 3_000;
/** How long it waits for the pool to connect one. */
const CONNECT_MS = 5_000;
/** Interval at which a pod that got fewer sessions asks for one more. */
const GROW_AFTER_MS = 10_000;
/** Interval at which sick sessions are logged: they come by the dozen. */
const REPORT_EVERY_MS = 10_000;

type Waiter = { others: number; admit: () => void };

/** The events of a pool of node-postgres. */
type Listening = (event: 'connect', heard: (client: pg.PoolClient) => void) => unknown;
type Events = Readonly<{ on?: Listening; off?: Listening }>;

/**
 * Wraps `pool`: at most `size` sessions are in use at a time, and none that is likely to be sick.
 * @param options.size of it and the pool's own limit, the smaller one counts
 * @param options.base of another pool that leads to the same database: what is learned by one counts for both
 * @param options.outage told when no session can be opened, and when one is
 */
export function healthyPool(
  pool: Pool & Readonly<{ options?: Readonly<{ max?: number }> }>,
  options: Readonly<{ size: number; logger: Logger; base?: object; outage?: Outage }>,
): HealthyPool {
  const { logger, outage, base = pool.base ?? pool } = options;
  const size = Math.min(options.size, pool.options?.max ?? options.size);

  const heardAt = new WeakMap<pg.PoolClient, number>();
  /** Sessions that were connected since the pool is wrapped. Any other may be old, and used by the pool's owner. */
  const born = new WeakSet<pg.PoolClient>();
  /** When an error last concerned all sessions. */
  let invalidatedAt = Number.NEGATIVE_INFINITY;
  let reportedAt = Number.NEGATIVE_INFINITY;
  const events = pool as Pool & Events;
  const onConnect = (client: pg.PoolClient) => void born.add(client);
  events.on?.('connect', onConnect);

  let granted = size;
  let inUse = 0;
  let growsAt = 0;
  let waiting: Waiter[] = [];

  /** Waits until one session can be used and `others` more stay free. */
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
        reject(new Error(`${NO_SESSION_FREE} within ${WAIT_MS / 1_000} s (${granted} in use)`));
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

  /** PostgreSQL gives no more sessions: works with those in use, and asks for more after GROW_AFTER_MS. */
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

  async function open(): Promise<pg.PoolClient> {
    const askedAt = performance.now();
    try {
      return await pool.connect();
    } catch (error) {
      outage?.met(error as Error, askedAt);
      throw error;
    }
  }

  async function connected(): Promise<pg.PoolClient> {
    for (let i = 0; ; i++) {
      const client = await connectWithin(open, CONNECT_MS);
      // The session may break during the check. Afterwards its user adds a listener.
      client.on('error', nextStatementFails);
      try {
        if (await isSound(client)) {
          watchRelease(client);
          client.off('error', nextStatementFails);
          if (!heardAt.has(client)) outage?.over();
          return client;
        }
      } catch (error) {
        // If a new session is sick, the next new one will be too. Among old sessions the next may be sound.
        if (born.has(client) || i >= MAX_TRIES) {
          discard(client);
          throw error;
        }
      }
      discard(client);
    }
  }

  /** @throws why the session is sick, where it had to be asked */
  async function isSound(client: pg.PoolClient): Promise<boolean> {
    const heard = heardAt.get(client);
    if (heard !== undefined) return heard > invalidatedAt;
    // The pool has not used this session yet, and no error has concerned all sessions.
    if (invalidatedAt === Number.NEGATIVE_INFINITY) return true;
    const { rows } = await client.query({
      text: `SELECT current_setting('transaction_read_only') AS "readOnly", pg_is_in_recovery() AS "isStandby"`,
      query_timeout: VERIFY_TIMEOUT_MS,
    } as pg.QueryConfig);
    if (rows[0].readOnly !== 'off') throw new ReadOnlyError(rows[0].isStandby);
    return true;
  }

  function watchRelease(client: pg.PoolClient): void {
    // The pool sets a new `release` each time that it hands the session out.
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
    base,
    sessions: () => ({ size, granted }),
    unwrap: () => void events.off?.('connect', onConnect),
  });
  return leaving(0);
}

/** A pool of others may wait for ever; one that connects too late is given back. */
async function connectWithin(open: Pool['connect'], ms: number): Promise<pg.PoolClient> {
  const connecting = open();
  try {
    return await withDeadline(ms, connecting);
  } catch (error) {
    if (!(error instanceof DeadlineError)) throw error;
    connecting.then(
      (client) => client.release(),
      () => {},
    );
    throw new Error(`the pool gave no database session within ${ms / 1_000} s`);
  }
}

/** Not by saying goodbye: a dead connection would wait for the answer to that, and its place in the pool with it. */
function discard(client: pg.PoolClient, release = client.release): void {
  (client as unknown as { connection?: { stream?: { destroy(): void } } }).connection?.stream?.destroy();
  release.call(client, true);
}
