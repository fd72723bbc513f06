import type pg from 'pg';
import { describe, expect, test } from 'vitest';
import { migrate } from '../../src/outbox/migrations.ts';
import { createOldTable } from '../support/events.ts';
import { asRelay, MIGRATOR_ROLE } from '../support/least-privilege.ts';
import { createDatabase } from '../support/servers.ts';
import { openAdminPool, openPool, silent } from '../support/stages.ts';

async function emptyDatabase(): Promise<pg.Pool> {
  const { adminUrl, name } = await createDatabase({ template: false });
  await openAdminPool(adminUrl).query(`GRANT CREATE ON DATABASE ${name} TO ${MIGRATOR_ROLE}`);
  return openPool(asRelay(adminUrl, MIGRATOR_ROLE));
}

async function runMigration(pool: pg.Pool, topic?: string): Promise<void> {
  const client = await pool.connect();
  try {
    await migrate(client as unknown as pg.Client, true, silent, topic);
  } finally {
    client.release();
  }
}

/** Every relation, column and trigger in the schema. */
async function readSchema(pool: pg.Pool): Promise<unknown> {
  const { rows } = await pool.query(`
    SELECT c.oid, c.relname, c.relkind, a.attname, a.atttypid, a.attnotnull,
           array(SELECT t.tgname FROM pg_trigger t WHERE t.tgrelid = c.oid) AS triggers
    FROM pg_class c LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
    WHERE c.relnamespace = 'identity'::regnamespace ORDER BY c.oid, a.attnum`);
  return rows;
}

const ALTER = 'ALTER TABLE identity.outbox';
const OTHER_TABLE = 'DROP TABLE identity.outbox; ';
const ROW = `INSERT INTO identity.outbox (event_type, aggregate_id, payload) VALUES ('A', gen_random_uuid(), '{}');`;

describe('an existing table that the relay cannot work with is refused before anything is changed', () => {
  for (const [what, sql, reason] of [
    ['json', `${ALTER} ALTER payload TYPE json`, /column payload is json, .*jsonb: ALTER TABLE/],
    [
      'an enum',
      `CREATE TYPE identity.kind AS ENUM ('A'); ${ALTER} ALTER event_type TYPE identity.kind USING 'A'`,
      /column event_type is enum/,
    ],
    ['text for a uuid', `${ALTER} ALTER aggregate_id TYPE text`, /column aggregate_id is text, .*uuid/],
    ['bigint for a uuid', `${ALTER} ALTER aggregate_id TYPE bigint USING 1`, /column aggregate_id is bigint/],
    [
      'event ids as text',
      `${ALTER} ALTER event_id DROP DEFAULT; ${ALTER} ALTER event_id TYPE text`,
      /column event_id is text/,
    ],
    [
      'no time zone',
      `${ALTER} ALTER created_at TYPE timestamp`,
      /column created_at is timestamp without time zone.*AT TIME ZONE/,
    ],
    [
      'too little room for reasons',
      `${ALTER} ALTER error_message TYPE varchar(99)`,
      /column error_message has a limit of 99/,
    ],
    [
      'nulls',
      `${ALTER} ALTER published DROP NOT NULL; ${ROW} UPDATE identity.outbox SET published = NULL`,
      /published.*null in some rows/,
    ],
    [
      'no unique event id',
      `${ALTER} DROP CONSTRAINT outbox_event_id_key`,
      /column event_id has no unique index/,
    ],
    [
      'missing columns',
      `${ALTER} DROP COLUMN attempts; ${ALTER} DROP COLUMN topic`,
      /no column attempts .*no column topic/,
    ],
    [
      'a generated column',
      `${ALTER} DROP COLUMN published; ${ALTER} ADD published boolean NOT NULL GENERATED ALWAYS AS (id > 5) STORED`,
      /column published is generated/,
    ],
    ['a view', `${OTHER_TABLE} CREATE VIEW identity.outbox AS SELECT 1 AS id`, /is a view/],
    [
      'a partitioned table',
      `${OTHER_TABLE} CREATE TABLE identity.outbox (id bigint) PARTITION BY RANGE (id)`,
      /is a partitioned table/,
    ],
    ['heirs', 'CREATE TABLE identity.heir () INHERITS (identity.outbox)', /inherit/],
  ] as const) {
    test(what, async () => {
      const pool = await emptyDatabase();
      await createOldTable(pool);
      await pool.query(sql);
      const before = await readSchema(pool);
      const refused = runMigration(pool);
      await expect(refused).rejects.toMatchObject({ name: 'RequirementError' });
      await expect(refused).rejects.toThrow(reason);
      expect(await readSchema(pool)).toEqual(before);
    });
  }
});

test('varchar, domains and an integer id are adopted, and columns that may be null and are not', async () => {
  const pool = await emptyDatabase();
  await createOldTable(pool);
  await pool.query(`CREATE DOMAIN identity.kind AS varchar(40); CREATE DOMAIN identity.key AS uuid;
    ${ALTER} ALTER event_type TYPE identity.kind, ALTER aggregate_id TYPE identity.key, ALTER id TYPE integer, ALTER topic TYPE varchar(90),
      ALTER published DROP NOT NULL`);
  await expect(runMigration(pool)).resolves.toBeUndefined();
});

test('rows of a new table that name no topic go to the default stream, those of an adopted one where they went', async () => {
  const topicOf = async (pool: pg.Pool) =>
    (await pool.query(`${ROW.replace(';', ' RETURNING topic')}`)).rows[0].topic;
  const made = await emptyDatabase();
  for (const time of ['first', 'second']) {
    await runMigration(made, "it's.mine");
    expect(await topicOf(made), time).toBe("it's.mine");
  }
  const adopted = await emptyDatabase();
  await createOldTable(adopted);
  await runMigration(adopted, 'my.stream');
  expect(await topicOf(adopted)).toBe('identity.user.v1');
});
