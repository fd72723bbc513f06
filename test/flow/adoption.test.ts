import { randomUUID } from 'node:crypto';
import { expect, test } from 'vitest';
import { anEvent, createOldTable, insertEvents, someEvents } from '../support/events.ts';
import { STREAM, type Stage, setStage } from '../support/flow.ts';
import { createDatabase } from '../support/servers.ts';
import type { AdminPool } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const DICTIONARY = 'dictionary.word.v1';
const NO_TENANT = '00000000-0000-0000-0000-000000000000';

/** A database as the old system left it: 500 rows, of which every fifth is published. */
async function setOldStage(): Promise<Stage> {
  const { adminUrl } = await createDatabase({ template: false });
  const stage = await setStage({ databaseUrl: adminUrl });
  await createOldTable(stage.pool);
  const users = Array.from({ length: 40 }, () => randomUUID());
  const correlationId = randomUUID();
  const events = Array.from({ length: 500 }, (_, i) => {
    const aggregateId = users[i % users.length] as string;
    if (i % 4 === 1) {
      const payload = { word: 'Straße', correlation_id: correlationId, rank: 12345 };
      return anEvent({
        ...{ aggregateId, payload, topic: DICTIONARY },
        ...{ eventType: 'DictionaryWordAdded', aggregateType: 'word' },
      });
    }
    return anEvent({ aggregateId, ...(i % 4 === 2 && { topic: null }) });
  });
  await insertEvents(stage.pool, events);
  await stage.pool.query(`
    UPDATE identity.outbox SET created_at = '2024-02-29 23:59:59.123456+00' WHERE id % 7 = 0;
    UPDATE identity.outbox SET published = true, published_at = created_at + interval '1 second' WHERE id % 5 = 0;
    -- Dead-lettered by the old relay, which marked such rows as published.
    UPDATE identity.outbox SET attempts = 5, error_message = 'gave up' WHERE id % 35 = 0;
    -- Failed once or more, and to be tried again at a time that has passed.
    UPDATE identity.outbox SET attempts = 1 + id % 4, error_message = 'connection refused',
           next_attempt_at = now() - interval '1 hour' WHERE NOT published AND id % 3 = 0`);
  return stage;
}

/** The published rows in full, with the transaction that wrote them last; only columns that the old table has. */
async function publishedRows(pool: AdminPool): Promise<unknown[]> {
  const { rows } = await pool.query(
    `SELECT xmin::text, to_jsonb(o) - '{dead_lettered_at,stream_entry_id,replayed_at,discard_reason,discarded_by}'::text[] AS row
       FROM identity.outbox o WHERE published AND id % 5 = 0 ORDER BY id`,
  );
  return rows;
}

/** The row as the stream's consumers must get it. */
async function expectedFields(pool: AdminPool): Promise<Map<string, Record<string, string>>> {
  const { rows } = await pool.query(
    `SELECT event_id::text, event_type, coalesce(topic, '${STREAM}') AS topic, '1' AS schema_version,
            to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS occurred_at,
            coalesce(payload->>'tenant_id', '${NO_TENANT}') AS tenant_id, aggregate_id::text, aggregate_type,
            payload::text, payload->>'correlation_id' AS correlation_id
       FROM identity.outbox WHERE NOT published`,
  );
  return new Map(
    rows.map(({ correlation_id: correlationId, ...fields }) => [
      fields.event_id,
      { ...fields, ...(correlationId !== null && { correlation_id: correlationId }) },
    ]),
  );
}

test('a table of the old system is adopted: what was not published is, once and with the documented fields', async () => {
  const stage = await setOldStage();
  const before = await publishedRows(stage.pool);
  const expected = await expectedFields(stage.pool);
  expect(before).toHaveLength(100);
  expect(expected.size).toBe(400);

  for (const time of ['first', 'second']) {
    const { code, lines } = await stage.command(['migrate']);
    expect(code, `${time} migration:\n${lines.join('\n')}`).toBe(0);
  }
  expect(await publishedRows(stage.pool)).toEqual(before);
  await stage.pod();
  await stage.rested();

  const entries = [...(await stage.entries(STREAM)), ...(await stage.entries(DICTIONARY))];
  expect(entries).toHaveLength(400);
  for (const { fields } of entries) expect(fields).toEqual(expected.get(fields.event_id ?? ''));
  expect(new Set(entries.map(({ fields }) => fields.event_id)).size).toBe(400);
  const topics = new Set((await stage.entries(DICTIONARY)).map(({ fields }) => fields.topic));
  expect(topics).toEqual(new Set([DICTIONARY]));

  expect(await publishedRows(stage.pool)).toEqual(before);
  expect(
    await stage.count(`id % 5 = 0 AND (stream_entry_id IS NOT NULL OR dead_lettered_at IS NOT NULL)`),
  ).toBe(0);
});

test('three pods that migrate an old table at once all succeed, and the relay can work with it', async () => {
  const stage = await setOldStage();
  const before = await publishedRows(stage.pool);
  const expected = await expectedFields(stage.pool);
  const outcomes = await Promise.all([1, 2, 3].map(() => stage.command(['migrate'])));
  for (const { code, lines } of outcomes) expect(code, lines.join('\n')).toBe(0);
  const { rows } = await stage.pool.query(
    `SELECT count(*)::int AS n FROM pg_index WHERE indrelid = 'identity.outbox'::regclass AND NOT indisvalid`,
  );
  expect(rows).toEqual([{ n: 0 }]);
  expect(await publishedRows(stage.pool)).toEqual(before);
  await stage.pod();
  await stage.rested();
  expect((await stage.entries(STREAM)).length + (await stage.entries(DICTIONARY)).length).toBe(expected.size);
});

test('three pods that migrate an empty database at once all succeed', async () => {
  const { adminUrl } = await createDatabase({ template: false });
  const stage = await setStage({ databaseUrl: adminUrl });
  // Nobody can make a schema until all three are here.
  const client = await stage.pool.connect();
  await client.query('BEGIN');
  await client.query('LOCK TABLE pg_catalog.pg_namespace IN SHARE MODE');
  const migrations = [1, 2, 3].map(() => stage.command(['migrate']));
  const sessions = `SELECT count(*)::int AS there, (count(*) FILTER (WHERE wait_event_type = 'Lock'))::int AS waiting
    FROM pg_stat_activity
    WHERE datname = current_database() AND backend_type = 'client backend' AND application_name <> 'test'`;
  const areHere = async () => {
    const { there, waiting } = (await stage.pool.query(sessions)).rows[0];
    return there === 3 && waiting >= 1;
  };
  await waitFor(areHere, { what: 'three migrations under way' });
  await client.query('COMMIT');
  client.release();
  for (const { code, lines } of await Promise.all(migrations)) expect(code, lines.join('\n')).toBe(0);
  const event = anEvent();
  await insertEvents(stage.pool, [event]);
  await stage.pod();
  await stage.rested();
  expect((await stage.entries()).map(({ fields }) => fields.event_id)).toEqual([event.eventId]);
});

test('an open transaction of a writer does not keep the migration of an old table from coming through', async () => {
  const stage = await setOldStage();
  const writer = await stage.pool.connect();
  try {
    await writer.query('BEGIN');
    await insertEvents(writer, [anEvent()]);
    const migration = stage.command(['migrate']);
    // It is waiting for the writer's table lock or snapshot; other writers must not have to wait for it.
    const waiting = `SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`;
    await waitFor(async () => (await stage.pool.query(waiting)).rowCount, { what: 'the migration to wait' });
    await writer.query('COMMIT');
    const { code, lines } = await migration;
    expect(code, lines.join('\n')).toBe(0);
  } finally {
    writer.release();
  }
});

test('a table with columns and a trigger of its own is adopted, whatever the columns are called', async () => {
  const { adminUrl } = await createDatabase({ template: false });
  const stage = await setStage({ databaseUrl: adminUrl });
  await createOldTable(stage.pool);
  // Names that the relay's statements use, too.
  const names = [
    'parked',
    'after',
    'before',
    'place',
    'blocked',
    'taken',
    'seen',
    'leasable',
    'trace',
    'text',
    'bytes',
  ];
  names.push(
    'flaw',
    'entry_id',
    'failed',
    'is_leased',
    'kind',
    'live',
    'headers',
    'o',
    'c',
    'w',
    'json',
    'own',
    'locked',
  );
  await stage.pool.query(`
    ALTER TABLE identity.outbox ${names.map((name) => `ADD COLUMN "${name}" text DEFAULT 'x'`).join(', ')},
      ADD COLUMN lock_version int NOT NULL DEFAULT 0,
      ADD COLUMN day date GENERATED ALWAYS AS ((created_at AT TIME ZONE 'UTC')::date) STORED;
    CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS
      $$ BEGIN NEW.lock_version := OLD.lock_version + 1; RETURN NEW; END $$;
    CREATE TRIGGER touch BEFORE UPDATE ON identity.outbox FOR EACH ROW EXECUTE FUNCTION touch()`);
  const migrated = await stage.command(['migrate']);
  expect(migrated.code, migrated.lines.join('\n')).toBe(0);
  await stage.pod();
  const hopeless = anEvent({ topic: '' });
  await insertEvents(stage.pool, [...someEvents(300, 1), ...someEvents(100), hopeless]);
  await stage.rested();
  expect(await stage.entries()).toHaveLength(400);
  await stage.redis.flushall();
  await waitFor(async () => (await stage.redis.xlen(STREAM)) === 400, { what: 'all to be there again' });
  await stage.rested();
  await stage.expectPromisesHeld();
});
