/** One queue belongs to one database: a second is refused, whatever its rows are. */
import { type AddressInfo, connect, createServer, type Socket } from 'node:net';
import { expect, onTestFinished, test } from 'vitest';
import { createRelay, loadConfig } from '../../src/index.ts';
import { insertEvents, someEvents } from '../support/events.ts';
import { setStage } from '../support/flow.ts';
import { asRelay, grantLeast } from '../support/least-privilege.ts';
import { createDatabase, createPostgres, createRedis, type TestRedis } from '../support/servers.ts';
import { openAdminPool, openAdminRedis, silent } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const OWNER = 'bull:relay:owner';

type Outcome = Readonly<{ code: number | null; lines: readonly string[] }>;

function expectRefused({ code, lines }: Outcome, exit: number): void {
  const text = lines.join('\n');
  expect(code, text).toBe(exit);
  expect(text).toContain('RELAY_QUEUE_NAME');
  expect(text).toContain('RELAY_QUEUE_PREFIX');
  expect(text).toContain('relay own');
}

/** A second database, whose token is another one. */
async function anotherDatabase(): Promise<{ url: string; adminUrl: string }> {
  const database = await createDatabase();
  await openAdminPool(database.adminUrl).query('UPDATE identity.relay_owner SET token = gen_random_uuid()');
  return database;
}

test('the relay of a second database is refused by start and check, and the first goes on', async () => {
  const stage = await setStage();
  await stage.pod();
  await insertEvents(stage.pool, someEvents(30, 3));
  const second = await anotherDatabase();
  await insertEvents(openAdminPool(second.adminUrl), someEvents(30, 3));
  const env = { RELAY_DATABASE_URL: second.url };
  expectRefused(await stage.command(['check'], env), 1);
  expectRefused(await stage.command(['start'], env), 78);
  // So are the commands that would act on the rows of one and the jobs and entries of the other.
  for (const command of [
    ['dlq', 'replay', '--all', '--yes'],
    ['verify', '--since', '1h', '--repair'],
    ['board'],
  ])
    expectRefused(await stage.command(command, env), 78);
  expectRefused(await stage.command(['status'], env), 1);
  await stage.rested();
  expect((await stage.expectPromisesHeld()).entries).toBe(30);
  // With a queue of its own it may share Redis, and the streams.
  const own = { ...env, RELAY_QUEUE_NAME: 'second' };
  expect((await stage.command(['check'], own)).code).toBe(0);
  await stage.pod(own);
  const pool = openAdminPool(second.adminUrl);
  await waitFor(
    async () => (await pool.query('SELECT FROM identity.outbox WHERE NOT published')).rowCount === 0,
    { what: 'the events of the second' },
  );
  expect(await stage.entries()).toHaveLength(60);
});

test('a copy of the database, with the same token, is refused as well; so is an embedded relay', async () => {
  const stage = await setStage();
  await stage.pod();
  const copy = await createDatabase();
  const [pool, other] = [stage.pool, openAdminPool(copy.adminUrl)];
  const { rows } = await pool.query('SELECT token FROM identity.relay_owner');
  await other.query('UPDATE identity.relay_owner SET token = $1', [rows[0].token]);
  const refused = await stage.command(['start'], { RELAY_DATABASE_URL: copy.url });
  expectRefused(refused, 78);
  expect(refused.lines.join('\n')).toContain('from which this one was restored, copied or renamed');
  const relay = createRelay(stage.config({ RELAY_DATABASE_URL: copy.url }), { logger: silent, http: false });
  await expect(relay.start()).rejects.toThrow(/RELAY_QUEUE_NAME/);
});

/** What a pod sends to have the queue. */
const CLAIM = /\$3\r\nset\r\n\$16\r\nbull:relay:owner\r\n/i;

/** Another address of this Redis. Who claims the queue there is held up until so many do. */
async function whereClaimsMeet(
  redis: TestRedis,
  count: number,
  onClaim: (client: Socket) => void = () => {},
): Promise<string> {
  let coming = 0;
  let open = () => {};
  const allCame = new Promise<void>((resolve) => {
    open = resolve;
  });
  const server = createServer((client) => {
    const upstream = connect(redis.port, '127.0.0.1');
    const end = () => {
      for (const it of [client, upstream]) it.destroy();
    };
    for (const it of [client, upstream]) it.on('error', () => {}).on('close', end);
    upstream.pipe(client);
    let sent = Promise.resolve();
    client.on('data', (chunk: Buffer) => {
      const isClaim = CLAIM.test(chunk.toString('latin1'));
      if (isClaim) onClaim(client);
      if (isClaim && ++coming === count) open();
      sent = sent.then(() => (isClaim ? allCame : undefined)).then(() => void upstream.write(chunk));
    });
  });
  await new Promise<void>((listening) => server.listen(0, '127.0.0.1', listening));
  onTestFinished(() => void server.close());
  const url = new URL(redis.url);
  url.port = String((server.address() as AddressInfo).port);
  return url.href;
}

test('of two that start at the same moment on an empty Redis, one has the queue', async () => {
  // Each finds the queue free before either claims it.
  const redisUrl = await whereClaimsMeet(await createRedis(), 2);
  const databases = [await anotherDatabase(), await anotherDatabase()];
  const relays = databases.map(({ url }) =>
    createRelay(loadConfig({ RELAY_DATABASE_URL: url, RELAY_REDIS_URL: redisUrl }), {
      logger: silent,
      http: false,
    }),
  );
  const started = await Promise.allSettled(relays.map((it) => it.start()));
  await Promise.all(relays.map((it) => it.stop()));
  expect(started.map(({ status }) => status).toSorted()).toEqual(['fulfilled', 'rejected']);
  const reason = started.find((it) => it.status === 'rejected')?.reason as Error;
  expect(reason.message).toMatch(/belongs to database/);
});

test('a pod whose connection to Redis is cut when it claims the queue is not ready, as if Redis were away: exit 69', async () => {
  const stage = await setStage();
  const redisUrl = await whereClaimsMeet(stage.server, Number.POSITIVE_INFINITY, (client) =>
    client.destroy(),
  );
  const { code, lines } = await stage.command(['start'], { RELAY_REDIS_URL: redisUrl });
  expect(code, lines.join('\n')).toBe(69);
  expect(lines.join('\n')).toContain('does not tell whose the queue is');
});

test('Redis that was emptied gets its owner again, and the first pod that comes to it has the queue', async () => {
  const stage = await setStage();
  const pod = await stage.pod();
  const owner = await stage.redis.get(OWNER);
  await insertEvents(stage.pool, someEvents(20));
  await stage.rested();
  await stage.redis.flushall();
  await waitFor(async () => (await stage.redis.get(OWNER)) === owner, {
    what: 'the owner to be written again',
  });
  await stage.rested();
  // Another one came first: the pod publishes nothing, and says so.
  const other = JSON.stringify({ token: 'x', system: '1', database: 'other' });
  await stage.redis.multi().flushall().set(OWNER, other).exec();
  const readiness = async () => (await fetch(`${pod.url}/readyz`)).text();
  await waitFor(async () => (await readiness()).includes('belongs to database'), {
    what: 'the pod to say whose the queue is',
  });
  await insertEvents(stage.pool, someEvents(5));
  expect(await stage.redis.exists('identity.user.v1')).toBe(0);
  // Nor is it anybody's with an owner that cannot be read.
  await stage.redis.set(OWNER, '{');
  expectRefused(await stage.command(['check']), 1);
  const { code, lines } = await stage.command(['own', '--yes']);
  expect(code, lines.join('\n')).toBe(0);
  await stage.rested();
  expect((await stage.expectPromisesHeld()).entries).toBe(25);
});

test('a second relay for the same table, with another Redis or queue, is refused while the pods of the first are at work', async () => {
  const stage = await setStage({ env: { RELAY_STARTUP_TIMEOUT: '1' } });
  await stage.pod();
  const listens = `SELECT FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = 'relay-service wake-up'`;
  await waitFor(async () => (await stage.pool.query(listens)).rowCount === 1, { what: 'the pod to listen' });
  await insertEvents(stage.pool, someEvents(20));
  const others = [{ RELAY_REDIS_URL: (await createRedis()).url }, { RELAY_QUEUE_NAME: 'second' }];
  for (const env of others)
    for (const [command, exit] of [
      ['check', 1],
      ['start', 69],
    ] as const) {
      const { code, lines } = await stage.command([command], env);
      expect(code, lines.join('\n')).toBe(exit);
      expect(lines.join('\n')).toMatch(/pods are at work on this table \(127\.0\.0\.1\)/);
    }
  // Pods of the first are welcome, also where its Redis was emptied.
  await stage.redis.flushall();
  await stage.pod({ RELAY_STARTUP_TIMEOUT: '60' });
  await insertEvents(stage.pool, someEvents(20));
  await stage.rested();
  expect((await stage.expectPromisesHeld()).entries).toBe(40);
});

test('once the pods of the first have ended, another Redis takes its place', async () => {
  const stage = await setStage();
  const pod = await stage.pod();
  await pod.kill('SIGTERM');
  await stage.pod({ RELAY_REDIS_URL: (await createRedis()).url });
});

test('a build without owners has left none: its database has the queue without a word', async () => {
  const stage = await setStage();
  const pod = await stage.pod();
  await insertEvents(stage.pool, someEvents(20));
  await stage.rested();
  await pod.kill();
  await stage.redis.del(OWNER, 'bull:relay:epoch:generation');
  await stage.pool.query(
    'DROP TABLE identity.relay_owner, identity.relay_claim_lock, identity.relay_epoch_lock, identity.relay_prune_lock',
  );
  expect((await stage.command(['check'])).lines.join('\n')).toMatch(
    /lacks table identity.relay_owner.*relay migrate/,
  );
  await stage.pool.query(
    `DELETE FROM identity.relay_migrations WHERE id > (SELECT max(id) - 3 FROM identity.relay_migrations)`,
  );
  expect((await stage.command(['migrate'])).code).toBe(0);
  expect((await stage.command(['check'])).lines.join('\n')).toMatch(
    /permission denied for table relay_claim_lock.*relay grants/,
  );
  await grantLeast(stage.databaseUrl);
  await stage.pod();
  await insertEvents(stage.pool, someEvents(20));
  await stage.rested();
  expect((await stage.expectPromisesHeld()).entries).toBe(40);
});

test('a server that holds the streams of two relays has an owner as well', async () => {
  const env = { RELAY_STREAM_REDIS_URL: 'redis://streams' };
  const streams = await createRedis({ env, on: 'streams' });
  const [first, second] = await Promise.all([
    createRedis({ env, on: 'queues' }),
    createRedis({ env, on: 'queues' }),
  ]);
  const databases = [await anotherDatabase(), await anotherDatabase()];
  const start = async (i: 0 | 1, on: typeof first) => {
    const relay = createRelay(
      loadConfig({
        RELAY_DATABASE_URL: databases[i]?.url,
        RELAY_REDIS_URL: on.url,
        RELAY_STREAM_REDIS_URL: streams.url,
      }),
      { logger: silent, http: false },
    );
    await relay.start();
    return relay;
  };
  const relay = await start(0, first);
  await expect(start(1, second)).rejects.toThrow(/stream owner.*RELAY_STREAM_REDIS_URL/);
  expect(await openAdminRedis(streams.adminUrl).exists(OWNER)).toBe(1);
  await relay.stop();
});

test('a database that was restored to another server is refused until an operator says that it is the one', async () => {
  const first = await createPostgres();
  const stage = await setStage({ databaseUrl: first.adminUrl });
  const pod = await stage.pod();
  await insertEvents(stage.pool, someEvents(60, 6));
  await stage.rested();
  await pod.kill();
  // As pg_restore would: the rows as the dump of before has them, and the token, on another server.
  const restored = await createPostgres();
  const [from, to] = [stage.pool, openAdminPool(restored.adminUrl)];
  const { rows } = await from.query('SELECT token FROM identity.relay_owner');
  await to.query('UPDATE identity.relay_owner SET token = $1', [rows[0].token]);
  const dump = await from.query(
    'SELECT id, event_id, event_type, aggregate_id, payload, topic FROM identity.outbox ORDER BY id',
  );
  for (const row of dump.rows)
    await to.query(
      'INSERT INTO identity.outbox (id, event_id, event_type, aggregate_id, payload, topic) VALUES ($1, $2, $3, $4, $5, $6)',
      [row.id, row.event_id, row.event_type, row.aggregate_id, row.payload, row.topic],
    );
  const env = { RELAY_DATABASE_URL: asRelay(restored.adminUrl) };
  expectRefused(await stage.command(['start'], env), 78);
  expectRefused(await stage.command(['check'], env), 1);
  // Nobody can answer here.
  expect((await stage.command(['own'], env)).lines.join('\n')).toContain('say --yes');
  expectRefused(await stage.command(['start'], env), 78);
  const own = await stage.command(['own', '--yes'], env);
  expect(own.code, own.lines.join('\n')).toBe(0);
  expect((await stage.command(['check'], env)).code).toBe(0);
  expectRefused(await stage.command(['check']), 1);
  const again = (await stage.command(['own'], env)).lines.join('\n');
  expect(again).toContain('There is nothing to take over');
  await stage.pod(env);
  await waitFor(
    async () => (await to.query('SELECT FROM identity.outbox WHERE NOT published')).rowCount === 0,
    {
      what: 'the rows to be found in their stream',
    },
  );
  expect(await stage.entries()).toHaveLength(60);
});
