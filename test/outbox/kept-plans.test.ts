/**
 * PostgreSQL keeps the plan of a statement that comes again and again. One that was made for an empty table must do for
 * the full one as well: until autovacuum analyses the table, nobody makes a new one.
 */
import { randomUUID } from 'node:crypto';
import pg from 'pg';
import { beforeAll, describe, expect, test } from 'vitest';
import { type Pool, transaction } from '../../src/connections/database.ts';
import { createOutbox, type Outbox } from '../../src/outbox/outbox.ts';
import { lockedRows } from '../../src/outbox/required.ts';
import { OUTBOX_OPTIONS } from '../support/outbox-table.ts';
import { createDatabase } from '../support/servers.ts';
import { type AdminPool, openAdminPool, openPool } from '../support/stages.ts';

const PUBLISHED_ROWS = 100_000;
const PARKED_ROWS = 1_000;
const BATCH = 50;
/** PostgreSQL keeps the plan of a statement from its sixth execution on. */
const EXECUTIONS = 7;
/** An update of a row writes to a dozen indexes, three levels each. */
const MOST_PAGES_PER_ROW = 100;
const FIRST_LEASED = PUBLISHED_ROWS + 1;
const HOT_HEAD = FIRST_LEASED + BATCH;
const HOT = { aggregateType: 'user', aggregateId: randomUUID() };
const SOME_AGGREGATES = [
  HOT,
  ...Array.from({ length: BATCH - 1 }, () => ({ aggregateType: 'user', aggregateId: randomUUID() })),
];
/** Each row's event id is its id. */
const eventIdOf = (id: number): string => `00000000-0000-0000-0000-${id.toString(16).padStart(12, '0')}`;
const nameOf = (id: number) => ({ id: String(id), eventId: eventIdOf(id) });
const namesFrom = (id: number) => Array.from({ length: BATCH }, (_, i) => nameOf(id + i));

const statements: [string, (outbox: Outbox) => Promise<unknown>, number][] = [
  ['a claim', (it) => it.inEpoch((tx) => it.claimFresh(tx, BATCH), { generic: true }), 20 * BATCH],
  ['expired rows', (it) => it.expired(BATCH), 3 * BATCH],
  [
    'an acknowledgement',
    (it) =>
      it.inEpoch((tx) =>
        it.markPublished(
          tx,
          namesFrom(FIRST_LEASED).map((name) => ({ ...name, entryId: '1-1' })),
        ),
      ),
    5 * BATCH,
  ],
  [
    'a dead letter',
    (it) =>
      it.inEpoch((tx) => it.markDead(tx, { ...nameOf(HOT_HEAD), attempts: 6, reason: 'x', entryId: '1-1' })),
    20,
  ],
  ['refill', (it) => it.refill(SOME_AGGREGATES), 10 * BATCH],
  [
    'the question where events stand',
    (it) =>
      it.standingOf(namesFrom(HOT_HEAD).map(({ eventId }, i) => ({ eventId, before: eventIdOf(i + 1) }))),
    10 * BATCH,
  ],
  [
    'the release of jobs',
    (it) =>
      it.park(
        namesFrom(HOT_HEAD).map((it) => it.eventId),
        [eventIdOf(HOT_HEAD)],
      ),
    5 * BATCH,
  ],
  [
    'the events that have dead letters',
    (it) =>
      it.inEpoch((tx) =>
        it.lockUngiven(
          tx,
          namesFrom(HOT_HEAD).map(({ eventId }) => ({ eventId, entryId: '1-1' })),
        ),
      ),
    3 * BATCH,
  ],
  [
    'the loss of entries',
    (it) =>
      it.unpublish(namesFrom(1).map((name) => ({ ...name, topic: 'x', entryId: '1-1', finalizedAt: '' }))),
    5 * BATCH,
  ],
];

const SOME_ROWS = `
  INSERT INTO identity.outbox (id, event_type, aggregate_id, payload, published, published_at, stream_entry_id)
  SELECT 1e6 + n, 'UserCreated', gen_random_uuid(), '{}', true, now(), '1-1' FROM generate_series(1, 3) n`;
/** When the plans were made: what autovacuum knew then. */
const TABLES: [string, string[]][] = [
  ['an empty table', []],
  [
    'a table that was emptied and vacuumed',
    [SOME_ROWS, 'DELETE FROM identity.outbox', 'VACUUM ANALYZE identity.outbox'],
  ],
  ['a table of a few rows', [SOME_ROWS, 'VACUUM ANALYZE identity.outbox']],
];

describe.each(TABLES)('by a plan of %s', (_table, prepare) => {
  let admin: AdminPool;
  /** One connection, which stays while the table is filled: plans are kept by each. */
  let relay: pg.Pool;
  const touched = new Map<string, number>();
  /** Pages of the table and its indexes, by statement. */
  const pages = new Map<string, number>();

  beforeAll(async () => {
    const { url, adminUrl } = await createDatabase();
    admin = openAdminPool(adminUrl);
    relay = openPool(url, { max: 1, idleTimeoutMillis: 0 });
    await admin.query('ALTER TABLE identity.outbox SET (autovacuum_enabled = off)');
    for (const sql of prepare) await admin.query(sql);
    const rows: number[] = [];
    const outbox = createOutbox(countingRows(relay, rows), { ...OUTBOX_OPTIONS, statementTimeoutMs: 20_000 });
    for (let i = 0; i < EXECUTIONS; i++) for (const [, run] of statements) await run(outbox);
    const eventId = (id: string) => `lpad(to_hex(${id}), 32, '0')::uuid`;
    await admin.query(`
    INSERT INTO identity.outbox (event_type, event_id, aggregate_id, payload, published, published_at, stream_entry_id)
    SELECT 'UserCreated', ${eventId('n')}, gen_random_uuid(), '{}', true, now(), '1-1'
      FROM generate_series(1, ${PUBLISHED_ROWS}) n;
    INSERT INTO identity.outbox (event_type, event_id, aggregate_id, payload, next_attempt_at)
    SELECT 'UserCreated', ${eventId(`n + ${FIRST_LEASED}`)}, gen_random_uuid(), '{}', now() + interval '1 minute'
      FROM generate_series(0, ${BATCH - 1}) n;
    INSERT INTO identity.outbox (event_type, event_id, aggregate_id, payload, next_attempt_at)
    SELECT 'UserUpdated', ${eventId(`n + ${HOT_HEAD}`)}, '${HOT.aggregateId}', '{}',
           CASE n WHEN 0 THEN now() + interval '1 minute' WHEN ${PARKED_ROWS} THEN NULL ELSE 'infinity' END
      FROM generate_series(0, ${PARKED_ROWS}) n;
    INSERT INTO identity.outbox (event_type, aggregate_id, payload, next_attempt_at)
    SELECT 'UserCreated', gen_random_uuid(), '{}', now() - interval '1 minute' FROM generate_series(1, ${2 * BATCH});
    INSERT INTO identity.outbox (event_type, aggregate_id, payload)
    SELECT 'UserCreated', gen_random_uuid(), '{}' FROM generate_series(1, ${2 * BATCH});
    -- Else the pages of these inserts may be counted later, as those of a statement.
    SELECT pg_stat_force_next_flush()`);
    for (const [name, run] of statements) {
      rows.length = 0;
      const before = await pagesRead();
      await run(outbox);
      pages.set(name, (await pagesRead()) - before);
      expect(rows).toHaveLength(1);
      touched.set(name, rows[0] as number);
    }
  });

  test.each(statements)('%s touches few rows', (name, _run, limit) => {
    expect(touched.get(name)).toBeGreaterThan(0);
    expect(touched.get(name)).toBeLessThanOrEqual(limit);
    // Of an index that is walked from end to end no row is counted.
    expect(pages.get(name)).toBeGreaterThan(0);
    expect(pages.get(name)).toBeLessThanOrEqual(MOST_PAGES_PER_ROW * (limit < BATCH ? 1 : BATCH));
  });

  test('these plans are kept ones', async () => {
    const { rows } = await relay.query<{ name: string }>(
      'SELECT name FROM pg_prepared_statements WHERE generic_plans > 1 ORDER BY name',
    );
    expect(rows.map((it) => it.name.split('-')[1])).toEqual([
      'claim',
      'publish',
      'refill',
      'standing',
      'unpublish',
    ]);
  });

  async function pagesRead(): Promise<number> {
    const { rows } = await admin.query<{ n: number }>(
      `SELECT (heap_blks_hit + heap_blks_read + idx_blks_hit + idx_blks_read)::int AS n
     FROM pg_statio_user_tables WHERE relid = 'identity.outbox'::regclass`,
    );
    return rows[0]?.n ?? 0;
  }
});

test('rows that others keep locked are found without a look at dead rows, beside an index of the platform', async () => {
  const { url, adminUrl } = await createDatabase();
  const admin = openAdminPool(adminUrl);
  const rows: number[] = [];
  const relay = countingRows(openPool(url), rows);
  await admin.query(`
    ALTER TABLE identity.outbox SET (autovacuum_enabled = off);
    CREATE INDEX ix_outbox_next_attempt_at ON identity.outbox (next_attempt_at) WHERE NOT published;
    INSERT INTO identity.outbox (event_type, aggregate_id, payload, published, published_at, stream_entry_id)
    SELECT 'UserCreated', gen_random_uuid(), '{}', true, now(), '1-1' FROM generate_series(1, ${PUBLISHED_ROWS});
    INSERT INTO identity.outbox (event_type, aggregate_id, payload, next_attempt_at, dead_lettered_at)
    SELECT 'UserCreated', gen_random_uuid(), '{}', 'infinity', now() FROM generate_series(1, ${PUBLISHED_ROWS / 10});
    ANALYZE identity.outbox;
    INSERT INTO identity.outbox (event_type, aggregate_id, payload, created_at, next_attempt_at)
    SELECT 'UserCreated', gen_random_uuid(), '{}', now() - interval '1 hour', 'infinity' FROM generate_series(1, ${BATCH})`);
  const other = await admin.connect();
  await other.query('BEGIN');
  await other.query(
    'SELECT FROM identity.outbox WHERE NOT published AND dead_lettered_at IS NULL LIMIT 3 FOR UPDATE',
  );
  const found = await transaction(relay, 20_000, 'repeatable', lockedRows);
  expect(found?.rows).toBe(3);
  expect(rows).toEqual([BATCH]);
});

/** The pool, which notes how many rows of the table each transaction has read by the time it commits. */
function countingRows(real: pg.Pool, rows: number[]): Pool {
  return {
    connect: (async () => {
      const client = await real.connect();
      const query = async (config: pg.QueryConfig) => {
        const send = pg.Client.prototype.query.bind(client) as pg.Client['query'];
        if (config.text === 'COMMIT') {
          const { rows: counted } = await send<{ n: number }>(
            `SELECT (seq_tup_read + coalesce(idx_tup_fetch, 0))::int AS n
             FROM pg_stat_xact_user_tables WHERE relid = 'identity.outbox'::regclass`,
          );
          rows.push(counted[0]?.n ?? 0);
        }
        const result = await send(config);
        // Else the next transaction's rows would be counted on top of these.
        if (config.text === 'COMMIT') await send('SELECT pg_stat_force_next_flush()');
        return result;
      };
      return Object.create(client, { query: { value: query } });
    }) as pg.Pool['connect'],
  };
}
