import type { Command } from 'commander';
import type { RelayConfig } from '../config/config.ts';
import { createPool } from '../connections/pool.ts';
import { checkRequirements } from '../connections/requirements.ts';
import { openBoth } from '../connections/servers.ts';
import type { Verdict } from '../verdict.ts';
import { EXIT, print, withConfig } from './command.ts';

/** Asks a server that may be away for no longer than this. */
const TIMEOUT_MS = 10_000;

export function addCheck(program: Command): void {
  program
    .command('check')
    .description(
      'try everything that the relay needs of configuration, database, table and Redis; each with a verdict',
    )
    .action(() => withConfig(async (config) => ((await runChecks(config)) ? EXIT.done : EXIT.failed)));
}

/**
 * Checks everything that the relay needs, and prints a verdict for each.
 * @returns whether the relay could run
 */
async function runChecks(config: RelayConfig): Promise<boolean> {
  const good: Verdict = {
    ...{ verdict: 'ok', subject: 'configuration', finding: 'every variable is good', mayPass: false },
  };
  const verdicts = [good, ...(await checkServers(config))];
  for (const { verdict, subject, finding } of verdicts) {
    print(`${verdict.padEnd(7)} ${subject.padEnd(22)} ${finding}`);
  }
  return verdicts.every(({ verdict }) => verdict !== 'failed');
}

async function checkServers(config: RelayConfig): Promise<Verdict[]> {
  const pool = createPool(config.databaseUrl, {
    max: 3,
    application_name: 'relay-check',
    connectionTimeoutMillis: TIMEOUT_MS,
    query_timeout: TIMEOUT_MS,
  });
  pool.on('error', () => {}); // the next query says so
  const [queueRedis, streamRedis] = openBoth(config, {
    ...{ maxRetriesPerRequest: 0, connectTimeout: TIMEOUT_MS, commandTimeout: TIMEOUT_MS },
    ...{ lazyConnect: true, retryStrategy: () => null, connectionName: 'relay-check' },
  });
  try {
    return await checkRequirements(config, { pool, queueRedis, streamRedis });
  } finally {
    for (const it of [queueRedis, streamRedis]) it.disconnect();
    await pool.end();
  }
}
