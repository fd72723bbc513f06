import { expect, onTestFinished, test } from 'vitest';
import { loadConfig } from '../../src/config/load-config.ts';
import { asking, type Pool, transaction } from '../../src/connections/database.ts';
import { createPool } from '../../src/connections/pool.ts';
import { type HealthyPool, healthyPool, TooFewSessionsError } from '../../src/connections/pool-health.ts';
import { openServers } from '../../src/connections/servers.ts';
import { withSession } from '../../src/connections/session.ts';
import type { Logger } from '../../src/telemetry/logger.ts';
import { anEvent, insertEvents } from '../support/events.ts';
import { asRelay } from '../support/least-privilege.ts';
import { startProxy, through } from '../support/proxy.ts';
import { createDatabase } from '../support/servers.ts';
import { openAdminPool, openPool, silent } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const { url, adminUrl, name } = await createDatabase();
const admin = openAdminPool(adminUrl);

/** `size` sessions that have all been used, by the relay or by others. */
async function usedPool(at: string, size: number, { byOthers = false } = {}) {
  const pool = openPool(at, { max: size });
  const healthy = byOthers ? undefined : healthyPool(pool, { size, logger: silent });
  const clients = await Promise.all(Array.from({ length: size }, () => (healthy ?? pool).connect()));
  for (const client of clients) client.release();
  return { pool, healthy: healthy ?? healthyPool(pool, { size, logger: silent }) };
}

/** The same on a network that then dies for these sessions. */
async function deadPool(size: number, options = {}) {
  const proxy = await startProxy(Number(new URL(url).port));
  onTestFinished(proxy.close);
  const used = await usedPool(through(proxy, url), size, options);
  proxy.loseTrack();
  return used;
}

const pidOf = async (pool: HealthyPool): Promise<number> =>
  transaction(pool, 5_000, 'durable', async (tx) => {
    const { rows } = await tx.query<{ pid: number }>('SELECT pg_backend_pid() AS pid');
    return (rows[0] as { pid: number }).pid;
  });

const ask = (pool: HealthyPool, deadlineMs: number, text = 'SELECT 1 AS one') =>
  transaction(pool, deadlineMs, 'durable', async (tx) => (await tx.query(text)).rows);

/** How many statements the session has that the pool hands out next. */
const keptBy = async (pool: Pool): Promise<number> => {
  const { rows } = await withSession(pool, (client) =>
    client.query<{ n: number }>('SELECT count(*)::int AS n FROM pg_prepared_statements'),
  );
  return rows[0]?.n ?? Number.NaN;
};

const write = (pool: Pool) =>
  transaction(pool, 5_000, 'durable', async (tx) => {
    const { rowCount } = await tx.query({
      name: 'a-statement-that-is-kept',
      text: 'UPDATE identity.outbox SET attempts = attempts RETURNING *',
    });
    return rowCount;
  });

const took = async (work: () => Promise<unknown>): Promise<number> => {
  const begun = performance.now();
  await work();
  return performance.now() - begun;
};

function warnings() {
  const lines: string[] = [];
  const logger: Logger = { ...silent, warn: (_fields, message) => void lines.push(message) };
  return { lines, logger };
}

test('of a pool whose sessions are all dead only the first costs time', async () => {
  const { pool, healthy } = await deadPool(10);
  let closed = 0;
  pool.on('remove', () => closed++);
  await expect(ask(healthy, 300)).rejects.toThrow('Query read timeout');
  const ms = await took(() =>
    Promise.all(Array.from({ length: 10 }, () => ask(healthy, 20_000, 'SELECT pg_sleep(0.05)'))),
  );
  expect(ms).toBeLessThan(15_000);
  expect(pool.totalCount).toBeLessThanOrEqual(10);
  await waitFor(() => closed === 10, { what: 'the dead ones to be closed', timeoutMs: 10_000 });
});

test('sessions of a pool that others use are asked for a sign of life before they are used', async () => {
  const { healthy } = await deadPool(4, { byOthers: true });
  await expect(ask(healthy, 300)).rejects.toThrow('Query read timeout');
  expect(await ask(healthy, 5_000)).toEqual([{ one: 1 }]);
});

test('a transaction that gets no answer ends after one timeout, and the next one has a sound session', async () => {
  const { healthy } = await deadPool(3);
  const ms = await took(() => expect(ask(healthy, 300)).rejects.toThrow('Query read timeout'));
  expect(ms).toBeLessThan(2_500);
  expect(await ask(healthy, 5_000)).toEqual([{ one: 1 }]);
});

test('a statement that fails says nothing about its session, nor about others', async () => {
  const { healthy } = await usedPool(url, 1);
  const before = await pidOf(healthy);
  await expect(ask(healthy, 5_000, 'SELECT 1/0')).rejects.toThrow('division by zero');
  expect(await pidOf(healthy)).toBe(before);
});

test('a table that is altered under kept statements costs no transaction, in any session', async () => {
  await insertEvents(admin, [anEvent()]);
  const { healthy } = await usedPool(url, 4);
  const inAll = () => Promise.all(Array.from({ length: 4 }, () => write(healthy)));
  await inAll();
  for (const type of ['varchar(500)', 'text']) {
    await admin.query(`ALTER TABLE identity.outbox ALTER COLUMN error_message TYPE ${type}`);
    // All at once, then one by one.
    expect(await inAll()).toEqual([1, 1, 1, 1]);
    for (let i = 0; i < 6; i++) expect(await write(healthy)).toBe(1);
  }
});

test('work of a session that is ended by an administrator is done by another one at once', async () => {
  const { healthy } = await usedPool(url, 2);
  let runs = 0;
  const rows = await transaction(healthy, 5_000, 'durable', async (tx) => {
    runs++;
    const { rows: found } = await tx.query('SELECT pg_backend_pid() AS pid');
    // Returns when the backend has ended.
    if (runs === 1) await admin.query('SELECT pg_terminate_backend($1, 5000)', [found[0].pid]);
    return (await tx.query('SELECT 1 AS one')).rows;
  });
  expect({ rows, runs }).toEqual({ rows: [{ one: 1 }], runs: 2 });
});

test('a transaction that fails after its COMMIT was sent is not done again', async () => {
  const pool = openPool(url);
  let commits = 0;
  const losing = Object.create(pool, {
    connect: {
      value: async () => {
        const client = await pool.connect();
        const send = client.query.bind(client) as unknown as (query: { text: string }) => Promise<unknown>;
        const query = async (sent: { text: string }) => {
          const result = await send(sent);
          if (sent.text !== 'COMMIT') return result;
          commits++;
          throw new Error('Connection terminated unexpectedly');
        };
        const release = { value: () => client.release(), writable: true };
        return Object.create(client, { query: { value: query }, release });
      },
    },
  });
  await expect(ask(healthyPool(losing, { size: 2, logger: silent }), 5_000)).rejects.toThrow('terminated');
  expect(commits).toBe(1);
});

test('sessions that became read-only leave the pool at once, and cost no transaction while new ones can write', async () => {
  const { pool, healthy } = await usedPool(url, 4);
  const clients = await Promise.all(Array.from({ length: 4 }, () => healthy.connect()));
  for (const client of clients) await client.query('SET default_transaction_read_only = on');
  for (const client of clients) client.release();
  const removed = new Set<unknown>();
  pool.on('remove', (client) => removed.add(client));
  await write(healthy);
  await Promise.all(Array.from({ length: 4 }, () => write(healthy)));
  await waitFor(() => clients.every((client) => removed.has(client)), { what: 'all four to leave' });
});

test('while only read-only sessions can be had, a transaction fails with that as its reason', async () => {
  const { healthy } = await usedPool(url, 2);
  const [client] = await Promise.all([healthy.connect()]);
  await client.query('SET default_transaction_read_only = on');
  client.release();
  await admin.query(`ALTER DATABASE ${name} SET default_transaction_read_only = on`);
  try {
    await waitFor(
      () =>
        write(healthy).then(
          () => false,
          (error) => /new ones are read-only/.test(error.message),
        ),
      {
        what: 'the reason',
      },
    );
  } finally {
    // By a session that is read-only itself, if need be.
    await admin.query(`BEGIN READ WRITE; ALTER DATABASE ${name} RESET default_transaction_read_only; COMMIT`);
  }
  await write(healthy);
});

test('a role that gets fewer sessions than the pool may have works with these, says so once, and gets more later', async () => {
  await admin.query(`CREATE ROLE few_sessions LOGIN PASSWORD 'open-sesame' CONNECTION LIMIT 3`);
  onTestFinished(async () => {
    await admin.query('DROP ROLE few_sessions');
  });
  const pool = createPool(asRelay(url, 'few_sessions'), { max: 10, connectionTimeoutMillis: 5_000 });
  const { lines, logger } = warnings();
  const healthy = healthyPool(pool, { size: 10, logger });
  const burst = () =>
    Promise.all(Array.from({ length: 12 }, () => ask(healthy, 20_000, 'SELECT pg_sleep(0.02)')));
  await burst();
  await burst();
  expect(healthy.sessions()).toEqual({ size: 10, granted: 3 });
  expect(lines).toEqual([expect.stringContaining('RELAY_DATABASE_POOL_SIZE')]);
  // Who holds a session while he waits for another is refused before all wait for each other.
  await expect(healthy.leaving?.(3).connect()).rejects.toThrow(TooFewSessionsError);
  await admin.query('ALTER ROLE few_sessions CONNECTION LIMIT -1');
  await waitFor(async () => (await burst()) && healthy.sessions().granted > 3, {
    what: 'it to get more',
  });
  await pool.end();
});

test('a pod has as many sessions as RELAY_DATABASE_POOL_SIZE says', async () => {
  const config = loadConfig({ RELAY_DATABASE_URL: url, RELAY_DATABASE_POOL_SIZE: '4' });
  const servers = openServers(config, {}, silent);
  onTestFinished(servers.close);
  expect(servers.pool.sessions()).toEqual({ size: 4, granted: 4 });
  const clients = await Promise.all(Array.from({ length: 4 }, () => servers.pool.connect()));
  const { rows } = await admin.query(
    `SELECT count(*)::int AS n FROM pg_stat_activity WHERE datname = $1 AND application_name = 'relay-service'`,
    [name],
  );
  expect(rows[0].n).toBe(4);
  for (const client of clients) client.release();
});

test('a session that has forgotten its kept statements costs no transaction; its pool keeps none from then on, others do', async () => {
  const { healthy } = await usedPool(url, 1);
  const { healthy: other } = await usedPool(url, 1);
  const [rows] = (await admin.query('SELECT count(*)::int AS n FROM identity.outbox')).rows;
  expect(await write(healthy)).toBe(rows.n);
  expect(await keptBy(healthy)).toBe(1);
  const client = await healthy.connect();
  await client.query('DISCARD ALL');
  client.release();
  expect(await write(healthy)).toBe(rows.n);
  const views: Pool[] = [healthy, asking(healthy, 5_000), healthy.leaving?.(0) ?? healthy];
  for (const view of views) {
    expect(await write(view)).toBe(rows.n);
    expect(await keptBy(healthy)).toBe(0);
  }
  expect(await write(other)).toBe(rows.n);
  expect(await keptBy(other)).toBe(1);
});

test('behind a pooler both pools of a relay find out at once that no statement is kept', async () => {
  const { pool, httpPool, close } = openServers(loadConfig({ RELAY_DATABASE_URL: url }), {}, silent);
  onTestFinished(close);
  await write(pool);
  expect(await keptBy(pool)).toBe(1);
  const client = await pool.connect();
  await client.query('DISCARD ALL');
  client.release();
  await write(pool);
  await write(httpPool);
  expect(await keptBy(httpPool)).toBe(0);
});
