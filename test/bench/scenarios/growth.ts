/** The same backlog in a table that has nothing else, 1 million and 10 million published rows. */
import type pg from 'pg';
import { openRelay } from '../contenders/relay.ts';
import type { Progress } from '../progress.ts';
import { inTurns, ONCE_IN_ORDER, rateFigures, type Scenario } from '../scenario.ts';

/** In one statement: bounded, so that progress can be seen. */
const STEP_ROWS = 100_000;

export const GROWTH: Scenario = {
  name: 'growth',
  describe: 'the drain rate with 0, 1 and 10 million published rows in the table (8 GB of disk meanwhile)',
  minutes: 12,
  async run(context) {
    const { options, undo, progress } = context;
    const { events = options.quick ? 3_000 : 20_000 } = options;
    const { published: sizes = options.quick ? [0, 100_000] : [0, 1_000_000, 10_000_000] } = options;
    progress.now('starting servers');
    const servers = await context.open();
    const entries = [];
    for (const rows of sizes) {
      const name = `${rows.toLocaleString('en')} published rows`;
      const prepare = (pool: pg.Pool) => fillPublished(pool, rows, progress);
      const relay = await openRelay(servers, { name, keepsRows: true, prepare }, undo);
      entries.push({ contender: relay, workload: { events, aggregates: events } });
    }
    progress.now('CHECKPOINT: what was filled in must not be written while it is measured');
    await entries[0]?.contender.pool.query('CHECKPOINT');
    const drained = await inTurns(context, entries);
    const [none = '', ...others] = [...drained.keys()];
    return {
      about: `${events} events, drained again and again by one pod for each table`,
      figures: rateFigures(
        drained,
        others.map((name) => [name, none] as const),
      ),
      verified: ONCE_IN_ORDER,
      notes: [],
    };
  },
};

async function fillPublished(pool: pg.Pool, rows: number, progress: Progress): Promise<void> {
  // Indexes that have an entry for each of these rows are made at the end, at a fraction of the time.
  const { rows: indexes } = await pool.query<{ without: string; again: string }>(
    `SELECT format('ALTER TABLE identity.outbox DROP CONSTRAINT %I', conname) AS without,
            format('ALTER TABLE identity.outbox ADD CONSTRAINT %I %s', conname, pg_get_constraintdef(oid)) AS again
       FROM pg_constraint WHERE conrelid = 'identity.outbox'::regclass AND contype = 'u'
     UNION ALL SELECT format('DROP INDEX %s', indexrelid::regclass), pg_get_indexdef(indexrelid)
       FROM pg_index WHERE indrelid = 'identity.outbox'::regclass AND NOT indisunique`,
  );
  for (const { without } of indexes) await pool.query(without);
  for (let filled = 0; filled < rows; filled += STEP_ROWS) {
    progress.now(`filling in published rows: ${filled.toLocaleString('en')} of ${rows.toLocaleString('en')}`);
    await pool.query(
      `INSERT INTO identity.outbox
              (event_type, aggregate_id, payload, created_at, published, published_at, stream_entry_id)
       SELECT 'UserCreated', gen_random_uuid(), jsonb_build_object(
         'user_id', gen_random_uuid(), 'tenant_id', '11111111-1111-1111-1111-111111111111',
         'email', 'user' || i || '@example.com', 'display_name', 'User ' || i, 'status', 'active',
         'created_at', '2026-01-01T00:00:00Z'), now() - interval '2 hours', true, now() - interval '2 hours', i || '-0'
       FROM generate_series($1::int + 1, $1::int + $2::int) i`,
      [filled, Math.min(STEP_ROWS, rows - filled)],
    );
  }
  progress.now(`making the indexes of ${rows.toLocaleString('en')} rows`);
  for (const { again } of indexes) await pool.query(again);
  await pool.query('VACUUM ANALYZE identity.outbox');
}
