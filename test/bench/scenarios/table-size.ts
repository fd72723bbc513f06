/**
 * How large the table is after 300,000 events have gone through it, by the statements of the relay itself: with
 * other fill factors, an eager autovacuum, retention, and partitions by time.
 */
import { join } from 'node:path';
import pg from 'pg';
import { loadConfig } from '../../../src/config/load-config.ts';
import { migrate } from '../../../src/outbox/migrations.ts';
import { createOutbox } from '../../../src/outbox/outbox.ts';
import { createPruner, FIRST_PLACE } from '../../../src/outbox/pruner.ts';
import { startPrivatePostgres } from '../../demo/servers.ts';
import { temporaryFolder } from '../../demo/watchdog.ts';
import type { Figure, Scenario } from '../scenario.ts';
import { silent } from '../servers.ts';

const BATCH = 1_000;
/** With retention: rows that are kept, and how often the older ones go. */
const KEPT_ROWS = 100_000;
const PRUNE_EVERY_BATCHES = 20;
const PARTITIONS = 10;

type Variant = { name: string; ddl?: string; retention?: true; partitioned?: true };
const EAGER = 'autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_cost_delay = 0';
export const VARIANTS: readonly Variant[] = [
  { name: 'as created' },
  { name: 'fillfactor 70', ddl: 'ALTER TABLE identity.outbox SET (fillfactor = 70)' },
  { name: 'fillfactor 50', ddl: 'ALTER TABLE identity.outbox SET (fillfactor = 50)' },
  { name: 'eager autovacuum', ddl: `ALTER TABLE identity.outbox SET (${EAGER})` },
  { name: 'retention', retention: true },
  { name: 'retention, eager autovacuum', retention: true, ddl: `ALTER TABLE identity.outbox SET (${EAGER})` },
  { name: 'partitions by time, dropped', partitioned: true },
];

export const TABLE_SIZE: Scenario = {
  name: 'table-size',
  describe: 'size of the table after 300,000 events, with other settings of the table',
  minutes: 6,
  async run({ options, undo, progress }) {
    const { events = options.quick ? 20_000 : 300_000, variant: only } = options;
    const folder = await temporaryFolder('relay-bench-');
    undo.push(folder.remove);
    const postgres = await startPrivatePostgres({
      directory: join(folder.path, 'postgres'),
      // So many events pass in a minute or less, not in a day: autovacuum looks as often in proportion.
      settings: { autovacuum_naptime: 1 },
    });
    undo.push(postgres.stop);
    const figures: Figure[] = [];
    const notes: string[] = [];
    for (const [index, variant] of VARIANTS.entries()) {
      if (only !== undefined && only !== index + 1) continue;
      progress.now(`${index + 1} of ${VARIANTS.length}: ${variant.name}`);
      const { table, indexes, note } = await measure(postgres.url, variant, events);
      figures.push(
        { name: `${variant.name}, table`, unit: 'MiB', values: [table] },
        { name: `${variant.name}, indexes`, unit: 'MiB', values: [indexes] },
      );
      notes.push(note);
      progress.note(note);
    }
    return {
      about: `${events} events through the statements of the relay, without Redis`,
      ...{ figures, notes, verified: 'every row published' },
    };
  },
};

async function measure(
  adminUrl: string,
  variant: Variant,
  events: number,
): Promise<{ table: number; indexes: number; note: string }> {
  const admin = new pg.Client(adminUrl);
  await admin.connect();
  await admin.query('DROP DATABASE IF EXISTS bench WITH (FORCE)');
  await admin.query('CREATE DATABASE bench');
  await admin.end();
  const url = new URL(adminUrl);
  url.pathname = 'bench';
  const client = new pg.Client(url.href);
  await client.connect();
  await migrate(client, false, silent);
  if (variant.partitioned) await client.query(PARTITIONED(events));
  if (variant.ddl) await client.query(variant.ddl);
  const pool = new pg.Pool({ connectionString: url.href, max: 4 });
  const options = { ...loadConfig({}), statementTimeoutMs: 10_000 };
  const outbox = createOutbox(pool, options);
  const pruner = createPruner(pool, options);
  const startedAt = Date.now();
  for (let batch = 1; batch * BATCH <= events; batch++) {
    await client.query(
      `INSERT INTO identity.outbox (event_type, aggregate_id, payload)
       SELECT 'UserCreated', gen_random_uuid(), jsonb_build_object(
         'user_id', gen_random_uuid(), 'tenant_id', '11111111-1111-1111-1111-111111111111',
         'email', 'user' || i || '@example.com', 'display_name', 'User ' || i, 'status', 'active',
         'created_at', '2026-01-01T00:00:00Z') FROM generate_series(1, $1::int) i`,
      [BATCH],
    );
    const { leased } = await outbox.inEpoch((tx) => outbox.claimFresh(tx, BATCH), { generic: true });
    for (let i = 0; i < leased.length; i += 100) {
      const part = leased
        .slice(i, i + 100)
        .map(({ id, eventId }) => ({ id, eventId, entryId: `1795511640759-${id}` }));
      await outbox.inEpoch((tx) => outbox.markPublished(tx, part), { generic: true });
    }
    if (variant.retention && batch % PRUNE_EVERY_BATCHES === 0) await pruneBut(KEPT_ROWS);
  }
  const seconds = (Date.now() - startedAt) / 1_000;
  const full = await size();
  const left = await client.query('SELECT count(*)::int AS n FROM identity.outbox WHERE NOT published');
  if (left.rows[0].n > 0) throw new Error(`${left.rows[0].n} rows were not published`);
  await pool.end(); // which hands in its statistics
  await new Promise((resolve) => setTimeout(resolve, 1_000));
  let more = '';
  if (variant.partitioned) {
    for (let i = 0; i < PARTITIONS - 1; i++) await client.query(`DROP TABLE identity.outbox_${i}`);
    more = `; ${(await size()).text} when all but the last of ${PARTITIONS} are dropped`;
  } else {
    const { rows } = await client.query(
      `SELECT n_tup_upd, n_tup_hot_upd, autovacuum_count FROM pg_stat_user_tables WHERE relname = 'outbox'`,
    );
    more = `; ${rows[0].n_tup_hot_upd} of ${rows[0].n_tup_upd} updates HOT, ${rows[0].autovacuum_count} autovacuums`;
    await client.query('VACUUM identity.outbox');
    await client.query('REINDEX TABLE identity.outbox');
    more += `; ${(await size()).text} after VACUUM and REINDEX`;
  }
  await client.end();
  return {
    ...{ table: full.table, indexes: full.indexes },
    note: `${variant.name}: ${full.text}, ${Math.round(events / seconds)} events/s${more}`,
  };

  async function pruneBut(kept: number): Promise<void> {
    const { rows } = await client.query(
      `SELECT published_at::text AS at FROM identity.outbox WHERE id <= (SELECT max(id) FROM identity.outbox) - $1
       ORDER BY id DESC LIMIT 1`,
      [kept],
    );
    for (let after: typeof FIRST_PLACE | null = rows.length > 0 ? FIRST_PLACE : null; after !== null; ) {
      const step = await pruner.step({ kind: 'with-entry', after, before: rows[0].at, limit: BATCH });
      if (step === 'busy') throw new Error('somebody else is deleting');
      after = step.next;
    }
  }

  async function size(): Promise<{ text: string; table: number; indexes: number }> {
    const { rows } = await client.query<{ heap: string; indexes: string }>(
      `SELECT sum(pg_table_size(c.oid)) AS heap, sum(pg_indexes_size(c.oid)) AS indexes
         FROM pg_class c WHERE c.relnamespace = 'identity'::regnamespace AND c.relname ~ '^outbox(_\\d+)?$'
          AND c.relkind = 'r'`,
    );
    const mib = (bytes: unknown) => Math.round(Number(bytes) / 2 ** 20);
    const { heap, indexes } = rows[0] as { heap: string; indexes: string };
    return {
      text: `table ${mib(heap)} MiB, indexes ${mib(indexes)} MiB`,
      ...{ table: mib(heap), indexes: mib(indexes) },
    };
  }
}

/** The same table in ranges of its id, which are ranges of time; event_id is unique only within each. */
const PARTITIONED = (events: number) => `
  CREATE TABLE identity.template (LIKE identity.outbox INCLUDING ALL);
  ALTER SEQUENCE identity.outbox_id_seq OWNED BY NONE;
  DROP TABLE identity.outbox;
  CREATE TABLE identity.outbox (LIKE identity.template INCLUDING DEFAULTS) PARTITION BY RANGE (id);
  ALTER TABLE identity.outbox ADD PRIMARY KEY (id);
  DO $$ BEGIN FOR i IN 0..${PARTITIONS - 1} LOOP
    EXECUTE format('CREATE TABLE identity.outbox_%s PARTITION OF identity.outbox FOR VALUES FROM (%s) TO (%s)',
      i, i * ${events / PARTITIONS} + 1, (i + 1) * ${events / PARTITIONS} + 1);
    EXECUTE format('CREATE UNIQUE INDEX ON identity.outbox_%s (event_id)', i);
  END LOOP; END $$;
  CREATE INDEX ON identity.outbox (id) WHERE not published and next_attempt_at is null;
  CREATE INDEX ON identity.outbox (next_attempt_at) WHERE not published and next_attempt_at < 'infinity'::timestamptz;
  CREATE INDEX ON identity.outbox (aggregate_type, aggregate_id, id) WHERE not published and dead_lettered_at is null;
  CREATE INDEX ON identity.outbox (aggregate_type, aggregate_id, id)
    WHERE not published and dead_lettered_at is null and next_attempt_at = 'infinity'::timestamptz;
  CREATE INDEX ON identity.outbox (aggregate_type, aggregate_id, id) WHERE not published and dead_lettered_at is not null;
  CREATE INDEX ON identity.outbox (coalesce(dead_lettered_at, published_at), id) WHERE stream_entry_id is not null;
  CREATE INDEX ON identity.outbox (coalesce(published_at, created_at), id) WHERE published and stream_entry_id is null;
  DROP TABLE identity.template;`;
