import { randomInt } from 'node:crypto';
import { escapeLiteral, type QueryConfig } from 'pg';
import type { RelayConfig } from '../config/config.ts';
import { tryClaim } from '../outbox/claim-trial.ts';
import {
  columnsWithNulls,
  idsOutOfOrder,
  lacks,
  lockedRows,
  misleadingDefaults,
  missingFromTable,
  nullableColumns,
  nullsIn,
  rolesThatInsertAll,
  topicByDefault,
  unsuitableInTable,
} from '../outbox/required.ts';
import { hiddenRows } from '../outbox/row-security.ts';
import { hasWakeup, hearsNotifications, isWakeupOff, notifyQueueUsage } from '../outbox/wakeup.ts';
import { advice, type Finding, failed, failedFor, ok, type Requirement } from '../requirement.ts';
import { errorText } from '../telemetry/logger.ts';
import { type Pool, type Queryable, transaction } from './database.ts';
import { READ_ONLY, sqlState, TIMED_OUT, TooFewSessionsError } from './pool-health.ts';
import { withSession } from './session.ts';
import { rowsHeldBy } from './table-lock.ts';

/** What the relay needs of PostgreSQL, of the table and of its role there. */

export type OnDatabase = Readonly<{
  pool: Pool & Queryable;
  config: RelayConfig;
  /** A claim is tried on a row that has waited for this long. */
  waitedMs: number;
}>;

/** Without these it cannot work. They take little: a pod tries them again and again while it runs. */
export const DATABASE_REQUIREMENTS: readonly Requirement<OnDatabase>[] = [
  { subject: 'database', check: isPostgres },
  { subject: 'writable', check: takesWrites },
  { subject: 'transactions', check: keepsTransactions },
  { subject: 'table', check: hasTable },
  { subject: 'row security', check: showsRows },
  { subject: 'claim', check: claims },
];

/** Tried once, before the relay starts: it may read the whole table. */
export const DATABASE_AT_START: readonly Requirement<OnDatabase>[] = [
  { subject: 'null columns', check: hasNoNulls },
];

/** Each gives advice alone, by `adviceFinding` also where it may not be asked. A pod asks once, when it is at work. */
export const DATABASE_ADVICE: readonly Requirement<OnDatabase>[] = [
  { subject: 'persistence', check: survivesCrash },
  { subject: 'row locks', check: rowsAreFree },
  { subject: 'ids', check: idsAreInOrder },
  { subject: 'defaults', check: rowsBeginFresh },
  { subject: 'topic', check: topicIsOurs },
  { subject: 'retention', check: mayDelete },
  { subject: 'wake-up', check: wakesUp },
  { subject: 'PREPARE TRANSACTION', check: letsPrepare },
  { subject: 'NOTIFY queue', check: hasRoomToNotify },
  { subject: 'producers', check: haveTheirColumns },
  { subject: 'dashboard', check: dashboardMayAct },
];

/** set_config knows all that a claim sets, and a claim uses what is in it. */
const MINIMUM_VERSION = 13;
/** How long a COMMIT waits for a standby that is there, at most, be the network slow. */
const SYNCHRONOUS_SECONDS = 5;
/** Longest time to read a whole table. */
const SCAN_MS = 2_000;
/** The queue holds 8 GB unless it is set smaller; sessions that listen read at once. */
const QUEUE_IS_FILLING = 0.01;

/**
 * SQLSTATEs of what passes: connections (08), transactions that collide (40), no resources (53), locks (55P, 55006), an
 * operator's intervention (57). Without one, nobody has answered. 55000 lasts: a publication has updates of a table that has
 * no replica identity.
 */
const PASSES = /^(08|40|53|55P|55006|57)/;
const NO_RIGHT = '42501';
/** SQLSTATEs of who may not log in (28), and of a database that is not there (3D). */
const NO_SUCH_LOGIN = /^(28|3D)/;
/** Of the system, of TLS and of node-postgres: no server answers at this address, or another kind of server. */
const NOT_REACHED =
  /\b(E(CONNREFUSED|CONNRESET|NOTFOUND|NOENT|PIPE|PROTO|HOSTUNREACH|NETUNREACH|TIMEDOUT)|EAI_AGAIN)\b|timeout expired|[Cc]onnection terminated|timeout exceeded when trying to connect|certificate|\b(SSL|TLS)\b/;
const UNSUPPORTED = /^(0A000|42)/;

export function databaseFinding(error: unknown): Finding {
  const code = sqlState(error) ?? '';
  const text = errorText(error);
  if (/statement pooling mode/.test(text)) return failed(STATEMENT_POOLING);
  if (code === NO_RIGHT) return failed(`${text}: give the role its rights; "relay grants" prints them`);
  if (NO_SUCH_LOGIN.test(code)) return failed(`${text}: see RELAY_DATABASE_URL`);
  if (text === 'Query read timeout')
    return failedFor(
      'soon',
      `${text}: the server hangs, or a pooler before it has no session to give: in session mode it needs as many as all pods together (RELAY_DATABASE_POOL_SIZE)`,
    );
  if (code === '' && NOT_REACHED.test(text)) return failedFor('soon', `${text}: see RELAY_DATABASE_URL`);
  if (code === READ_ONLY) return failedFor('soon', `${text}: let RELAY_DATABASE_URL lead to the primary`);
  // What PostgreSQL has and this server has not, or what the table has in addition. A table that is altered now passes.
  if (UNSUPPORTED.test(code) && !/cached plan/.test(text))
    return failed(`the relay's statements do not work here: ${text} (SQLSTATE ${code})`);
  return code !== '' && !PASSES.test(code) && code !== '0A000' ? failed(text) : failedFor('soon', text);
}

/** The relay works without an answer to what gives advice alone. */
export function adviceFinding(error: unknown): Finding {
  const found = databaseFinding(error);
  return found.mayPass === 'soon' ? found : advice(found.finding);
}

const STATEMENT_POOLING =
  'PgBouncer pools single statements (pool_mode=statement): the relay needs transactions; set pool_mode to transaction or session';

/** By what `version()` says, and why it will not do. */
const OTHERS: readonly (readonly [pattern: RegExp, name: string])[] = [
  [/CockroachDB/i, 'CockroachDB'],
  [/-YB-|Yugabyte/i, 'YugabyteDB'],
  [/Redshift/i, 'Amazon Redshift'],
  [/Greenplum|Cloudberry/i, 'Greenplum'],
  [/Materialize/i, 'Materialize'],
  [/CrateDB/i, 'CrateDB'],
  [/QuestDB/i, 'QuestDB'],
  [/RisingWave/i, 'RisingWave'],
];

/** Outside of a transaction of ours, whose settings another server may not know. */
async function isPostgres({ pool }: OnDatabase): Promise<Finding> {
  const { rows } = await withSession(pool, (client) =>
    client.query<{ version: string; text: string; role: string; encoding: string }>({
      text: `SELECT current_setting('server_version') AS version, version() AS text, current_user AS role,
                    current_setting('server_encoding') AS encoding`,
      query_timeout: STATEMENT_MS,
    } as QueryConfig),
  );
  const { version = '', text = '', role, encoding } = rows[0] ?? {};
  const other = OTHERS.find(([pattern]) => pattern.test(text))?.[1];
  if (other !== undefined)
    return failed(
      `${other} is not PostgreSQL: advisory locks, SKIP LOCKED or NOTIFY do not work there as the relay needs them`,
    );
  if (Number.parseInt(version, 10) < MINIMUM_VERSION)
    return failed(`PostgreSQL ${version}; at least ${MINIMUM_VERSION} is needed`);
  const found = `PostgreSQL ${version}, as role ${role}`;
  return encoding === 'SQL_ASCII'
    ? advice(`${found}; its encoding is SQL_ASCII: events with bytes that are no UTF-8 are dead-lettered`)
    : ok(found);
}

async function takesWrites({ pool }: OnDatabase): Promise<Finding> {
  const { rows } = await pool.query<{
    standby: boolean;
    readOnly: boolean;
    role: string;
    names: string;
    waitsSeconds: number | null;
  }>(
    `SELECT pg_is_in_recovery() AS standby, current_user AS role,
            current_setting('default_transaction_read_only')::boolean AS "readOnly",
            current_setting('synchronous_standby_names') AS names,
            (SELECT extract(epoch FROM clock_timestamp() - min(query_start))::int FROM pg_stat_activity
             WHERE datname = current_database() AND wait_event = 'SyncRep') AS "waitsSeconds"`,
  );
  const { standby, readOnly, role, names, waitsSeconds } = rows[0] ?? {};
  if (standby)
    return failedFor(
      'soon',
      'this is a standby, which takes no writes: let RELAY_DATABASE_URL lead to the primary',
    );
  if (readOnly)
    return failedFor(
      'soon',
      `sessions of ${role} are read only (default_transaction_read_only): let RELAY_DATABASE_URL lead to the primary, or ALTER ROLE or DATABASE … RESET default_transaction_read_only`,
    );
  // Other statements go on, also in the sessions of the health checks. A role sees the waits of its own sessions.
  if (waitsSeconds && waitsSeconds >= SYNCHRONOUS_SECONDS)
    return failedFor(
      'later',
      `a COMMIT has waited for ${waitsSeconds} s for a synchronous standby (synchronous_standby_names is ${JSON.stringify(names)}): start the standby, or take it out of synchronous_standby_names`,
    );
  return ok('the primary, and it takes writes');
}

/** A lock of the first statement is there for the second: both ran in one transaction, of one session of PostgreSQL. */
async function keepsTransactions({ pool }: OnDatabase): Promise<Finding> {
  const key = randomInt(2 ** 31);
  const isHeld = await transaction(pool, SCAN_MS, 'repeatable', async (tx) => {
    await tx.query(`SELECT pg_try_advisory_xact_lock(${key}, ${key})`);
    const { rows } = await tx.query<{ held: boolean }>(
      `SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid() AND granted
         AND (classid, objid) = (${key}, ${key})) AS held`,
    );
    return rows[0]?.held === true;
  });
  return isHeld
    ? ok('kept, with their locks')
    : failed(
        'a lock does not last as long as its transaction: two pods would claim at once; connect to PostgreSQL itself',
      );
}

async function hasTable({ pool }: OnDatabase): Promise<Finding> {
  const unsuitable = await unsuitableInTable(pool);
  if (unsuitable.length > 0) return failed(unsuitable.join('; '));
  const missing = await missingFromTable(pool);
  if (missing.length > 0) return failedFor('later', lacks(missing));
  return ok('identity.outbox has its columns and indexes');
}

async function survivesCrash({ pool }: OnDatabase): Promise<Finding | undefined> {
  const { rowCount } = await pool.query(
    `SELECT FROM pg_class WHERE oid = to_regclass('identity.outbox') AND relpersistence <> 'p'`,
  );
  if (rowCount === 0) return undefined;
  return advice(
    'identity.outbox is UNLOGGED: a crash of PostgreSQL empties it, and a standby has none of its rows: ALTER TABLE identity.outbox SET LOGGED',
  );
}

async function rowsAreFree({ pool }: OnDatabase): Promise<Finding | undefined> {
  const locked = await lockedRows(pool);
  if (locked === undefined) return undefined;
  const { rows, pid, role } = locked;
  return advice(
    `session ${pid} (role ${role}) keeps at least ${rows} of the rows locked that have waited for a minute or longer, and no pod can take them: end its transaction, or SELECT pg_terminate_backend(${pid})`,
  );
}

async function hasNoNulls({ pool }: OnDatabase): Promise<Finding | undefined> {
  const nullable = await nullableColumns(pool);
  if (nullable.length === 0) return undefined;
  const may = `${nullable.join(', ')} may be null, and a row where one is would never be published`;
  const set = nullable.map((it) => `ALTER COLUMN ${it} SET NOT NULL`).join(', ');
  try {
    const withNulls = await transaction(pool, SCAN_MS, 'repeatable', (tx) => columnsWithNulls(tx, nullable));
    if (withNulls.length > 0) return failed(nullsIn(withNulls));
  } catch (error) {
    // A table too large to be read at each start.
    if (sqlState(error) !== TIMED_OUT) throw error;
  }
  return advice(`${may}: ALTER TABLE identity.outbox ${set}`);
}

async function showsRows({ pool, config }: OnDatabase): Promise<Finding | undefined> {
  const how = await hiddenRows(pool, { deletes: config.publishedRetentionMs > 0 });
  if (how === undefined) return undefined;
  const { rows } = await pool.query<{ role: string }>('SELECT quote_ident(current_user) AS role');
  const role = rows[0]?.role;
  return failed(
    `row level security of identity.outbox hides rows from role ${role} (${how}): CREATE POLICY relay ON identity.outbox TO ${role} USING (true) WITH CHECK (true), or ALTER ROLE ${role} BYPASSRLS`,
  );
}

/** Longest time for a statement of the trial. */
const STATEMENT_MS = 4_000;

async function claims({ pool, config, waitedMs }: OnDatabase): Promise<Finding> {
  const options = { ...config, statementTimeoutMs: STATEMENT_MS };
  const changes = await tryClaim(pool, options, waitedMs).catch(async (error) => {
    throw (sqlState(error) === TIMED_OUT && (await rowsHeldBy(pool, STATEMENT_MS))) || error;
  });
  if (!changes)
    return failed(
      'a row stays as it is when the relay changes it, without an error: a trigger BEFORE UPDATE on identity.outbox returns NULL; let it return NEW',
    );
  return ok('a row can be claimed, published and dead-lettered (tried, and rolled back)');
}

async function idsAreInOrder({ pool }: OnDatabase): Promise<Finding | undefined> {
  const problem = await idsOutOfOrder(pool);
  return problem === undefined ? undefined : advice(problem);
}

async function rowsBeginFresh({ pool }: OnDatabase): Promise<Finding | undefined> {
  const columns = await misleadingDefaults(pool);
  if (columns.length === 0) return undefined;
  return advice(
    `the default of ${columns.join(', ')} makes a new row look as if the relay had been at it, so that it is published late or never: ALTER TABLE identity.outbox ALTER COLUMN … DROP DEFAULT (published: SET DEFAULT false)`,
  );
}

async function mayDelete({ pool, config }: OnDatabase): Promise<Finding | undefined> {
  if (config.publishedRetentionMs === 0) return undefined;
  const { rows } = await pool.query<{ may: boolean }>(
    `SELECT has_table_privilege('identity.outbox', 'DELETE')
            AND has_table_privilege('identity.relay_prune_lock', 'UPDATE') AS may`,
  );
  if (rows[0]?.may) return undefined;
  return advice(
    'the role may not delete rows, which RELAY_PUBLISHED_RETENTION takes: give it its rights; "relay grants" prints them',
  );
}

async function topicIsOurs({ pool, config }: OnDatabase): Promise<Finding | undefined> {
  const topic = await topicByDefault(pool);
  if (topic === undefined || topic === config.streamName) return undefined;
  return advice(
    `rows that name no topic go to "${topic}", the default of the column topic, and not to RELAY_STREAM_NAME: ALTER TABLE identity.outbox ALTER COLUMN topic SET DEFAULT ${escapeLiteral(config.streamName)}`,
  );
}

async function wakesUp({ pool, config }: OnDatabase): Promise<Finding | undefined> {
  if (!config.notify) return undefined;
  const waits = `new events wait up to ${config.pollIntervalMs / 1_000} s`;
  if (!(await hasWakeup(pool))) return advice(`no trigger: ${waits} ("relay migrate" adds it)`);
  if (await isWakeupOff(pool))
    return advice(
      `the trigger is off: ${waits} (ALTER TABLE identity.outbox ENABLE TRIGGER relay_outbox_wakeup)`,
    );
  try {
    if (await hearsNotifications(pool)) return ok('the trigger is there, and notifications arrive');
  } catch (error) {
    if (error instanceof TooFewSessionsError || sqlState(error) === NO_RIGHT)
      return advice(`${waits}: ${errorText(error)}`);
    throw error;
  }
  return advice(
    `no notification arrives on this connection, as behind a pooler in transaction mode: ${waits}; connect to PostgreSQL itself, or set RELAY_NOTIFY=false`,
  );
}

async function letsPrepare({ pool }: OnDatabase): Promise<Finding | undefined> {
  const { rows } = await pool.query<{ max: number }>(
    `SELECT current_setting('max_prepared_transactions')::int AS max`,
  );
  if (rows[0]?.max === 0 || !(await hasWakeup(pool))) return undefined;
  return advice(
    `max_prepared_transactions is ${rows[0]?.max}: a producer that uses PREPARE TRANSACTION fails where the wake-up trigger notifies; if there is one, run "relay migrate --no-notify"`,
  );
}

async function hasRoomToNotify({ pool }: OnDatabase): Promise<Finding | undefined> {
  const used = (await notifyQueueUsage(pool)) ?? 0;
  if (used < QUEUE_IS_FILLING) return undefined;
  return advice(
    `${Math.round(used * 100)} % full: a session that LISTENs in an open transaction does not read; when it is full, writers' commits fail. Look for an old xact_start in pg_stat_activity, and end that session`,
  );
}

async function haveTheirColumns({ pool }: OnDatabase): Promise<Finding | undefined> {
  const roles = await rolesThatInsertAll(pool);
  if (roles.length === 0) return undefined;
  return advice(
    `may insert every column of identity.outbox, also what only the relay can know: ${roles.join(', ')}; run the SQL of "relay grants" again`,
  );
}

async function dashboardMayAct({ pool, config }: OnDatabase): Promise<Finding | undefined> {
  const problem = config.board ? await whyNoOperator(pool, config) : undefined;
  return problem === undefined ? undefined : advice(problem);
}

/**
 * What of the dashboard's API the role is refused; undefined where that is nothing, or there are viewers alone. Retry, and
 * what else the pages have, needs no right: it is done in Redis, and a pod publishes.
 */
export async function whyNoOperator(
  db: Queryable,
  { boardUsers }: Pick<RelayConfig, 'boardUsers'>,
): Promise<string | undefined> {
  if (boardUsers.length > 0 && boardUsers.every(({ role }) => role === 'viewer')) return undefined;
  const { rows } = await db.query<{ role: string; replay: boolean; discard: boolean }>(
    `SELECT current_user AS role,
            has_column_privilege('identity.outbox', 'replayed_at', 'UPDATE')
            AND has_column_privilege('identity.outbox', 'replayed_at', 'INSERT') AS replay,
            has_column_privilege('identity.outbox', 'discarded_by', 'UPDATE') AS discard`,
  );
  const [may] = rows;
  const refused = (['replay', 'discard'] as const).filter((it) => may?.[it] === false);
  if (may === undefined || refused.length === 0) return undefined;
  const paths = refused.map((it) => `POST /api/dlq/${it}`).join(' and ');
  return `role ${may.role} may not ${refused.join(' or ')}: the API refuses ${paths}, while Retry in the dashboard works; let RELAY_DATABASE_URL name a role with the operators’ rights; "relay grants" prints them`;
}
