import type { Command } from 'commander';
import type { RelayConfig } from '../config/config.ts';
import { createClient } from '../connections/pool.ts';
import { NotReadyError } from '../lifecycle.ts';
import { migrate } from '../outbox/migrations.ts';
import { createLogger, errorText } from '../telemetry/logger.ts';
import { EXIT, withConfig } from './command.ts';

export function addMigrate(program: Command): void {
  program
    .command('migrate')
    .description('create identity.outbox, or adopt the one that is there (only additions; may be run again)')
    .option(
      '--no-notify',
      'leave out the wake-up trigger, or remove it: new events then wait for the poll interval',
    )
    .action(({ notify }: { notify: boolean }) => withConfig((config) => runMigration(config, notify)));
}

async function runMigration(config: RelayConfig, notify: boolean): Promise<number> {
  const client = createClient(config.databaseUrl, { connectionTimeoutMillis: config.startupTimeoutMs });
  try {
    await client.connect();
  } catch (error) {
    throw new NotReadyError(`PostgreSQL cannot be reached (see RELAY_DATABASE_URL): ${errorText(error)}`);
  }
  try {
    await migrate(client, notify, createLogger(config.logLevel));
  } finally {
    await client.end();
  }
  return EXIT.done;
}
