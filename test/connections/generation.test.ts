import { beforeAll, describe, expect, test } from 'vitest';
import { transaction } from '../../src/connections/database.ts';
import { createGeneration, NotPrimaryError, OtherGenerationError } from '../../src/connections/generation.ts';
import { createDatabase } from '../support/servers.ts';
import { openAdminPool, openPool } from '../support/stages.ts';

const database = await createDatabase();
const admin = openAdminPool(database.adminUrl);

/** The same database, told to be on another timeline. */
const onTimeline = (generation: string, timeline: string) => generation.replace(/^[^.]+/, timeline);

const one = openPool(database.url, { max: 1 });
const pidOf = async () => (await one.query('SELECT pg_backend_pid() AS pid')).rows[0].pid;

let here = '';
beforeAll(async () => {
  here = (await createGeneration().read(one, 5_000)).generation;
});

describe('a transaction', () => {
  const run = (generation: ReturnType<typeof createGeneration>) => {
    const pool = { connect: () => one.connect(), generation };
    return transaction(
      pool,
      5_000,
      'repeatable',
      async (tx) => (await tx.query('SELECT 1 AS one')).rows[0].one,
    );
  };

  test('of the accepted generation runs, and so does any before one is accepted', async () => {
    const generation = createGeneration();
    expect(await run(generation)).toBe(1);
    generation.accept(here);
    expect(await run(generation)).toBe(1);
  });

  test('of a newer one fails, which is told; its session stays in the pool', async () => {
    const generation = createGeneration();
    let told = 0;
    generation.watch(() => void told++);
    generation.accept(onTimeline(here, '00000000'));
    const pid = await pidOf();
    await expect(run(generation)).rejects.toThrow(OtherGenerationError);
    expect({ told, pid: await pidOf() }).toEqual({ told: 1, pid });
  });

  test('of a former primary fails, and its session leaves the pool', async () => {
    const generation = createGeneration();
    await generation.read(one, 5_000, null);
    generation.accept(onTimeline(here, '000000FF'));
    await expect(generation.read(one, 5_000, onTimeline(here, '000000FF'))).rejects.toThrow(NotPrimaryError);
    const pid = await pidOf();
    await expect(run(generation)).rejects.toThrow(OtherGenerationError);
    expect(await pidOf()).not.toBe(pid);
    // An operator has said that it is the one.
    expect((await generation.read(one, 5_000, null)).generation).toBe(here);
  });
});

test('a table that is emptied or written anew, or comes from elsewhere, is of another generation', async () => {
  const seen = new Set([here]);
  for (const statement of [
    'TRUNCATE identity.outbox',
    'VACUUM FULL identity.outbox',
    'ALTER TABLE identity.outbox ALTER COLUMN event_type TYPE varchar(300)',
  ]) {
    await admin.query(statement);
    seen.add((await createGeneration().read(one, 5_000)).generation);
  }
  expect(seen.size).toBeGreaterThanOrEqual(3);
  await admin.query(
    'INSERT INTO identity.outbox (event_type, aggregate_id, payload) VALUES ($1, gen_random_uuid(), $2)',
    [...['X', '{}']],
  );
  const { generation } = await createGeneration().read(one, 5_000);
  await admin.query('DELETE FROM identity.outbox');
  expect((await createGeneration().read(one, 5_000)).generation).toBe(generation);
});

test('the time is printed in one way, whatever the session has set', async () => {
  const options = '-c DateStyle=German,DMY -c TimeZone=Asia/Kolkata';
  const { now } = await createGeneration().read(openPool(database.url, { options }), 5_000);
  expect(now).toMatch(/^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}\+00$/);
  const { rows } = await admin.query('SELECT clock_timestamp() - $1::timestamptz < $2 AS it', [
    now,
    '1 hour',
  ]);
  expect(rows[0].it).toBe(true);
});

test('a role that may not ask for the timeline knows the rest', async () => {
  await admin.query('REVOKE EXECUTE ON FUNCTION pg_walfile_name(pg_lsn) FROM PUBLIC');
  const generation = createGeneration();
  const untold = (await generation.read(one, 5_000)).generation;
  expect(untold).toMatch(/^00000000\.\d/);
  // It is not taken for a former primary.
  expect((await generation.read(one, 5_000, onTimeline(untold, '00000005'))).generation).toBe(untold);
});
