import { expect, onTestFinished, test } from 'vitest';
import { transaction } from '../../src/connections/database.ts';
import { distrustful } from '../../src/connections/pool-health.ts';
import { startProxy, through } from '../support/proxy.ts';
import { createDatabase } from '../support/servers.ts';
import { openPool } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const { url } = await createDatabase();

/** A pool whose connections have all been used, on a network that then dies for them. */
async function aDeadPool(size: number, { usedByUs }: { usedByUs: boolean }) {
  const proxy = await startProxy(Number(new URL(url).port));
  onTestFinished(proxy.close);
  const pool = openPool(through(proxy, url), { max: size });
  const trusted = distrustful(pool, 400);
  const by = usedByUs ? trusted : pool;
  const clients = await Promise.all(Array.from({ length: size }, () => by.connect()));
  for (const client of clients) client.release();
  proxy.loseTrack();
  return { pool, trusted };
}

const took = async (work: () => Promise<unknown>): Promise<number> => {
  const begun = performance.now();
  await work();
  return performance.now() - begun;
};

test('of a pool whose connections are all dead only the first costs time', async () => {
  const { pool, trusted } = await aDeadPool(10, { usedByUs: true });
  let closed = 0;
  pool.on('remove', () => closed++);
  await expect(trusted.query('SELECT 1')).rejects.toThrow('Query read timeout');
  const ms = await took(() =>
    Promise.all(Array.from({ length: 10 }, () => trusted.query('SELECT pg_sleep(0.05)'))),
  );
  expect(ms).toBeLessThan(2_000);
  expect(pool.totalCount).toBeLessThanOrEqual(10);
  await waitFor(() => closed === 10, { what: 'the dead ones to be closed', timeoutMs: 3_000 });
}, 30_000);

test('connections of a pool that others use are asked for a sign of life before they are trusted', async () => {
  const { trusted } = await aDeadPool(4, { usedByUs: false });
  await expect(trusted.query('SELECT 1')).rejects.toThrow('Query read timeout');
  const { rows } = await trusted.query('SELECT 1 AS one');
  expect(rows).toEqual([{ one: 1 }]);
}, 30_000);

test('a transaction that gets no answer ends after one timeout, and the next one has a sound connection', async () => {
  const { trusted } = await aDeadPool(3, { usedByUs: true });
  const ms = await took(() =>
    expect(transaction(trusted, 300, 'durable', (tx) => tx.query('SELECT 1'))).rejects.toThrow(
      'Query read timeout',
    ),
  );
  expect(ms).toBeLessThan(2_000);
  const { rows } = await transaction(trusted, 2_000, 'durable', (tx) => tx.query('SELECT 1 AS one'));
  expect(rows).toEqual([{ one: 1 }]);
}, 30_000);

test('a statement that fails says nothing about other connections', async () => {
  const pool = openPool(url, { max: 2 });
  const trusted = distrustful(pool, 5_000);
  const pid = async () => (await trusted.query('SELECT pg_backend_pid() AS pid')).rows[0].pid as number;
  const [first, second] = await Promise.all([trusted.connect(), trusted.connect()]);
  first.release();
  second.release();
  const failing = trusted.connect().then(async (client) => {
    await client.query('SELECT 1/0').catch((error) => client.release(error));
  });
  const before = await pid();
  await failing;
  expect(await pid()).toBe(before);
});
