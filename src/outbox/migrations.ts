import { fileURLToPath } from 'node:url';
import { readMigrationFiles } from 'drizzle-orm/migrator';
import { drizzle } from 'drizzle-orm/node-postgres';
import { migrate as runMigrations } from 'drizzle-orm/node-postgres/migrator';
import type pg from 'pg';
import { pause } from '../lifecycle.ts';
import { RequirementError } from '../requirement.ts';
import type { Logger } from '../telemetry/logger.ts';
import {
  columnsWithNulls,
  missingFromTable,
  NO_TABLE,
  nullableColumns,
  nullsIn,
  topicByDefault,
  unsuitableInTable,
} from './required.ts';
import { installWakeup, removeWakeup } from './wakeup.ts';

const MIGRATIONS = fileURLToPath(new URL('../../drizzle', import.meta.url));
/** Spells "rlay", "migr". */
const MIGRATING = '1919705465, 1835624306';
const LOCK_POLL_MS = 200;
/** Building indexes on a large table takes its time; a session that hangs would be waited for for ever. */
const LOCK_DEADLINE_MS = 3_600_000;
/** What others may have set for the role or the database, and what the statements of a migration rely on. */
const SESSION = `
  SELECT CASE WHEN current_setting('transaction_timeout', true) <> '0' THEN set_config('transaction_timeout', '0', false) END;
  SET statement_timeout = 0; SET idle_in_transaction_session_timeout = 0; SET lock_timeout = 0;
  SET search_path = pg_catalog, public; SET default_transaction_isolation = 'read committed';
  SET standard_conforming_strings = on; SET default_tablespace = ''; SET row_security = on`;
/** A table's exclusive lock is not waited for longer: every writer would queue up behind us. */
const TABLE_LOCK_TIMEOUT_MS = 10_000;

/**
 * Creates `identity.outbox`, or adopts one that is there: only additions, each `IF NOT EXISTS`. Safe when
 * several pods migrate at once (one after the other) and when it is run again.
 *
 * @param notify install the wake-up trigger; false removes it
 * @param topic of rows that name none, in a table that is made here; an adopted one keeps its default
 * @throws {RequirementError} when there is a table, or something of its name, that cannot be adopted: nothing was done
 * @throws when the database refuses a step: nothing of that step was done
 */
export async function migrate(
  client: pg.Client,
  notify: boolean,
  logger: Logger,
  topic?: string,
): Promise<void> {
  await client.query(SESSION);
  await takeLock(client, logger);
  try {
    await client.query(`SET lock_timeout = ${TABLE_LOCK_TIMEOUT_MS}`);
    const isNew = await refuseUnsuitable(client);
    await indexWithoutBlocking(client, logger);
    const before = await applied(client);
    await runMigrations(drizzle(client), {
      migrationsFolder: MIGRATIONS,
      migrationsSchema: 'identity',
      migrationsTable: 'relay_migrations',
    });
    await client.query('INSERT INTO identity.relay_owner DEFAULT VALUES ON CONFLICT DO NOTHING');
    const after = await applied(client);
    logger.info({ applied: after - before, total: after }, 'identity.outbox has all migrations');
    if (isNew && topic !== undefined) await setTopicByDefault(client, topic);
    const trigger = notify ? await installWakeup(client) : await removeWakeup(client);
    logger.info({ trigger }, notify ? 'the wake-up trigger is there' : 'there is no wake-up trigger');
  } finally {
    await client.query(`SELECT pg_advisory_unlock(${MIGRATING})`);
  }
}

/**
 * @returns whether there is no table yet
 * @throws {RequirementError} naming everything that has to be changed by hand
 */
async function refuseUnsuitable(client: pg.Client): Promise<boolean> {
  const problems = await unsuitableInTable(client);
  const nullable = problems.length > 0 ? [] : await nullableColumns(client);
  const withNulls = nullable.length > 0 ? await columnsWithNulls(client, nullable) : [];
  if (withNulls.length > 0) problems.push(nullsIn(withNulls));
  if (problems.length > 0)
    throw new RequirementError(
      `nothing was changed, since identity.outbox cannot be adopted as it is: ${problems.join('; ')}`,
    );
  return (await missingFromTable(client)).includes(NO_TABLE);
}

async function setTopicByDefault(client: pg.Client, topic: string): Promise<void> {
  if ((await topicByDefault(client)) === topic) return;
  await client.query(
    `ALTER TABLE identity.outbox ALTER COLUMN topic SET DEFAULT ${client.escapeLiteral(topic)}`,
  );
}

/**
 * By trying, not by waiting in the lock: a session that waits holds a snapshot, and CREATE INDEX CONCURRENTLY
 * waits for every snapshot, so that two pods would deadlock.
 */
async function takeLock(client: pg.Client, logger: Logger): Promise<void> {
  const deadline = performance.now() + LOCK_DEADLINE_MS;
  for (let tries = 0; ; tries++) {
    const { rows } = await client.query(`SELECT pg_try_advisory_lock(${MIGRATING}) AS mine`);
    if (rows[0].mine) return;
    const isOver = performance.now() > deadline;
    if (tries === 0 || isOver) {
      const holder = await whoMigrates(client);
      if (isOver) throw new Error(`${holder} has held the lock of migrations for an hour; nothing was done`);
      logger.info({ holder }, 'another process is migrating this database; waiting for it');
    }
    await pause(LOCK_POLL_MS);
  }
}

async function whoMigrates(client: pg.Client): Promise<string> {
  const { rows } = await client.query(
    `SELECT format('process %s of PostgreSQL (application "%s", role %s)', pid, application_name, usename) AS holder
     FROM pg_locks JOIN pg_stat_activity USING (pid)
     WHERE locktype = 'advisory' AND granted AND (classid, objid) = (${MIGRATING}) AND objsubid = 2`,
  );
  return rows[0]?.holder ?? 'another process';
}

/**
 * On a table that has rows, the migration's CREATE INDEX would keep writers out for as long as it takes to
 * read the whole table. So its indexes are made here first, CONCURRENTLY, and the migration finds them there.
 */
async function indexWithoutBlocking(client: pg.Client, logger: Logger): Promise<void> {
  const { rows } = await client.query(`SELECT to_regclass('identity.outbox') IS NOT NULL AS there`);
  if (!rows[0].there) return;
  const statements = readMigrationFiles({ migrationsFolder: MIGRATIONS }).flatMap((it) => it.sql);
  const matching = (pattern: RegExp) =>
    statements.flatMap((text) => pattern.exec(text)?.[0] ?? []).map((text) => text.trim());
  for (const text of matching(/ALTER TABLE "identity"\."outbox" ADD COLUMN IF NOT EXISTS[^;]*/)) {
    await client.query(text);
  }
  // Before any index is built: one that is there under its earlier name need not be.
  for (const text of matching(/DO \$\$ BEGIN[^$]*INDEX[^$]*END \$\$/)) await client.query(text);
  for (const text of matching(/CREATE INDEX IF NOT EXISTS "[^"]+" ON "identity"\."outbox"[^;]*/)) {
    const name = /"([^"]+)"/.exec(text)?.[1] as string;
    const index = await client.query(
      `SELECT indisvalid AS valid FROM pg_index WHERE indexrelid = to_regclass($1)`,
      [`identity."${name}"`],
    );
    if (index.rows[0]?.valid) continue;
    // An interrupted CONCURRENTLY leaves an invalid index of that name.
    if (index.rows[0]) await client.query(`DROP INDEX CONCURRENTLY identity."${name}"`);
    logger.info({ index: name }, 'building an index on the existing table; writers are not blocked');
    await client.query('SET lock_timeout = 0'); // waits for old transactions, holding up nobody
    await client.query(text.replace('CREATE INDEX', 'CREATE INDEX CONCURRENTLY'));
    await client.query(`SET lock_timeout = ${TABLE_LOCK_TIMEOUT_MS}`);
  }
}

async function applied(client: pg.Client): Promise<number> {
  const { rows } = await client.query(`SELECT to_regclass('identity.relay_migrations') IS NOT NULL AS there`);
  if (!rows[0].there) return 0;
  const count = await client.query('SELECT count(*)::int AS n FROM identity.relay_migrations');
  return count.rows[0].n;
}
