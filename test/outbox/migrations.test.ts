import { execFile } from 'node:child_process';
import { cp, readdir, readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { getTableConfig } from 'drizzle-orm/pg-core';
import pg from 'pg';
import { describe, expect, inject, test } from 'vitest';
import { withDeadline } from '../../src/lifecycle.ts';
import { migrate } from '../../src/outbox/migrations.ts';
import { missingFromTable, REQUIRED } from '../../src/outbox/required.ts';
import { outbox } from '../../src/outbox/table.ts';
import { hasWakeup } from '../../src/outbox/wakeup.ts';
import { anEvent, createOldTable, insertEvents, someEvents } from '../support/events.ts';
import { asRelay, MIGRATOR_ROLE } from '../support/least-privilege.ts';
import { createDatabase, folderOfFile } from '../support/servers.ts';
import { openAdminPool, openPool, readStates, silent } from '../support/stages.ts';
import { PATIENCE_MS, waitFor } from '../support/wait.ts';

const ADDED = [
  'column dead_lettered_at',
  'column stream_entry_id',
  'column replayed_at',
  'column discard_reason',
  'column discarded_by',
  'index relay_outbox_fresh',
  'index relay_outbox_due',
  'index relay_outbox_live',
  'index relay_outbox_parked',
  'index relay_outbox_dead',
  'index relay_outbox_dead_at',
  'index relay_outbox_with_entry',
  'index relay_outbox_without_entry',
  'table identity.relay_owner',
  'table identity.relay_claim_lock',
  'table identity.relay_epoch_lock',
  'table identity.relay_prune_lock',
];

test('what a pod looks for is what the table is described as', () => {
  const { columns, indexes } = getTableConfig(outbox);
  expect(REQUIRED.columns).toEqual(columns.map((it) => it.name));
  expect(REQUIRED.indexes).toEqual(indexes.map((it) => it.config.name));
});

/** Everything in it is done by the role that migrates, and so owns what is there. */
async function emptyDatabase(): Promise<{ url: string; pool: pg.Pool }> {
  const { adminUrl, name } = await createDatabase({ template: false });
  await openAdminPool(adminUrl).query(`GRANT CREATE ON DATABASE ${name} TO ${MIGRATOR_ROLE}`);
  const url = asRelay(adminUrl, MIGRATOR_ROLE);
  return { url, pool: openPool(url) };
}

async function runMigration(url: string, notify = true): Promise<void> {
  const client = new pg.Client({ connectionString: url });
  await client.connect();
  try {
    await migrate(client, notify, silent);
  } finally {
    await client.end();
  }
}

/** Everything in the schema by its definition and identity: what is made anew has another identity. */
async function readSchema(pool: pg.Pool): Promise<unknown> {
  const { rows } = await pool.query(`
    SELECT c.oid, c.relname, c.relkind, c.relfilenode, i.indisvalid AS valid,
           CASE WHEN i.indexrelid IS NOT NULL THEN pg_get_indexdef(c.oid) END AS definition
      FROM pg_class c LEFT JOIN pg_index i ON i.indexrelid = c.oid
     WHERE c.relnamespace = 'identity'::regnamespace ORDER BY c.oid`);
  const columns = await pool.query(`
    SELECT column_name, data_type, is_nullable, column_default FROM information_schema.columns
     WHERE table_schema = 'identity' AND table_name = 'outbox' ORDER BY ordinal_position`);
  const triggers = await pool.query(
    `SELECT oid, pg_get_triggerdef(oid) FROM pg_trigger WHERE tgrelid = 'identity.outbox'::regclass`,
  );
  const applied = await pool.query('SELECT * FROM identity.relay_migrations');
  return { objects: rows, columns: columns.rows, triggers: triggers.rows, applied: applied.rows };
}

const oldColumns = `id, event_id, event_type, aggregate_type, aggregate_id, payload::text, created_at, published,
  attempts, next_attempt_at, published_at, error_message, topic`;

describe('an empty database', () => {
  test('gets the table, the indexes and the trigger', async () => {
    const { url, pool } = await emptyDatabase();
    expect(await missingFromTable(pool)).toEqual(['table identity.outbox']);
    await runMigration(url);
    expect(await missingFromTable(pool)).toEqual([]);
    expect(await hasWakeup(pool)).toBe(true);
    await insertEvents(pool, [anEvent()]);
    expect(await readStates(pool)).toEqual(['fresh']);
  });

  test('gets the same table as the platform would have made, and the relay’s additions', async () => {
    const [made, adopted] = [await emptyDatabase(), await emptyDatabase()];
    await createOldTable(adopted.pool);
    await Promise.all([runMigration(made.url), runMigration(adopted.url)]);
    const columns = async (pool: pg.Pool) => ((await readSchema(pool)) as { columns: unknown }).columns;
    expect(await columns(made.pool)).toEqual(await columns(adopted.pool));
  });
});

describe('a table that is there already', () => {
  test('is adopted: its rows stay as they are, and the relay’s additions come to them', async () => {
    const { url, pool } = await emptyDatabase();
    await createOldTable(pool);
    await insertEvents(pool, someEvents(400, 40));
    await insertEvents(pool, someEvents(100, 10, { topic: null }));
    await pool.query(
      `UPDATE identity.outbox SET published = true, published_at = now(), attempts = 2 WHERE id % 3 = 0`,
    );
    await pool.query(`UPDATE identity.outbox SET next_attempt_at = now() + interval '5 s' WHERE id % 7 = 1`);
    expect(await missingFromTable(pool)).toEqual(ADDED);
    const read = async () => (await pool.query(`SELECT ${oldColumns} FROM identity.outbox ORDER BY id`)).rows;
    const before = await read();
    await runMigration(url);
    expect(await read()).toEqual(before);
    expect(before).toHaveLength(500);
    expect(await missingFromTable(pool)).toEqual([]);
    expect(await hasWakeup(pool)).toBe(true);
  });

  test('does not lock its writers out while indexes are built', async () => {
    const { url, pool } = await emptyDatabase();
    await createOldTable(pool);
    await insertEvents(pool, someEvents(10));
    // CREATE INDEX CONCURRENTLY has to wait for whoever has an old view of the table.
    const reader = await pool.connect();
    await reader.query('BEGIN ISOLATION LEVEL REPEATABLE READ');
    await reader.query('SELECT 1');
    const migrating = runMigration(url);
    await waitFor(
      async () =>
        (
          await pool.query(
            `SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'
                AND query LIKE 'CREATE INDEX CONCURRENTLY%'`,
          )
        ).rowCount,
      { what: 'the migration to wait for the reader' },
    );
    await withDeadline(2_000, insertEvents(pool, [anEvent()]));
    await reader.query('COMMIT');
    reader.release();
    await migrating;
    expect(await missingFromTable(pool)).toEqual([]);
  });

  test('is migrated though the role has a statement timeout: an index takes as long as it must', async () => {
    const { url, pool } = await emptyDatabase();
    await createOldTable(pool);
    await insertEvents(pool, someEvents(10));
    const hasty = new URL(url);
    hasty.searchParams.set('options', '-c statement_timeout=500 -c transaction_timeout=500');
    // CREATE INDEX CONCURRENTLY has to wait for whoever has an old view of the table.
    const reader = await pool.connect();
    await reader.query('BEGIN ISOLATION LEVEL REPEATABLE READ');
    await reader.query('SELECT 1');
    const migrating = runMigration(hasty.href);
    const outlasted = waitFor(
      async () =>
        (
          await pool.query(
            `SELECT FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'CREATE INDEX CONCURRENTLY%'
                AND state = 'active' AND clock_timestamp() - query_start > interval '2 s'`,
          )
        ).rowCount,
      { what: 'an index to be built for longer than the timeout' },
    );
    // A migration that fails is not waited for.
    await Promise.race([outlasted, migrating]);
    await reader.query('COMMIT');
    reader.release();
    await migrating;
    expect(await missingFromTable(pool)).toEqual([]);
  });

  test('is repaired where an earlier migration was interrupted: a half-built index is built anew', async () => {
    const { url, pool } = await emptyDatabase();
    await createOldTable(pool);
    await insertEvents(pool, someEvents(3));
    // Fails, and leaves what an interrupted build leaves: an index of that name, invalid.
    const leftover = 'CREATE UNIQUE INDEX CONCURRENTLY relay_outbox_live ON identity.outbox ((1))';
    await expect(pool.query(leftover)).rejects.toThrow('could not create unique index');
    expect(await missingFromTable(pool)).toContain('index relay_outbox_live');
    await runMigration(url);
    expect(await missingFromTable(pool)).toEqual([]);
    const { rows } = await pool.query(
      `SELECT indexdef FROM pg_indexes WHERE indexname = 'relay_outbox_live' AND schemaname = 'identity'`,
    );
    expect(rows[0].indexdef).toContain('(aggregate_type, aggregate_id, id)');
    expect(rows[0].indexdef).not.toContain('UNIQUE');
  });
});

test('a copy that has taken the place of the table is refused: the relay’s indexes are those of the former table', async () => {
  const { url, pool } = await emptyDatabase();
  await runMigration(url);
  await pool.query(`
    CREATE TABLE identity.copied (LIKE identity.outbox INCLUDING ALL);
    ALTER TABLE identity.outbox RENAME TO former;
    ALTER TABLE identity.copied RENAME TO outbox`);
  const error = await runMigration(url).catch(({ message }) => message as string);
  expect(error).toMatch(/index relay_outbox_fresh belongs to table identity\.former: ALTER INDEX/);
  for (const remedy of error?.match(/ALTER INDEX [^;]+/g) ?? []) await pool.query(remedy);
  await runMigration(url);
  expect(await missingFromTable(pool)).toEqual([]);
});

test('several migrations at once all succeed, and do the work once', async () => {
  const [empty, old] = [await emptyDatabase(), await emptyDatabase()];
  await createOldTable(old.pool);
  await insertEvents(old.pool, someEvents(100));
  await Promise.all([empty, old].flatMap(({ url }) => Array.from({ length: 4 }, () => runMigration(url))));
  for (const { pool } of [empty, old]) {
    expect(await missingFromTable(pool)).toEqual([]);
    const { rows } = await pool.query('SELECT hash FROM identity.relay_migrations');
    expect(rows).toHaveLength(new Set(rows.map(({ hash }) => hash)).size);
    const journal = JSON.parse(await readFile(join(inject('root'), 'drizzle/meta/_journal.json'), 'utf8'));
    expect(rows).toHaveLength(journal.entries.length);
  }
});

test('a second migration changes nothing', async () => {
  const { url, pool } = await emptyDatabase();
  await createOldTable(pool);
  await runMigration(url);
  const before = await readSchema(pool);
  await runMigration(url);
  expect(await readSchema(pool)).toEqual(before);
});

describe('indexes that an earlier version named otherwise', () => {
  const EARLIER = {
    relay_outbox_settled: 'relay_outbox_with_entry',
    relay_outbox_unreceipted: 'relay_outbox_without_entry',
  };
  const indexes = async (pool: pg.Pool): Promise<Record<string, number>> => {
    const { rows } = await pool.query(
      `SELECT relname AS name, relfilenode AS file FROM pg_class WHERE relnamespace = 'identity'::regnamespace
          AND relkind = 'i' AND relname LIKE 'relay_outbox%'`,
    );
    return Object.fromEntries(rows.map(({ name, file }) => [name, file]));
  };
  const asEarlier = async (pool: pg.Pool): Promise<void> => {
    for (const [earlier, name] of Object.entries(EARLIER))
      await pool.query(`ALTER INDEX identity.${name} RENAME TO ${earlier}`);
    await pool.query(
      'DELETE FROM identity.relay_migrations WHERE id = (SELECT max(id) FROM identity.relay_migrations)',
    );
  };

  test('are renamed, not built anew', async () => {
    const { url, pool } = await emptyDatabase();
    await runMigration(url);
    const before = await indexes(pool);
    await asEarlier(pool);
    expect(await missingFromTable(pool)).toEqual(Object.values(EARLIER).map((it) => `index ${it}`));
    await runMigration(url);
    expect(await indexes(pool)).toEqual(before);
  });

  test('are dropped when that version, run again meanwhile, has built them a second time', async () => {
    const { url, pool } = await emptyDatabase();
    await runMigration(url);
    const before = await indexes(pool);
    for (const [earlier, name] of Object.entries(EARLIER)) {
      const { rows } = await pool.query(`SELECT pg_get_indexdef('identity.${name}'::regclass) AS definition`);
      await pool.query(rows[0].definition.replace(name, earlier));
    }
    await runMigration(url);
    expect(await indexes(pool)).toEqual(before);
  });
});

test('the trigger is left out, removed and put back as is asked for', async () => {
  const { url, pool } = await emptyDatabase();
  await runMigration(url, false);
  expect(await hasWakeup(pool)).toBe(false);
  expect(await missingFromTable(pool)).toEqual([]);
  await runMigration(url, true);
  expect(await hasWakeup(pool)).toBe(true);
  await runMigration(url, false);
  expect(await hasWakeup(pool)).toBe(false);
  const { rows } = await pool.query(`SELECT FROM pg_proc WHERE pronamespace = 'identity'::regnamespace`);
  expect(rows).toEqual([]);
});

test('a migration that fails lets the next one through', async () => {
  const { url, pool } = await emptyDatabase();
  // In the way of the table: a view of its name.
  await pool.query('CREATE SCHEMA identity; CREATE VIEW identity.outbox AS SELECT 1 AS id');
  const client = await pool.connect();
  await expect(migrate(client as unknown as pg.Client, true, silent)).rejects.toThrow();
  await pool.query('DROP VIEW identity.outbox');
  // While the session of the failed one is still there.
  await withDeadline(10_000, runMigration(url));
  client.release();
  expect(await missingFromTable(pool)).toEqual([]);
});

test('what is missing is named, one by one', async () => {
  const { url, pool } = await emptyDatabase();
  await runMigration(url);
  await pool.query(
    'ALTER TABLE identity.outbox DROP COLUMN stream_entry_id; DROP INDEX identity.relay_outbox_due',
  );
  // With the column go the indexes on it.
  expect(await missingFromTable(pool)).toEqual([
    'column stream_entry_id',
    'index relay_outbox_due',
    'index relay_outbox_with_entry',
    'index relay_outbox_without_entry',
  ]);
});

test('the migrations are up to date with the table: drizzle-kit finds nothing to generate', async () => {
  const root = inject('root');
  const folder = join(await folderOfFile(), 'drizzle-kit');
  await cp(join(root, 'drizzle'), join(folder, 'drizzle'), { recursive: true });
  const before = await readdir(join(folder, 'drizzle'));
  const config = {
    dialect: 'postgresql',
    schema: join(root, 'src/outbox/table.ts'),
    out: './drizzle',
    schemaFilter: ['identity'],
  };
  await writeFile(join(folder, 'drizzle.config.json'), JSON.stringify(config));
  const { stdout } = await promisify(execFile)(
    process.execPath,
    [join(root, 'node_modules/drizzle-kit/bin.cjs'), 'generate', '--config=drizzle.config.json'],
    // It caches what it compiles where temporary files are: in our folder, which is removed.
    { cwd: folder, timeout: PATIENCE_MS, env: { ...process.env, TMPDIR: folder } },
  );
  expect(stdout).toContain('No schema changes');
  expect(await readdir(join(folder, 'drizzle'))).toEqual(before);
});
