import type { Queryable } from '../connections/database.ts';
import { CANNOT_TELL } from '../connections/generation.ts';

/** Which database this is. */
export type Owner = Readonly<{
  /** Stands in the database, and goes wherever that is restored or copied to. */
  token: string;
  /** `system_identifier`: the same after a failover, another one after `initdb`. '' where the role may not ask. */
  system: string;
  /** Name of the database on its server. */
  database: string;
}>;

/**
 * Asked anew each time: an address may lead to another database.
 * @throws when it does not answer, or has no token: `relay migrate` gives it one
 */
export async function readOwner(db: Queryable): Promise<Owner> {
  const ask = async (system: string): Promise<Owner | undefined> => {
    const { rows } = await db.query<Owner>(
      `SELECT o.token, current_database() AS database, ${system} AS system FROM identity.relay_owner o`,
    );
    return rows[0];
  };
  const owner = await ask('(SELECT system_identifier::text FROM pg_control_system())').catch((error) => {
    if (!CANNOT_TELL.has(error.code)) throw error;
    return ask(`''`);
  });
  if (owner === undefined)
    throw new Error('identity.relay_owner is empty: run "relay migrate" on this database');
  return owner;
}
