/** What the log says when a server of the relay's connections goes and comes. */
import { expect, onTestFinished, test } from 'vitest';
import { loadConfig } from '../../src/config/load-config.ts';
import { levelOf } from '../../src/connections/outage.ts';
import { openServers } from '../../src/connections/servers.ts';
import { withSession } from '../../src/connections/session.ts';
import type { Logger } from '../../src/telemetry/logger.ts';
import { createDatabase, createPostgres, createRedis } from '../support/servers.ts';
import { openAdminPool, openPool, silent } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const LOST_IDLE = 'lost an idle database connection';

/** The connections to servers of the test's own, and the lines about them: level, text and server. */
async function open() {
  const [database, redis] = await Promise.all([createDatabase(), createRedis()]);
  return { database, redis, ...openThem(database.url, redis.url) };
}

function openThem(databaseUrl: string, redisUrl: string, deps: Parameters<typeof openServers>[1] = {}) {
  const lines: [level: string, message: string, server?: unknown][] = [];
  const told = (level: string) => (fields: Record<string, unknown>, message: string) =>
    void lines.push(fields.server === undefined ? [level, message] : [level, message, fields.server]);
  const logger: Logger = { ...silent, debug: told('debug'), info: told('info'), warn: told('warn') };
  const config = loadConfig({ RELAY_DATABASE_URL: databaseUrl, RELAY_REDIS_URL: redisUrl });
  const servers = openServers(config, deps, logger);
  onTestFinished(servers.close);
  return { servers, lines };
}

test('an outage of Redis is one warning, its end one line, and both name the server', async () => {
  const { redis, servers, lines } = await open();
  const { queueRedis, appendRedis, workerRedis } = servers;
  const areAll = (status: string) => () =>
    [queueRedis, appendRedis, workerRedis].every((it) => it.status === status);
  await waitFor(areAll('ready'), { what: 'the connections to open' });
  await redis.stop();
  await waitFor(() => lines.length > 0, { what: 'the log to say that Redis is away' });
  await redis.restart();
  await waitFor(() => areAll('ready')() && lines.some(([level]) => level === 'info'), {
    what: 'the log to say that Redis is back',
  });
  expect(lines).toEqual([
    ['warn', 'no connection to Redis; trying again until it is back', 'Redis'],
    ['info', 'the connection to Redis is back', 'Redis'],
  ]);
});

for (const whose of ['its own', 'an embedding program’s'])
  test(`an outage of PostgreSQL is one warning, its end one line: with a pool of ${whose}`, async () => {
    const [postgres, redis] = await Promise.all([createPostgres(), createRedis()]);
    const deps = whose === 'its own' ? {} : { pool: openPool(postgres.url) };
    const { servers, lines } = openThem(postgres.url, redis.url, deps);
    const { pool, httpPool } = servers;
    const ask = () =>
      Promise.allSettled([pool, pool, httpPool].map((it) => withSession(it, (db) => db.query('SELECT 1'))));
    const failed = (results: readonly PromiseSettledResult<unknown>[]) =>
      results.flatMap((it) => (it.status === 'rejected' ? [it.reason as Error] : []));
    for (const outage of [1, 2]) {
      expect(failed(await ask())).toEqual([]);
      await postgres.stop();
      const errors = [...failed(await ask()), ...failed(await ask())];
      expect(errors.length).toBeGreaterThanOrEqual(3);
      await postgres.restart();
      expect(failed(await ask())).toEqual([]);
      const pair = [
        ['warn', 'no connection to PostgreSQL; trying again until it is back'],
        ['info', 'the connection to PostgreSQL is back'],
      ];
      const told = lines.filter(([, message]) => /connection to PostgreSQL/.test(message));
      expect(told).toEqual(Array.from({ length: outage }, () => pair).flat());
      expect(new Set(errors.map(levelOf))).toEqual(new Set(['debug']));
    }
  });

test('a pool of an embedding program is left as it was: programs make one relay after the other on it', async () => {
  const [database, redis] = await Promise.all([createDatabase(), createRedis()]);
  const pool = openPool(database.url);
  const listeners = () => pool.eventNames().map((name) => [name, pool.listenerCount(name)]);
  const before = listeners();
  const { servers } = openThem(database.url, redis.url, { pool });
  await withSession(servers.pool, (db) => db.query('SELECT 1'));
  await servers.close();
  expect(listeners()).toEqual(before);
});

test('idle sessions that end together are one warning, and one more after a session was opened again', async () => {
  const { database, servers, lines } = await open();
  const admin = openAdminPool(database.adminUrl);
  const count = (level: string) => lines.filter((line) => line[0] === level && line[1] === LOST_IDLE).length;
  for (const outage of [1, 2]) {
    const clients = await Promise.all(Array.from({ length: 4 }, () => servers.pool.connect()));
    for (const client of clients) client.release();
    await admin.query(
      'SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1 AND application_name = $2',
      [database.name, 'relay-service'],
    );
    await waitFor(() => count('warn') + count('debug') === 4 * outage, { what: 'each session to be lost' });
    expect(count('warn')).toBe(outage);
  }
});
