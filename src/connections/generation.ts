import type pg from 'pg';
import type { DatabaseState } from '../event.ts';
import { withSession } from './session.ts';

/**
 * PostgreSQL may forget what was committed: a standby that lagged is promoted, the database is restored, the table is
 * emptied. Then rows are older than what Redis holds of them. A generation names where the rows come from: the timeline,
 * the run of the server and the file of the table. While the generation is the same, nothing is forgotten.
 *
 * - Timeline: a promotion makes a new one. It is the one that the server writes to, since `pg_control_checkpoint()` shows a
 *   new one late.
 * - Run of the server: a crash loses commits that did not wait for the disk, and a data directory that was copied back
 *   still has its old timeline.
 * - File: TRUNCATE, and whatever else rewrites the table, makes a new one.
 *
 * Each transaction reads the generation, not each session once: behind a pooler the server may change between two
 * transactions of a session. The text must be the same in all sessions: PostgreSQL 13 prints a float as extra_float_digits
 * says, a numeric always alike.
 */
const RUN_AND_FILE = `extract(epoch FROM pg_postmaster_start_time())::numeric::text || '.' || coalesce(pg_relation_filenode('identity.outbox'), 0)`;
const TIMELINE = 'left(pg_walfile_name(pg_current_wal_lsn()), 8)';
/** Pods keep it in Redis as text. The session's own settings for times are those of its role, database or owner. */
const NOW = `to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US"+00"')`;
/** Timeline of a server that does not tell it. */
const UNTOLD = `'00000000'`;
/** Takes the place of the timeline on a standby, which takes no writes. */
const STANDBY = 'standby';

/** 42501: the role may not ask; 42883, 0A000: the server is a relative of PostgreSQL and has no such function. */
export const CANNOT_TELL = new Set(['42501', '42883', '0A000']);

/** Sessions to a former primary that one `read` closes, at most; the next `read` goes on. */
const THROWN_AWAY_MAX = 3;

/** Each promotion makes a higher one. */
const timelineOf = (generation: string): number => Number.parseInt(generation, 16);

/** Whether the server of `generation` is a standby, or the former primary of the failover that made `other`. */
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
  /** A generation of the highest timeline that a session, or another pod, has reported. */
  let latest: string | undefined;
  let timeline = TIMELINE;
  let onOther = (): void => {};

  const sql = (): string =>
    `CASE WHEN pg_is_in_recovery() THEN '${STANDBY}' ELSE ${timeline} END || '.' || ${RUN_AND_FILE}`;

  function meet(generation: string): void {
    if (!isBehind(generation, latest)) latest = generation;
  }

  async function ask(client: pg.PoolClient, timeoutMs: number): Promise<DatabaseState> {
    const text = `SELECT ${NOW} AS now, ${sql()} AS generation`;
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
     * Asks the database for its time and generation. After a failover a pool may have sessions to both servers; it closes
     * those to the former primary.
     * @param known the generation that pods have worked with last; null where there is none, undefined to leave it
     * @throws {NotPrimaryError} when no session leads to the primary
     */
    async read(
      pool: Readonly<{ connect(): Promise<pg.PoolClient> }>,
      timeoutMs: number,
      known?: string | null,
    ): Promise<DatabaseState> {
      if (known === null) latest = undefined;
      else if (known !== undefined) meet(known);
      for (let thrownAway = 1; ; thrownAway++) {
        try {
          return await withSession(pool, async (client) => {
            const found = await ask(client, timeoutMs);
            if (isBehind(found.generation, latest)) throw new NotPrimaryError(found.generation, latest);
            meet(found.generation);
            return found;
          });
        } catch (error) {
          if (!(error instanceof NotPrimaryError) || thrownAway >= THROWN_AWAY_MAX) throw error;
        }
      }
    },
  };
}
