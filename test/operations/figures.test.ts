import type { Redis } from 'ioredis';
import pg from 'pg';
import { expect, test } from 'vitest';
import type { Pool } from '../../src/connections/database.ts';
import { FAILS_FAST } from '../../src/connections/servers.ts';
import { createFigures, entriesAtRisk, type Figures, shareFigures } from '../../src/operations/figures.ts';
import { createFleetReader } from '../../src/operations/heartbeat.ts';
import { createBacklog } from '../../src/outbox/backlog.ts';
import { createQueues } from '../../src/queue/queues.ts';
import { createStreamInspector } from '../../src/streams/inspect.ts';
import type { PrivateRedis } from '../demo/servers.ts';
import { createDatabase, createRedis } from '../support/servers.ts';
import { openPool, openRedis, silent } from '../support/stages.ts';

const QUEUES = { queuePrefix: 'bull', queueName: 'relay', maxRetryAttempts: 5, retryBaseDelayMs: 1_000 };

/** The pool, and the statements on the table that went through it. */
function counting(pool: pg.Pool): Pool & { statements: string[] } {
  const statements: string[] = [];
  const note = (query: unknown) => {
    const text = typeof query === 'string' ? query : (query as pg.QueryConfig).text;
    if (text.includes('identity.outbox')) statements.push(text);
  };
  return {
    statements,
    connect: (async () => {
      const client = await pool.connect();
      return Object.create(client, {
        query: {
          value: (config: pg.QueryConfig) => {
            note(config);
            return (pg.Client.prototype.query as (config: pg.QueryConfig) => unknown).call(client, config);
          },
        },
        release: { value: client.release.bind(client) },
      });
    }) as Pool['connect'],
  };
}

const SHARED = 'bull:relay:figures';

function readerOn(pool: Pool, redis: Redis) {
  const backlog = createBacklog(pool, {
    ...{ streamName: 'identity.user.v1', deadLetterPolicy: 'continue', statementTimeoutMs: 4_000 },
  });
  const read = createFigures({
    backlog: backlog.count,
    databaseTime: backlog.time,
    notifyQueueUsage: backlog.notifyQueueUsage,
    queues: createQueues(redis, QUEUES, silent).figures,
    fleet: createFleetReader(redis, 'bull:relay'),
    inspectStreams: createStreamInspector(redis),
    streams: ['identity.user.v1'],
    deadlineMs: 4_000,
  });
  return { read, shared: shareFigures({ redis, key: SHARED, read }) };
}

const connection = (server: PrivateRedis): Promise<Redis> => {
  const redis = openRedis(server.url, { ...FAILS_FAST, commandTimeout: 5_000 });
  return new Promise((resolve) => redis.once('ready', () => resolve(redis)));
};

test('three pods that are scraped at once, and again, ask the database once', async () => {
  const server = await createRedis();
  const pool = counting(openPool((await createDatabase()).url));
  const pods = await Promise.all([1, 2, 3].map(async () => readerOn(pool, await connection(server)).shared));
  for (let scrape = 0; scrape < 3; scrape++) {
    const answers = await Promise.all(pods.map((figures) => figures()));
    for (const answer of answers) {
      expect(answer?.figures).toMatchObject({ backlog: { fresh: 0 }, queues: { publish: { waiting: 0 } } });
      expect(answer?.figures.problems).toEqual([]);
      expect(answer?.ageSeconds).toBeLessThan(15);
    }
  }
  expect(pool.statements).toHaveLength(1);
  // In the next interval once more.
  await openRedis(server.url).del(SHARED, `${SHARED}:reading`);
  await Promise.all(pods.map((figures) => figures()));
  expect(pool.statements).toHaveLength(2);
  const remainingMs = await openRedis(server.url).pttl(SHARED);
  expect(remainingMs).toBeGreaterThan(10_000);
  expect(remainingMs).toBeLessThanOrEqual(15_000);
});

test('without Redis there are no shared figures, and nobody asks the database instead', async () => {
  const server = await createRedis();
  const pool = counting(openPool((await createDatabase()).url));
  const { shared } = readerOn(pool, await connection(server));
  await server.kill('SIGKILL');
  expect(await shared()).toBeUndefined();
  expect(pool.statements).toEqual([]);
});

test('without database there is what Redis tells, and why the rest is missing', async () => {
  const server = await createRedis();
  const pool = openPool('postgres://relay@127.0.0.1:9/none');
  const figures = await readerOn(pool, await connection(server)).read();
  expect(figures).toMatchObject({ queues: { claim: { waiting: 0 } }, streams: [], fleet: { pods: [] } });
  expect(figures.backlog).toBeUndefined();
  expect(figures.problems).toEqual([expect.stringMatching(/^database: .*ECONNREFUSED/)]);
});

test('the difference of the clocks is that of the servers, whatever the clock of the pod says', async () => {
  const server = await createRedis();
  const pool = openPool((await createDatabase()).url);
  const { read } = readerOn(pool, await connection(server));
  // Both servers have the clock of this machine.
  expect(Math.abs((await read()).clockDifferenceMs ?? Number.NaN)).toBeLessThan(30_000);
});

test('a pod that reads for all and is gone is replaced', async () => {
  const server = await createRedis();
  const redis = await connection(server);
  const read = async (): Promise<Figures> => ({ problems: [] });
  await redis.set(`${SHARED}:reading`, 'a pod that was killed', 'PX', 300);
  const found = await shareFigures({ redis, key: SHARED, read })();
  expect(found).toEqual({ figures: { problems: [] }, ageSeconds: 0 });
});

test('entries are at risk when less than a tenth of the limit is left to append before they go', () => {
  expect(entriesAtRisk(90_000, 100_000)).toBe(0);
  expect(entriesAtRisk(90_001, 100_000)).toBe(1);
  expect(entriesAtRisk(100_000, 100_000)).toBe(10_000);
  expect(entriesAtRisk(1_000_000, 0)).toBe(0);
});
