import type pg from 'pg';
import type { DatabaseState } from '../event.ts';

/**
 * PostgreSQL may forget: a standby that lagged is promoted, the database is restored, the table is emptied. Then rows
 * are older than what Redis holds of them. A generation names what the rows came from: timeline, run of the server and
 * file of the table. While it is the same, nothing that was committed is forgotten.
 *
 * The timeline is the one that the server writes to (`pg_control_checkpoint()` tells of a new one late). The run of the
 * server: a crash costs what was committed without waiting for the disk, and a folder that was copied back has its old
 * timeline. The file: TRUNCATE and whatever writes the table anew make another one.
 *
 * Each transaction tells its own, not each session once: behind a pooler a session is no session.
 */
const RUN_AND_FILE = `extract(epoch FROM pg_postmaster_start_time())::text || '.' || pg_relation_filenode('identity.outbox')`;
const TIMELINE = 'left(pg_walfile_name(pg_current_wal_lsn()), 8)';
/** Of a server that does not tell its timeline. */
const UNTOLD = `'00000000'`;
/** Of a standby: it has no timeline of its own, and takes no writes. */
const STANDBY = 'standby';

/** 42501: the role may not ask; 42883, 0A000: the server is a relative of PostgreSQL and has no such function. */
const CANNOT_TELL = new Set(['42501', '42883', '0A000']);

/** Sessions to a former primary that one look throws away, at most; the next look goes on. */
const THROWN_AWAY_MAX = 3;

/** Each promotion makes a higher one. */
const timelineOf = (generation: string): number => Number.parseInt(generation, 16);

/** Whether it is a standby, or a primary of before the failover that made the other one. */
const isBehind = (generation: string, other: string | undefined): boolean =>
  generation.startsWith(STANDBY) ||
  (other !== undefined && timelineOf(generation) > 0 && timelineOf(generation) < timelineOf(other));

/** The database has been replaced, restored or emptied since its rows were last looked up. */
export class OtherGenerationError extends Error {
  override readonly name = 'OtherGenerationError';
  /** The session leads to a server that is behind: it leaves the pool. */
  readonly isBehind: boolean;
  constructor(behind: boolean) {
    super(
      'PostgreSQL was restarted, replaced or restored, or the table was emptied or rewritten; nothing is claimed until its rows were looked up in their streams',
    );
    this.isBehind = behind;
  }
}

/** The server takes no writes, or its writes are lost to all who use the primary of now. */
export class NotPrimaryError extends Error {
  override readonly name = 'NotPrimaryError';
  constructor(found: string, latest: string | undefined) {
    super(
      found.startsWith(STANDBY)
        ? 'this PostgreSQL is a standby: it takes no writes. Point RELAY_DATABASE_URL to the primary'
        : `this PostgreSQL is on timeline ${timelineOf(found)}, and the relay has worked with timeline ${timelineOf(latest ?? '')}: ` +
            'it is a primary of before a failover. Point RELAY_DATABASE_URL to the primary of now; or, if this one was restored on purpose, say so with "relay own"',
    );
  }
}

/** What the transactions of a pool must belong to. */
export type Generation = ReturnType<typeof createGeneration>;

export function createGeneration() {
  let accepted: string | undefined;
  /** One of the highest timeline that a session, or another pod, has told of. */
  let latest: string | undefined;
  let timeline = TIMELINE;
  let onOther = (): void => {};

  const sql = (): string =>
    `CASE WHEN pg_is_in_recovery() THEN '${STANDBY}' ELSE ${timeline} END || '.' || ${RUN_AND_FILE}`;

  function meet(generation: string): void {
    if (!isBehind(generation, latest)) latest = generation;
  }

  async function ask(client: pg.PoolClient, timeoutMs: number): Promise<DatabaseState> {
    const text = `SELECT clock_timestamp()::text AS now, ${sql()} AS generation`;
    try {
      const { rows } = await client.query<DatabaseState>({
        text,
        query_timeout: timeoutMs,
      } as pg.QueryConfig);
      return rows[0] as DatabaseState;
    } catch (error) {
      if (timeline === UNTOLD || !CANNOT_TELL.has((error as pg.DatabaseError).code ?? '')) throw error;
      timeline = UNTOLD;
      return ask(client, timeoutMs);
    }
  }

  return {
    /** An expression: the generation. */
    sql,

    /** From now on transactions of any other generation fail. */
    accept(generation: string): void {
      accepted = generation;
    },

    /** @param told when a transaction of another generation has failed */
    watch(told: () => void): void {
      onOther = told;
    },

    /** @throws {OtherGenerationError} before the transaction has done anything that lasts */
    assert(found: string): void {
      if (accepted === undefined || accepted === found) return;
      meet(found);
      onOther();
      throw new OtherGenerationError(isBehind(found, latest));
    },

    /**
     * Asks a session. After a failover a pool may have sessions to both servers; those to the former primary are thrown
     * away.
     * @param known the generation that pods have worked with last; null where there is none, undefined to leave it
     * @throws {NotPrimaryError} when no session leads to the primary
     */
    async look(
      pool: Readonly<{ connect(): Promise<pg.PoolClient> }>,
      timeoutMs: number,
      known?: string | null,
    ): Promise<DatabaseState> {
      if (known === null) latest = undefined;
      else if (known !== undefined) meet(known);
      for (let thrownAway = 1; ; thrownAway++) {
        const client = await pool.connect();
        client.on('error', nextStatementFails);
        try {
          const found = await ask(client, timeoutMs);
          if (isBehind(found.generation, latest)) throw new NotPrimaryError(found.generation, latest);
          meet(found.generation);
          client.release();
          client.off('error', nextStatementFails);
          return found;
        } catch (error) {
          client.release(error as Error);
          if (!(error instanceof NotPrimaryError) || thrownAway >= THROWN_AWAY_MAX) throw error;
        }
      }
    },
  };
}

const nextStatementFails = (): void => {};
