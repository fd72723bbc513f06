import { SingleBar } from 'cli-progress';
import type { Command } from 'commander';
import type { RelayConfig } from '../config/config.ts';
import { openOperations } from '../operations/open.ts';
import { barOptions, confirmed, counted, operator, untilInterrupted } from './act.ts';
import { EXIT, print, when, withConfig, withServers } from './command.ts';
import { aggregate } from './dlq.ts';

type RepublishOptions = Readonly<{
  since: Date | number;
  until: Date | number;
  topic?: string;
  type?: string;
  aggregate?: { aggregateType?: string; aggregateId: string };
  after?: string;
  dryRun?: boolean;
  yes?: boolean;
}>;

export function addRepublish(program: Command): void {
  program
    .command('republish')
    .description('append once more what was published before, for a consumer that is new or was broken')
    .requiredOption(
      '--since <when>',
      'published from then on: a time (2026-01-31T12:00:00Z) or how long ago (90s, 15m, 2h, 7d)',
      when,
    )
    .requiredOption('--until <when>', 'published up to then', when)
    .option('--topic <stream>', 'only this topic')
    .option('--type <event-type>', 'only this event type')
    .option('--aggregate <id>', 'only this aggregate: its id, or type:id', aggregate)
    .option('--after <cursor>', 'go on where an earlier run was cut off, with the same times')
    .option('--dry-run', 'only say what would be appended')
    .option('--yes', 'do not ask; needed where there is no terminal')
    .addHelpText('after', '\nEvery consumer reads these entries again; they have the field replayed_at.')
    .action((options: RepublishOptions) => withConfig((config) => republish(config, options)));
}

const republish = (config: RelayConfig, options: RepublishOptions): Promise<number> =>
  withServers(config, 'relay-republish', async (servers) => {
    const operations = openOperations(config, servers);
    try {
      return await run(operations.republish, config, options);
    } finally {
      await operations.close();
    }
  });

async function run(
  { count, run: append }: ReturnType<typeof openOperations>['republish'],
  config: RelayConfig,
  options: RepublishOptions,
): Promise<number> {
  const { topic, type: eventType, aggregate: of, after } = options;
  const instant = (at: Date | number) => (at instanceof Date ? at : new Date(Date.now() - at)).toISOString();
  const range = {
    since: instant(options.since),
    until: instant(options.until),
    filter: { ...(topic !== undefined && { topic }), ...(eventType !== undefined && { eventType }), ...of },
  };
  const { streams: counts } = await count(range);
  const total = [...counts.values()].reduce((sum, n) => sum + n, 0);
  print(`Published from ${range.since} to ${range.until}:`);
  for (const [stream, n] of counts) {
    const tooMany = config.streamMaxLen > 0 && n > config.streamMaxLen;
    print(
      `${String(n).padStart(9)}  ${stream}${tooMany ? '  more than RELAY_STREAM_MAXLEN: the first are trimmed' : ''}`,
    );
  }
  if (options.dryRun || total === 0) {
    print(`${counted(total, 'event')} would be appended again.`);
    return EXIT.done;
  }
  if (
    !(await confirmed(
      `Append ${counted(total, 'event')} again, for every consumer to read?`,
      options.yes === true,
    ))
  )
    return EXIT.failed;

  const by = operator();
  const bar = new SingleBar(
    ...barOptions(' {percentage}% | {bar} | {value} of {total} | {eta_formatted} left'),
  );
  let at = after ?? null;
  const goOn = () => {
    if (at !== null)
      print(`The rest: the same command with --since ${range.since} --until ${range.until} --after ${at}`);
  };
  bar.start(total, 0);
  try {
    const { result, interrupted } = await untilInterrupted((stopped) =>
      append(range, {
        by,
        stopped,
        ...(after !== undefined && { after }),
        onProgress: (seen, next) => {
          at = next;
          bar.update(seen);
        },
      }),
    ).finally(() => bar.stop());
    print(`${by} had ${counted(result.appended, 'event')} appended again.`);
    if (result.refused > 0) print(`${counted(result.refused, 'event')} refused: ${result.reason}`);
    if (result.error !== null) console.error(`relay: ${result.error}`);
    if (interrupted || result.error !== null) goOn();
    return result.refused === 0 && result.next === null ? EXIT.done : EXIT.failed;
  } catch (error) {
    goOn();
    throw error;
  }
}
