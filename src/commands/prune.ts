import { createInterface } from 'node:readline/promises';
import { Presets, SingleBar } from 'cli-progress';
import type { Command } from 'commander';
import type { RelayConfig } from '../config/config.ts';
import { createRetentionOf } from '../maintenance/maintenance.ts';
import { EXIT, print, when, withConfig, withServers } from './command.ts';

type PruneOptions = Readonly<{
  /** A time, or how long ago in ms. */
  olderThan?: Date | number;
  dryRun?: boolean;
  yes?: boolean;
}>;

export function addPrune(program: Command): void {
  program
    .command('prune')
    .description('delete old published rows from the table, in short transactions')
    .option(
      '--older-than <when>',
      'published before that: how long ago (12h, 30d), or a time (default: RELAY_PUBLISHED_RETENTION)',
      when,
    )
    .option('--dry-run', 'count them, delete nothing')
    .option('--yes', 'do not ask')
    .addHelpText(
      'after',
      '\nDead and discarded rows stay, as do rows that a resync may need (RELAY_RESYNC_WINDOW). Interrupted, it can be run again.',
    )
    .action((options: PruneOptions) => withConfig((config) => prune(config, options)));
}

async function prune(config: RelayConfig, options: PruneOptions): Promise<number> {
  const { olderThan = config.publishedRetentionMs } = options;
  const ms = typeof olderThan === 'number' ? olderThan : Date.now() - olderThan.getTime();
  if (ms === 0) throw new Error('how old? Say --older-than, or set RELAY_PUBLISHED_RETENTION');
  if (ms < config.resyncWindowMs) {
    throw new Error(
      `rows of the last ${config.resyncWindowMs / 1000} s are needed should Redis lose data (RELAY_RESYNC_WINDOW): --older-than must be more`,
    );
  }
  return withServers(config, 'relay-prune', async ({ pool, streamRedis }) => {
    const retention = createRetentionOf(config, pool, streamRedis, config.publishTimeoutMs);
    const found = await counted(retention.byHand(ms, true), 'counting', undefined);
    const before = new Date(Date.now() - ms).toISOString();
    if (options.dryRun || found === 0) {
      print(`${found} rows were published before ${before}${options.dryRun ? '; none was deleted' : ''}.`);
      return EXIT.done;
    }
    if (!options.yes && !(await agreed(`Delete ${found} rows that were published before ${before}?`))) {
      print('Nothing was deleted.');
      return EXIT.failed;
    }
    const startedAt = Date.now();
    const deleted = await counted(retention.byHand(ms, false), 'deleting', found);
    print(`${deleted} rows were deleted in ${((Date.now() - startedAt) / 1000).toFixed(1)} s.`);
    return EXIT.done;
  });
}

/** Adds up, with a bar on stderr: in place in a terminal, otherwise a line now and then. */
async function counted(
  steps: AsyncIterable<number>,
  what: string,
  total: number | undefined,
): Promise<number> {
  const bar = new SingleBar(
    {
      stream: process.stderr,
      format:
        total === undefined
          ? ` ${what} | {value} rows`
          : ` ${what} {percentage}% | {bar} | {value} of {total} rows | {eta_formatted} left`,
      noTTYOutput: true,
      notTTYSchedule: 5_000,
      hideCursor: true,
      clearOnComplete: true,
    },
    Presets.shades_classic,
  );
  bar.start(total ?? 0, 0);
  let sum = 0;
  try {
    for await (const rows of steps) {
      sum += rows;
      bar.update(sum);
    }
  } finally {
    bar.stop();
  }
  return sum;
}

/** @throws when there is nobody to ask */
async function agreed(question: string): Promise<boolean> {
  if (!process.stdin.isTTY) throw new Error(`${question} There is nobody to ask: say --yes`);
  const terminal = createInterface({ input: process.stdin, output: process.stderr });
  try {
    return /^y(es)?$/i.test((await terminal.question(`${question} [y/N] `)).trim());
  } finally {
    terminal.close();
  }
}
