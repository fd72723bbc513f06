import type { Command } from 'commander';
import type { RelayConfig } from '../config/config.ts';
import { counted } from '../event.ts';
import { createRetentionOf } from '../maintenance/maintenance.ts';
import type { KeptRow } from '../outbox/pruner.ts';
import { confirmed, withProgress } from './act.ts';
import { EXIT, when, withConfig, withServers } from './command.ts';
import { print, text } from './terminal.ts';

/** Rows that the database keeps are counted, and so many of them named. */
const KEPT_SHOWN = 10;

type PruneOptions = Readonly<{
  /** A time, or how long ago in ms. */
  olderThan?: Date | number;
  dryRun?: boolean;
  yes?: boolean;
}>;

export function add(command: Command): void {
  command
    .option(
      '--older-than <when>',
      'published before that: how long ago (12h, 30d), or a time (default: RELAY_PUBLISHED_RETENTION)',
      when,
    )
    .option('--dry-run', 'count them, delete nothing')
    .option('--yes', 'do not ask; needed where there is no terminal')
    .addHelpText(
      'after',
      '\nDead and discarded rows stay, as do rows that a resync may need\n' +
        '(RELAY_RESYNC_WINDOW). After an interruption, run it again.',
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
    const kept: KeptRow[] = [];
    const retention = createRetentionOf(config, pool, streamRedis, config.publishTimeoutMs, (rows) => {
      kept.push(...rows);
    });
    const found = await sumOf(' counting rows | {value}', 0, retention.byHand(ms, true));
    const before = new Date(Date.now() - ms).toISOString();
    if (options.dryRun || found === 0) {
      print(
        text`${counted(found, 'row')} ${found === 1 ? 'was' : 'were'} published before ${before}${options.dryRun ? '; none was deleted' : ''}.`,
      );
      return EXIT.done;
    }
    const question = text`Delete ${counted(found, 'row')} published before ${before}?`;
    if (!(await confirmed(question, options.yes === true))) return EXIT.failed;
    const startedAt = Date.now();
    const format = ' deleting rows {percentage}% | {bar} | {value} of {total}';
    const deleted = await sumOf(format, found, retention.byHand(ms, false));
    print(text`Deleted ${counted(deleted, 'row')} in ${((Date.now() - startedAt) / 1000).toFixed(1)} s.`);
    if (kept.length > 0) print(text`The database keeps ${counted(kept.length, 'row')} old enough to go:`);
    for (const { id, reason } of kept.slice(0, KEPT_SHOWN)) print(text`  id ${id}: ${reason}`);
    if (kept.length > KEPT_SHOWN) print(text`  and ${kept.length - KEPT_SHOWN} more.`);
    return EXIT.done;
  });
}

/** Adds up, and shows how far it is. */
const sumOf = (format: string, total: number, steps: AsyncIterable<number>): Promise<number> =>
  withProgress(
    format,
    total || Number.MAX_SAFE_INTEGER,
    async (update) => {
      let sum = 0;
      for await (const rows of steps) {
        sum += rows;
        update(sum);
      }
      return sum;
    },
    { isDone: () => total > 0 },
  );
