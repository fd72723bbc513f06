import type pg from 'pg';

/**
 * What table.ts describes, by name (a test compares the two). A pod looks for it at start and needs drizzle for nothing
 * else, which would take 5 MiB of its memory for as long as it lives.
 */
export const REQUIRED = {
  columns: [
    'id',
    'event_id',
    'event_type',
    'aggregate_type',
    'aggregate_id',
    'payload',
    'created_at',
    'published',
    'attempts',
    'next_attempt_at',
    'published_at',
    'error_message',
    'topic',
    'dead_lettered_at',
    'stream_entry_id',
    'replayed_at',
    'discard_reason',
    'discarded_by',
  ],
  indexes: [
    'relay_outbox_fresh',
    'relay_outbox_due',
    'relay_outbox_live',
    'relay_outbox_parked',
    'relay_outbox_dead',
    'relay_outbox_dead_at',
    'relay_outbox_settled',
    'relay_outbox_unreceipted',
  ],
} as const;

/** What is missing before the relay can work with this table; empty when nothing is. */
export async function missingFromTable(client: Pick<pg.Client, 'query'>): Promise<string[]> {
  const { rows } = await client.query<{ columns: string[]; indexes: string[] }>(
    `SELECT array(SELECT attname::text FROM pg_attribute WHERE attrelid = to_regclass('identity.outbox')
              AND attnum > 0 AND NOT attisdropped) AS columns,
            array(SELECT c.relname::text FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
              WHERE i.indrelid = to_regclass('identity.outbox') AND i.indisvalid) AS indexes`,
  );
  const { columns = [], indexes = [] } = rows[0] ?? {};
  if (columns.length === 0) return ['table identity.outbox'];
  return [
    ...REQUIRED.columns.filter((it) => !columns.includes(it)).map((it) => `column ${it}`),
    ...REQUIRED.indexes.filter((it) => !indexes.includes(it)).map((it) => `index ${it}`),
  ];
}

export const lacks = (missing: readonly string[]): string =>
  `the outbox lacks ${missing.join(', ')}: run "relay migrate" on this database first`;
