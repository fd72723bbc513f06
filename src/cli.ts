#!/usr/bin/env node
import { setFlagsFromString } from 'node:v8';
import { Command, InvalidArgumentError } from 'commander';
import { createRelay } from './app.ts';
import { runChecks } from './check.ts';
import { ConfigError, describeVariables, loadConfig, type RelayConfig, unknownVariables } from './config.ts';
import { NotReadyError, succeedsWithin } from './lifecycle.ts';
import { createLogger, errorText } from './logger.ts';
import { migrate } from './outbox/migrate.ts';
import { createClient } from './outbox/pool.ts';
import { type VerifyOptions, verify } from './verify.ts';

/** sysexits.h, where it has a word for it. */
const EXIT = { failed: 1, unavailable: 69, config: 78 } as const;

/**
 * V8 lets the heap grow to four times what lives before it collects all of it: 30 MiB of a busy pod became 225 MiB of
 * resident memory, and 140 with this, at the same CPU time per event. No cap: what lives may be as large as it must be.
 */
const HEAP_GROWING_PERCENT = 50;

const program = new Command('relay')
  .description('Outbox relay: publishes domain events from PostgreSQL to Redis Streams, by way of BullMQ.')
  .addHelpText(
    'after',
    `\nExit codes: 0 done, 1 failed, 69 database or Redis not ready, 78 wrong configuration.`,
  );

program
  .command('start')
  .description('run the relay until SIGTERM or SIGINT')
  .addHelpText('after', () => `\nEnvironment:\n${describeVariables()}`)
  .action(() => withConfig(start));

program
  .command('migrate')
  .description('create identity.outbox, or adopt the one that is there (only additions; may be run again)')
  .option(
    '--no-notify',
    'leave out the wake-up trigger, or remove it: new events then wait for the poll interval',
  )
  .action(({ notify }: { notify: boolean }) => withConfig((config) => runMigration(config, notify)));

program
  .command('check')
  .description('check configuration, database, table, Redis, AOF and eviction policy; each with a verdict')
  .action(() => withConfig(async (config) => ((await runChecks(config, print)) ? 0 : EXIT.failed)));

program
  .command('verify')
  .description('compare what the table says is published, or dead, with what is in the streams')
  .requiredOption(
    '--since <when>',
    'from then on: a time (2026-01-31T12:00:00Z) or how long ago (90s, 15m, 2h, 7d)',
    when,
  )
  .option('--until <time>', 'up to then (default: now)', time)
  .option('--topic <stream>', 'only this stream')
  .option('--repair', 'append again what is missing, in order; entries that were trimmed are not')
  .option('--json', 'print the result as JSON')
  .addHelpText('after', '\nExits 0 if nothing is missing (any more), else 1.')
  .action((options: VerifyOptions) =>
    withConfig(async (config) => ((await verify(config, options, print)) ? 0 : EXIT.failed)),
  );

await program.parseAsync();

function time(text: string): Date {
  const date = new Date(text);
  if (Number.isNaN(date.getTime()))
    throw new InvalidArgumentError('Expected a time like 2026-01-31T12:00:00Z.');
  return date;
}

/** A time, or so many ms ago. */
function when(text: string): Date | number {
  const [, count, unit] = /^(\d{1,9})([smhd]?)$/.exec(text) ?? [];
  if (unit === undefined) return time(text);
  return (
    Number(count) *
    { s: 1_000, m: 60_000, h: 3_600_000, d: 86_400_000 }[(unit || 's') as 's' | 'm' | 'h' | 'd']
  );
}

/** Loads the configuration, runs the command, and turns what went wrong into a clear line and an exit code. */
async function withConfig(run: (config: RelayConfig) => Promise<number>): Promise<void> {
  try {
    process.exitCode = await run(loadConfig(process.env));
  } catch (error) {
    fail(error);
  }
}

function fail(error: unknown): void {
  if (error instanceof ConfigError) {
    console.error(`The configuration is wrong:\n${error.message.replace(/^/gm, '  ')}`);
    process.exitCode = EXIT.config;
  } else {
    console.error(`relay: ${errorText(error)}`);
    process.exitCode = error instanceof NotReadyError ? EXIT.unavailable : EXIT.failed;
  }
}

async function start(config: RelayConfig): Promise<never> {
  setFlagsFromString(`--heap-growing-percent=${HEAP_GROWING_PERCENT}`);
  const logger = createLogger(config.logLevel);
  for (const { name, nearest } of unknownVariables(process.env)) {
    logger.warn({ variable: name, ...(nearest && { nearest }) }, 'unknown variable; it has no effect');
  }
  const relay = createRelay(config, { logger });
  const signalled = new Promise<NodeJS.Signals>((resolve) => {
    for (const signal of ['SIGTERM', 'SIGINT'] as const) {
      process.once(signal, () => {
        // A second signal means: now. Nothing is lost by it, other pods take over what was left.
        for (const again of ['SIGTERM', 'SIGINT'] as const)
          process.once(again, () => process.exit(EXIT.failed));
        resolve(signal);
      });
    }
  });
  const started = relay.start().then(() => 'started' as const);
  try {
    const first = await Promise.race([started, signalled]);
    if (first === 'started') logger.info({ port: relay.httpPort(), ...settings(config) }, 'relay started');
    logger.info({ signal: await signalled }, 'stopping');
    started.catch((error) => logger.warn({ err: error }, 'stopped while starting'));
    // Parts that overrun get a grace each, which may add up to some seconds more.
    await succeedsWithin(config.shutdownTimeoutMs, relay.stop());
  } catch (error) {
    fail(error);
  }
  // Whatever is still open belongs to a part that overran; it must not keep the process.
  process.exit();
}

/** What is worth knowing in the log; no URL, no secret. */
function settings({ databaseUrl: _, redisUrl: __, ...rest }: RelayConfig): Partial<RelayConfig> {
  return rest;
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
  return 0;
}

function print(line: string): void {
  process.stdout.write(`${line}\n`);
}
