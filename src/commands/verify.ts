import { SingleBar } from 'cli-progress';
import type { Command } from 'commander';
import { createComparison, streamOptionsOf } from '../comparison.ts';
import type { RelayConfig } from '../config.ts';
import { createReceipts } from '../outbox/receipts.ts';
import { createRestorer, notesOf } from '../stream/restore.ts';
import { type Found, totals } from '../triage/resync.ts';
import { barOptions } from './act.ts';
import { EXIT, print, time, when, withConfig, withServers } from './command.ts';

type VerifyOptions = Readonly<{
  /** A time, or how long ago in ms. */
  since: Date | number;
  until?: Date;
  /** Only this stream. */
  topic?: string;
  /** Append again what is missing. */
  repair?: boolean;
  json?: boolean;
}>;

/** Held by the epoch's key where no relay has been yet: the first one compares by itself. */
const NO_EPOCH = 'checking:verify';

export function addVerify(program: Command): void {
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
      withConfig(async (config) => ((await verify(config, options)) ? EXIT.done : EXIT.failed)),
    );
}

/**
 * Compares what the table says is published, or dead, with what is in the streams; with `repair` appends again what is
 * missing. Prints a line for each stream.
 * @returns whether nothing is missing, any more
 * @throws {NotReadyError} when a server cannot be reached
 */
const verify = (config: RelayConfig, options: VerifyOptions): Promise<boolean> =>
  withServers(config, 'relay-verify', async ({ pool, streamRedis: redis, logger }) => {
    const receipts = createReceipts(pool, { ...config, statementTimeoutMs: config.publishTimeoutMs });
    const streamOptions = streamOptionsOf(config);
    const compare = createComparison(
      createRestorer(redis, streamOptions),
      receipts,
      config.dlqStreamName,
      logger,
    );
    const since =
      typeof options.since === 'number'
        ? await receipts.comparedFrom(options.since, null)
        : options.since.toISOString();
    const until = options.until?.toISOString() ?? (await receipts.time());
    if (options.repair) await redis.set(streamOptions.epochKey, NO_EPOCH, 'NX');
    const guard = options.repair ? await redis.get(streamOptions.epochKey) : null;

    const bar = progressBar(since, until);
    const found = await compare({
      since,
      until,
      ...(options.topic !== undefined && { stream: options.topic }),
      ...(guard !== null && { guard }),
      onProgress: (at, sofar) => bar.update(at, totals(sofar)),
    }).finally(() => bar.stop());
    if (guard !== null) await redis.del(notesOf(streamOptions.epochKey));

    const all = totals(found);
    if (options.json) print(JSON.stringify({ since, until, streams: Object.fromEntries(found), total: all }));
    else report(found, since, until, options.repair === true);
    return all.lost === all.restored && all.refused === 0;
  });

/** Advances by the time of the rows. */
function progressBar(since: string, until: string) {
  const [from, to] = [Date.parse(since), Date.parse(until)];
  const bar = new SingleBar(
    ...barOptions(
      ' {percentage}% | {bar} | {rows} rows, {lost} missing, {restored} restored | {eta_formatted} left',
    ),
  );
  bar.start(Math.max(1, to - from), 0, { rows: 0, lost: 0, restored: 0 });
  return {
    update: (at: string, { rows, lost, restored }: Found) =>
      bar.update(Math.max(0, Date.parse(at) - from), { rows, lost, restored }),
    stop: () => bar.stop(),
  };
}

function report(found: ReadonlyMap<string, Found>, since: string, until: string, repair: boolean): void {
  const columns = ['rows', 'there', 'trimmed', 'missing', 'restored', 'refused', 'stream'];
  const line = (cells: readonly (string | number)[]) =>
    print(cells.map((cell, i) => (i < 6 ? String(cell).padStart(9) : `  ${cell}`)).join(''));
  print(`Rows published or given up from ${since} to ${until}:`);
  line(columns);
  for (const [stream, { rows, lost, trimmed, restored, refused }] of found) {
    const unreadable = lost === 0 ? refused : 0;
    line([rows, rows - lost - trimmed - unreadable, trimmed, lost, restored, refused, stream]);
  }
  const { rows, lost, restored, refused } = totals(found);
  if (rows === 0) print('No row has a receipt in this time.');
  else if (lost === 0 && refused === 0) print('Nothing is missing.');
  else if (!repair) print(`${lost} entries are missing: "relay verify --repair" appends them again.`);
  else print(`${restored} of ${lost} missing entries were appended again; ${refused} were refused.`);
}
