import { expect, test } from 'vitest';
import { transaction } from '../../src/outbox/database.ts';
import { createPool } from '../../src/outbox/pool.ts';
import { atEndOfFile } from '../support/cleanup.ts';
import { createDatabase } from '../support/servers.ts';
import { openPool } from '../support/stages.ts';

const { url } = await createDatabase();
const pipelined = createPool(url, { pipeline: true });
atEndOfFile(() => pipelined.end());

const admin = openPool(url);

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
    await pool.query('CREATE TABLE IF NOT EXISTS kept (n int)');
    const failing = transaction(pool, 4_000, 'durable', async (tx) => {
      await tx.query('INSERT INTO kept VALUES (1)');
      throw new Error('the caller gave up');
    });
    await expect(failing).rejects.toThrow('the caller gave up');
    expect((await pool.query('SELECT FROM kept')).rowCount).toBe(0);
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
