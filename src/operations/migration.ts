import type { RelayConfig } from '../config/config.ts';
import type { Queryable } from '../connections/database.ts';
import { createClient } from '../connections/pool.ts';
import { failureOf, POSTGRES } from '../connections/wait-for-servers.ts';
import type { Logger } from '../telemetry/logger.ts';

/**
 * Makes or adopts `identity.outbox`, with the role of `config.databaseUrl`, on a connection of its own.
 *
 * @param notify whether writers wake the relay up by a trigger; false removes it
 * @param then what is to be done on that connection afterwards
 * @throws {NotReadyError} when PostgreSQL cannot be reached
 * @throws {RequirementError} when PostgreSQL refuses the role, or there is a table that cannot be adopted: nothing was done
 */
export async function migrateDatabase(
  config: RelayConfig,
  notify: boolean,
  logger: Logger,
  then = async (_: Queryable): Promise<void> => {},
): Promise<void> {
  // Imported on demand: only a migration needs drizzle's migrator.
  const { migrate } = await import('../outbox/migrations.ts');
  const client = createClient(config.databaseUrl, {
    connectionTimeoutMillis: config.startupTimeoutMs,
    application_name: 'relay-migrate',
  });
  try {
    await client.connect();
  } catch (error) {
    throw failureOf(POSTGRES, error);
  }
  try {
    await migrate(client, notify, logger, config.streamName);
    await then(client);
  } finally {
    await client.end();
  }
}
