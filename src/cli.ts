#!/usr/bin/env node
import type { Command as Program } from 'commander';

await import('./commands/signals.ts');
const { Command } = await import('commander');
const { cleanLines } = await import('./commands/terminal.ts');
const { VERSION } = await import('./version.ts');

type Entry = Readonly<{ about: string; load: () => Promise<(command: Program) => void> }>;

/** In the order of the help. */
const COMMANDS: Readonly<Record<string, Entry>> = {
  start: {
    about: 'run the relay until SIGTERM or SIGINT',
    load: async () => (await import('./commands/start.ts')).addStart,
  },
  migrate: {
    about: 'create identity.outbox, or adopt the one that is there (only additions; may be run again)',
    load: async () => (await import('./commands/migrate.ts')).addMigrate,
  },
  check: {
    about:
      'try everything that the relay needs of configuration, database, table and Redis; each with its result',
    load: async () => (await import('./commands/check.ts')).addCheck,
  },
  status: {
    about: 'what the relay is doing: backlog, what the oldest event waits for, rates, queues, pods, streams',
    load: async () => (await import('./commands/status.ts')).addStatus,
  },
  verify: {
    about: 'compare what the table says is published, or dead, with what is in the streams',
    load: async () => (await import('./commands/verify.ts')).addVerify,
  },
  dlq: {
    about: 'list, show, replay and discard dead letters',
    load: async () => (await import('./commands/dlq.ts')).addDlq,
  },
  republish: {
    about: 'append once more what was published before, for a consumer that is new or was broken',
    load: async () => (await import('./commands/republish.ts')).addRepublish,
  },
  prune: {
    about: 'delete old published rows from the table, in short transactions',
    load: async () => (await import('./commands/prune.ts')).addPrune,
  },
  board: {
    about: 'serve the dashboard alone, without claiming or publishing, until SIGTERM or SIGINT',
    load: async () => (await import('./commands/board.ts')).addBoard,
  },
  'hash-password': {
    about: 'print an entry for RELAY_BOARD_USERS; the password is asked for, or read from stdin',
    load: async () => (await import('./commands/hash-password.ts')).addHashPassword,
  },
  own: {
    about: 'make the queue in Redis that of this database, after it was restored, copied or moved on purpose',
    load: async () => (await import('./commands/own.ts')).addOwn,
  },
  grants: {
    about: 'print the rights that the relay needs with this configuration: SQL and a Redis ACL',
    load: async () => (await import('./commands/grants.ts')).addGrants,
  },
};

const program = new Command('relay')
  .description('Outbox relay: publishes domain events from PostgreSQL to Redis Streams, by way of BullMQ.')
  .version(VERSION)
  .configureOutput({ outputError: (message, write) => write(cleanLines(message)) })
  .addHelpText(
    'after',
    `\nExit codes: 0 done, 1 failed, 69 database or Redis not ready,\n            78 wrong configuration.`,
  );

// What a pod loads may print or make Node.js warn already, before the level of its log is known.
if (process.argv[2] === 'start') {
  const { createLogger, logWhatOthersPrint } = await import('./telemetry/logger.ts');
  logWhatOthersPrint(createLogger('warn'));
}

// Only the command that is named is loaded: the others cost a second of start-up, and a pod memory as long as it lives.
const [first, second] = process.argv.slice(2);
const named = first === 'help' ? second : first;
for (const [name, { about, load }] of Object.entries(COMMANDS)) {
  const command = program.command(name).description(about);
  if (name === named) (await load())(command);
}

await program.parseAsync();
