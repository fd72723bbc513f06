#!/usr/bin/env node
import { Command } from 'commander';
import { addBoard } from './commands/board.ts';
import { addCheck } from './commands/check.ts';
import { addDlq } from './commands/dlq.ts';
import { addGrants } from './commands/grants.ts';
import { addHashPassword } from './commands/hash-password.ts';
import { addMigrate } from './commands/migrate.ts';
import { addPrune } from './commands/prune.ts';
import { addRepublish } from './commands/republish.ts';
import { addStart } from './commands/start.ts';
import { addStatus } from './commands/status.ts';
import { addVerify } from './commands/verify.ts';

const program = new Command('relay')
  .description('Outbox relay: publishes domain events from PostgreSQL to Redis Streams, by way of BullMQ.')
  .addHelpText(
    'after',
    `\nExit codes: 0 done, 1 failed, 69 database or Redis not ready, 78 wrong configuration.`,
  );

for (const add of [
  addStart,
  addMigrate,
  addCheck,
  addStatus,
  addVerify,
  addDlq,
  addRepublish,
  addPrune,
  addBoard,
  addHashPassword,
  addGrants,
]) {
  add(program);
}

await program.parseAsync();
