import type { Command } from 'commander';
import type { RelayConfig } from '../config/config.ts';
import { streamPlace } from '../config/redis-places.ts';
import { createClient } from '../connections/pool.ts';
import { inspectRedis } from '../connections/preflight.ts';
import { openRedis } from '../connections/servers.ts';
import { withDeadline } from '../lifecycle.ts';
import { missingFromTable } from '../outbox/required.ts';
import { hasWakeup } from '../outbox/wakeup.ts';
import { errorText } from '../telemetry/logger.ts';
import { EXIT, print, withConfig } from './command.ts';

/** `advice`: it works, but an operator should know. */
type Verdict = { verdict: 'ok' | 'advice' | 'failed'; subject: string; finding: string };

/** Asks a server that may be away for no longer than this. */
const TIMEOUT_MS = 10_000;
/** XADD with MAXLEN ~ and everything else the relay uses; BullMQ recommends it as well. */
const MINIMUM_REDIS = [6, 2];

export function addCheck(program: Command): void {
  program
    .command('check')
    .description('check configuration, database, table, Redis, AOF and eviction policy; each with a verdict')
    .action(() => withConfig(async (config) => ((await runChecks(config)) ? EXIT.done : EXIT.failed)));
}

/**
 * Checks everything that the relay needs, and prints a verdict for each.
 * @returns whether the relay could run
 */
async function runChecks(config: RelayConfig): Promise<boolean> {
  const verdicts: Verdict[] = [
    { verdict: 'ok', subject: 'configuration', finding: 'every variable is good' },
  ];
  verdicts.push(...(await checkDatabase(config)), ...(await checkRedis(config)));
  const streams = streamPlace(config);
  if (streams !== config) verdicts.push(...(await checkRedis(streams, 'stream ')));
  for (const { verdict, subject, finding } of verdicts) {
    print(`${verdict.padEnd(7)} ${subject.padEnd(22)} ${finding}`);
  }
  return verdicts.every(({ verdict }) => verdict !== 'failed');
}

async function checkDatabase(config: RelayConfig): Promise<Verdict[]> {
  const client = createClient(config.databaseUrl, {
    connectionTimeoutMillis: TIMEOUT_MS,
    query_timeout: TIMEOUT_MS,
  });
  // An error outside of a query (the server goes away) shows in the next query.
  client.on('error', () => {});
  try {
    await client.connect();
    const { rows } = await client.query(
      `SELECT current_setting('server_version') AS version, current_user AS role`,
    );
    const verdicts: Verdict[] = [
      {
        verdict: 'ok',
        subject: 'database',
        finding: `PostgreSQL ${rows[0].version}, as role ${rows[0].role}`,
      },
    ];
    const missing = await missingFromTable(client);
    if (missing.length > 0) {
      const finding = `the outbox lacks ${missing.join(', ')}: run "relay migrate"`;
      return [...verdicts, { verdict: 'failed', subject: 'table', finding }];
    }
    verdicts.push({
      verdict: 'ok',
      subject: 'table',
      finding: 'identity.outbox has its columns and indexes',
    });
    if (!config.notify) return verdicts;
    verdicts.push(
      (await hasWakeup(client))
        ? { verdict: 'ok', subject: 'wake-up', finding: 'the trigger is there' }
        : {
            verdict: 'advice',
            subject: 'wake-up',
            finding: `no trigger: new events wait up to ${config.pollIntervalMs / 1000} s ("relay migrate" adds it)`,
          },
    );
    return verdicts;
  } catch (error) {
    return [{ verdict: 'failed', subject: 'database', finding: errorText(error) }];
  } finally {
    await client.end().catch(() => {});
  }
}

/** @param of which of two servers, in front of what is said of it */
async function checkRedis(config: RelayConfig, of = ''): Promise<Verdict[]> {
  const redis = openRedis(config, {
    lazyConnect: true,
    retryStrategy: () => null,
    maxRetriesPerRequest: 0,
  });
  let connectionError: Error | undefined;
  redis.on('error', (error) => {
    connectionError ??= error;
  });
  try {
    await withDeadline(TIMEOUT_MS, redis.connect());
    const { version, aofEnabled, maxmemoryPolicy } = await withDeadline(TIMEOUT_MS, inspectRedis(redis));
    const [major = 0, minor = 0] = version.split('.').map(Number);
    const recent =
      major > (MINIMUM_REDIS[0] as number) ||
      (major === MINIMUM_REDIS[0] && minor >= (MINIMUM_REDIS[1] as number));
    return [
      {
        verdict: recent ? 'ok' : 'failed',
        subject: `${of}Redis`,
        finding: `version ${version}${recent ? '' : `; at least ${MINIMUM_REDIS.join('.')} is needed`}`,
      },
      aofEnabled
        ? { verdict: 'ok', subject: `${of}AOF`, finding: 'on' }
        : {
            verdict: 'advice',
            subject: `${of}AOF`,
            finding: 'off: a restart of Redis loses the streams (appendonly yes)',
          },
      maxmemoryPolicy === 'noeviction'
        ? { verdict: 'ok', subject: `${of}eviction policy`, finding: 'noeviction' }
        : {
            verdict: 'failed',
            subject: `${of}eviction policy`,
            finding: `${maxmemoryPolicy}: Redis may throw away jobs and streams (maxmemory-policy noeviction)`,
          },
    ];
  } catch (error) {
    return [{ verdict: 'failed', subject: `${of}Redis`, finding: errorText(connectionError ?? error) }];
  } finally {
    redis.disconnect();
  }
}
