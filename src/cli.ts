#!/usr/bin/env node
import type { Command as Program } from 'commander';

await import('./commands/signals.ts');
const { Command, Help } = await import('commander');
const { cleanLines, endWithTheReader } = await import('./commands/terminal.ts');
const { VERSION } = await import('./version.ts');

/** In the order of the help. */
const COMMANDS = {
  start: 'run the relay until SIGTERM or SIGINT',
  migrate: 'create identity.outbox, or adopt the one that is there (only additions; may be run again)',
  check:
    'try everything that the relay needs of configuration, database, table and Redis; each with its result',
  status: 'what the relay is doing: backlog, what the oldest event waits for, rates, queues, pods, streams',
  verify: 'compare what the table says is published, or dead, with what is in the streams',
  dlq: 'list, show, replay and discard dead letters',
  republish: 'append once more what was published before, for a consumer that is new or was broken',
  prune: 'delete old published rows from the table, in short transactions',
  board: 'serve the dashboard alone, without claiming or publishing, until SIGTERM or SIGINT',
  'hash-password': 'print an entry for RELAY_BOARD_USERS; the password is asked for, or read from stdin',
  own: 'make the queue in Redis that of this database, after it was restored, copied or moved on purpose',
  grants: 'print the rights that the relay needs with this configuration: SQL and a Redis ACL',
};
type Name = keyof typeof COMMANDS;

const LOAD: Readonly<Record<Name, () => Promise<{ add: (command: Program) => void }>>> = {
  start: () => import('./commands/start.ts'),
  migrate: () => import('./commands/migrate.ts'),
  check: () => import('./commands/check.ts'),
  status: () => import('./commands/status.ts'),
  verify: () => import('./commands/verify.ts'),
  dlq: () => import('./commands/dlq.ts'),
  republish: () => import('./commands/republish.ts'),
  prune: () => import('./commands/prune.ts'),
  board: () => import('./commands/board.ts'),
  'hash-password': () => import('./commands/hash-password.ts'),
  own: () => import('./commands/own.ts'),
  grants: () => import('./commands/grants.ts'),
};

const program = new Command('relay')
  .description('Outbox relay: publishes domain events from PostgreSQL to Redis Streams, by way of BullMQ.')
  .version(VERSION)
  .configureOutput({
    outputError: (message, write) => write(cleanLines(message.replace(/^error: /, 'relay: '))),
  })
  .configureHelp({
    optionDescription: (option) =>
      `${new Help().optionDescription(option)}${option.mandatory ? ' (required)' : ''}`,
  })
  .showHelpAfterError('See "relay --help" or "relay <command> --help".')
  .addHelpText(
    'after',
    `\nExit codes: 0 done, 1 failed, 69 database or Redis not ready,\n            78 wrong configuration, 130 and 143 ended by a signal.`,
  );

// What a pod loads may print or make Node.js warn already, before the level of its log is known.
if (process.argv[2] === 'start') {
  const { createLogger, logWhatOthersPrint } = await import('./telemetry/logger.ts');
  logWhatOthersPrint(createLogger('warn'));
} else endWithTheReader();

// Only the command that is named is loaded: the others cost a second of start-up, and a pod memory as long as it lives.
const [first, second] = process.argv.slice(2);
const named = first === 'help' ? second : first;
for (const [name, about] of Object.entries(COMMANDS)) {
  const command = program.command(name).description(about);
  if (name === named) (await LOAD[name as Name]()).add(command);
}
// That of commander takes one name: "relay help dlq replay" would print the help of dlq.
program
  .command('help')
  .description('display help for command')
  .argument('[command...]')
  .action((names: string[]) => {
    let at = program;
    for (const name of names)
      at = at.commands.find((it) => it.name() === name) ?? at.error(`relay: unknown command '${name}'`);
    at.help();
  });

await program.parseAsync();
