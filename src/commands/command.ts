import { InvalidArgumentError } from 'commander';
import type { Redis } from 'ioredis';
import { ConfigError, loadConfig, type RelayConfig, unknownVariables } from '../config/config.ts';
import type { Pool } from '../connections/database.ts';
import { createPool } from '../connections/pool.ts';
import { requireTable, waitForServers } from '../connections/preflight.ts';
import { openBoth } from '../connections/servers.ts';
import { NotReadyError } from '../lifecycle.ts';
import { APPEND_CONNECTION } from '../streams/append.ts';
import { createLogger, errorText, type Logger } from '../telemetry/logger.ts';
import { RequirementError } from '../verdict.ts';

/** What all commands share: configuration, connections, options, exit codes. */

/** sysexits.h, where it has a word for it. */
export const EXIT = { done: 0, failed: 1, unavailable: 69, config: 78 } as const;

/** Loads the configuration, runs the command, and turns what went wrong into a clear line and an exit code. */
export async function withConfig(run: (config: RelayConfig) => Promise<number>): Promise<void> {
  try {
    process.exitCode = await run(loadConfig(process.env));
  } catch (error) {
    fail(error);
  }
}

export function fail(error: unknown): void {
  if (error instanceof ConfigError) {
    console.error(`The configuration is wrong:\n${error.message.replace(/^/gm, '  ')}`);
    process.exitCode = EXIT.config;
  } else {
    console.error(`relay: ${errorText(error)}`);
    process.exitCode = exitCodeOf(error);
  }
}

function exitCodeOf(error: unknown): number {
  if (error instanceof RequirementError) return EXIT.config;
  return error instanceof NotReadyError ? EXIT.unavailable : EXIT.failed;
}

/** One connection to each Redis and two to PostgreSQL, for as long as a command of an operator runs. Logs to stderr. */
export async function withServers<T>(
  config: RelayConfig,
  command: string,
  work: (servers: { pool: Pool; redis: Redis; streamRedis: Redis; logger: Logger }) => Promise<T>,
): Promise<T> {
  const logger = createLogger('warn', process.stderr);
  const pool = createPool(config.databaseUrl, { max: 2, application_name: command });
  pool.on('error', () => {}); // the next query says so
  const [redis, streamRedis] = openBoth(config, {
    ...APPEND_CONNECTION,
    commandTimeout: config.publishTimeoutMs,
    connectionName: command,
  });
  for (const it of [redis, streamRedis]) it.on('error', () => {}); // the next command says so
  try {
    const { startupTimeoutMs: timeoutMs } = config;
    await waitForServers({ pool, redis: [redis], streamRedis: [streamRedis], timeoutMs, logger });
    await requireTable(pool);
    return await work({ pool, redis, streamRedis, logger });
  } finally {
    for (const it of [redis, streamRedis]) it.disconnect();
    await pool.end();
  }
}

/** The first SIGTERM or SIGINT. */
export const signalled = (): Promise<NodeJS.Signals> =>
  new Promise((resolve) => {
    for (const signal of ['SIGTERM', 'SIGINT'] as const) {
      process.once(signal, () => {
        // A second signal means: now. Nothing is lost by it, other pods take over what was left.
        for (const again of ['SIGTERM', 'SIGINT'] as const)
          process.once(again, () => process.exit(EXIT.failed));
        resolve(signal);
      });
    }
  });

export function warnOfUnknownVariables(logger: Logger): void {
  for (const { name, nearest } of unknownVariables(process.env)) {
    logger.warn({ variable: name, ...(nearest && { nearest }) }, 'unknown variable; it has no effect');
  }
}

export function print(line: string): void {
  process.stdout.write(`${line}\n`);
}

/** Option parser: a time. */
export function time(text: string): Date {
  const date = new Date(text);
  if (Number.isNaN(date.getTime()))
    throw new InvalidArgumentError('Expected a time like 2026-01-31T12:00:00Z.');
  return date;
}

const UNIT_MS = { s: 1_000, m: 60_000, h: 3_600_000, d: 86_400_000 };

/** Option parser: a time, or so many ms ago. */
export function when(text: string): Date | number {
  if (text === 'now') return 0;
  const [, count, unit] = /^(\d{1,9})([smhd]?)$/.exec(text) ?? [];
  if (unit === undefined) return time(text);
  return Number(count) * UNIT_MS[(unit || 's') as keyof typeof UNIT_MS];
}
