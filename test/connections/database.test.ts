import { expect, test } from 'vitest';
import { transaction } from '../../src/connections/database.ts';
import { createPool } from '../../src/connections/pool.ts';
import { withSession } from '../../src/connections/session.ts';
import { epochLock, outboxLock } from '../../src/connections/table-lock.ts';
import { atEndOfFile } from '../support/cleanup.ts';
import { anEvent, insertEvents } from '../support/events.ts';
import { createDatabase } from '../support/servers.ts';
import { openAdminPool, openPool } from '../support/stages.ts';

const { url, adminUrl } = await createDatabase();
const pipelined = createPool(url, { pipeline: true });
atEndOfFile(() => pipelined.end());

const admin = openAdminPool(adminUrl);

const settings = `SELECT current_setting('statement_timeout') AS deadline, current_setting('jit') AS jit, pg_current_xact_id() IS NOT NULL AS started`;

for (const [kind, pool] of [
  ['one statement at a time', openPool(url)],
  ['statements in a pipeline', pipelined],
] as const) {
  test(`the first statement is inside the transaction, under its settings (${kind})`, async () => {
    const { rows } = await transaction(pool, 4_000, 'durable', (tx) => tx.query(settings));
    expect(rows).toEqual([{ deadline: '4s', jit: 'off', started: true }]);
  });

  test(`nothing remains of a transaction whose work fails (${kind})`, async () => {
    const [id] = await insertEvents(admin, [anEvent()]);
    const failing = transaction(pool, 4_000, 'durable', async (tx) => {
      const { rowCount } = await tx.query('UPDATE identity.outbox SET attempts = 7 WHERE id = $1', [id]);
      expect(rowCount).toBe(1);
      throw new Error('the caller gave up');
    });
    await expect(failing).rejects.toThrow('the caller gave up');
    expect((await admin.query('SELECT FROM identity.outbox WHERE attempts > 0')).rowCount).toBe(0);
  });

  test(`a connection that breaks between two statements fails the transaction, not the process (${kind})`, async () => {
    const broken = transaction(pool, 4_000, 'durable', async (tx) => {
      const { rows } = await tx.query('SELECT pg_backend_pid() AS pid');
      // Returns when the backend has ended.
      await admin.query('SELECT pg_terminate_backend($1, 5000)', [rows[0].pid]);
      await tx.query('SELECT 1');
    });
    await expect(broken).rejects.toThrow(/terminat|not queryable/i);
    await transaction(pool, 4_000, 'durable', (tx) => tx.query('SELECT 1'));
  });
}

test('values are read and printed in one way, whatever role, database or owner of the pool have set', async () => {
  const habits = [
    ...['DateStyle=German,DMY', 'TimeZone=Asia/Kolkata', 'IntervalStyle=sql_standard', 'bytea_output=escape'],
    ...['extra_float_digits=-10', 'standard_conforming_strings=off', 'array_nulls=off', 'row_security=off'],
  ];
  const pool = openPool(url, { options: habits.map((it) => `-c ${it}`).join(' ') });
  const { rows } = await transaction(pool, 4_000, 'durable', (tx) =>
    tx.query(
      String.raw`SELECT '2026-01-31T12:00:00Z'::timestamptz::text AS time,
      '1 day 2 hours'::interval::text AS interval, decode('00ff', 'hex')::text AS bytes, 'a\nb' AS text,
      (0.1::float8 + 0.2::float8)::text AS number, ($1::text[])[1] IS NULL AS "isNull",
      current_setting('row_security') AS rows`,
      [[null]],
    ),
  );
  expect(rows).toEqual([
    {
      ...{ time: '2026-01-31 12:00:00+00', interval: '1 day 02:00:00' },
      ...{ bytes: String.raw`\x00ff`, text: String.raw`a\nb`, number: '0.30000000000000004' },
      ...{ isNull: true, rows: 'on' },
    },
  ]);
});

test('what must be durable waits for the disk, whatever the role has set; what may be repeated does not', async () => {
  const found: string[] = [];
  for (const set of ['off', 'local', 'on']) {
    const pool = openPool(url, { options: `-c synchronous_commit=${set}` });
    for (const durability of ['durable', 'repeatable'] as const) {
      const { rows } = await transaction(pool, 4_000, durability, (tx) =>
        tx.query('SHOW synchronous_commit'),
      );
      found.push(`${set}, ${durability}: ${rows[0].synchronous_commit}`);
    }
  }
  expect(found).toEqual([
    ...['off, durable: on', 'off, repeatable: off', 'local, durable: local', 'local, repeatable: off'],
    ...['on, durable: on', 'on, repeatable: off'],
  ]);
});

test('a role’s limit for whole transactions does not end those of the relay, which have deadlines of their own', async () => {
  const pool = openPool(url, { options: '-c transaction_timeout=300' });
  const { rows } = await transaction(pool, 4_000, 'durable', (tx) =>
    tx.query('SELECT pg_sleep(0.6), 1 AS one'),
  );
  expect(rows).toMatchObject([{ one: 1 }]);
});

test('a row that another transaction holds is waited for as long as a statement may take, and is not called a lock of the relay', async () => {
  const [id] = await insertEvents(admin, [anEvent()]);
  const holder = await admin.connect();
  try {
    await holder.query('BEGIN');
    await holder.query('SELECT FROM identity.outbox WHERE id = $1 FOR UPDATE', [id]);
    const waiting = transaction(
      pipelined,
      500,
      'durable',
      (tx) => tx.query('UPDATE identity.outbox SET attempts = 7 WHERE id = $1', [id]),
      { locks: [epochLock('ROW SHARE', 100), outboxLock(100)] },
    );
    await expect(waiting).rejects.toThrow('canceling statement due to statement timeout');
  } finally {
    await holder.query('ROLLBACK');
    holder.release();
  }
});

test('a session that is used again and again keeps no listeners', async () => {
  const listeners: number[] = [];
  for (let i = 0; i < 3; i++)
    listeners.push(await withSession(pipelined, async (client) => client.listenerCount('error')));
  expect(new Set(listeners).size).toBe(1);
  await expect(withSession(pipelined, () => Promise.reject(new Error('broken')))).rejects.toThrow('broken');
  expect(pipelined.idleCount).toBe(pipelined.totalCount);
});
