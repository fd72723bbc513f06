import { randomBytes, randomUUID } from 'node:crypto';
import pg from 'pg';
import { expect, onTestFinished, test } from 'vitest';
import { loadConfig } from '../../src/config/config.ts';
import { appendEvent, createRelay } from '../../src/index.ts';
import { databaseGrants } from '../../src/operations/roles.ts';
import { createDeadRows } from '../../src/outbox/dead-rows.ts';
import type { RowName } from '../../src/outbox/finalize.ts';
import { createOutbox } from '../../src/outbox/outbox.ts';
import { createPruner, FIRST_PLACE } from '../../src/outbox/pruner.ts';
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
import { openAdminPool, openAdminRedis, openPool, silent } from '../support/stages.ts';
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
}, 90_000);

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
}, 60_000);

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
    await attempt(outbox.transaction('repeatable', (tx) => outbox.claimFresh(tx, 10)));
    await attempt(outbox.recordFailure({ ...two, attempts: 1, reason: 'x', retryInMs: 1_000 }));
    await attempt(outbox.inEpoch((tx) => outbox.markPublished(tx, [{ ...one, entryId: '1-1' }])));
    const dead = { ...three, attempts: 6, reason: 'x', entryId: '1-1' };
    await attempt(outbox.inEpoch((tx) => outbox.markDead(tx, dead)));
    await attempt(pruner.step({ kind: 'receipted', after: FIRST_PLACE, before: 'now', limit: 10 }));
    const lost = { eventId: randomUUID(), eventType: 'X', aggregateType: 'user', aggregateId: randomUUID() };
    await attempt(
      deadRows.insert({ ...lost, topic: STREAM, payload: '{}', occurredAt: new Date().toISOString() }),
    );
    await attempt(deadRows.transaction((tx) => deadRows.discard(tx, [three.id], 'x', 'x')));
    await attempt(deadRows.transaction((tx) => deadRows.revive(tx, [three.id], [])));
    await attempt(operatorsPruner.step({ kind: 'receipted', after: FIRST_PLACE, before: 'now', limit: 10 }));
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
    ...['INSERT', 'SELECT (id)', 'SELECT (event_id)'].map((it): [string, string] => [it, PRODUCER_ROLE]),
    ...['replayed_at', 'discard_reason', 'discarded_by'].map((it): [string, string] => [
      `UPDATE (${it})`,
      OPERATOR_ROLE,
    ]),
    ...INSERTED.map((it): [string, string] => [`INSERT (${it})`, OPERATOR_ROLE]),
  ];
  // All that there are: none is forgotten here.
  const { rows } = await admin.query<{ granted: string }>(
    `WITH granted AS (
       SELECT grantee, privilege_type, '' AS columns FROM information_schema.role_table_grants
       UNION ALL
       SELECT c.grantee, c.privilege_type, ' (' || c.column_name || ')' FROM information_schema.role_column_grants c
        WHERE NOT EXISTS (SELECT FROM information_schema.role_table_grants t
                           WHERE t.grantee = c.grantee AND t.privilege_type = c.privilege_type)
     ) SELECT privilege_type || columns || ' to ' || grantee AS granted FROM granted WHERE grantee = ANY ($1)`,
    [[RELAY_USER, OPERATOR_ROLE, PRODUCER_ROLE]],
  );
  expect(rows.map((row) => row.granted).toSorted()).toEqual(
    rights.map(([right, to]) => `${right} to ${to}`).toSorted(),
  );
  const all: [right: string, on: string, to: string][] = [
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
}, 60_000);

test('each right in Redis is needed', async () => {
  const [database, server] = await Promise.all([createDatabase(), createRedis()]);
  const [pool, redis] = [openAdminPool(database.adminUrl), openAdminRedis(server.adminUrl)];
  await grantLeast(database.adminUrl, EVERYTHING);
  const all = redisRules(EVERYTHING);
  const config = loadConfig({
    ...EVERYTHING,
    RELAY_DATABASE_URL: database.url,
    RELAY_REDIS_URL: server.url,
    ...{ RELAY_STARTUP_TIMEOUT: '0.5', RELAY_SHUTDOWN_TIMEOUT: '0.5', RELAY_MAX_RETRY_ATTEMPTS: '0' },
  });

  /** What Redis refused to a relay that gets one event of each kind, up to the first refusal. */
  async function refused(rules: readonly string[]): Promise<unknown[]> {
    await redis.flushall();
    await redis.script('FLUSH');
    await redis.call('ACL', 'LOG', 'RESET');
    await redis.call('ACL', 'SETUSER', RELAY_USER, 'reset', ...rules);
    await pool.query('TRUNCATE identity.outbox');
    await insertEvents(pool, [anEvent(), anEvent({ topic: WORDS }), anEvent({ topic: FORBIDDEN_TOPIC })]);
    const log = async () => (await redis.call('ACL', 'LOG')) as unknown[];
    const left = 'SELECT FROM identity.outbox WHERE NOT published AND dead_lettered_at IS NULL';
    const relay = createRelay(config, { logger: silent, http: false });
    const started = relay.start().catch(() => {});
    await waitFor(async () => (await log()).length > 0 || (await pool.query(left)).rowCount === 0, {
      what: 'an end, or a refusal',
    });
    await relay.stop();
    await started;
    return log();
  }
  expect(await refused(all)).toEqual([]);
  expect(await redis.exists(STREAM, WORDS, DLQ)).toBe(3);
  const rights = all.filter((rule) => /^[~+]/.test(rule));
  expect(rights.length).toBeGreaterThan(8);
  for (const right of rights) {
    expect(await refused(all.filter((rule) => rule !== right)), right).not.toEqual([]);
  }
}, 60_000);
