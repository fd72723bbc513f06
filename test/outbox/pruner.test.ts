import { afterEach, beforeEach, describe, expect, onTestFinished, test } from 'vitest';
import { createRetention } from '../../src/maintenance/retention.ts';
import { createPruner, FIRST_PLACE, type KeptRow, PRUNABLE_KINDS } from '../../src/outbox/pruner.ts';
import { createPublished } from '../../src/outbox/published.ts';
import { asRelay, grantLeast, OPERATOR_ROLE, RELAY_USER } from '../support/least-privilege.ts';
import { createDatabase } from '../support/servers.ts';
import { openAdminPool, openPool } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const HOUR_MS = 3_600_000;
const { url, adminUrl } = await createDatabase();
// The relay itself deletes rows where it is told to, and has the right to only then.
await grantLeast(adminUrl, { RELAY_PUBLISHED_RETENTION: '86400' });
const pool = openAdminPool(adminUrl);
const prunerAs = (user: string) => createPruner(openPool(asRelay(url, user)), { statementTimeoutMs: 10_000 });
const pruner = prunerAs(RELAY_USER);
const { ago: timeAgo } = createPublished(openPool(asRelay(url, RELAY_USER)), {
  ...{ streamName: 'identity.user.v1', maxEventBytes: 1e6, statementTimeoutMs: 10_000 },
});
const kept: KeptRow[] = [];
const retentionWith = (comparing: () => Promise<boolean>, by = pruner) =>
  createRetention({
    ...by,
    ago: timeAgo,
    comparing,
    onKept: (rows) => kept.push(...rows),
    resyncWindowMs: HOUR_MS,
  });
const retention = retentionWith(async () => false);
const operators = retentionWith(async () => false, prunerAs(OPERATOR_ROLE));

beforeEach(async () => {
  kept.length = 0;
  await pool.query('TRUNCATE identity.outbox CASCADE');
});

/** Rows of one kind, each with its name in event_type; `columns` are further columns and their values. */
async function add(name: string, columns: Record<string, string>, count = 1): Promise<void> {
  const all = { event_type: `'${name}'`, aggregate_id: 'gen_random_uuid()', payload: `'{}'`, ...columns };
  await pool.query(
    `INSERT INTO identity.outbox (${Object.keys(all)}) SELECT ${Object.values(all)} FROM generate_series(1, ${count})`,
  );
}
const names = async () => {
  const { rows } = await pool.query('SELECT DISTINCT event_type FROM identity.outbox ORDER BY 1');
  return rows.map((row) => row.event_type);
};
const count = async () => (await pool.query('SELECT count(*)::int AS n FROM identity.outbox')).rows[0].n;
const ago = (hours: number) => `now() - interval '${hours} hours'`;
const published = (hours: number) => ({
  published: 'true',
  published_at: ago(hours),
  stream_entry_id: `'1-1'`,
});

describe('of the rows of the table', () => {
  beforeEach(async () => {
    await add('old', published(30));
    await add('old, of another system', { published: 'true', published_at: ago(30) });
    await add('old, and nobody knows when', { published: 'true', created_at: ago(30) });
    await add('young', published(1));
    await add('young, of another system', { published: 'true', published_at: ago(1), created_at: ago(30) });
    await add('old and waiting', { created_at: ago(30) });
    await add('old and parked', { created_at: ago(30), next_attempt_at: `'infinity'` });
    const dead = { created_at: ago(40), dead_lettered_at: ago(30), stream_entry_id: `'1-1'` };
    await add('old and dead', { ...dead, next_attempt_at: `'infinity'` });
    await add('dead and skipped', { ...dead, ...published(29) });
    await add('discarded', { ...dead, published: 'true', published_at: ago(29), stream_entry_id: 'NULL' });
    await add('old and taken back', { ...published(30), published: 'false' });
    await add('old and unpublished: its entry was lost', { published: 'false', published_at: ago(30) });
  });

  test('those are deleted that were published long enough ago, and are not dead', async () => {
    expect(await retention.run(24 * HOUR_MS, () => true)).toBe(3);
    expect(await names()).toEqual(
      [
        'young',
        'young, of another system',
        'old and waiting',
        'old and parked',
        'old and dead',
        'dead and skipped',
        'discarded',
        'old and taken back',
        'old and unpublished: its entry was lost',
      ].toSorted(),
    );
  });

  test('none is, by a dry run, which counts the same', async () => {
    let sum = 0;
    for await (const rows of operators.byHand(24 * HOUR_MS, true)) sum += rows;
    expect(sum).toBe(3);
    expect(await count()).toBe(12);
  });
});

test('a row that a resync may need is not deleted, whatever is asked for', async () => {
  await add('needed', published(1));
  await add('not needed', published(1.1));
  expect(await retention.run(1, () => true)).toBe(1);
  expect(await names()).toEqual(['needed']);
});

test('a row that becomes unpublished while it is being deleted stays: Redis lost its entry', async () => {
  await add('lost meanwhile', published(30));
  await add('old', published(30));
  const recovery = await pool.connect();
  onTestFinished(() => recovery.release());
  await recovery.query('BEGIN');
  await recovery.query(`UPDATE identity.outbox SET published = false WHERE event_type = 'lost meanwhile'`);
  const running = retention.run(24 * HOUR_MS, () => true);
  await waitFor(
    async () =>
      (
        await pool.query(
          `SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`,
        )
      ).rowCount === 1,
    { what: 'the deletion to meet the row' },
  );
  await recovery.query('COMMIT');
  expect(await running).toBe(1);
  expect(await names()).toEqual(['lost meanwhile']);
  // Nothing keeps it: it goes once it is published again.
  expect(kept).toEqual([]);
  await pool.query('UPDATE identity.outbox SET published = true');
  expect(await retention.run(24 * HOUR_MS, () => true)).toBe(1);
});

test('nothing is deleted while table and streams are compared, and no more once that begins', async () => {
  await add('old', published(30), 2_500);
  let looks = 0;
  const interrupted = retentionWith(async () => ++looks > 2);
  await expect(interrupted.run(24 * HOUR_MS, () => true)).rejects.toThrow('nothing is deleted meanwhile');
  expect(await count()).toBe(500);
});

test('a thousand rows go at a time, past dead ones that are in between, until somebody says stop', async () => {
  for (let i = 0; i < 3; i++) {
    await add(
      'dead',
      { dead_lettered_at: ago(30), stream_entry_id: `'1-1'`, next_attempt_at: `'infinity'` },
      1_200,
    );
    await add('old', published(30), 400);
  }
  await add('of another system', { published: 'true', published_at: ago(30) }, 1_100);
  const steps: number[] = [];
  for await (const rows of operators.byHand(24 * HOUR_MS, false)) steps.push(rows);
  expect(steps.reduce((sum, it) => sum + it)).toBe(2_300);
  expect(Math.max(...steps)).toBe(1_000);
  expect(await names()).toEqual(['dead']);

  await add('old', published(30), 3_000);
  let turns = 0;
  const counting = retentionWith(async () => false, {
    step(step) {
      turns++;
      return pruner.step(step);
    },
  });
  expect(await counting.run(24 * HOUR_MS, () => turns < 5)).toBe(1_400);
});

test('one process deletes at a time: another gives way, a command waits for its turn', async () => {
  await add('old', published(30), 10);
  const holder = await pool.connect();
  try {
    await holder.query('BEGIN');
    await holder.query('LOCK TABLE identity.relay_prune_lock IN EXCLUSIVE MODE');
    expect(await retention.run(24 * HOUR_MS, () => true)).toBe(0);
    const byHand = operators.byHand(24 * HOUR_MS, false);
    const first = byHand.next();
    await holder.query('ROLLBACK');
    expect(await first).toMatchObject({ value: 10 });
  } finally {
    holder.release();
  }
});

test('rows published by the relay do not enter the index of those that are not its own', async () => {
  await add('fresh', {}, 1_000);
  await pool.query(
    `UPDATE identity.outbox SET published = true, published_at = now(), stream_entry_id = '1-1'`,
  );
  await pool.query('VACUUM identity.outbox');
  const { rows } = await pool.query(
    `SELECT (SELECT reltuples FROM pg_class WHERE oid = 'identity.relay_outbox_without_entry'::regclass) AS theirs,
            (SELECT reltuples FROM pg_class WHERE oid = 'identity.relay_outbox_with_entry'::regclass) AS ours`,
  );
  expect(rows[0]).toEqual({ theirs: 0, ours: 1_000 });
});

test('each step says where the next one begins, and the last one that it is the last', async () => {
  await add('young', published(0));
  const before = await timeAgo(HOUR_MS);
  for (const kind of PRUNABLE_KINDS) {
    expect(await pruner.step({ kind, after: FIRST_PLACE, before, limit: 10 })).toEqual({
      ...{ deleted: 0, kept: [] },
      next: null,
    });
  }
});

describe('a row that the database keeps', () => {
  const idsOf = async (name: string): Promise<string[]> =>
    (
      await pool.query('SELECT id::text FROM identity.outbox WHERE event_type = $1 ORDER BY id', [name])
    ).rows.map((row) => row.id);
  const fails = (condition: string, what: string) =>
    pool.query(`
      CREATE FUNCTION keep_some() RETURNS trigger LANGUAGE plpgsql AS $$
      BEGIN IF ${condition} THEN ${what}; END IF; RETURN OLD; END $$;
      CREATE TRIGGER keep_some BEFORE DELETE ON identity.outbox FOR EACH ROW EXECUTE FUNCTION keep_some()`);

  beforeEach(async () => {
    await add('old', published(30), 700);
    await add('kept', published(29), 2);
    await add('kept, of another system', { published: 'true', published_at: ago(30) });
    await add('old', published(28), 700);
  });
  afterEach(async () => {
    await pool.query('DROP TABLE IF EXISTS theirs; DROP FUNCTION IF EXISTS keep_some CASCADE');
  });

  test('since a foreign key leads to it stays by itself, is told once with the reason, and is tried again later', async () => {
    await pool.query(`CREATE TABLE theirs AS SELECT id FROM identity.outbox WHERE event_type LIKE 'kept%'`);
    await pool.query('ALTER TABLE theirs ADD FOREIGN KEY (id) REFERENCES identity.outbox');
    const ids = [...(await idsOf('kept')), ...(await idsOf('kept, of another system'))];
    expect(await retention.run(24 * HOUR_MS, () => true)).toBe(1_400);
    expect(await names()).toEqual(['kept', 'kept, of another system']);
    expect(kept.map(({ id }) => id)).toEqual(ids);
    for (const { reason } of kept) expect(reason).toMatch(/violates foreign key constraint "theirs_id_fkey"/);
    // Of what comes next, nothing waits for them.
    await add('old', published(28), 10);
    expect(await retention.run(24 * HOUR_MS, () => true)).toBe(10);
    expect(kept).toHaveLength(3);
    // As an hour later.
    await pool.query('DROP TABLE theirs');
    expect(await retentionWith(async () => false, prunerAs(RELAY_USER)).run(24 * HOUR_MS, () => true)).toBe(
      3,
    );
  });

  test.each([
    ['raises', `RAISE 'not this one'`, /not this one/],
    ['returns nothing', 'RETURN NULL', /a trigger, a rule or row level security keeps it/],
  ])('since a trigger %s stays by itself', async (_, what, reason) => {
    await fails(`OLD.event_type LIKE 'kept%'`, what);
    expect(await retention.run(24 * HOUR_MS, () => true)).toBe(1_400);
    expect(await names()).toEqual(['kept', 'kept, of another system']);
    expect(kept).toHaveLength(3);
    for (const it of kept) expect(it.reason).toMatch(reason);
  });

  test('is none where all together take longer than a statement may: fewer go at once', async () => {
    await pool.query('TRUNCATE identity.outbox');
    await add('old', published(30), 40);
    await fails('true', 'PERFORM pg_sleep(0.02)');
    const hasty = createPruner(openPool(asRelay(url, RELAY_USER)), { statementTimeoutMs: 500 });
    expect(await retentionWith(async () => false, hasty).run(24 * HOUR_MS, () => true)).toBe(40);
    expect(kept).toEqual([]);
  });

  test('is not blamed for what concerns the whole table', async () => {
    await pool.query(`REVOKE DELETE ON identity.outbox FROM ${RELAY_USER}`);
    await expect(retention.run(24 * HOUR_MS, () => true)).rejects.toThrow(/permission denied/);
    await pool.query(`GRANT DELETE ON identity.outbox TO ${RELAY_USER}`);
    expect(kept).toEqual([]);
  });
});
