import type { ConnectionOptions } from 'bullmq';
import type { Redis } from 'ioredis';
import type { ClientBase } from 'pg';
import { expect, expectTypeOf, test } from 'vitest';
import type { Pool } from '../../src/connections/database.ts';
import { RELAY_USER } from './least-privilege.ts';
import { createDatabase, createRedis } from './servers.ts';
import {
  type AdminClient,
  type AdminPool,
  type AdminRedis,
  openAdminPool,
  openPool,
  openRedis,
} from './stages.ts';

test('code under test that is given the URLs of a test has the rights of the relay, and no others', async () => {
  const [database, server] = await Promise.all([createDatabase(), createRedis()]);
  const relay = openPool(database.url);
  const { rows } = await relay.query(
    'SELECT current_user AS name, rolsuper FROM pg_roles WHERE rolname = current_user',
  );
  expect(rows).toEqual([{ name: RELAY_USER, rolsuper: false }]);
  for (const forbidden of ['TRUNCATE identity.outbox', `UPDATE identity.outbox SET payload = '1'`])
    await expect(relay.query(forbidden)).rejects.toThrow('permission denied');
  await expect(openRedis(server.url).flushall()).rejects.toThrow('NOPERM');
});

test('an admin is refused where code under test gets its connections', async () => {
  const [database, server] = await Promise.all([createDatabase(), createRedis()]);
  expect(() => openPool(database.adminUrl)).toThrow('openAdminPool');
  expect(() => openRedis(server.adminUrl)).toThrow('openAdminRedis');
  expect((await openAdminPool(database.adminUrl).query('TRUNCATE identity.outbox')).command).toBe('TRUNCATE');
});

test('the compiler lets no admin pass for a connection of the relay', () => {
  // Nothing of this is looked at when it runs: `npm run types` fails.
  expectTypeOf<AdminPool>().not.toExtend<Pool>();
  expectTypeOf<AdminClient>().not.toExtend<ClientBase>();
  expectTypeOf<AdminRedis>().not.toExtend<Redis>();
  expectTypeOf<AdminRedis>().not.toExtend<ConnectionOptions>();
});
