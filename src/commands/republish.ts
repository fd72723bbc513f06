import type { Command } from 'commander';
import type { RelayConfig } from '../config/config.ts';
import { counted } from '../event.ts';
import type { Republish } from '../operations/republishing.ts';
import { confirmed, operator, untilInterrupted, withProgress } from './act.ts';
import { EXIT, range, WHEN, when, withConfig } from './command.ts';
import { type EventOptions, eventFilterOf, eventFilters } from './dlq.ts';
import { folded, name, print, printAll, printError, text } from './terminal.ts';
import { withOperations } from './with-operations.ts';

type RepublishOptions = EventOptions &
  Readonly<{ since: Date | number; until: Date | number; after?: string; dryRun?: boolean; yes?: boolean }>;

export function add(command: Command): void {
  command
    .requiredOption('--since <when>', `published from then on: ${WHEN}`, when)
    .requiredOption('--until <when>', 'published up to then, or up to "now"', when);
  eventFilters(command)
    .option('--after <cursor>', 'go on where an earlier run was cut off, with the same times')
    .option('--dry-run', 'only say what would be appended')
    .option('--yes', 'do not ask; needed where there is no terminal')
    .addHelpText('after', '\nEvery consumer reads these entries again; they have the field replayed_at.')
    .action((options: RepublishOptions) => withConfig((config) => republish(config, options)));
}

const republish = (config: RelayConfig, options: RepublishOptions): Promise<number> => {
  const times = range(options.since, options.until);
  return withOperations(config, 'relay-republish', (operations) =>
    run(operations.republish, config, options, times),
  );
};

async function run(
  { count, run: append }: Republish,
  config: RelayConfig,
  options: RepublishOptions,
  times: ReturnType<typeof range>,
): Promise<number> {
  const { after } = options;
  const which = { ...times, filter: eventFilterOf(options) };
  const { streams: counts } = await count(which, after === undefined ? {} : { after });
  const total = [...counts.values()].reduce((sum, n) => sum + n, 0);
  print(text`Published from ${times.since} to ${times.until}:`);
  for (const [stream, n] of counts) {
    const tooMany = config.streamMaxLen > 0 && n > config.streamMaxLen;
    printAll(
      folded(
        text`${String(n).padStart(9)}  ${name(stream)}${tooMany ? '  more than RELAY_STREAM_MAXLEN: the first are trimmed' : ''}`,
      ),
    );
  }
  if (options.dryRun || total === 0) {
    print(text`${counted(total, 'event')} would be appended again.`);
    return EXIT.done;
  }
  if (
    !(await confirmed(
      text`Append ${counted(total, 'event')} again, for every consumer to read?`,
      options.yes === true,
    ))
  )
    return EXIT.failed;

  const by = operator();
  let at = after ?? null;
  const goOn = () => {
    if (at !== null)
      print(
        text`The rest: the same command with --since ${times.since} --until ${times.until} --after ${at}`,
      );
  };
  try {
    const { result, interrupted } = await withProgress(
      ' {percentage}% | {bar} | {value} of {total}',
      total,
      (update) =>
        untilInterrupted((stopped) =>
          append(which, {
            by,
            stopped,
            ...(after !== undefined && { after }),
            onProgress: (seen, next) => {
              at = next;
              update(seen);
            },
          }),
        ),
      { isDone: ({ result }) => result.next === null },
    );
    print(text`${by} appended ${counted(result.appended, 'event')} again.`);
    if (result.refused > 0) print(text`${counted(result.refused, 'event')} refused: ${result.reason ?? ''}`);
    if (result.error !== null) printError(text`relay: ${result.error}`);
    if (interrupted || result.error !== null) goOn();
    return result.refused === 0 && result.next === null ? EXIT.done : EXIT.failed;
  } catch (error) {
    goOn();
    throw error;
  }
}
