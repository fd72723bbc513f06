import { randomBytes, randomUUID } from 'node:crypto';
import { readdir, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import pg from 'pg';
import { expect, inject, onTestFinished, test } from 'vitest';
import type { RelayConfig } from '../../src/config/config.ts';
import { loadConfig } from '../../src/config/load-config.ts';
import { FAILS_FAST } from '../../src/connections/servers.ts';
import { appendEvent, createRelay } from '../../src/index.ts';
import { openOperations } from '../../src/operations/open.ts';
import { databaseGrants } from '../../src/operations/roles.ts';
import { createDeadRows } from '../../src/outbox/dead-rows.ts';
import type { RowName } from '../../src/outbox/finalize.ts';
import { createOutbox } from '../../src/outbox/outbox.ts';
import { createPruner, FIRST_PLACE } from '../../src/outbox/pruner.ts';
import { createQueues } from '../../src/queue/queues.ts';
import { createStreamInspector } from '../../src/streams/inspect.ts';
import { createTrimmer } from '../../src/streams/trim.ts';
import { anEvent, createOldTable, insertEvents, someEvents } from '../support/events.ts';
import { DLQ, STREAM, type Stage, setStage } from '../support/flow.ts';
import {
  asRelay,
  grantLeast,
  OPERATOR_ROLE,
  PRODUCER_ROLE,
  RELAY_PASSWORD,
  RELAY_USER,
  redisRules,
} from '../support/least-privilege.ts';
import { blocksUnder } from '../support/readme.ts';
import { createDatabase, createRedis } from '../support/servers.ts';
import { openAdminPool, openAdminRedis, openPool, openRedis, silent } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const FORBIDDEN_TOPIC = 'payments.v1';
const WORDS = 'dictionary.word.v1';
/** Every duty of the relay that takes a right of its own. */
const EVERYTHING = {
  ...{ RELAY_ALLOWED_TOPICS: `${STREAM},${WORDS}`, RELAY_STREAM_TRIM: 'acknowledged' },
  ...{ RELAY_PUBLISHED_RETENTION: '3600', RELAY_RETRY_BASE_DELAY: '0.1', RELAY_MAX_RETRY_ATTEMPTS: '1' },
  ...{ RELAY_FAILED_JOBS_KEPT: '1', RELAY_POLL_INTERVAL: '0.2', RELAY_CLAIM_LEASE: '1' },
};

/** Names of two roles that end with the test: roles belong to the whole server. */
function someRoles(stage: Stage): { role: string; operator: string; producer: string } {
  const suffix = randomBytes(6).toString('hex');
  const roles = { role: `relay_${suffix}`, operator: `operator_${suffix}`, producer: `producer_${suffix}` };
  onTestFinished(async () => {
    const admin = new pg.Client({ connectionString: stage.databaseUrl });
    await admin.connect();
    const { rows } = await admin.query('SELECT rolname FROM pg_roles WHERE rolname = ANY ($1)', [
      Object.values(roles),
    ]);
    for (const { rolname } of rows)
      await admin.query(`DROP OWNED BY ${rolname} CASCADE; DROP ROLE ${rolname}`);
    await admin.end();
  });
  return roles;
}

const createRole = (stage: Stage, name: string) =>
  stage.pool.query(`CREATE ROLE ${name} LOGIN PASSWORD '${RELAY_PASSWORD}'`);

test('the relay, all its duties, and its producers work with the rights that relay grants gives them', async () => {
  const stage = await setStage();
  const { role, operator, producer } = someRoles(stage);
  for (const name of [role, operator, producer]) await createRole(stage, name);
  const grants = [
    'grants',
    '--role',
    role,
    '--operator',
    operator,
    '--producer',
    producer,
    '--redis-user',
    'other',
    '--only',
  ];
  const sql = await stage.command([...grants, 'sql'], EVERYTHING);
  // Twice, since it may be.
  for (let i = 0; i < 2; i++) await stage.pool.query(sql.lines.join('\n'));
  const acl = await stage.command([...grants, 'redis'], EVERYTHING);
  const [command = '', ...args] = (acl.lines[0] ?? '').replace('>password', `>${RELAY_PASSWORD}`).split(' ');
  await stage.redis.call(command, ...args);
  const env = {
    ...EVERYTHING,
    RELAY_DATABASE_URL: asRelay(stage.databaseUrl, role),
    RELAY_REDIS_URL: asRelay(stage.server.url, 'other'),
    // Redis refuses what the relay would let pass.
    RELAY_ALLOWED_TOPICS: '*',
  };
  const check = await stage.command(['check'], env);
  expect(check.code, check.lines.join('\n')).toBe(0);
  expect(check.lines.join('\n')).not.toMatch(/producers|Redis user/);
  // It tries whether it may do more.
  await stage.redis.call('ACL', 'LOG', 'RESET');
  await stage.pool.query(
    `INSERT INTO identity.outbox (event_type, aggregate_id, payload, published, published_at)
     VALUES ('Old', gen_random_uuid(), '{}', true, now() - interval '2 hours')`,
  );
  const pods = [await stage.pod(env), await stage.pod(env)];

  // What producers write, retries and dead letters, a job that has to be found missing, and a killed pod's jobs.
  const client = new pg.Client({ connectionString: asRelay(stage.databaseUrl, producer) });
  await client.connect();
  await client.query('BEGIN');
  const { eventId } = await appendEvent(client, {
    eventType: 'DictionaryWordAdded',
    aggregateId: anEvent().aggregateId,
    payload: { word: 'Straße' },
  });
  await client.query('COMMIT');
  await client.end();
  const forbidden = someEvents(4, 4, { topic: FORBIDDEN_TOPIC });
  await insertEvents(stage.pool, [...forbidden, ...someEvents(300, 30)]);
  await stage.rested();
  const publish = stage.queue('publish');
  await publish.pause();
  await insertEvents(stage.pool, someEvents(60, 20));
  await waitFor(async () => (await stage.count('NOT published AND next_attempt_at IS NULL')) === 0, {
    what: 'the events to be claimed',
  });
  await publish.drain();
  await pods[0]?.kill('SIGKILL');
  await publish.resume();
  await stage.rested();

  await stage.expectPromisesHeld();
  expect(await stage.count(`event_type = 'Old'`)).toBe(0);
  await stage.redis.xgroup('CREATE', STREAM, 'group', '$');
  await waitFor(async () => (await stage.redis.xlen(STREAM)) <= 100, { what: 'the stream to be trimmed' });
  expect(await stage.row(eventId)).toMatchObject({ published: true });
  expect(await stage.entries(DLQ)).toHaveLength(4);
  for (const event of forbidden) {
    expect((await stage.row(event.eventId)).error_message).toMatch(/^NOPERM|ACL failure/);
  }
  // Nothing but those four was refused.
  const refused = (await stage.redis.call('ACL', 'LOG')) as unknown[][];
  expect(new Set(refused.map((entry) => entry[entry.indexOf('object') + 1]))).toEqual(
    new Set([FORBIDDEN_TOPIC]),
  );
  expect((await fetch(`${pods[1]?.url}/health/detailed`)).status).toBe(200);
});

test('a role that owns the table and may create in database and schema can migrate', async () => {
  for (const isOld of [true, false]) {
    const { url, adminUrl, name } = await createDatabase({ template: false });
    const stage = await setStage({ databaseUrl: adminUrl });
    const { role } = someRoles(stage);
    await createRole(stage, role);
    await stage.pool.query(`GRANT CREATE ON DATABASE ${name} TO ${role}`);
    if (isOld) {
      await createOldTable(stage.pool);
      await stage.pool.query(`GRANT USAGE, CREATE ON SCHEMA identity TO ${role}`);
      await stage.pool.query(`ALTER TABLE identity.outbox OWNER TO ${role}`);
    }
    const { code, lines } = await stage.command(['migrate'], { RELAY_DATABASE_URL: asRelay(url, role) });
    expect(code, lines.join('\n')).toBe(0);
  }
});

test('the security page shows what relay grants prints', async () => {
  const stage = await setStage();
  const [sql] = blocksUnder('docs/security.md', 'Rights', 'sql');
  const [acl] = blocksUnder('docs/security.md', 'Rights', '');
  const env = { RELAY_ALLOWED_TOPICS: `${STREAM},${WORDS}` };
  const { lines } = await stage.command(['grants'], env);
  expect(lines.join('\n')).toBe(`${sql?.trim()}\n\n-- In Redis:\n${acl?.trim()}`);
  // Its password is a placeholder, which nobody should hand to Redis.
  const help = await stage.command(['grants', '--help']);
  expect(help.lines.join('\n')).not.toMatch(/\| redis-cli/);
});

test('a relay is never without its rights while they are given anew, whatever its role is called', async () => {
  const { url, adminUrl } = await createDatabase();
  const admin = await openAdminPool(adminUrl).connect();
  const roles = { role: 'user', operator: 'order', producer: 'Select "' };
  const names = Object.values(roles).map((name) => pg.escapeIdentifier(name));
  onTestFinished(async () => {
    await admin.query(`ROLLBACK; DROP OWNED BY ${names} CASCADE; DROP ROLE ${names}`);
    admin.release();
  });
  for (const name of names) await admin.query(`CREATE ROLE ${name} LOGIN PASSWORD '${RELAY_PASSWORD}'`);
  const statements = databaseGrants(loadConfig(EVERYTHING), roles).split(/;$/m);
  expect(statements.length).toBeGreaterThan(10);
  // One after the other, as psql sends them.
  for (const statement of statements) await admin.query(statement);
  const relay = openPool(asRelay(url, roles.role), { max: 1 });
  for (const statement of statements) {
    await admin.query(statement);
    await relay.query('SELECT event_id FROM identity.outbox LIMIT 1');
  }
});

test('each right in PostgreSQL is needed', async () => {
  const database = await createDatabase();
  const admin = openAdminPool(database.adminUrl);
  const grantAll = () => grantLeast(database.adminUrl, EVERYTHING);
  await grantAll();
  const relay = openPool(database.url, { max: 2 });
  const operators = openPool(asRelay(database.url, OPERATOR_ROLE), { max: 2 });
  const producer = await openPool(asRelay(database.url, PRODUCER_ROLE), { max: 1 }).connect();
  const options = { ...loadConfig(EVERYTHING), statementTimeoutMs: 5_000 };
  const outbox = createOutbox(relay, options);
  const pruner = createPruner(relay, options);
  const deadRows = createDeadRows(operators, options);
  const operatorsPruner = createPruner(operators, options);

  /** Does what the rights are for. Answers what was refused. */
  async function refused(): Promise<string[]> {
    const reasons: string[] = [];
    const attempt = (work: Promise<unknown>) =>
      work.catch((error: Error & { code?: string }) => {
        const { code, message } = (error.cause ?? error) as typeof error;
        expect(code, message).toBe('42501');
        reasons.push(message);
      });
    const events = someEvents(3);
    const ids = await insertEvents(admin, events);
    const [one, two, three] = events.map(({ eventId }, i) => ({ id: ids[i] as string, eventId })) as [
      RowName,
      RowName,
      RowName,
    ];
    await attempt(appendEvent(producer, { eventType: 'X', aggregateId: anEvent().aggregateId, payload: {} }));
    await attempt(insertEvents(producer, someEvents(1)));
    await attempt(outbox.inEpoch((tx) => outbox.claimFresh(tx, 10)));
    await attempt(outbox.withClaimLock(async () => {}));
    await attempt(outbox.recordFailure({ ...two, attempts: 1, reason: 'x', retryInMs: 1_000 }));
    await attempt(outbox.inEpoch((tx) => outbox.markPublished(tx, [{ ...one, entryId: '1-1' }])));
    const dead = { ...three, attempts: 6, reason: 'x', entryId: '1-1' };
    await attempt(outbox.inEpoch((tx) => outbox.markDead(tx, dead)));
    await attempt(pruner.step({ kind: 'with-entry', after: FIRST_PLACE, before: 'now', limit: 10 }));
    const lost = { eventId: randomUUID(), eventType: 'X', aggregateType: 'user', aggregateId: randomUUID() };
    await attempt(
      deadRows.insert({ ...lost, topic: STREAM, payload: '{}', occurredAt: new Date().toISOString() }),
    );
    await attempt(deadRows.transaction((tx) => deadRows.discard(tx, [three.id], 'x', 'x')));
    await attempt(deadRows.transaction((tx) => deadRows.revive(tx, [three.id], [])));
    await attempt(operatorsPruner.step({ kind: 'with-entry', after: FIRST_PLACE, before: 'now', limit: 10 }));
    return reasons;
  }
  expect(await refused()).toEqual([]);
  const INSERTED = [
    ...['event_id', 'event_type', 'aggregate_type', 'aggregate_id', 'topic', 'payload', 'created_at'],
    'replayed_at',
  ];
  const changed = ['published', 'published_at', 'attempts', 'next_attempt_at', 'error_message'];
  const rights: [right: string, to: string][] = [
    ...[...changed, 'dead_lettered_at', 'stream_entry_id'].map((it): [string, string] => [
      `UPDATE (${it})`,
      RELAY_USER,
    ]),
    ...['SELECT', 'DELETE'].map((it): [string, string] => [it, RELAY_USER]),
    ...PRODUCED.map((it): [string, string] => [`INSERT (${it})`, PRODUCER_ROLE]),
    ...['SELECT (id)', 'SELECT (event_id)'].map((it): [string, string] => [it, PRODUCER_ROLE]),
    ...['replayed_at', 'discard_reason', 'discarded_by'].map((it): [string, string] => [
      `UPDATE (${it})`,
      OPERATOR_ROLE,
    ]),
    ...INSERTED.map((it): [string, string] => [`INSERT (${it})`, OPERATOR_ROLE]),
  ];
  // All that there are: none is forgotten here.
  const { rows } = await admin.query<{ granted: string }>(
    `WITH granted AS (
       SELECT grantee, table_name, privilege_type, '' AS columns FROM information_schema.role_table_grants
       UNION ALL
       SELECT c.grantee, c.table_name, c.privilege_type, ' (' || c.column_name || ')'
         FROM information_schema.role_column_grants c
        WHERE NOT EXISTS (SELECT FROM information_schema.role_table_grants t WHERE t.grantee = c.grantee
                             AND t.table_name = c.table_name AND t.privilege_type = c.privilege_type)
     ) SELECT privilege_type || columns || ' on ' || table_name || ' to ' || grantee AS granted FROM granted
        WHERE grantee = ANY ($1)`,
    [[RELAY_USER, OPERATOR_ROLE, PRODUCER_ROLE]],
  );
  expect(rows.map((row) => row.granted).toSorted()).toEqual(
    [
      ...rights.map(([right, to]) => `${right} on outbox to ${to}`),
      ...LOCKS.map((it) => `UPDATE on ${it} to ${RELAY_USER}`),
    ].toSorted(),
  );
  const all: [right: string, on: string, to: string][] = [
    ...LOCKS.map((it): [string, string, string] => ['UPDATE', `identity.${it}`, RELAY_USER]),
    ...rights.map(([right, to]): [string, string, string] => [right, 'identity.outbox', to]),
    ['USAGE', 'SCHEMA identity', RELAY_USER],
    ['USAGE', 'SCHEMA identity', PRODUCER_ROLE],
    ['USAGE', 'SEQUENCE identity.outbox_id_seq', PRODUCER_ROLE],
    ['USAGE', 'SEQUENCE identity.outbox_id_seq', OPERATOR_ROLE],
  ];
  for (const [right, on, to] of all) {
    await admin.query(`REVOKE ${right} ON ${on} FROM ${to}`);
    expect(await refused(), `without ${right} on ${on} for ${to}`).not.toEqual([]);
    await grantAll();
  }
  expect(await refused()).toEqual([]);
  producer.release();
});

const LOCKS = ['relay_claim_lock', 'relay_epoch_lock', 'relay_prune_lock'];

/** Columns that producers fill, and what an attacker would put into the others. */
const PRODUCED = [
  'event_id',
  'event_type',
  'aggregate_type',
  'aggregate_id',
  'payload',
  'topic',
  'created_at',
];
const FORGED: Readonly<Record<string, string>> = {
  ...{ id: '9223372036854775807', published: 'true', attempts: '2147483647', next_attempt_at: `'infinity'` },
  ...{ published_at: 'now()', error_message: `'x'`, dead_lettered_at: 'now()', stream_entry_id: `'garbage'` },
  ...{ replayed_at: 'now()', discard_reason: `'x'`, discarded_by: `'alice'` },
};

test('a producer says nothing of what becomes of its events, also not by name of a column that it leaves to its default', async () => {
  const { url, adminUrl } = await createDatabase();
  const admin = openAdminPool(adminUrl);
  const { rows } = await admin.query(
    `SELECT attname AS name FROM pg_attribute
     WHERE attrelid = 'identity.outbox'::regclass AND attnum > 0 AND NOT attisdropped`,
  );
  // Each column is on one side: who adds one decides.
  expect([...PRODUCED, ...Object.keys(FORGED)].toSorted()).toEqual(rows.map(({ name }) => name).toSorted());
  const producer = openPool(asRelay(url, PRODUCER_ROLE), { max: 1 });
  for (const [column, value] of Object.entries(FORGED)) {
    const insert = (values: string) =>
      producer.query(
        `INSERT INTO identity.outbox (event_type, aggregate_id, payload, ${column}) VALUES ('X', gen_random_uuid(), '{}', ${values})`,
      );
    await expect(insert(value), column).rejects.toThrow('permission denied');
    await expect(insert('DEFAULT'), column).rejects.toThrow('permission denied');
  }
  for (const sql of [
    'SELECT payload FROM identity.outbox',
    `UPDATE identity.outbox SET topic = 'x'`,
    'DELETE FROM identity.outbox',
    'TRUNCATE identity.outbox',
    'DO $$ BEGIN LOCK TABLE identity.outbox; END $$',
    `SELECT setval('identity.outbox_id_seq', 1)`,
  ])
    await expect(producer.query(sql), sql).rejects.toThrow('permission denied');
  await insertEvents(producer, someEvents(2));
});

test('relay check advises to grant anew while the rights of an older version are there', async () => {
  const stage = await setStage();
  const check = async () => (await stage.command(['check'])).lines.join('\n');
  expect(await check()).not.toMatch(/producers|Redis user/);
  await stage.pool.query(`GRANT INSERT ON identity.outbox TO ${PRODUCER_ROLE}`);
  const older =
    '~bull:relay-* ~bull:relay:* ~* -@all +@read +@write +@connection +eval +evalsha -@dangerous +info';
  await stage.redis.call('ACL', 'SETUSER', RELAY_USER, 'resetkeys', ...older.split(' '));
  const found = await check();
  expect(found).toMatch(
    new RegExp(`^advice +producers +.*${PRODUCER_ROLE}; run the SQL of "relay grants" again$`, 'm'),
  );
  expect(found).toMatch(
    new RegExp(`^advice +Redis user +${RELAY_USER} may do more .*relay grants --only redis`, 'm'),
  );
  await stage.pool.query(`GRANT INSERT ON identity.outbox TO PUBLIC`);
  expect(await check()).toMatch(/^advice +producers +.*PUBLIC/m);
});

test('a table with a column for headers lets producers fill it', async () => {
  const { url, adminUrl } = await createDatabase();
  const admin = openAdminPool(adminUrl);
  await admin.query('ALTER TABLE identity.outbox ADD COLUMN headers jsonb');
  const producer = await openPool(asRelay(url, PRODUCER_ROLE), { max: 1 }).connect();
  onTestFinished(() => producer.release());
  const event = { eventType: 'X', aggregateId: anEvent().aggregateId, payload: {} };
  const headers = { source: 'test' };
  await appendEvent(producer, event);
  await expect(appendEvent(producer, { ...event, headers })).rejects.toThrow();
  await grantLeast(adminUrl);
  await appendEvent(producer, { ...event, headers });
});

test('the user in Redis reaches nothing but its own keys, its own database, and what it does there', async () => {
  const server = await createRedis({ env: EVERYTHING });
  const admin = openAdminRedis(server.adminUrl);
  const relay = openRedis(server.url);
  // Keys of others that begin like ours.
  const keys = [
    'bull:relay-emails:1',
    'bull:relay-publisher:1',
    'bull:relays:1',
    'bull:other:1',
    'payments.v1',
  ];
  for (const key of keys) await admin.hset(key, 'secret', 'x');
  await admin.xgroup('CREATE', STREAM, 'consumers', '$', 'MKSTREAM');
  const forbidden = [
    ...keys.flatMap((key) => [`HGET ${key} secret`, `DEL ${key}`, `XADD ${key} * a b`, `EXISTS ${key}`]),
    ...keys.map((key) => `EVAL return{redis.call('HGET',KEYS[1],'secret')} 1 ${key}`),
    ...keys.map((key) => `RENAME ${key} bull:relay:stolen`),
    ...[
      'SCAN 0',
      'KEYS *',
      'RANDOMKEY',
      'DBSIZE',
      'FLUSHALL',
      'FLUSHDB',
      'SWAPDB 0 1',
      'SELECT 1',
      'SELECT 0',
    ],
    ...[`COPY ${STREAM} ${STREAM} DB 1`, `MOVE ${STREAM} 1`, `DUMP ${STREAM}`, `SORT bull:relay:list`],
    ...['FUNCTION FLUSH', 'FUNCTION LIST', 'FCALL f 0', 'SCRIPT FLUSH', 'SCRIPT KILL', 'CONFIG GET *'],
    ...[
      'CONFIG SET maxmemory 1',
      'ACL LIST',
      'ACL WHOAMI',
      'CLIENT LIST',
      'CLIENT KILL ID 1',
      'CLIENT PAUSE 1',
    ],
    ...['MONITOR', 'SHUTDOWN', 'DEBUG SLEEP 0', 'SAVE', 'REPLICAOF NO ONE', 'SLOWLOG GET', 'MODULE LIST'],
    ...['PUBLISH channel x', 'SUBSCRIBE channel', 'CLUSTER RESET', 'LATENCY RESET', 'MEMORY DOCTOR'],
    ...[
      `XGROUP DESTROY ${STREAM} consumers`,
      `XGROUP DELCONSUMER ${STREAM} consumers c`,
      `XSETID ${STREAM} 99-0`,
    ],
    ...[`XACK ${STREAM} consumers 1-1`, `XREADGROUP GROUP consumers c STREAMS ${STREAM} >`],
  ];
  for (const line of forbidden) {
    const [command = '', ...args] = line.split(' ');
    await expect(relay.call(command, ...args), line).rejects.toThrow(
      /NOPERM|ACL failure|no permissions|not allowed/,
    );
  }
  expect(await admin.exists(...keys, STREAM)).toBe(keys.length + 1);

  // Its own database by number, where the address names one, and no other.
  await admin.call(
    'ACL',
    'SETUSER',
    'third',
    ...redisRules({ RELAY_REDIS_URL: 'redis://localhost/3' }, 'third'),
  );
  const third = openRedis(`${asRelay(server.url, 'third')}/3`);
  expect(await third.call('SELECT', '3')).toBe('OK');
  await expect(third.call('SELECT', '0')).rejects.toThrow('NOPERM');
});

test('the user in Redis may run every command that a script of BullMQ has in it', async () => {
  const server = await createRedis({ env: EVERYTHING });
  const admin = openAdminRedis(server.adminUrl);
  const inCategory = async (name: string) => (await admin.call('ACL', 'CAT', name)) as string[];
  const allowed = new Set<string>();
  for (const rule of redisRules(EVERYTHING).filter((it) => /^[+-]/.test(it))) {
    const [sign, name] = [rule[0], rule.slice(1).replace(/\|.*/, '')];
    const commands = name.startsWith('@') ? (name === '@all' ? [] : await inCategory(name.slice(1))) : [name];
    for (const command of commands) sign === '+' ? allowed.add(command) : allowed.delete(command);
  }
  const scripts = join(inject('root'), 'node_modules/bullmq/dist/esm/scripts');
  const used = new Set<string>();
  // BullMQ has a thing of its own that is called a relay, and is not used here.
  for (const file of (await readdir(scripts)).filter((it) => it.endsWith('.js') && !it.startsWith('relay')))
    for (const [, command = ''] of (await readFile(join(scripts, file), 'utf8')).matchAll(
      /call\(\s*["'](\w+)["']/g,
    ))
      used.add(command.toLowerCase());
  expect(used.size).toBeGreaterThan(40);
  expect([...used].filter((command) => !allowed.has(command))).toEqual([]);
});

test('each right in Redis is needed', async () => {
  const [database, server] = await Promise.all([createDatabase(), createRedis()]);
  const [pool, redis] = [openAdminPool(database.adminUrl), openAdminRedis(server.adminUrl)];
  const operators = openPool(asRelay(database.url, OPERATOR_ROLE));
  await grantLeast(database.adminUrl, EVERYTHING);
  const all = redisRules(EVERYTHING);
  const config = loadConfig({
    ...EVERYTHING,
    RELAY_DATABASE_URL: database.url,
    RELAY_REDIS_URL: server.url,
    RELAY_MAX_RETRY_ATTEMPTS: '0',
  });

  /** Every command of a relay that gets one event of each kind, those within scripts too. */
  async function commandsOf(): Promise<string[][]> {
    const monitor = await openAdminRedis(server.adminUrl).monitor();
    onTestFinished(() => monitor.disconnect());
    const ours = /addr=(\S+)/.exec(String(await redis.client('INFO')))?.[1];
    const found = new Map<string, string[]>();
    let isComplete = false;
    monitor.on('monitor', (_: string, args: string[], source: string) => {
      if (source !== ours) found.set(args.join('\0'), args);
      else if (args[0] === 'echo') isComplete = true;
    });
    await redis.call('ACL', 'SETUSER', RELAY_USER, 'reset', ...all);
    // A consumer that has acknowledged most, and has one entry in hand.
    const entries = redis.pipeline();
    for (let n = 0; n < 300; n++) entries.xadd(STREAM, '*', 'n', n);
    await entries.exec();
    await redis.xgroup(
      'CREATE',
      STREAM,
      'group',
      (await redis.xrevrange(STREAM, '+', '-', 'COUNT', 2))[1]?.[0] ?? '0',
    );
    await redis.xreadgroup('GROUP', 'group', 'me', 'COUNT', 1, 'STREAMS', STREAM, '>');
    await insertEvents(pool, [anEvent(), anEvent({ topic: WORDS }), anEvent({ topic: FORBIDDEN_TOPIC })]);
    const relay = createRelay(config, { logger: silent, http: false });
    await relay.start();
    // BullMQ keeps a request for a claim that comes during a claim by PERSIST: which requests do is a matter of time.
    const persists = async () => {
      if ([...found.values()].some(([name]) => name?.toLowerCase() === 'persist')) return true;
      await insertEvents(pool, [anEvent()]);
      return false;
    };
    await waitFor(persists, { what: 'a request for a claim during a claim' });
    const left = 'SELECT FROM identity.outbox WHERE NOT published AND dead_lettered_at IS NULL';
    await waitFor(async () => (await pool.query(left)).rowCount === 0, {
      what: 'the events to be published or dead',
    });
    await relay.stop();
    await operate(config);
    await redis.echo('the last command');
    await waitFor(() => isComplete, { what: 'all commands to be told' });
    expect(await redis.call('ACL', 'LOG')).toEqual([]);
    return [...found.values()];
  }

  /** What operators do beside a relay, and what it does now and then. */
  async function operate(config: RelayConfig): Promise<void> {
    const client = openRedis(server.url, FAILS_FAST);
    await waitFor(() => client.status === 'ready', { what: 'the connection' });
    const queues = createQueues(client, config, silent);
    const { deadLetters, close } = openOperations(config, {
      ...{ pool: operators, redis: client, streamRedis: client, queues, logger: silent },
    });
    const trimmer = createTrimmer(client, {
      ...{ streamMaxLen: 0, epochKey: 'bull:relay:epoch', listKey: 'bull:relay:trimmed', logger: silent },
      epoch: () => epoch ?? undefined,
    });
    const epoch = await redis.get('bull:relay:epoch');
    trimmer.remember(STREAM);
    // What is refused is in the log of Redis.
    await Promise.allSettled([
      trimmer.run(() => true),
      createStreamInspector(client)([STREAM]),
      deadLetters.replay({ filter: {} }, { by: 'x' }),
    ]);
    await close();
    await queues.close();
    client.disconnect();
  }
  const commands = await commandsOf();
  expect(await redis.exists(STREAM, WORDS, DLQ)).toBe(3);
  const names = new Set(commands.map(([name = '']) => name.toLowerCase()));
  expect([...names]).toEqual(expect.arrayContaining(['evalsha', 'xadd', 'hmget', 'bzpopmin', 'xinfo']));

  /** Whether Redis would refuse any of the commands to a user with these rights. */
  async function refuses(rules: readonly string[]): Promise<boolean> {
    await redis.call('ACL', 'SETUSER', RELAY_USER, 'reset', ...rules);
    const tries = redis.pipeline();
    for (const command of commands) tries.call('ACL', 'DRYRUN', RELAY_USER, ...command);
    return ((await tries.exec()) ?? []).some(([, answer]) => String(answer).includes('no permission'));
  }
  expect(await refuses(all)).toBe(false);
  const rights = all.filter((rule) => /^[~+]/.test(rule));
  expect(rights.length).toBeGreaterThan(30);
  const needless: string[] = [];
  for (const right of rights)
    if (!(await refuses(all.filter((rule) => rule !== right)))) needless.push(right);
  // A queue that is paused while jobs wait is renamed: the scripts of BullMQ say so in the test before.
  expect(needless).toEqual(['+rename']);
});
