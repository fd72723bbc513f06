import { InvalidArgumentError } from 'commander';
import type { Redis, RedisOptions } from 'ioredis';
import type { RelayConfig } from '../config/config.ts';
import { ConfigError, loadConfig } from '../config/load-config.ts';
import { unknownVariables } from '../config/unknown-variables.ts';
import type { Pool } from '../connections/database.ts';
import { assertOurs } from '../connections/ownership.ts';
import { createPool } from '../connections/pool.ts';
import {
  healthyPool,
  isNoAnswer,
  READ_ONLY,
  ReadOnlyError,
  sqlState,
  TIMED_OUT,
} from '../connections/pool-health.ts';
import { requireTable } from '../connections/preflight.ts';
import { refusesEverybody, reasonOf as replyOf } from '../connections/refusals.ts';
import { FAILS_FAST, openBoth } from '../connections/servers.ts';
import { waitForServers } from '../connections/wait-for-servers.ts';
import { NotReadyError } from '../lifecycle.ts';
import { RequirementError } from '../requirement.ts';
import { createLogger, errorText, type Logger } from '../telemetry/logger.ts';
import { printError, text } from './terminal.ts';

/** What all commands share: configuration, connections, options, exit codes. */

/** Exit codes; 69 and 78 are those of sysexits.h. */
export const EXIT = { done: 0, failed: 1, unavailable: 69, config: 78 } as const;

/** Loads the configuration, runs the command, and reports what went wrong by a clear line and an exit code. */
export async function withConfig(
  run: (config: RelayConfig) => Promise<number>,
  {
    logs = false,
  }: Readonly<{ /** The command has a log, and reports unknown variables there. */ logs?: boolean }> = {},
): Promise<void> {
  try {
    const config = configured();
    if (!logs) for (const { variable, problem } of unknown()) printError(text`relay: ${variable} ${problem}`);
    process.exitCode = await run(config);
  } catch (error) {
    fail(error);
  }
}

/** @throws {ConfigError} which names unknown variables too: a misspelled one may be the reason for the rest */
function configured(): RelayConfig {
  try {
    return loadConfig(process.env);
  } catch (error) {
    throw error instanceof ConfigError ? new ConfigError([...error.problems, ...unknown()]) : error;
  }
}

const unknown = () =>
  unknownVariables(process.env).map(({ name, nearest }) => ({
    variable: name,
    problem: `is no variable of the relay and has no effect${nearest === undefined ? '' : `: is ${nearest} meant?`}`,
  }));

export function fail(error: unknown): void {
  if (error instanceof ConfigError) {
    printError(text`relay: the configuration is wrong:`);
    for (const { variable, problem } of error.problems) printError(text`  ${variable}: ${problem}`);
  } else {
    printError(text`relay: ${reasonOf(error)}`);
  }
  process.exitCode = exitCodeOf(error);
}

export function exitCodeOf(error: unknown): number {
  if (error instanceof ConfigError || error instanceof RequirementError) return EXIT.config;
  return error instanceof NotReadyError || isUnavailable(error) ? EXIT.unavailable : EXIT.failed;
}

/** SQLSTATE of PostgreSQL, also where drizzle has put its error into another one. */
const stateOf = (error: unknown): string | undefined =>
  sqlState((error as Error | null)?.cause) ?? sqlState(error);

/** A server is a replica, read-only, full and so on, or did not answer in time: that may pass. */
const isUnavailable = (error: unknown): boolean =>
  [READ_ONLY, TIMED_OUT].includes(stateOf(error) ?? '') ||
  isNoAnswer(error) ||
  (error instanceof Error && refusesEverybody(error));

const OUTBOX = /identity|outbox/;

/** What went wrong; where PostgreSQL lacks what the relay has made, or refuses a right, what to do about it. */
export function reasonOf(error: unknown): string {
  const reason = errorText(error);
  const { code } = ((error as Error | null)?.cause ?? error ?? {}) as { code?: string };
  if (error instanceof Error && refusesEverybody(error))
    return `Redis refuses changes now: ${replyOf(error)}`;
  switch (code) {
    case READ_ONLY:
      return error instanceof ReadOnlyError
        ? reason
        : `PostgreSQL refuses changes: let RELAY_DATABASE_URL lead to the primary (${reason})`;
    case TIMED_OUT:
      return `PostgreSQL did not do this in time: ${reason}`;
    case '3F000':
    case '42P01':
      return OUTBOX.test(reason)
        ? `the database has no identity.outbox: run "relay migrate" (${reason})`
        : reason;
    case '42703':
      return `identity.outbox was made for an older version: run "relay migrate" (${reason})`;
    case '42501':
      return `the role in RELAY_DATABASE_URL lacks a right: ${reason.replace(/^Failed query: /, '')}; "relay grants" prints the roles, the commands of each, and their rights`;
    default:
      return reason;
  }
}

const POOL_SIZE = 2;
/** A person waits. Whatever takes longer is tried again by hand. */
const ANSWER_WITHIN_MS = 5_000;

/**
 * One connection to each Redis and two to PostgreSQL, for as long as a command of an operator runs. Logs to stderr.
 * @throws {NotReadyError} when a server cannot be reached, or the table is not ready
 * @throws {RequirementError} when the queue belongs to another database, unless `anyOwner`
 */
export async function withServers<T>(
  config: RelayConfig,
  command: string,
  work: (servers: { pool: Pool; redis: Redis; streamRedis: Redis; logger: Logger }) => Promise<T>,
  { anyOwner = false } = {},
): Promise<T> {
  const logger = createLogger('warn', process.stderr);
  const timeoutMs = Math.min(config.startupTimeoutMs, ANSWER_WITHIN_MS);
  const redisSettings = { ...FAILS_FAST, commandTimeout: config.publishTimeoutMs };
  const options = { pool: { max: POOL_SIZE, connectionTimeoutMillis: timeoutMs }, redis: redisSettings };
  return withConnections(config, command, options, async ({ pool: ownPool, redis, streamRedis }) => {
    const pool = healthyPool(ownPool, { size: POOL_SIZE, logger });
    // It is short, and a person reads the sentence at its end.
    const quiet = createLogger('error', process.stderr);
    await waitForServers({ pool, redis: [redis], streamRedis: [streamRedis], timeoutMs, logger: quiet });
    await requireTable(pool);
    if (!anyOwner) for (const it of new Set([redis, streamRedis])) await assertOurs(pool, it, config);
    return work({ pool, redis, streamRedis, logger });
  });
}

export type Connections = Readonly<{ pool: ReturnType<typeof createPool>; redis: Redis; streamRedis: Redis }>;

/** Longest time for closing a connection. ioredis spends it in full, by default 2 s, where there never was one. */
const DISCONNECT_MS = 200;

/** Connections for as long as `work` runs. */
export async function withConnections<T>(
  config: RelayConfig,
  name: string,
  options: Readonly<{ pool: Parameters<typeof createPool>[1]; redis: RedisOptions }>,
  work: (on: Connections) => Promise<T>,
): Promise<T> {
  const pool = createPool(config.databaseUrl, { ...options.pool, application_name: name });
  const [redis, streamRedis] = openBoth(config, {
    ...options.redis,
    connectionName: name,
    disconnectTimeout: DISCONNECT_MS,
  });
  // The next query or command says so.
  pool.on('error', () => {});
  for (const it of [redis, streamRedis]) it.on('error', () => {});
  try {
    return await work({ pool, redis, streamRedis });
  } finally {
    for (const it of [redis, streamRedis]) it.disconnect();
    await pool.end();
  }
}

export function warnOfUnknownVariables(logger: Logger): void {
  for (const { name, nearest } of unknownVariables(process.env)) {
    logger.warn({ variable: name, ...(nearest && { nearest }) }, 'unknown variable; it has no effect');
  }
}

/** JavaScript guesses at any other text: it reads "1" as the year 2001, and a time without a zone as local time. */
const ISO_8601 = /^\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d{1,9})?)?(Z|[+-]\d\d:?\d\d))?$/i;

/** JavaScript takes 30 February for 2 March. */
function isInCalendar(given: string): boolean {
  const day = given.slice(0, 10);
  return new Date(day).toJSON()?.startsWith(day) ?? false;
}

/** PostgreSQL has no year 0, and none before it in this form. */
const isInHistory = (time: number): boolean => new Date(time).getUTCFullYear() > 0;

/** Option parser: a time. */
export function time(given: string): Date {
  const isTime = ISO_8601.test(given) && isInCalendar(given);
  const date = new Date(isTime ? given.replace(' ', 'T') : Number.NaN);
  if (!isInHistory(date.getTime()))
    throw new InvalidArgumentError('Expected a time with its zone, like 2026-01-31T12:00:00Z.');
  return date;
}

const UNIT_MS = { s: 1_000, m: 60_000, h: 3_600_000, d: 86_400_000 };

/** What `when` takes, for help texts. */
export const WHEN =
  'a time (2026-01-31T12:00:00Z) or how long ago (90s, 15m, 2h, 7d; a number alone is seconds)';

/** Option parser: a time, or how many ms ago. */
export function when(given: string): Date | number {
  if (given === 'now') return 0;
  const [, count, unit] = /^(\d{1,9})([smhd]?)$/.exec(given) ?? [];
  const agoMs = Number(count) * UNIT_MS[(unit || 's') as keyof typeof UNIT_MS];
  if (isInHistory(Date.now() - agoMs)) return agoMs;
  try {
    return time(given);
  } catch {
    throw new InvalidArgumentError(
      'Expected how long ago (90s, 15m, 2h, 7d; a number alone is seconds), "now", a day (2026-01-31, UTC), or a time with its zone (2026-01-31T12:00:00Z).',
    );
  }
}

export const instant = (at: Date | number, now = Date.now()): string =>
  (at instanceof Date ? at : new Date(now - at)).toISOString();

/**
 * The range of time between two options.
 * @throws when nothing can be in between
 */
export function range(since: Date | number, until: Date | number): { since: string; until: string } {
  const now = Date.now();
  const found = { since: instant(since, now), until: instant(until, now) };
  if (Date.parse(found.since) >= Date.parse(found.until))
    throw new Error(`--since must be earlier than --until, and ${found.since} is not before ${found.until}`);
  return found;
}
