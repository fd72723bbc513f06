import { execFile } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { promisify } from 'node:util';
import { drizzle } from 'drizzle-orm/node-postgres';
import { Redis } from 'ioredis';
import { Pool, types } from 'pg';
import { expect, inject, onTestFinished, test } from 'vitest';
import { appendEvent, createRelay, type Logger } from '../../src/index.ts';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { STREAM, type Stage, setStage } from '../support/flow.ts';
import { asRelay, EMBEDDER_ROLE, PRODUCER_ROLE } from '../support/least-privilege.ts';
import { folderOfFile } from '../support/servers.ts';
import { openPool } from '../support/stages.ts';
import { PATIENCE_MS, waitFor } from '../support/wait.ts';

type Line = { level: string; fields: Record<string, unknown>; message: string };

/** The caller's own logger, which keeps what it is told. */
function listeningLogger(): Logger & { lines: Line[] } {
  const lines: Line[] = [];
  const level = (name: string) => (fields: Record<string, unknown>, message: string) => {
    lines.push({ level: name, fields, message });
  };
  return {
    ...{ trace: level('trace'), debug: level('debug'), info: level('info') },
    ...{ warn: level('warn'), error: level('error'), fatal: level('fatal') },
    lines,
  };
}

/** What the caller brings along. */
function ownConnections(stage: Stage): { pool: Pool; redis: Redis } {
  const pool = new Pool({ connectionString: asRelay(stage.databaseUrl, EMBEDDER_ROLE), max: 10 });
  const redis = new Redis(stage.env.RELAY_REDIS_URL);
  redis.on('error', () => {});
  onTestFinished(async () => {
    redis.disconnect();
    await pool.end();
  });
  return { pool, redis };
}

test('an embedded relay works on the pool, the Redis and the logger that it is given, and leaves them usable', async () => {
  const stage = await setStage();
  const { pool, redis } = ownConnections(stage);
  const logger = listeningLogger();
  const relay = createRelay(stage.config({ RELAY_LOG_LEVEL: 'debug' }), { pool, redis, logger, http: false });
  onTestFinished(() => relay.stop());
  await relay.start();
  expect(relay.httpPort()).toBeUndefined();
  await insertEvents(pool, someEvents(200, 20));
  await stage.rested();
  await stage.expectPromisesHeld();
  expect(logger.lines.length).toBeGreaterThan(0);
  await relay.stop();

  expect((await pool.query('SELECT 1 AS one')).rows).toEqual([{ one: 1 }]);
  expect(await redis.ping()).toBe('PONG');
  expect({ checkedOut: pool.totalCount - pool.idleCount, waiting: pool.waitingCount }).toEqual({
    checkedOut: 0,
    waiting: 0,
  });
  // Its own connections are gone; the caller's and ours stay.
  const clients = async () => String(await stage.redis.client('LIST')).match(/name=relay-\S*/g) ?? [];
  await waitFor(async () => (await clients()).length === 0, { what: 'the Redis connections to be closed' });
  // What comes after the stop stays in the table.
  const event = anEvent();
  await insertEvents(pool, [event]);
  expect(await stage.row(event.eventId)).toMatchObject({ published: false, next_attempt_at: null });
});

test('starting twice and stopping twice is the same as once', async () => {
  const stage = await setStage();
  const relay = createRelay(stage.config({ RELAY_HTTP_PORT: '0' }), { logger: listeningLogger() });
  await relay.stop();
  await Promise.all([relay.start(), relay.start()]);
  await relay.start();
  expect((await fetch(`http://127.0.0.1:${relay.httpPort()}/readyz`)).status).toBe(200);
  await insertEvents(stage.pool, someEvents(50, 5));
  await stage.rested();
  await Promise.all([relay.stop(), relay.stop()]);
  await relay.stop();
  await stage.expectPromisesHeld();
  // Nothing that was opened twice stayed open.
  const clients = async () => String(await stage.redis.client('LIST')).match(/name=relay-\S*/g) ?? [];
  await waitFor(async () => (await clients()).length === 0, { what: 'the Redis connections to be closed' });
  // Not one that looks started and does nothing.
  await expect(relay.start()).rejects.toThrow(/create another/);
});

test('a second start that comes while the first is at it resolves when the relay is at work, not before', async () => {
  const stage = await setStage();
  const relay = createRelay(stage.config({ RELAY_HTTP_PORT: '0' }), { logger: listeningLogger() });
  onTestFinished(() => relay.stop());
  const first = relay.start();
  await relay.start();
  expect((await fetch(`http://127.0.0.1:${relay.httpPort()}/readyz`)).status).toBe(200);
  await first;
});

test('a start that fails says why, leaves the caller as he was, and a later one with another relay succeeds', async () => {
  const stage = await setStage();
  const { pool, redis } = ownConnections(stage);
  await stage.pool.query('ALTER TABLE identity.outbox RENAME TO outbox_away');
  const config = stage.config();
  const deps = { pool, redis, logger: listeningLogger(), http: false };
  await expect(createRelay(config, deps).start()).rejects.toThrow(/relay migrate/);
  expect(await redis.ping()).toBe('PONG');
  expect(pool.totalCount - pool.idleCount).toBe(0);
  const clients = async () => String(await stage.redis.client('LIST')).match(/name=relay-\S*/g) ?? [];
  await waitFor(async () => (await clients()).length === 0, { what: 'the Redis connections to be closed' });

  await stage.pool.query('ALTER TABLE identity.outbox_away RENAME TO outbox');
  const relay = createRelay(config, deps);
  onTestFinished(() => relay.stop());
  await relay.start();
  await insertEvents(pool, [anEvent()]);
  await stage.rested();
});

test('a process that embeds the relay ends by itself when everything is stopped', async () => {
  const stage = await setStage();
  const script = join(await folderOfFile(), `embed-${randomUUID()}.mjs`);
  const root = inject('root');
  await writeFile(
    script,
    `import { createRequire } from 'node:module';
     const require = createRequire(${JSON.stringify(pathToFileURL(join(root, 'package.json')).href)});
     const { Pool } = require('pg');
     const { Redis } = require('ioredis');
     const { createRelay, loadConfig, appendEvent } = await import(${JSON.stringify(pathToFileURL(join(root, 'dist/index.js')).href)});
     const pool = new Pool({ connectionString: process.env.RELAY_DATABASE_URL });
     const redis = new Redis(process.env.RELAY_REDIS_URL);
     for (const own of [{}, { pool, redis, http: false }]) {
       const relay = createRelay(loadConfig(process.env), own);
       await relay.start();
       const client = await pool.connect();
       await client.query('BEGIN');
       const event = { eventType: 'SomethingElse', aggregateId: crypto.randomUUID(), payload: { n: 1 } };
       const { eventId } = await appendEvent(client, event);
       await client.query('COMMIT');
       client.release();
       const isPublished = 'SELECT FROM identity.outbox WHERE published AND event_id = $1';
       while ((await pool.query(isPublished, [eventId])).rowCount === 0) await new Promise((r) => setTimeout(r, 10));
       await relay.stop();
     }
     await pool.end();
     await redis.quit();
     console.log('everything is stopped');`,
  );
  // Rejects when it has to be killed.
  const { stdout } = await promisify(execFile)(process.execPath, [script], {
    env: {
      ...{ ...process.env, ...stage.env, RELAY_HTTP_PORT: '0', NODE_OPTIONS: '' },
      RELAY_DATABASE_URL: asRelay(stage.databaseUrl, EMBEDDER_ROLE),
    },
    timeout: PATIENCE_MS,
    killSignal: 'SIGKILL',
  });
  // Not the last line always: log lines and this one take different ways to the same pipe.
  expect(stdout.split('\n')).toContain('everything is stopped');
  expect((await stage.entries()).length).toBe(2);
});

test('an event that is appended in a pg transaction exists if and only if that commits', async () => {
  const stage = await setStage();
  await stage.pod();
  const client = await openPool(asRelay(stage.databaseUrl, PRODUCER_ROLE)).connect();
  const aggregateId = randomUUID();
  const event = { eventType: 'SomethingElse', aggregateId, payload: { tenant_id: randomUUID() } };
  try {
    await client.query('BEGIN');
    await appendEvent(client, event);
    await client.query('ROLLBACK');
    await client.query('BEGIN');
    const one = await appendEvent(client, event);
    const own = { ...event, eventId: randomUUID(), topic: 'dictionary.word.v1', aggregateType: 'word' };
    const two = await appendEvent(client, own);
    expect(two.eventId).toBe(own.eventId);
    expect(two.id).toBeGreaterThan(one.id);
    // As the README warns.
    expect(() => JSON.stringify(two)).toThrow('BigInt');
    expect(await stage.count('true'), 'rows before the commit').toBe(0);
    await client.query('COMMIT');
    await stage.rested();
    expect((await stage.rows()).map((row) => [row.id, row.event_id])).toEqual([
      [String(one.id), one.eventId],
      [String(two.id), two.eventId],
    ]);
    expect((await stage.entries()).map(({ fields }) => fields)).toMatchObject([
      {
        ...{ event_id: one.eventId, aggregate_id: aggregateId, aggregate_type: 'user' },
        tenant_id: event.payload.tenant_id,
      },
    ]);
    expect((await stage.entries('dictionary.word.v1')).map(({ fields }) => fields)).toMatchObject([
      { event_id: two.eventId, topic: 'dictionary.word.v1', aggregate_type: 'word' },
    ]);
  } finally {
    client.release();
  }
});

test('an event that is appended in a drizzle transaction exists if and only if that commits', async () => {
  const stage = await setStage();
  await stage.pod();
  const db = drizzle(openPool(asRelay(stage.databaseUrl, PRODUCER_ROLE)));
  const event = {
    eventType: 'SomethingElse',
    aggregateId: randomUUID(),
    payload: { word: 'Straße', list: [1] },
  };
  await expect(
    db.transaction(async (tx) => {
      await appendEvent(tx, event);
      throw new Error('the caller changed its mind');
    }),
  ).rejects.toThrow('changed its mind');
  const { eventId } = await db.transaction((tx) => appendEvent(tx, event));
  await stage.rested();
  expect((await stage.rows()).map((row) => row.event_id)).toEqual([eventId]);
  const [entry] = await stage.entries();
  expect(entry?.fields.event_id).toBe(eventId);
  expect(JSON.parse(entry?.fields.payload ?? '')).toEqual(event.payload);
});

test('a pool is refused, also below drizzle: it would insert outside of the transaction', async () => {
  const stage = await setStage();
  const pool = openPool(asRelay(stage.databaseUrl, PRODUCER_ROLE));
  const event = { eventType: 'SomethingElse', aggregateId: randomUUID(), payload: {} };
  // @ts-expect-error as a program without types, or with its own, would
  await expect(appendEvent(pool, event)).rejects.toThrow(TypeError);
  await expect(appendEvent(drizzle(pool), event)).rejects.toThrow(/pool.*outside of your transaction/);
  const client = await pool.connect();
  try {
    await client.query('BEGIN');
    await appendEvent(drizzle(client), event);
    expect(await stage.count('true'), 'rows before the commit').toBe(0);
  } finally {
    client.release(true);
  }
  await drizzle(pool).transaction((tx) => tx.transaction((savepoint) => appendEvent(savepoint, event)));
  expect(await stage.count('true')).toBe(1);
});

test('habits of the program around it do no harm: parsers of node-postgres, options of ioredis, settings of the role', async () => {
  const stage = await setStage({ env: { RELAY_POLL_INTERVAL: '0.5' } });
  const pool = new Pool({
    connectionString: asRelay(stage.databaseUrl, EMBEDDER_ROLE),
    max: 10,
    options: HABITS.map((it) => `-c ${it}`).join(' '),
  });
  // As for all of the process, where its own code wants numbers and strings.
  const parsers = types as unknown as { setTypeParser(oid: number, parse: (text: string) => unknown): void };
  const before = [20, 16, 114, 1009, 1184].map((oid) => [oid, types.getTypeParser(oid, 'text')] as const);
  for (const [oid] of before) parsers.setTypeParser(oid, (text) => `parsed ${text}`);
  const redis = new Redis(stage.env.RELAY_REDIS_URL, {
    ...{ enableAutoPipelining: true, keyPrefix: 'theirs:', stringNumbers: true, commandTimeout: 1 },
    ...{ maxRetriesPerRequest: 1, enableOfflineQueue: true, autoResendUnfulfilledCommands: true },
  });
  redis.on('error', () => {});
  onTestFinished(async () => {
    for (const [oid, parse] of before) parsers.setTypeParser(oid, parse as (text: string) => unknown);
    redis.disconnect();
    await pool.end();
  });
  const relay = createRelay(stage.config(), { pool, redis, logger: listeningLogger(), http: false });
  onTestFinished(() => relay.stop());
  await relay.start();
  await insertEvents(stage.pool, someEvents(200, 20));
  await stage.rested();
  await stage.expectPromisesHeld();
  // What is compared with the streams goes by times as they are printed.
  await stage.redis.flushall();
  await waitFor(async () => (await stage.redis.xlen(STREAM)) === 200, {
    what: 'every entry to come back',
  });
  await stage.rested();
  // A restart leaves the time of the last checkpoint, from which on it is compared.
  await stage.server.restart();
  await insertEvents(stage.pool, someEvents(20));
  await stage.rested();
  expect((await stage.expectPromisesHeld()).entries).toBe(220);
});

/** Of a role or a database; none of them with a blank, which the driver's option would need escaped. */
const HABITS = [
  ...['DateStyle=German,DMY', 'TimeZone=Asia/Kolkata', 'IntervalStyle=sql_standard', 'search_path='],
  ...['array_nulls=off', 'row_security=off', 'synchronous_commit=off'],
  ...['enable_nestloop=off', 'enable_indexscan=off', 'plan_cache_mode=force_custom_plan'],
  ...[
    'bytea_output=escape',
    'extra_float_digits=-10',
    'lock_timeout=1',
    'default_transaction_isolation=serializable',
  ],
];
