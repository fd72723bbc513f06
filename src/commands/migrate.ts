import type { Command } from 'commander';
import type { RelayConfig } from '../config/config.ts';
import { migrateDatabase } from '../operations/migration.ts';
import { databaseGrants } from '../operations/roles.ts';
import { createLogger, type Logger } from '../telemetry/logger.ts';
import { EXIT, withConfig } from './command.ts';
import { isTerminal, print, text } from './terminal.ts';

export function add(command: Command): void {
  command
    .option(
      '--no-notify',
      'leave out the wake-up trigger, or remove it, as RELAY_NOTIFY=false does: new events then wait for the poll interval',
    )
    .option(
      '--grants',
      'give the roles relay, relay_operator and producer what "relay grants" prints; they must exist',
    )
    .action((options: MigrateOptions) => withConfig((config) => runMigration(config, options)));
}

type MigrateOptions = Readonly<{ notify: boolean; grants?: boolean }>;

const GRANTEES = { role: 'relay', operator: 'relay_operator', producer: 'producer' };

const NOT_GRANTED =
  'the table is migrated, but no rights were given: --grants needs the roles relay, relay_operator and producer ("relay grants" takes other names)';

async function runMigration(config: RelayConfig, { notify, grants }: MigrateOptions): Promise<number> {
  const logger = isTerminal() ? onTerminal : createLogger(config.logLevel);
  await migrateDatabase(config, notify && config.notify, logger, async (client) => {
    if (!grants) return;
    try {
      await client.query(databaseGrants(config, GRANTEES));
    } catch (cause) {
      throw new Error(NOT_GRANTED, { cause });
    }
    logger.info(GRANTEES, 'the roles have their rights');
  });
  return EXIT.done;
}

/** A migration runs in a Job, whose lines are a log, or by hand. */
const say = (fields: Record<string, unknown>, message: string): void =>
  print(
    text`${message} (${Object.entries(fields)
      .map(([name, value]) => `${name}: ${value}`)
      .join(', ')})`,
  );
const nothing = (): void => {};
const onTerminal: Logger = {
  ...{ trace: nothing, debug: nothing, info: say, warn: say, error: say, fatal: say },
};
