/** The role and the user that pods run as: with the rights that `relay grants` prints, and no others. */
import { Client } from 'pg';
import { loadConfig } from '../../src/config/load-config.ts';
import { databaseGrants, redisAcls } from '../../src/operations/roles.ts';

export const RELAY_USER = 'relay_pod';
export const OPERATOR_ROLE = 'relay_test_operator';
export const PRODUCER_ROLE = 'relay_producer';
/** Makes the table, or owns the one that is there. Each of its databases gives it CREATE. */
export const MIGRATOR_ROLE = 'relay_migrator';
/** Has the rights of both, as a program that writes events and embeds the relay. */
export const EMBEDDER_ROLE = 'relay_embedder';
export const RELAY_PASSWORD = 'open-sesame';

/** The same server, as the relay. */
export function asRelay(url: string, user = RELAY_USER): string {
  const changed = new URL(url);
  changed.username = user;
  changed.password = RELAY_PASSWORD;
  return changed.href;
}

/** What ACL SETUSER takes after the name; of two servers, on that one. */
export function redisRules(
  env: Readonly<Record<string, string>> = {},
  user = RELAY_USER,
  on: 'queues' | 'streams' = 'queues',
): string[] {
  const acls = redisAcls(loadConfig(env), { redisUser: user });
  const acl = acls.at(on === 'streams' ? -1 : 0) ?? '';
  return acl.replace('>password', `>${RELAY_PASSWORD}`).split(' ').slice(3);
}

/** Arguments of redis-server: it knows the user after a restart and after FLUSHALL, too. */
export const redisArgs = (
  env?: Readonly<Record<string, string>>,
  on?: 'queues' | 'streams',
  user = RELAY_USER,
): string[] => [...['--user', user], ...redisRules(env, user, on)];

/** Makes the roles where there are none, and gives them their rights if the table is there. */
export async function grantLeast(
  adminUrl: string,
  env: Readonly<Record<string, string>> = {},
  { role = RELAY_USER, operator = OPERATOR_ROLE, producer = PRODUCER_ROLE } = {},
): Promise<void> {
  const admin = new Client({ connectionString: adminUrl });
  await admin.connect();
  try {
    for (const [name, member] of [
      [role],
      [operator],
      [producer],
      [MIGRATOR_ROLE],
      [EMBEDDER_ROLE, `IN ROLE ${role}, ${producer}`],
    ]) {
      await admin.query(`DO $$ BEGIN
        CREATE ROLE ${name} LOGIN PASSWORD '${RELAY_PASSWORD}' ${member ?? ''};
      EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;
      END $$`);
    }
    const { rows } = await admin.query(`SELECT to_regclass('identity.outbox') IS NOT NULL AS there`);
    if (rows[0].there) await admin.query(databaseGrants(loadConfig(env), { role, operator, producer }));
  } finally {
    await admin.end();
  }
}
