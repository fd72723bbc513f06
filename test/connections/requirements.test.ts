import { writeFile } from 'node:fs/promises';
import { createServer, connect as openSocket, type Server } from 'node:net';
import { join } from 'node:path';
import { Queue } from 'bullmq';
import { Client } from 'pg';
import { afterAll, describe, expect, onTestFinished, test } from 'vitest';
import { checkServers } from '../../src/commands/check.ts';
import { loadConfig } from '../../src/config/load-config.ts';
import type { Pool } from '../../src/connections/database.ts';
import { healthyPool } from '../../src/connections/pool-health.ts';
import { checkRequirements, watchRequirements } from '../../src/connections/requirements.ts';
import { createRelay } from '../../src/relay.ts';
import type { RequirementResult } from '../../src/requirement.ts';
import { startPrivatePostgres } from '../demo/servers.ts';
import { boardUsers } from '../support/board.ts';
import { atEndOfFile } from '../support/cleanup.ts';
import { anEvent, insertEvents } from '../support/events.ts';
import { asRelay, grantLeast, OPERATOR_ROLE, RELAY_USER } from '../support/least-privilege.ts';
import { startPod } from '../support/pods.ts';
import {
  createDatabase,
  createPostgres,
  createRedis,
  folderOfFile,
  type TestDatabase,
  type TestRedis,
} from '../support/servers.ts';
import { openAdminPool, openAdminRedis, openPool, openRedis, silent } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

/** Each broken set-up has exactly one result that is no `ok`, and it names the cause. */

let good: Promise<TestRedis> | undefined;
const goodRedis = () => {
  good ??= createRedis();
  return good;
};

type Env = Readonly<Record<string, string>>;

const check = async (env: Env): Promise<RequirementResult[]> =>
  checkServers(loadConfig({ RELAY_REDIS_URL: (await goodRedis()).url, ...env }));

const notOk = async (env: Env): Promise<RequirementResult[]> =>
  (await check(env)).filter(({ result }) => result !== 'ok');

async function databaseWith(sql: string): Promise<TestDatabase> {
  const database = await createDatabase();
  await openAdminPool(database.adminUrl).query(sql);
  return database;
}

test('a good set-up passes, and no trace of the trials is left', async () => {
  const database = await createDatabase();
  const admin = openAdminPool(database.adminUrl);
  await insertEvents(admin, [anEvent(), anEvent()]);
  const rows = async () =>
    (await admin.query('SELECT to_jsonb(o) AS row FROM identity.outbox o ORDER BY id')).rows;
  const before = await rows();
  const redis = await goodRedis();
  expect(await notOk({ RELAY_DATABASE_URL: database.url })).toEqual([]);
  expect(await rows()).toEqual(before);
  const keys = await openAdminRedis(redis.adminUrl).keys('*');
  expect(keys.filter((key) => !key.endsWith(':probe'))).toEqual([]);
});

test('with streams on a server of their own, both are tried', async () => {
  const database = await createDatabase();
  const env = { RELAY_STREAM_REDIS_URL: 'redis://there' };
  const [queues, streams] = await Promise.all([
    createRedis({ env, on: 'queues' }),
    createRedis({ env, on: 'streams' }),
  ]);
  const urls = { RELAY_REDIS_URL: queues.url, RELAY_STREAM_REDIS_URL: streams.url };
  const results = await check({ ...urls, RELAY_DATABASE_URL: database.url });
  expect(results.filter(({ result }) => result !== 'ok')).toEqual([]);
  const subjects = results.map(({ subject }) => subject);
  expect(subjects).toEqual(expect.arrayContaining(['queues', 'stream AOF', 'stream streams']));
  expect(subjects).not.toContain('streams');
});

const ROWS = `INSERT INTO identity.outbox (event_type, aggregate_id, payload) VALUES ('A', gen_random_uuid(), '{}');`;
const TENANTS = `payload->>'tenant_id' = current_setting('app.tenant', true)`;
const OPEN = 'ALTER TABLE identity.outbox ENABLE ROW LEVEL SECURITY;';
const ALTER = 'ALTER TABLE identity.outbox';

describe('what keeps the relay from its table', () => {
  for (const [what, sql, subject, cause] of [
    [
      'row level security without a policy',
      OPEN,
      'row security',
      /hides rows.*relay_pod.*SELECT.*CREATE POLICY/,
    ],
    [
      'a policy that depends on the row',
      `${OPEN} CREATE POLICY tenants ON identity.outbox USING (${TENANTS})`,
      'row security',
      /policy tenants may hide rows/,
    ],
    [
      'a policy for readers alone',
      `${OPEN} CREATE POLICY readers ON identity.outbox FOR SELECT USING (true)`,
      'row security',
      /no policy lets it UPDATE/,
    ],
    [
      'a policy for others',
      `${OPEN} CREATE POLICY others ON identity.outbox TO relay_producer USING (true)`,
      'row security',
      /no policy lets it SELECT/,
    ],
    [
      'a restrictive policy',
      `${OPEN} CREATE POLICY a ON identity.outbox USING (true); CREATE POLICY b ON identity.outbox AS RESTRICTIVE USING (${TENANTS})`,
      'row security',
      /policy b hides rows/,
    ],
    [
      'a right that is missing',
      `REVOKE UPDATE ON identity.outbox FROM ${RELAY_USER}`,
      'claim',
      /permission denied.*relay grants/,
    ],
    [
      'a schema that it may not use',
      `REVOKE USAGE ON SCHEMA identity FROM ${RELAY_USER}`,
      'table',
      /permission denied.*relay grants/,
    ],
    [
      'a trigger that refuses its updates',
      `${ROWS} CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'immutable'; END $$;
       CREATE TRIGGER no BEFORE UPDATE ON identity.outbox FOR EACH ROW EXECUTE FUNCTION no()`,
      'claim',
      /immutable/,
    ],
    [
      'a trigger that keeps rows as they are',
      `${ROWS} CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
       CREATE TRIGGER keep BEFORE UPDATE ON identity.outbox FOR EACH ROW EXECUTE FUNCTION keep()`,
      'claim',
      /trigger BEFORE UPDATE.*RETURN NEW/i,
    ],
    [
      'a trigger that lets a row be leased, but not published',
      `${ROWS} CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
       CREATE TRIGGER keep BEFORE UPDATE OF published ON identity.outbox FOR EACH ROW EXECUTE FUNCTION keep()`,
      'claim',
      /trigger BEFORE UPDATE.*RETURN NEW/i,
    ],
    [
      'a trigger that refuses a row that was published, while all rows are leased',
      `${ROWS} ${ROWS} UPDATE identity.outbox SET next_attempt_at = now() + interval '1 minute';
       CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'audit is full'; END $$;
       CREATE TRIGGER no AFTER UPDATE ON identity.outbox FOR EACH ROW WHEN (NEW.published) EXECUTE FUNCTION no()`,
      'claim',
      /audit is full/,
    ],
    [
      'a trigger that refuses every change of a published row',
      `${ROWS} CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'history'; END $$;
       CREATE TRIGGER no BEFORE UPDATE ON identity.outbox FOR EACH ROW WHEN (OLD.published) EXECUTE FUNCTION no()`,
      'claim',
      /history/,
    ],
    [
      'a trigger that keeps published rows as they are',
      `${ROWS} CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
       CREATE TRIGGER keep BEFORE UPDATE ON identity.outbox FOR EACH ROW WHEN (OLD.published) EXECUTE FUNCTION keep()`,
      'claim',
      /trigger BEFORE UPDATE.*RETURN NEW/i,
    ],
    [
      'a constraint that is deferred to the commit',
      `${ROWS} CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not in this state'; END $$;
       CREATE CONSTRAINT TRIGGER no AFTER UPDATE ON identity.outbox DEFERRABLE INITIALLY DEFERRED
       FOR EACH ROW WHEN (NEW.published) EXECUTE FUNCTION no()`,
      'claim',
      /not in this state/,
    ],
    [
      'a check of the entry id, while all rows wait for retries',
      `${ROWS} ${ROWS} UPDATE identity.outbox SET next_attempt_at = now() + interval '1 minute', attempts = 1;
       ${ALTER} ADD CONSTRAINT short CHECK (length(stream_entry_id) < 3)`,
      'claim',
      /check constraint "short"/,
    ],
    ['a rule', 'CREATE RULE nope AS ON UPDATE TO identity.outbox DO INSTEAD NOTHING', 'table', /rule nope/],
    [
      'a publication without a replica identity',
      `${ALTER} REPLICA IDENTITY NOTHING; CREATE PUBLICATION all_of_it FOR TABLE identity.outbox`,
      'claim',
      /replica identity/,
    ],
    ['a column that is json', `${ALTER} ALTER payload TYPE json`, 'table', /column payload is json.*jsonb/],
    [
      'a column that may be null, and is',
      `${ALTER} ALTER published DROP NOT NULL; ${ROWS} UPDATE identity.outbox SET published = NULL`,
      'null columns',
      /published.*null in some rows/,
    ],
    ['tables that inherit', 'CREATE TABLE heir () INHERITS (identity.outbox)', 'table', /inherit/],
    [
      'a hypertable',
      `CREATE SCHEMA _timescaledb_catalog; CREATE TABLE _timescaledb_catalog.hypertable (schema_name text, table_name text);
       GRANT USAGE ON SCHEMA _timescaledb_catalog TO public; GRANT SELECT ON _timescaledb_catalog.hypertable TO public;
       INSERT INTO _timescaledb_catalog.hypertable VALUES ('identity', 'outbox')`,
      'table',
      /TimescaleDB/,
    ],
    [
      'a table that is not there',
      'DROP TABLE identity.outbox',
      'table',
      /lacks table identity\.outbox.*relay migrate/,
    ],
    [
      'an index that is not there',
      'DROP INDEX identity.relay_outbox_due',
      'table',
      /lacks index relay_outbox_due.*relay migrate/,
    ],
  ] as const) {
    test(`${what} fails`, async () => {
      const { url } = await databaseWith(sql);
      const results = await notOk({ RELAY_DATABASE_URL: url });
      expect(results).toEqual([
        { result: 'failed', subject, finding: expect.stringMatching(cause), mayPass: expect.anything() },
      ]);
      expect(results[0]?.finding).not.toContain('\n');
    });
  }

  test('sessions that are read only fail', async () => {
    const database = await createDatabase();
    await openAdminPool(database.adminUrl).query(
      `ALTER DATABASE ${database.name} SET default_transaction_read_only = on`,
    );
    const results = await notOk({ RELAY_DATABASE_URL: database.url });
    expect(results).toMatchObject([
      {
        result: 'failed',
        subject: 'writable',
        finding: expect.stringContaining('default_transaction_read_only'),
      },
    ]);
  });

  test('a policy that shows every row to the relay is good, and so is one that does not ask for the row', async () => {
    for (const policy of [
      `TO ${RELAY_USER} USING (true) WITH CHECK (true)`,
      `USING (current_user = '${RELAY_USER}')`,
    ]) {
      const { url } = await databaseWith(`${OPEN} CREATE POLICY relay ON identity.outbox ${policy}`);
      expect(await notOk({ RELAY_DATABASE_URL: url })).toEqual([]);
    }
  });

  test.each([1, 3])('a row of %i that refuses to be changed is no fault of the set-up', async (count) => {
    const { url, adminUrl } = await databaseWith(
      `${ROWS.repeat(count)} UPDATE identity.outbox SET next_attempt_at = now() - interval '1 s' * id`,
    );
    await openAdminPool(adminUrl).query(
      `${ALTER} ADD CONSTRAINT never CHECK (id <> (1)) NOT VALID; ${ALTER} ADD CONSTRAINT nor CHECK (id <> ${count}) NOT VALID`,
    );
    // Of three, the first and the last refuse.
    expect(await notOk({ RELAY_DATABASE_URL: url })).toEqual([]);
  });

  test('a row that cannot be printed is no fault of the set-up', async () => {
    const { url } = await databaseWith(
      `${ROWS} UPDATE identity.outbox SET payload = (repeat('[', 9000) || repeat(']', 9000))::jsonb`,
    );
    expect(await notOk({ RELAY_DATABASE_URL: url })).toEqual([]);
  });
});

describe('advice', () => {
  for (const [what, sql, subject, cause, env] of [
    [
      'a sequence that hands out blocks',
      'ALTER SEQUENCE identity.outbox_id_seq CACHE 50',
      'ids',
      /CACHE 50.*CACHE 1/,
      {},
    ],
    [
      'an identity that hands out blocks',
      `${ALTER} ALTER id DROP DEFAULT; ${ALTER} ALTER id ADD GENERATED BY DEFAULT AS IDENTITY (CACHE 20)`,
      'ids',
      /CACHE 20/,
      {},
    ],
    ['ids without a sequence', `${ALTER} ALTER id DROP DEFAULT`, 'ids', /no sequence/, {}],
    [
      'another topic by default',
      'SELECT',
      'topic',
      /identity\.user\.v1.*SET DEFAULT 'my\.stream'/,
      { RELAY_STREAM_NAME: 'my.stream' },
    ],
    [
      'a column that may be null',
      `${ALTER} ALTER published DROP NOT NULL`,
      'null columns',
      /published may be null.*SET NOT NULL/,
      {},
    ],
    [
      'a default that makes rows look leased',
      `${ALTER} ALTER next_attempt_at SET DEFAULT now()`,
      'defaults',
      /next_attempt_at.*DROP DEFAULT/,
      {},
    ],
    [
      'retention without the right to delete',
      'SELECT',
      'retention',
      /may not delete.*relay grants/,
      { RELAY_PUBLISHED_RETENTION: '8640000' },
    ],
    [
      'a dashboard whose role may not replay or discard',
      'SELECT',
      'dashboard',
      /^role relay_pod may not replay or discard: the API refuses POST \/api\/dlq\/replay and POST \/api\/dlq\/discard, while Retry in the dashboard works;.*relay grants/,
      { RELAY_BOARD: 'true', RELAY_HTTP_HOST: '127.0.0.1' },
    ],
    [
      'a dashboard whose role may discard, but not replay',
      `GRANT UPDATE (discarded_by) ON identity.outbox TO ${RELAY_USER}`,
      'dashboard',
      /^role relay_pod may not replay: the API refuses POST \/api\/dlq\/replay, while Retry/,
      { RELAY_BOARD: 'true', RELAY_HTTP_HOST: '127.0.0.1' },
    ],
    [
      'no trigger',
      'DROP TRIGGER relay_outbox_wakeup ON identity.outbox',
      'wake-up',
      /no trigger.*relay migrate/,
      {},
    ],
    [
      'a table that a crash empties',
      `${ALTER} SET UNLOGGED`,
      'persistence',
      /UNLOGGED.*crash.*SET LOGGED/,
      {},
    ],
    [
      'a trigger that is off',
      `${ALTER} DISABLE TRIGGER relay_outbox_wakeup`,
      'wake-up',
      /ENABLE TRIGGER/,
      {},
    ],
  ] as const) {
    test(`${what} is worth it`, async () => {
      const { url } = await databaseWith(sql);
      const redis = 'RELAY_STREAM_NAME' in env ? await createRedis({ env }) : await goodRedis();
      expect(await notOk({ RELAY_DATABASE_URL: url, RELAY_REDIS_URL: redis.url, ...env })).toEqual([
        { result: 'advice', subject, finding: expect.stringMatching(cause), mayPass: false },
      ]);
    });
  }
});

test('a dashboard with the operators’ role, or with viewers alone, needs no advice', async () => {
  const { url, adminUrl } = await goodDatabase();
  const env = { RELAY_BOARD: 'true', RELAY_HTTP_HOST: '127.0.0.1' };
  const operators = asRelay(adminUrl, OPERATOR_ROLE);
  expect(await notOk({ ...env, RELAY_DATABASE_URL: operators })).toEqual([]);
  const [RELAY_BOARD_USERS = ''] = (await boardUsers()).split(' ');
  expect(await notOk({ ...env, RELAY_DATABASE_URL: url, RELAY_BOARD_USERS })).toEqual([]);
});

test('too few sessions to listen for notifications are worth advice: the relay works without them', async () => {
  const { url } = await goodDatabase();
  const redis = openRedis((await goodRedis()).url, { lazyConnect: true });
  const results = await checkRequirements(loadConfig({ RELAY_DATABASE_URL: url }), {
    pool: healthyPool(openPool(url), { size: 1, logger: silent }),
    ...{ queueRedis: redis, streamRedis: redis },
  });
  expect(results.filter(({ result }) => result !== 'ok')).toEqual([
    {
      ...{ result: 'advice', subject: 'wake-up', mayPass: false },
      finding: expect.stringMatching(/^new events wait up to 5 s: PostgreSQL gives this pod 1 of 1 sessions/),
    },
  ]);
});

describe('a pod at work is given the advice that its start did not wait for', () => {
  /** What a pod is told, whose first question for a session is answered by `first`, and who is given no two of them. */
  async function toldAtWork(
    sql: string,
    { first, leaving }: Readonly<{ first?: Promise<never>; leaving?: Pool['leaving'] }> = {},
  ): Promise<unknown[]> {
    const { url } = await databaseWith(sql);
    const redis = openRedis((await goodRedis()).url);
    const sessions = openPool(url);
    const config = loadConfig({ RELAY_DATABASE_URL: url });
    const on = { pool: sessions, queueRedis: redis, streamRedis: redis };
    const atStart = await checkRequirements(config, on, 'start');
    expect(atStart.filter(({ result }) => result !== 'ok')).toEqual([]);
    let next: ReturnType<Pool['connect']> | undefined = first;
    const connect = () => {
      const answer = next ?? sessions.connect();
      next = undefined;
      return answer;
    };
    const told: unknown[] = [];
    const warn = (fields: object) => {
      if ('advice' in fields) told.push(fields);
    };
    const watch = watchRequirements(
      config,
      { ...on, pool: { connect, ...(leaving && { leaving }) } },
      { ...silent, warn },
    );
    onTestFinished(() => watch.stop());
    watch.start();
    await waitFor(() => told.length > 0, { what: 'advice' });
    return told;
  }

  test('also where PostgreSQL was away at first', async () => {
    const sql =
      'ALTER TABLE identity.outbox SET UNLOGGED; DROP TRIGGER relay_outbox_wakeup ON identity.outbox';
    const away = Promise.reject(new Error('connect ECONNREFUSED'));
    away.catch(() => {});
    // What got no answer at first is asked last.
    expect(await toldAtWork(sql, { first: away })).toEqual([
      { subject: 'wake-up', advice: expect.stringContaining('relay migrate') },
      { subject: 'persistence', advice: expect.stringContaining('UNLOGGED') },
    ]);
  });

  test('also while one of its questions gets no answer', async () => {
    const connect = () => Promise.reject(new Error('no database session became free within 3 s (10 in use)'));
    const sql =
      'ALTER TABLE identity.outbox SET UNLOGGED; ALTER TABLE identity.outbox ALTER COLUMN attempts SET DEFAULT 1';
    expect(await toldAtWork(sql, { leaving: () => ({ connect }) })).toEqual([
      { subject: 'persistence', advice: expect.stringContaining('UNLOGGED') },
      { subject: 'defaults', advice: expect.stringContaining('attempts') },
    ]);
  });

  test('also what PostgreSQL does not let it ask, and what comes after that', async () => {
    const sql =
      'REVOKE SELECT ON pg_catalog.pg_sequence FROM PUBLIC; DROP TRIGGER relay_outbox_wakeup ON identity.outbox';
    expect(await toldAtWork(sql)).toEqual([
      {
        subject: 'ids',
        advice: expect.stringMatching(/^permission denied for table pg_sequence: .*relay grants/),
      },
      { subject: 'wake-up', advice: expect.stringContaining('relay migrate') },
    ]);
  });
});

test('what PostgreSQL does not let an operator ask is advice as well, where a pod starts without it', async () => {
  const { url } = await databaseWith(
    'REVOKE SELECT ON pg_catalog.pg_sequence FROM PUBLIC; DROP TRIGGER relay_outbox_wakeup ON identity.outbox',
  );
  const env = { RELAY_DATABASE_URL: url, RELAY_REDIS_URL: (await goodRedis()).url };
  expect(await notOk(env)).toMatchObject([
    { result: 'advice', subject: 'ids', finding: expect.stringMatching(/^permission denied/) },
    { result: 'advice', subject: 'wake-up' },
  ]);
});

test('a pooler that has no session to give is thought of where PostgreSQL does not answer', async () => {
  const { url } = await goodDatabase();
  const client = {
    query: () => Promise.reject(new Error('Query read timeout')),
    on() {},
    off() {},
    release() {},
  };
  const redis = openRedis((await goodRedis()).url);
  const pool = { connect: async () => client as never };
  const on = { pool, queueRedis: redis, streamRedis: redis };
  const results = await checkRequirements(loadConfig({ RELAY_DATABASE_URL: url }), on);
  expect(results[0]).toMatchObject({
    ...{ result: 'failed', subject: 'database', mayPass: 'soon' },
    finding: expect.stringMatching(/Query read timeout.*pooler.*RELAY_DATABASE_POOL_SIZE/),
  });
});

test('what calls itself something else than PostgreSQL fails', async () => {
  const database = await databaseWith(
    `CREATE FUNCTION public.version() RETURNS text LANGUAGE sql AS $$ SELECT 'CockroachDB CCL v25.1.0' $$`,
  );
  await openAdminPool(database.adminUrl).query(
    `ALTER DATABASE ${database.name} SET search_path = public, pg_catalog`,
  );
  expect(await notOk({ RELAY_DATABASE_URL: database.url })).toMatchObject([
    { result: 'failed', subject: 'database', finding: expect.stringContaining('CockroachDB') },
  ]);
});

test('of a server: prepared transactions and a NOTIFY queue that fills are worth advice, a standby fails and keeps start from starting', async () => {
  const directory = join(await folderOfFile(), 'own-postgres');
  const settings = { max_prepared_transactions: 5 };
  const postgres = await startPrivatePostgres({ directory, settings });
  atEndOfFile(() => postgres.kill('SIGQUIT'));
  const migration = await startPod({ RELAY_DATABASE_URL: postgres.url }, ['migrate']);
  expect((await migration.exited).code).toBe(0);
  await grantLeast(postgres.url);
  const env = { RELAY_DATABASE_URL: asRelay(postgres.url) };
  expect(await notOk(env)).toMatchObject([
    { result: 'advice', subject: 'PREPARE TRANSACTION', finding: expect.stringContaining('--no-notify') },
  ]);

  // Somebody listens and does not read: 90 MB of 8 GB wait for them.
  const deaf = new Client({ connectionString: postgres.url });
  await deaf.connect();
  await deaf.query('LISTEN nobody');
  await deaf.query('BEGIN');
  await deaf.query('SELECT 1');
  await openAdminPool(postgres.url).query(
    `SELECT pg_notify('nobody', repeat('x', 7900) || i) FROM generate_series(1, 12000) i`,
  );
  expect(await notOk(env)).toMatchObject([
    { subject: 'PREPARE TRANSACTION' },
    {
      result: 'advice',
      subject: 'NOTIFY queue',
      finding: expect.stringMatching(/^\d+ % full.*pg_stat_activity/),
    },
  ]);
  deaf.on('error', () => {});

  // Without these rights the relay works.
  await openAdminPool(postgres.url).query(
    'REVOKE EXECUTE ON FUNCTION pg_notify(text, text), pg_notification_queue_usage() FROM PUBLIC',
  );
  expect(await notOk(env)).toMatchObject([
    { result: 'advice', subject: 'wake-up', finding: expect.stringMatching(/wait up to.*pg_notify/) },
    { result: 'advice', subject: 'PREPARE TRANSACTION' },
  ]);

  await postgres.stop();
  await writeFile(join(directory, 'data', 'standby.signal'), '');
  await postgres.restart();
  expect(await notOk(env)).toMatchObject([
    {
      result: 'failed',
      subject: 'writable',
      finding: expect.stringMatching(/standby.*RELAY_DATABASE_URL.*primary/),
    },
  ]);
  const relay = createRelay(
    loadConfig({ ...env, RELAY_REDIS_URL: (await goodRedis()).url, RELAY_STARTUP_TIMEOUT: '1' }),
    { http: false, logger: silent },
  );
  await expect(relay.start()).rejects.toMatchObject({
    name: 'NotReadyError',
    message: expect.stringContaining('standby'),
  });
});

const servers: Server[] = [];
afterAll(() => {
  for (const server of servers) server.close();
});

/** The same Redis, but what it answers has `from` replaced by `to`, which is as long. */
async function saying(redis: TestRedis, from: RegExp, to: string): Promise<string> {
  const { port, hostname } = new URL(redis.url);
  const server = createServer((client) => {
    const upstream = openSocket({ host: hostname, port: Number(port) });
    const end = () => {
      for (const it of [client, upstream]) it.destroy();
    };
    for (const it of [client, upstream]) it.on('error', () => {}).on('close', end);
    client.pipe(upstream);
    upstream.on('data', (chunk: Buffer) => {
      const text = chunk.toString('latin1').replace(from, (found) => to.padEnd(found.length, 'x'));
      client.write(Buffer.from(text, 'latin1'));
    });
  });
  servers.push(server);
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const url = new URL(redis.url);
  url.port = String((server.address() as { port: number }).port);
  return url.href;
}

let sharedDatabase: Promise<TestDatabase> | undefined;
const goodDatabase = () => {
  sharedDatabase ??= createDatabase();
  return sharedDatabase;
};

test('queues that an operator has paused or limited in BullMQ are worth advice', async () => {
  const redis = await createRedis();
  const connection = { host: '127.0.0.1', port: redis.port };
  const claim = new Queue('relay-claim', { connection });
  const publish = new Queue('relay-publish', { connection });
  await claim.pause();
  await publish.setGlobalConcurrency(1);
  await publish.setGlobalRateLimit(2, 3_000);
  const env = { RELAY_DATABASE_URL: (await goodDatabase()).url, RELAY_REDIS_URL: redis.url };
  const results = await notOk(env);
  expect(results).toMatchObject([{ result: 'advice', subject: 'queue limits' }]);
  expect(results[0]?.finding).toMatch(
    /relay-claim is paused.*relay-publish takes at most 1 in progress.*removeGlobalConcurrency.*at most 2 in 3000 ms/,
  );
  await Promise.all([claim.close(), publish.close()]);
});

test('rows that another session keeps locked are worth advice: no pod can take them', async () => {
  const database = await createDatabase();
  const admin = openAdminPool(database.adminUrl);
  await insertEvents(admin, [anEvent(), anEvent()]);
  await admin.query(
    `UPDATE identity.outbox SET created_at = now() - interval '2 minutes', next_attempt_at = CASE WHEN id % 2 = 0 THEN 'infinity'::timestamptz END`,
  );
  const client = await admin.connect();
  await client.query('BEGIN');
  await client.query('SELECT FROM identity.outbox FOR UPDATE');
  const { rows } = await client.query('SELECT pg_backend_pid() AS pid, current_user AS role');
  const { pid, role } = rows[0];
  expect(await notOk({ RELAY_DATABASE_URL: database.url })).toMatchObject([
    {
      ...{ result: 'advice', subject: 'row locks' },
      finding: expect.stringContaining(`session ${pid} (role ${role}) keeps at least 2 of the rows locked`),
    },
  ]);
  await client.query('ROLLBACK');
  client.release();
  expect(await notOk({ RELAY_DATABASE_URL: database.url })).toEqual([]);
});

test('a COMMIT that waits for a synchronous standby fails', async () => {
  const { adminUrl, url } = await createPostgres();
  const admin = openAdminPool(adminUrl);
  const setNames = async (names: string) => {
    await admin.query(`ALTER SYSTEM SET synchronous_standby_names = '${names}'`);
    await admin.query('SELECT pg_reload_conf()');
  };
  await setNames('away');
  await waitFor(
    async () =>
      (await admin.query('SHOW synchronous_standby_names')).rows[0].synchronous_standby_names === 'away',
    { what: 'the setting' },
  );
  const committed = openPool(url).query(`SELECT pg_logical_emit_message(true, 'a', 'b')`);
  await waitFor(async () => (await notOk({ RELAY_DATABASE_URL: url })).length > 0, {
    what: 'the wait to be noticed',
  });
  expect(await notOk({ RELAY_DATABASE_URL: url })).toMatchObject([
    {
      ...{ result: 'failed', subject: 'writable', mayPass: 'later' },
      finding: expect.stringMatching(/COMMIT has waited for \d+ s.*synchronous_standby_names is "away"/),
    },
  ]);
  await setNames('');
  await committed;
  expect(await notOk({ RELAY_DATABASE_URL: url })).toEqual([]);
});

describe('a Redis that will not do fails', () => {
  const failsWith = async (env: Env, subject: string, cause: RegExp): Promise<void> => {
    const { url } = await goodDatabase();
    const results = await notOk({ RELAY_DATABASE_URL: url, ...env });
    expect(results).toEqual([
      { result: 'failed', subject, finding: expect.stringMatching(cause), mayPass: expect.anything() },
    ]);
    expect(results[0]?.finding).not.toContain('\n');
  };

  test('one that is too old', async () => {
    const old = await saying(await goodRedis(), /redis_version:[\d.]+/, 'redis_version:6.0.1');
    await failsWith({ RELAY_REDIS_URL: old }, 'Redis', /version 6\.0\.1.*at least 6\.2/);
  });

  test('one whose INFO has no run_id', async () => {
    const without = await saying(await goodRedis(), /run_id:/, 'ran_id:');
    await failsWith({ RELAY_REDIS_URL: without }, 'Redis', /no run_id.*restart/);
  });

  test('one that is another each time, as behind a proxy in front of several', async () => {
    // What the client is told differs from what the script reads.
    const changing = await saying(await goodRedis(), /run_id:[0-9a-f]{39}/, 'run_id:');
    await failsWith({ RELAY_REDIS_URL: changing }, 'streams', /another server each time/);
  });

  test('a database number that it does not have', async () => {
    const { adminUrl } = await goodRedis();
    await failsWith(
      { RELAY_REDIS_URL: `${adminUrl}/16` },
      'Redis',
      /DB index is out of range.*RELAY_REDIS_URL/,
    );
  });

  test('a key of the stream’s name that is none', async () => {
    const redis = await createRedis();
    await openAdminRedis(redis.adminUrl).rpush('identity.user.v1', 'x');
    await failsWith({ RELAY_REDIS_URL: redis.url }, 'streams', /identity\.user\.v1.*RELAY_STREAM_NAME/);
  });

  for (const [key, type] of [
    ['bull:relay:epoch', 'hash'],
    ['bull:relay:epoch:appended', 'string'],
    ['bull:relay:epoch:last-entries', 'string'],
    ['bull:relay-publish:wait', 'string'],
    ['bull:relay-publish:delayed', 'string'],
    ['bull:relay-claim:meta', 'string'],
  ] as const)
    test(`${key}, a key of its own that is a ${type}`, async () => {
      const redis = await createRedis();
      const admin = openAdminRedis(redis.adminUrl);
      if (type === 'hash') await admin.hset(key, 'a', 'b');
      else await admin.set(key, 'x');
      const cause = new RegExp(`the key ${key} holds a ${type}.*delete this key`);
      await failsWith({ RELAY_REDIS_URL: redis.url }, 'keys', cause);
    });

  test('one that refuses the password', async () => {
    const { url } = await goodRedis();
    await failsWith(
      { RELAY_REDIS_URL: url.replace(/:[^:]*@/, ':wrong@') },
      'Redis',
      /WRONGPASS[^:]*\w: see user/,
    );
  });

  test('one that has as many clients as it may have', async () => {
    const redis = await createRedis({ args: ['--maxclients', '1'] });
    const only = openAdminRedis(redis.adminUrl);
    await only.ping();
    const { url } = await goodDatabase();
    const results = await notOk({ RELAY_DATABASE_URL: url, RELAY_REDIS_URL: redis.url });
    expect(results).toMatchObject([
      {
        result: 'failed',
        subject: 'Redis',
        finding: expect.stringMatching(/max number of clients|maxclients.*RELAY_REDIS_URL/),
      },
    ]);
  });

  test('a user without its rights', async () => {
    const redis = await createRedis();
    await openAdminRedis(redis.adminUrl).call('ACL', 'SETUSER', RELAY_USER, '-xadd');
    await failsWith({ RELAY_REDIS_URL: redis.url }, 'queues', /relay grants/);
    await openAdminRedis(redis.adminUrl).call('ACL', 'SETUSER', RELAY_USER, '-info');
    await failsWith({ RELAY_REDIS_URL: redis.url }, 'Redis', /info.*relay grants/);
  });

  for (const [right, subject] of [
    ['evalsha', 'queues'],
    ['smembers', 'queues'],
    ['xtrim', 'queues'],
    ['xrevrange', 'streams'],
  ] as const)
    test(`a user without ${right}, which new events do not take, but retries or repairs`, async () => {
      const redis = await createRedis();
      await openAdminRedis(redis.adminUrl).call('ACL', 'SETUSER', RELAY_USER, `-${right}`);
      await failsWith({ RELAY_REDIS_URL: redis.url }, subject, new RegExp(`${right}.*relay grants`));
    });

  for (const [what, args, subject, cause] of [
    [
      'a node of a cluster that nobody announced',
      ['--cluster-enabled', 'yes'],
      'cluster',
      /RELAY_REDIS_CLUSTER/,
    ],
    ['a replica', ['--replicaof', '127.0.0.1 9'], 'role', /replica.*RELAY_REDIS_URL.*master/],
    ['one that is full', ['--maxmemory', '1'], 'writes', /OOM.*maxmemory/],
    [
      'one that evicts',
      ['--maxmemory-policy', 'volatile-lru'],
      'eviction policy',
      /volatile-lru.*noeviction/,
    ],
    [
      'one without enough replicas',
      ['--min-replicas-to-write', '1'],
      'writes',
      /NOREPLICAS.*min-replicas-to-write/,
    ],
  ] as const) {
    test(what, async () => {
      const redis = await createRedis({ args });
      await failsWith({ RELAY_REDIS_URL: redis.url }, subject, cause);
    });
  }

  test('a cluster where there is none, and a sentinel', async () => {
    const { adminUrl } = await goodRedis();
    await failsWith(
      { RELAY_REDIS_URL: adminUrl, RELAY_REDIS_CLUSTER: 'true' },
      'Redis',
      /unset RELAY_REDIS_CLUSTER/,
    );
    const mode = await saying(
      await goodRedis(),
      /redis_mode:standalone\r\nos:/,
      'redis_mode:sentinel\r\nos:',
    );
    await failsWith({ RELAY_REDIS_URL: mode }, 'Redis', /sentinel.*RELAY_REDIS_SENTINELS/);
  });
});

test('relay start refuses what check knows to be fatal: exit 78, and the cause in one line', async () => {
  const { url } = await goodDatabase();
  const redis = await createRedis({ args: ['--maxmemory-policy', 'allkeys-lru'] });
  const pod = await startPod({ RELAY_DATABASE_URL: url, RELAY_REDIS_URL: redis.url, RELAY_HTTP_PORT: '0' });
  expect((await pod.exited).code).toBe(78);
  expect(pod.lines.join('\n')).toMatch(/eviction policy: allkeys-lru.*noeviction/);
  const relay = createRelay(loadConfig({ RELAY_DATABASE_URL: url, RELAY_REDIS_URL: redis.url }), {
    ...{ http: false, logger: silent },
  });
  await expect(relay.start()).rejects.toMatchObject({ name: 'RequirementError' });
});
