/** docker-compose.yml without Docker: its roles, users and addresses on servers of the test's own. */
import { randomUUID } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { Redis } from 'ioredis';
import { Client } from 'pg';
import { expect, inject, test } from 'vitest';
import { parse } from 'yaml';
import { loadConfig } from '../../src/config/load-config.ts';
import { redisAcls } from '../../src/operations/roles.ts';
import { appendEvent } from '../../src/outbox/producer.ts';
import { startPrivatePostgres, startPrivateRedis } from '../demo/servers.ts';
import { atEndOfFile } from '../support/cleanup.ts';
import { anEvent, insertEvents } from '../support/events.ts';
import { startPod } from '../support/pods.ts';
import { codeSpans, PAGES } from '../support/readme.ts';
import { folderOfFile } from '../support/servers.ts';
import { waitFor } from '../support/wait.ts';

/** Every variable has its default. */
const text = readFileSync(join(inject('root'), 'docker-compose.yml'), 'utf8').replaceAll(
  /\$\{\w+:-([^}]*)\}/g,
  '$1',
);
const { services, configs } = parse(text, { merge: true });

test('no password is among the arguments of a process', () => {
  const source = readFileSync(join(inject('root'), 'docker-compose.yml'), 'utf8');
  for (const { command } of Object.values(parse(source, { merge: true }).services) as { command?: unknown }[])
    expect(JSON.stringify(command ?? '')).not.toMatch(/PASSWORD/);
  expect(services.redis.command).toContain(services.redis.configs[0].target);
});

/** What the README says to programs on the host. */
const urlsOnHost = codeSpans(PAGES.get('README.md') ?? '')
  .filter((code) => /^\w+:\/\/\S+@127\.0\.0\.1:/.test(code))
  .map((code) => new URL(code));

test('what is published can be reached from the host alone, where the README says', () => {
  const published = Object.entries(services as Record<string, { ports?: unknown[] }>).flatMap(
    ([name, { ports = [] }]) => ports.map((port) => [name, port] as const),
  );
  for (const [name, port] of published)
    expect(typeof port === 'string' ? port : (port as { host_ip?: string }).host_ip, name).toMatch(
      /^127\.0\.0\.1(?::|$)/,
    );
  const [postgres, redis] = urlsOnHost;
  expect(urlsOnHost).toHaveLength(2);
  expect(services.postgres.ports).toEqual([`${postgres?.host}:5432`]);
  expect(services.redis.ports).toEqual([`${redis?.host}:6379`]);
  expect(postgres?.pathname).toBe(`/${services.postgres.environment.POSTGRES_DB}`);
  // Of both, the server of the test asks for no password.
  expect(configs['postgres-roles'].content).toContain(
    `ROLE ${postgres?.username} LOGIN PASSWORD '${postgres?.password}';`,
  );
  expect(configs['redis-users'].content).toContain(
    `user ${redis?.username || 'default'} on >${redis?.password} `,
  );
});

test('the Redis user has the rights that the relay needs, and no others', () => {
  const [acl] = redisAcls(loadConfig({}), { redisUser: 'relay' });
  expect(configs['redis-users'].content.trim().split('\n').at(-1)).toBe(
    acl?.replace('ACL SETUSER', 'user').replace('>password', '>relay'),
  );
});

test('pods run with these rights, from the migration on', async () => {
  const folder = await folderOfFile();
  const acl = join(folder, 'redis-users.acl');
  // The test's own look at Redis is without a password.
  await writeFile(acl, configs['redis-users'].content.replace('>redis ', 'nopass '));
  const [postgres, redis] = await Promise.all([
    startPrivatePostgres({ directory: join(folder, 'postgres') }),
    startPrivateRedis({ directory: join(folder, 'redis'), args: ['--aclfile', acl] }),
  ]);
  atEndOfFile(() => postgres.kill('SIGQUIT'));
  atEndOfFile(() => redis.kill('SIGKILL'));
  /** The service's environment, with the servers of the test. */
  const envOf = (service: string): Record<string, string> => {
    const { RELAY_DATABASE_URL, RELAY_REDIS_URL } = services[service].environment;
    const [database, queue] = [new URL(postgres.url), new URL(redis.url)];
    const [asked, askedRedis] = [new URL(RELAY_DATABASE_URL), new URL(RELAY_REDIS_URL)];
    [database.username, database.password] = [asked.username, asked.password];
    [queue.username, queue.password] = [askedRedis.username, askedRedis.password];
    return { RELAY_DATABASE_URL: database.href, RELAY_REDIS_URL: queue.href };
  };
  const admin = new Client({ connectionString: postgres.url });
  await admin.connect();
  atEndOfFile(() => admin.end());
  await admin.query(configs['postgres-roles'].content);

  const migration = await startPod(
    { ...envOf('migrate'), RELAY_DATABASE_URL: postgres.url },
    services.migrate.command,
  );
  expect((await migration.exited).code, migration.lines.join('\n')).toBe(0);

  const pod = await startPod(envOf('relay'));
  atEndOfFile(() => pod.kill('SIGKILL'));
  await pod.waitReady();
  await insertEvents(admin as never, [anEvent()]);
  const published = async () =>
    (await admin.query('SELECT count(*)::int AS n FROM identity.outbox WHERE published')).rows[0].n === 1;
  await waitFor(published, { what: 'the event to be published' });
  const { rows } = await admin.query(
    `SELECT DISTINCT usename FROM pg_stat_activity WHERE application_name LIKE 'relay-service%'`,
  );
  expect(rows).toEqual([{ usename: 'relay' }]);

  // A producer and a consumer on the host, as the README has them.
  const onServer = (asked: URL | undefined, server: string): string => {
    const url = new URL(server);
    [url.username, url.password] = [asked?.username ?? '', asked?.password ?? ''];
    return url.href;
  };
  const producer = new Client({ connectionString: onServer(urlsOnHost[0], postgres.url) });
  await producer.connect();
  atEndOfFile(() => producer.end());
  const { eventId } = await appendEvent(producer, {
    ...{ eventType: 'UserRenamed', aggregateId: randomUUID(), payload: { name: 'Ada' } },
  });
  const consumer = new Redis(onServer(urlsOnHost[1], redis.url));
  atEndOfFile(() => consumer.quit());
  const stream = 'identity.user.v1';
  await consumer.xgroup('CREATE', stream, 'printer', '0', 'MKSTREAM');
  const read = async () => {
    const reply = await consumer.xreadgroup('GROUP', 'printer', 'one', 'STREAMS', stream, '>');
    return JSON.stringify(reply).includes(eventId);
  };
  await waitFor(read, { what: 'the entry to be read' });

  const rights = await admin.query(
    `SELECT rolsuper, has_table_privilege('relay', 'identity.outbox', 'DELETE') AS deletes,
            has_any_column_privilege('producer', 'identity.outbox', 'INSERT') AS inserts
     FROM pg_roles WHERE rolname = 'relay'`,
  );
  expect(rights.rows).toEqual([{ rolsuper: false, deletes: false, inserts: true }]);
});
