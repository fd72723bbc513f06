#!/usr/bin/env node
import { Command } from 'commander';

/** Each adds its command. In the order of the help. */
const COMMANDS: Record<string, () => Promise<(program: Command) => void>> = {
  start: async () => (await import('./commands/start.ts')).addStart,
  migrate: async () => (await import('./commands/migrate.ts')).addMigrate,
  check: async () => (await import('./commands/check.ts')).addCheck,
  status: async () => (await import('./commands/status.ts')).addStatus,
  verify: async () => (await import('./commands/verify.ts')).addVerify,
  dlq: async () => (await import('./commands/dlq.ts')).addDlq,
  republish: async () => (await import('./commands/republish.ts')).addRepublish,
  prune: async () => (await import('./commands/prune.ts')).addPrune,
  board: async () => (await import('./commands/board.ts')).addBoard,
  'hash-password': async () => (await import('./commands/hash-password.ts')).addHashPassword,
  grants: async () => (await import('./commands/grants.ts')).addGrants,
};

const program = new Command('relay')
  .description('Outbox relay: publishes domain events from PostgreSQL to Redis Streams, by way of BullMQ.')
  .addHelpText(
    'after',
    `\nExit codes: 0 done, 1 failed, 69 database or Redis not ready, 78 wrong configuration.`,
  );

// Only the command that is named is loaded: a pod keeps what it loads in memory for as long as it lives.
const named = Object.keys(COMMANDS).filter((name) => name === process.argv[2]);
for (const name of named.length > 0 ? named : Object.keys(COMMANDS)) {
  const add = await COMMANDS[name]?.();
  add?.(program);
}

await program.parseAsync();
