import { randomBytes } from 'node:crypto';
import pg from 'pg';
import { expect, onTestFinished, test } from 'vitest';
import { appendEvent } from '../../src/app.ts';
import { anEvent, createOldTable, insertEvents, someEvents } from '../support/events.ts';
import { DLQ, setStage } from '../support/flow.ts';
import { blocksUnder } from '../support/readme.ts';
import { createDatabase } from '../support/servers.ts';
import { waitFor } from '../support/wait.ts';

const FORBIDDEN_TOPIC = 'payments.v1';

/** A role of its own for this test (roles belong to the whole server): its name, and the URL to connect as it. */
async function createRole(pool: pg.Pool, databaseUrl: string): Promise<{ name: string; url: string }> {
  const name = `role_${randomBytes(6).toString('hex')}`;
  await pool.query(`CREATE ROLE ${name} LOGIN PASSWORD 'secret'`);
  onTestFinished(async () => {
    const admin = new pg.Client({ connectionString: databaseUrl });
    await admin.connect();
    await admin.query(`DROP OWNED BY ${name} CASCADE; DROP ROLE ${name}`);
    await admin.end();
  });
  const url = new URL(databaseUrl);
  url.username = name;
  url.password = 'secret';
  return { name, url: url.href };
}

test('the relay and its producers work with the rights that the README gives them', async () => {
  const stage = await setStage({ redisArgs: ['--appendonly', 'yes'] });
  const relay = await createRole(stage.pool, stage.databaseUrl);
  const producer = await createRole(stage.pool, stage.databaseUrl);
  const [grants = ''] = blocksUnder('Rights', 'sql');
  await stage.pool.query(
    grants.replaceAll(/TO relay\b/g, `TO ${relay.name}`).replaceAll(/TO producer\b/g, `TO ${producer.name}`),
  );
  const [acl = ''] = blocksUnder('Rights', '');
  const [command = '', ...args] = acl.trim().split(' ');
  await stage.redis.call(command, ...args);

  const redisUrl = new URL(stage.server.url);
  redisUrl.username = 'relay';
  redisUrl.password = 'password';
  const env = {
    ...{ RELAY_DATABASE_URL: relay.url, RELAY_REDIS_URL: redisUrl.href },
    ...{ RELAY_RETRY_BASE_DELAY: '0.1', RELAY_MAX_RETRY_ATTEMPTS: '1', RELAY_FAILED_JOBS_KEPT: '1' },
    ...{ RELAY_POLL_INTERVAL: '0.2', RELAY_CLAIM_LEASE: '1' },
  };
  const check = await stage.command(['check'], env);
  expect(check.code, check.lines.join('\n')).toBe(0);
  const pods = [await stage.pod(env), await stage.pod(env)];

  // What producers write, retries and dead letters, a job that has to be found missing, and a killed pod's jobs.
  const client = new pg.Client({ connectionString: producer.url });
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
    const { url, name } = await createDatabase({ template: false });
    const stage = await setStage({ databaseUrl: url });
    const role = await createRole(stage.pool, url);
    await stage.pool.query(`GRANT CREATE ON DATABASE ${name} TO ${role.name}`);
    if (isOld) {
      await createOldTable(stage.pool);
      await stage.pool.query(`GRANT USAGE, CREATE ON SCHEMA identity TO ${role.name}`);
      await stage.pool.query(`ALTER TABLE identity.outbox OWNER TO ${role.name}`);
    }
    const { code, lines } = await stage.command(['migrate'], { RELAY_DATABASE_URL: role.url });
    expect(code, lines.join('\n')).toBe(0);
  }
}, 60_000);
