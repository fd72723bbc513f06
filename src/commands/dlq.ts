import { type Command, InvalidArgumentError, Option } from 'commander';
import type { RelayConfig } from '../config/config.ts';
import { printableJson } from '../config/printable.ts';
import { counted, isUuid } from '../event.ts';
import type { ActionResult, DeadLetters, Selection } from '../operations/dead-letters.ts';
import type { ListedDeadLetter } from '../operations/inspection.ts';
import type { DeadLetterFilter, DeadLetterGroup } from '../outbox/dead-rows.ts';
import { confirmed, operator, untilInterrupted, withProgress } from './act.ts';
import { EXIT, instant, range, WHEN, when, withConfig } from './command.ts';
import {
  cut,
  folded,
  joined,
  name,
  print,
  printAll,
  printError,
  printJson,
  text,
  toSecond,
} from './terminal.ts';
import { withOperations } from './with-operations.ts';

/** Of `eventFilters`. */
export type EventOptions = Readonly<{ type?: string; topic?: string; aggregate?: Aggregate }>;
type FilterOptions = EventOptions &
  Readonly<{ error?: string; since?: Date | number; until?: Date | number; pruned?: boolean }>;
type ListOptions = FilterOptions &
  Readonly<{ limit: number; after?: string; cursor?: string; group?: boolean; json?: boolean }>;
type ActOptions = FilterOptions & Readonly<{ all?: boolean; dryRun?: boolean; yes?: boolean }>;

const MOST_LISTED = 10_000;

export function add(dlq: Command): void {
  filters(dlq.command('list').description('dead letters, the latest first; never a payload'))
    .option('--limit <count>', `how many at most (1 to ${MOST_LISTED})`, count, 50)
    .option('--after <cursor>', 'go on where an earlier list ended')
    .addOption(new Option('--cursor <cursor>').hideHelp()) // its name before --after
    .option('--group', 'count them by error instead')
    .option('--json', 'print JSON')
    .action((options: ListOptions) =>
      run(
        'relay-dlq-list',
        (it) => list(it, options),
        () => listed(options),
      ),
    );

  dlq
    .command('show')
    .description('everything that is known of one event: envelope, error, attempts, times, job')
    .argument('<event-id>', 'its event_id', eventId)
    .option('--json', 'print JSON')
    .action((id: string, options: { json?: boolean }) =>
      run('relay-dlq-show', (it) => show(it, id, options)),
    );

  acting(dlq.command('replay').description('publish dead events again, in the order of their aggregates'))
    .addHelpText('after', '\nAfter an interruption, run it again. Exits 1 if any event was refused.')
    .action((ids: string[], options: ActOptions) =>
      run(
        'relay-dlq-replay',
        (it, config) => act(it, config, 'replay', ids, options),
        () => selected(ids, options),
      ),
    );

  acting(dlq.command('discard').description('give dead events up for good; nothing waits for them any more'))
    .requiredOption('--reason <text>', 'why; it is kept with the row', words)
    .action((ids: string[], options: ActOptions & { reason: string }) =>
      run(
        'relay-dlq-discard',
        (it, config) => act(it, config, 'discard', ids, options, options.reason),
        () => selected(ids, options),
      ),
    );
}

/** Option parser: a text with something in it. */
function words(given: string): string {
  if (given.trim() === '') throw new InvalidArgumentError('Expected some words.');
  return given;
}

export const eventFilters = (command: Command): Command =>
  command
    .option('--type <event-type>', 'only this event type')
    .option('--topic <stream>', 'only this topic')
    .option('--aggregate <id>', 'only this aggregate: its id, or type:id', aggregate);

const filters = (command: Command): Command =>
  eventFilters(command)
    .option(
      '--error <text>',
      'only errors that contain this, in any case; # stands for numbers and ids, as in list --group',
      (given) => words(given).replace(/(?<=.)…$/, ''), // copied from a line that was cut
    )
    .option('--since <when>', `given up from then on: ${WHEN}`, when)
    .option('--until <when>', 'given up to then', when)
    .option('--pruned', 'those whose row is gone, from the dead-letter stream, instead');

const acting = (command: Command): Command =>
  filters(command.argument('[event-id...]', 'these events; or use filters', eventIds))
    .option('--all', 'every dead letter, where no filter is given')
    .option('--dry-run', 'only say what would be done')
    .option('--yes', 'do not ask; needed where there is no terminal');

/** @param check throws where the options contradict each other; no server is asked before */
async function run(
  name: string,
  work: (deadLetters: DeadLetters, config: RelayConfig) => Promise<number>,
  check: () => unknown = () => {},
): Promise<void> {
  await withConfig((config) => {
    check();
    return withOperations(config, name, ({ deadLetters }) => work(deadLetters, config));
  });
}

/** @throws where the options contradict each other */
function listed({ group, ...options }: ListOptions): DeadLetterFilter {
  if (group && options.pruned) throw new Error('--group counts rows: it does not go with --pruned');
  return filterOf(options);
}

async function list(deadLetters: DeadLetters, options: ListOptions): Promise<number> {
  const filter = listed(options);
  if (options.group) {
    const groups = await deadLetters.groups(filter, options.limit);
    if (options.json) printJson({ groups });
    else if (groups.length === 0) print(text`No dead letters.`);
    else printGroups(groups);
    return EXIT.done;
  }
  const { limit, cursor, after = cursor, pruned = false } = options;
  const page = await deadLetters.list(filter, {
    limit,
    pruned,
    ...(after !== undefined && { after }),
  });
  if (options.json) {
    printJson(page);
    return EXIT.done;
  }
  if (page.letters.length === 0) print(text`No dead letters.`);
  for (const letter of page.letters) printLetter(letter);
  if (page.next !== null) print(text`There are more: --after ${page.next}`);
  return EXIT.done;
}

async function show(deadLetters: DeadLetters, id: string, options: { json?: boolean }): Promise<number> {
  const details = await deadLetters.show(id);
  if (details === null) {
    printError(text`relay: neither the table nor the dead-letter stream knows ${id}`);
    return EXIT.failed;
  }
  if (options.json) {
    printJson(details);
    return EXIT.done;
  }
  const { event, state, error, attempts, timeline, entryId, dlqEntryId, job } = details;
  const rows: [string, string][] = [
    ['event', event.eventId],
    ['type', event.eventType],
    ['aggregate', `${event.aggregateType}:${event.aggregateId}`],
    ['topic', event.topic],
    ['state', state === 'pruned' ? 'pruned: the row is gone, this is its dead letter' : state],
    ['attempts', String(attempts)],
    [state === 'published' ? 'last error' : 'error', error ?? '–'],
    ...(entryId === null ? [] : [['entry', entryId] as [string, string]]),
    ['dead letter', dlqEntryId ?? (state === 'dead' ? 'none in the stream' : 'none')],
    ['job', job === null ? 'none in BullMQ' : `${job.state}, ${counted(job.attempts, 'attempt')}`],
    ['payload', event.withheld ? `withheld: ${event.withheld}` : printableJson(event.payload)],
  ];
  for (const [name, value] of rows) print(text`${name.padEnd(12)} ${value}`);
  for (const { at, what } of timeline) print(text`${at.padEnd(28)} ${what}`);
  return EXIT.done;
}

/** @throws where the options name nothing, or contradict each other */
function selected(ids: readonly string[], options: ActOptions) {
  const filter = filterOf(options);
  const filtered = Object.keys(filter).length > 0 || options.pruned === true;
  if (ids.length > 0 && (filtered || options.all)) throw new Error('name events, or use filters: not both');
  if (ids.length === 0 && !filtered && !options.all)
    throw new Error('name events, use filters, or say --all for every dead letter');
  const selection: Selection =
    ids.length > 0 ? { eventIds: ids } : { filter, ...(options.pruned && { pruned: true }) };
  return { filter, filtered, selection };
}

async function act(
  deadLetters: DeadLetters,
  config: RelayConfig,
  verb: 'replay' | 'discard',
  ids: readonly string[],
  options: ActOptions,
  reason = '',
): Promise<number> {
  const { filter, filtered, selection } = selected(ids, options);
  const by = operator();
  const perform = (more: {
    dryRun?: boolean;
    stopped?: () => boolean;
    onProgress?: (seen: number) => void;
  }) =>
    verb === 'replay'
      ? deadLetters.replay(selection, { by, ...more })
      : deadLetters.discard(selection, reason, { by, ...more });

  const would = await perform({ dryRun: true });
  if (would.done === 0) {
    print(
      text`There is nothing to ${verb}: ${ids.length === 0 ? `no dead letter ${filtered ? 'matches' : 'is there'}` : 'none of these events is dead'}.`,
    );
    printRefusals(would);
    return would.refused === 0 ? EXIT.done : EXIT.failed;
  }
  const past = verb === 'replay' ? 'replayed' : 'discarded';
  if (options.dryRun) {
    if (!('eventIds' in selection) && !options.pruned) printGroups(await deadLetters.groups(filter));
    print(text`${counted(would.done, 'dead letter')} would be ${past}.`);
    printRefusals(would);
    return would.refused === 0 ? EXIT.done : EXIT.failed;
  }
  const question = text`${verb === 'replay' ? 'Replay' : 'Discard'} ${counted(would.done, 'dead letter')}?`;
  if (!(await confirmed(question, options.yes === true))) return EXIT.failed;

  const { result, interrupted } = await withProgress(
    ' {percentage}% | {bar} | {value} of {total}',
    would.done + would.refused,
    (update) => untilInterrupted((stopped) => perform({ stopped, onProgress: (seen) => update(seen) })),
    { isDone: (it) => !it.interrupted },
  );
  print(text`${by} ${past} ${counted(result.done, 'dead letter')}.`);
  if (verb === 'replay' && result.done > 0)
    print(
      text`${result.done === 1 ? 'It goes' : 'They go'} out at once where a relay runs, else within ${config.pollIntervalMs / 1_000} s of the relay’s start.`,
    );
  printRefusals(result);
  if (interrupted) print(text`Interrupted: run it again for the rest.`);
  return result.refused === 0 && !interrupted ? EXIT.done : EXIT.failed;
}

function printRefusals({ refused, refusals }: ActionResult): void {
  if (refused === 0) return;
  print(text`${counted(refused, 'event')} left as before:`);
  for (const { eventId, reason } of refusals) print(text`  ${eventId}  ${reason}`);
  if (refused > refusals.length) print(text`  … and ${refused - refusals.length} more`);
}

/** Three lines for each: an event id and an aggregate's id leave no room for columns. Ids and names are whole. */
function printLetter(it: ListedDeadLetter): void {
  printAll([
    ...folded(text`${toSecond(it.deadLetteredAt)}  ${it.eventId}  after ${counted(it.attempts, 'attempt')}`),
    ...folded(
      text`  ${name(it.eventType)} of ${name(it.aggregateType)}:${it.aggregateId} to ${name(it.topic)}`,
    ),
    cut(text`  ${it.error}`),
  ]);
}

function printGroups(groups: readonly DeadLetterGroup[]): void {
  for (const it of groups)
    printAll([
      cut(text`${String(it.count).padStart(6)}  ${it.error}`),
      ...folded(text`        ${joined(it.eventTypes.map(name), ', ')}, e.g. ${it.example}`),
      ...folded(text`        ${toSecond(it.first)} to ${toSecond(it.last)}`),
    ]);
}

type Aggregate = Readonly<{ aggregateType?: string; aggregateId: string }>;

/** Option parser: an aggregate. Its type may have colons. */
function aggregate(given: string): Aggregate {
  const colon = given.lastIndexOf(':');
  const aggregateId = given.slice(colon + 1);
  if (!isUuid(aggregateId))
    throw new InvalidArgumentError('Expected the id of an aggregate (a uuid), or type:id.');
  return colon === -1 ? { aggregateId } : { aggregateType: given.slice(0, colon), aggregateId };
}

function eventId(given: string): string {
  if (!isUuid(given)) throw new InvalidArgumentError('Expected an event_id (a uuid).');
  return given.toLowerCase();
}

const eventIds = (given: string, before: readonly string[] | undefined): string[] => [
  ...(before ?? []),
  eventId(given),
];

function count(given: string): number {
  const number = Number(given);
  if (!Number.isInteger(number) || number < 1 || number > MOST_LISTED)
    throw new InvalidArgumentError(`Expected a number from 1 to ${MOST_LISTED}.`);
  return number;
}

export const eventFilterOf = ({ type, topic, aggregate: of }: EventOptions) => ({
  ...(type !== undefined && { eventType: type }),
  ...(topic !== undefined && { topic }),
  ...of,
});

function filterOf({ error, since, until, ...events }: FilterOptions): DeadLetterFilter {
  if (since !== undefined && until !== undefined) range(since, until);
  return {
    ...eventFilterOf(events),
    ...(error !== undefined && { error }),
    ...(since !== undefined && { since: instant(since) }),
    ...(until !== undefined && { until: instant(until) }),
  };
}
