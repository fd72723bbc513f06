import type { Command } from 'commander';
import type { Redis } from 'ioredis';
import type { RelayConfig } from '../config/config.ts';
import { redisOptions } from '../config/redis-urls.ts';
import { checkRequirements } from '../connections/requirements.ts';
import { advice, type RequirementResult } from '../requirement.ts';
import { EXIT, withConfig, withConnections } from './command.ts';
import { columns, print, printAll, text } from './terminal.ts';
import { wrapped } from './variables.ts';

/** Asks a server that may be away for no longer than this. */
const TIMEOUT_MS = 10_000;
/** Where the findings begin; in a terminal without room for them there, on a line of their own. */
const INDENT = 31;
const NARROW_INDENT = 8;
/** Fewer columns are not wrapped. */
const FINDING_COLUMNS = 40;

export function add(command: Command): void {
  command
    .addHelpText(
      'after',
      '\nEach result is ok, advice or failed. Exits 0 if none has failed, 1 if one has,\n' +
        '78 if the configuration is wrong. Where one has failed, "relay start" refuses.',
    )
    .action(() => withConfig(async (config) => ((await runChecks(config)) ? EXIT.done : EXIT.failed)));
}

/**
 * Checks everything that the relay needs, and prints the result of each.
 * @returns whether the relay could run
 */
async function runChecks(config: RelayConfig): Promise<boolean> {
  const unset = ['RELAY_DATABASE_URL', 'RELAY_REDIS_URL'].filter((it) => process.env[it] === undefined);
  const defaults = unset.length === 0 ? '' : `; not set, so at the default: ${unset.join(', ')}`;
  const good: RequirementResult = {
    ...{ result: 'ok', subject: 'configuration', finding: `every variable is good${defaults}` },
    mayPass: false,
  };
  const isNarrow = columns() < INDENT + FINDING_COLUMNS;
  const results = [good, ...(await checkServers(config))];
  for (const { result, subject, finding } of results) {
    const indent = isNarrow ? NARROW_INDENT : INDENT;
    const [first = '', ...others] = wrapped(text`${finding}`.value, columns() - indent);
    const heading = `${result.padEnd(7)} ${subject}`;
    if (isNarrow) printAll([text`${heading}`, text`${' '.repeat(indent)}${first}`]);
    else print(text`${heading.padEnd(indent)}${first}`);
    for (const line of others) print(text`${' '.repeat(indent)}${line}`);
  }
  return results.every(({ result }) => result !== 'failed');
}

/** On connections of its own. */
export function checkServers(config: RelayConfig): Promise<RequirementResult[]> {
  const options = {
    pool: { max: 3, connectionTimeoutMillis: TIMEOUT_MS, query_timeout: TIMEOUT_MS },
    redis: {
      ...{ maxRetriesPerRequest: 0, connectTimeout: TIMEOUT_MS, commandTimeout: TIMEOUT_MS },
      ...{ lazyConnect: true, retryStrategy: () => null },
    },
  };
  return withConnections(config, 'relay-check', options, async ({ pool, redis, streamRedis }) => {
    const results = await checkRequirements(config, { pool, queueRedis: redis, streamRedis });
    return [...results, ...(await wideUser(config, redis))];
  });
}

/** Of a user of its own. Not asked at every start: Redis records each refusal in its ACL LOG. */
async function wideUser({ redisUrl }: RelayConfig, redis: Redis): Promise<RequirementResult[]> {
  const { username = 'default' } = redisOptions(redisUrl);
  if (username === 'default' || redis.status !== 'ready') return [];
  const mayMore = await redis.dbsize().then(
    () => true,
    () => false,
  );
  if (!mayMore) return [];
  const finding = `${username} may do more than the relay needs; run what "relay grants --only redis" prints`;
  return [{ ...advice(finding), subject: 'Redis user' }];
}
