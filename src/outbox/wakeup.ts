import type pg from 'pg';
import type { Pool, Queryable } from '../connections/database.ts';
import type { Generation } from '../connections/generation.ts';
import {
  type HealthyPool,
  ReadOnlyError,
  sqlState,
  TooFewSessionsError,
} from '../connections/pool-health.ts';
import { pause, succeedsWithin } from '../lifecycle.ts';
import type { Logger } from '../telemetry/logger.ts';

/**
 * Wake-up: an insert into the outbox asks the relay for a claim, by LISTEN/NOTIFY.
 *
 * NOTIFY makes commits wait for one database-wide lock, so writers send none while the relay is busy anyway. An advisory
 * lock tells them: an idle relay holds it exclusively (it is "armed"). The trigger tries to share the lock. If it cannot,
 * the relay sleeps, and the writer notifies. If it can, the relay is awake: the writer sends nothing, and keeps the share
 * until it commits. So a relay gets the lock only when every writer that sent nothing has committed. Then it claims once
 * more, and has missed no event.
 */

const CHANNEL = 'relay_outbox';
/** Any constant pair will do; spells "rlay", "wake". Advisory locks are per database. */
const ARMED = '1919705465, 2002873189';

const RECONNECT_DELAY_MS = 1_000;
const HEARTBEAT_MS = 10_000;
/** A session that hears nothing is kept, in place of trying others again and again. */
const DEAF_MS = 2 ** 31 - 1;
/** By this name others see that a pod is at work. */
const LISTENER = 'relay-service wake-up';
/** A session that was silent for longer is what is left of a machine that is gone. */
const AT_WORK_SECONDS = (3 * HEARTBEAT_MS) / 1_000;
const QUERY_TIMEOUT_MS = 5_000;
const NO_RIGHT = '42501';

export async function installWakeup(db: Queryable): Promise<'installed' | 'present'> {
  await db.query(`
    CREATE OR REPLACE FUNCTION identity.relay_outbox_wakeup() RETURNS trigger LANGUAGE plpgsql AS $wakeup$
    BEGIN
      IF NOT pg_try_advisory_xact_lock_shared(${ARMED}) THEN
        PERFORM pg_notify('${CHANNEL}', '');
      END IF;
      RETURN NULL;
    END $wakeup$`);
  if (await hasWakeup(db)) return 'present';
  await db.query(`
    CREATE TRIGGER relay_outbox_wakeup AFTER INSERT ON identity.outbox
    FOR EACH STATEMENT EXECUTE FUNCTION identity.relay_outbox_wakeup()`);
  return 'installed';
}

export async function removeWakeup(db: Queryable): Promise<'removed' | 'absent'> {
  if (!(await hasWakeup(db))) return 'absent';
  await db.query('DROP TRIGGER relay_outbox_wakeup ON identity.outbox');
  await db.query('DROP FUNCTION IF EXISTS identity.relay_outbox_wakeup()');
  return 'removed';
}

/**
 * Where the pods are that listen for new events of this database: addresses, '' for a local socket. Pods without wake-up
 * are not among them, nor those of roles whose sessions this one may not see.
 */
export async function listeningPods(db: Queryable): Promise<string[]> {
  const { rows } = await db.query<{ address: string }>(
    `SELECT coalesce(host(client_addr), '') AS address FROM pg_stat_activity
     WHERE datname = current_database() AND application_name = $1
       AND state_change > clock_timestamp() - make_interval(secs => $2)`,
    [LISTENER, AT_WORK_SECONDS],
  );
  return rows.map(({ address }) => address);
}

/**
 * How full the queue of NOTIFY is, of 1; undefined where the role may not ask. It fills while a session listens and does not
 * read. When it is full, the wake-up trigger fails, and so does the commit of a producer.
 */
export async function notifyQueueUsage(db: Queryable): Promise<number | undefined> {
  try {
    const { rows } = await db.query<{ used: number }>('SELECT pg_notification_queue_usage() AS used');
    return rows[0]?.used;
  } catch (error) {
    if (sqlState(error) === NO_RIGHT) return undefined;
    throw error;
  }
}

/** `tgenabled` of the trigger; undefined where there is none. */
async function triggerState(db: Queryable): Promise<string | undefined> {
  const { rows } = await db.query<{ state: string }>(
    `SELECT tgenabled::text AS state FROM pg_trigger
     WHERE tgrelid = 'identity.outbox'::regclass AND tgname = 'relay_outbox_wakeup'`,
  );
  return rows[0]?.state;
}

export const hasWakeup = async (db: Queryable): Promise<boolean> => (await triggerState(db)) !== undefined;

/** Whether the trigger is switched off (DISABLE TRIGGER). */
export const isWakeupOff = async (db: Queryable): Promise<boolean> =>
  ['D', 'R'].includes((await triggerState(db)) ?? '');

/** Longest time that a notification takes where any arrives. */
const HEARD_WITHIN_MS = 2_000;

/**
 * Whether a session that listens hears another session. One session alone might hear itself even behind a pooler in
 * transaction mode, as long as both of its transactions are on one connection.
 */
export async function hearsNotifications(pool: Pool & Queryable): Promise<boolean> {
  const client = await (pool.leaving?.(1) ?? pool).connect();
  client.on('error', () => {}); // it is closed in any case
  try {
    return await hears(client, 'relay_check', (text) => pool.query(text));
  } finally {
    // The session still listens, so it is closed.
    client.release(true);
  }
}

const query = (client: pg.PoolClient, text: string) =>
  client.query({ text, query_timeout: QUERY_TIMEOUT_MS } as pg.QueryConfig);

/** Listens, and notifies by `ask`. */
async function hears(
  client: pg.PoolClient,
  channel: string,
  ask: (text: string) => Promise<unknown>,
): Promise<boolean> {
  await query(client, `LISTEN ${channel}`);
  const heard = new Promise((resolve) => client.once('notification', resolve));
  await ask(`SELECT pg_notify('${channel}', '')`);
  return succeedsWithin(HEARD_WITHIN_MS, heard);
}

/**
 * - `armed`: writers notify from now on; claim once more, then sleep.
 * - `already-armed`: this or another pod had armed it: sleep.
 * - `writers`: a writer who said nothing has yet to commit: claim again soon.
 * - `deaf`: no notifications here (switched off, no trigger, PgBouncer): the poll interval wakes the relay.
 */
export type Arming = 'armed' | 'already-armed' | 'writers' | 'deaf';

/** Sessions that a claim takes beside the one that listens: one holds the claim lock, one claims. */
const OTHER_SESSIONS = 2;

export type Wakeup = ReturnType<typeof createWakeup>;

export function createWakeup(deps: {
  pool: Pool & Partial<Pick<HealthyPool, 'sessions'>>;
  generation: Pick<Generation, 'sql' | 'assert'>;
  logger: Logger;
  onWake: () => void;
}) {
  const { generation, logger, onWake } = deps;
  const pool = deps.pool.leaving?.(OTHER_SESSIONS) ?? deps.pool;
  /** When sessions are few, the pod first gives up the one that only listens. */
  const hasTooFewSessions = () => (deps.pool.sessions?.().granted ?? OTHER_SESSIONS + 1) <= OTHER_SESSIONS;
  let isLost = false;
  let stopped = true;
  /** The listening connection, once it has proved that notifications arrive. */
  let listener: pg.PoolClient | undefined;
  let armed = false;
  let loop: Promise<void> | undefined;
  let interrupt = (): void => {};

  const onNotification = (client: pg.PoolClient) => () => {
    onWake();
    if (!armed) return;
    armed = false;
    query(client, `SELECT pg_advisory_unlock(${ARMED})`).catch(() => interrupt());
  };

  /** Holds one connection until it fails or the relay stops. */
  async function listen(): Promise<void> {
    const client = await pool.connect();
    let failed: Error | undefined;
    const over = new AbortController();
    interrupt = () => over.abort();
    client.on('error', (error) => {
      failed = error;
      over.abort();
    });
    client.on('end', interrupt);
    try {
      if (!(await hears(client, CHANNEL, (text) => query(client, text)))) {
        logger.warn(
          {},
          'no notification arrives on this database connection (PgBouncer?): new events wait for the poll interval',
        );
        await pause(DEAF_MS, over.signal);
        return;
      }
      await query(client, `SET application_name = '${LISTENER}'`);
      client.on('notification', onNotification(client));
      listener = client;
      if (isLost) logger.info({}, 'notifications of new events arrive again');
      isLost = false;
      onWake(); // whatever was missed while nobody listened
      while (!stopped) {
        await pause(HEARTBEAT_MS, over.signal);
        if (stopped) break;
        if (over.signal.aborted) throw failed ?? new Error('the session has ended');
        // A standby takes no writes, so no notification would ever arrive.
        const { rows } = await query(
          client,
          `SELECT pg_is_in_recovery() AS "isStandby", ${generation.sql()} AS generation`,
        );
        if (rows[0].isStandby) throw new ReadOnlyError(true);
        // Nor does one of a former primary.
        generation.assert(rows[0].generation);
        if (hasTooFewSessions()) throw new TooFewSessionsError('its session is needed to claim and publish');
      }
    } catch (error) {
      failed = error as Error;
      throw error;
    } finally {
      listener = undefined;
      armed = false;
      // Released only to be closed: it holds a session lock and LISTENs.
      client.removeAllListeners('notification');
      client.release(failed ?? true);
    }
  }

  return {
    start(): void {
      if (!stopped) return;
      stopped = false;
      loop = (async () => {
        while (!stopped) {
          try {
            await listen();
          } catch (error) {
            if (!isLost)
              logger.warn(
                { err: error },
                'lost the connection that listens for new events; polling until it is back',
              );
            isLost = true;
          }
          if (stopped) break;
          const stopping = new AbortController();
          interrupt = () => stopping.abort();
          await pause(RECONNECT_DELAY_MS, stopping.signal);
        }
      })();
    },

    async stop(): Promise<void> {
      stopped = true;
      interrupt();
      await loop;
    },

    async arm(): Promise<Arming> {
      const client = listener;
      if (!client) return 'deaf';
      if (armed) return 'already-armed';
      // Reading pg_locks locks the whole lock table for a moment, so it is read only when the try failed.
      const asked = query(
        client,
        `SELECT CASE
           WHEN pg_try_advisory_lock(${ARMED}) THEN 'armed'
           WHEN EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' AND granted
             AND (classid, objid) = (${ARMED}) AND objsubid = 2
             AND database = (SELECT oid FROM pg_database WHERE datname = current_database())) THEN 'already-armed'
           ELSE 'writers' END AS outcome`,
      );
      // A failure closes the listening session at once: the heartbeat would notice later.
      asked.catch(() => interrupt());
      const { rows } = await asked;
      const outcome = rows[0].outcome as Arming;
      if (listener !== client) return 'deaf';
      armed = outcome === 'armed';
      return outcome;
    },
  };
}
