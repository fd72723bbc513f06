import type { Command } from 'commander';
import type { Redis } from 'ioredis';
import type { RelayConfig } from '../config/config.ts';
import { becomeOwner } from '../connections/ownership.ts';
import { compareEntryIds, counted } from '../event.ts';
import { createOutbox } from '../outbox/outbox.ts';
import type { FinalizedRow } from '../outbox/published.ts';
import { createQueues } from '../queue/queues.ts';
import { createWake } from '../queue/scheduler.ts';
import { type Comparison, compareRows, createCompare, type Found, totals } from '../recovery/lost-data.ts';
import { streamOptionsOf } from '../stream-options.ts';
import { endEpoch } from '../streams/epoch.ts';
import { createLookup } from '../streams/lookup.ts';
import type { Logger } from '../telemetry/logger.ts';
import { untilInterrupted, withProgress } from './act.ts';
import { EXIT, range, WHEN, when, withConfig, withServers } from './command.ts';
import { name, print, printAll, printJson, table, text, toSecond } from './terminal.ts';

type VerifyOptions = Readonly<{
  /** A time, or how long ago in ms. */
  since: Date | number;
  until?: Date | number;
  /** Only this stream. */
  topic?: string;
  /** Makes the rows of missing entries unpublished, so that the relay publishes them again. */
  repair?: boolean;
  json?: boolean;
}>;

/** Rows whose entries are missing are collected, and repaired together when there are so many. */
const HELD_ROWS = 20_000;
/** Rows in one step of the repair. */
const STEP_ROWS = 1_000;
/** How long a repair waits for another process that compares table and streams. */
const EPOCH_TIMEOUT_MS = 60_000;

export function add(command: Command): void {
  command
    .requiredOption('--since <when>', `from then on: ${WHEN}`, when)
    .option('--until <when>', 'up to then (default: now)', when)
    .option('--topic <stream>', 'only this stream')
    .option('--repair', 'have the relay publish again what is missing, in order; not what was trimmed')
    .option('--json', 'print the result as JSON')
    .addHelpText('after', '\nExits 0 if nothing is missing (any more), else 1.')
    .action((options: VerifyOptions) =>
      withConfig(async (config) => ((await verify(config, options)) ? EXIT.done : EXIT.failed)),
    );
}

/**
 * Compares what the table says is published, or dead, with what is in the streams; with `repair` makes unpublished what
 * is missing, so that the relay publishes it again. Prints a line for each stream.
 * @returns whether nothing is missing, or all of it is to be published again
 * @throws {NotReadyError} when a server cannot be reached
 */
const verify = (config: RelayConfig, options: VerifyOptions): Promise<boolean> => {
  const times = range(options.since, options.until ?? 0);
  return withServers(
    config,
    'relay-verify',
    async ({ pool, redis: queueRedis, streamRedis: redis, logger }) => {
      const outbox = createOutbox(pool, { ...config, statementTimeoutMs: config.publishTimeoutMs });
      const streamOptions = streamOptionsOf(config);
      const { epochKey, dlqStreamName } = streamOptions;
      const streams = { lookup: createLookup(redis, streamOptions), dlqStreamName };
      const compare = createCompare({ published: outbox, ...streams });
      const since =
        typeof options.since === 'number' ? await outbox.ago(options.since) : options.since.toISOString();
      const until = options.until === undefined ? await outbox.ago(0) : times.until;

      /**
       * Ends the epoch, and makes the rows unpublished whose entries are still missing. The pods append nothing meanwhile,
       * so this is short. It goes in the order of the entries: after an interruption only later ones are missing.
       */
      const repair = async (missing: readonly FinalizedRow[]): Promise<number> => {
        // Rows were marked published in another order than their entries were appended.
        const rows = missing.toSorted((a, b) => compareEntryIds(a.entryId, b.entryId));
        const repaired = new Map<string, Found>();
        const recover = async () => {
          await outbox.epochsEnded();
          for (let i = 0; i < rows.length; i += STEP_ROWS) {
            const some = rows.slice(i, i + STEP_ROWS);
            await compareRows(streams, some, { remembering: true, onLost: outbox.unpublish }, repaired);
          }
          await outbox.expireAllLeases();
        };
        await endEpoch({
          redis,
          key: epochKey,
          assertOwner: () => becomeOwner(pool, redis, config),
          database: outbox.databaseState,
          recover,
          timeoutMs: EPOCH_TIMEOUT_MS,
        });
        return totals(repaired).unpublished;
      };

      const held: FinalizedRow[] = [];
      let unpublished = 0;
      const repairHeld = async () => {
        if (held.length > 0) unpublished += await repair(held.splice(0));
      };
      // It advances by the time of the rows.
      const from = Date.parse(since);
      const { result: found, interrupted } = await withProgress(
        ` {percentage}% | {bar} | rows: {rows}, missing: {lost}${options.repair ? ', to be published again: {unpublished}' : ''}`,
        Math.max(1, Date.parse(until) - from),
        (update) =>
          untilInterrupted(async (stopped) => {
            const progress = (at: string, sofar: Comparison) => {
              const { rows, lost } = totals(sofar);
              update(Math.max(0, Date.parse(at) - from) || 0, { rows, lost, unpublished });
            };
            const comparison = await compare({
              ...{ since, until, stopped, onProgress: progress },
              ...(options.topic !== undefined && { stream: options.topic }),
              ...(options.repair && {
                async onLost(rows) {
                  held.push(...rows);
                  if (held.length >= HELD_ROWS) await repairHeld();
                  return 0;
                },
              }),
            });
            await repairHeld();
            if (!stopped()) progress(until, comparison);
            return comparison;
          }),
        { isDone: (it) => !it.interrupted, numbers: { rows: 0, lost: 0, unpublished: 0 } },
      );
      if (unpublished > 0) await wakeRelay(config, queueRedis, logger);

      const all = { ...totals(found), unpublished };
      if (options.json) {
        const byStream = Object.fromEntries(
          [...found].map(([stream, { unpublished: _, ...counts }]) => [stream, counts]),
        );
        printJson({ since: iso(since), until: iso(until), streams: byStream, total: all, interrupted });
      } else report(found, all, since, until, options);
      if (interrupted && !options.json) print(text`Interrupted: the rest of the time was not compared.`);
      return !interrupted && all.lost === unpublished && all.unreadable === 0;
    },
  );
};

/** Asks for a claim now. Without it, the next tick would claim the rows. */
async function wakeRelay(config: RelayConfig, redis: Redis, logger: Logger): Promise<void> {
  const queues = createQueues(redis, config, logger);
  await createWake(queues.claim, logger)();
  await queues.close();
}

/** PostgreSQL has written it in its own form. */
const iso = (time: string): string => new Date(time).toISOString();

function report(
  found: ReadonlyMap<string, Found>,
  { rows, lost, unpublished, unreadable }: Found,
  since: string,
  until: string,
  { repair = false, topic }: VerifyOptions,
): void {
  const lines = [
    ['rows', 'there', 'trimmed', 'missing', 'unreadable', 'stream'],
    ...[...found].map(([stream, it]) => {
      const there = it.rows - it.lost - it.trimmed - it.unreadable;
      return [...[it.rows, there, it.trimmed, it.lost, it.unreadable].map(String), stream];
    }),
  ];
  const widest = (i: number) => Math.max(...lines.map((cells) => cells[i]?.length ?? 0));
  print(text`Rows published or given up from ${toSecond(iso(since))} to ${toSecond(iso(until))}:`);
  printAll(table(lines.map((cells) => cells.map((it, i) => (i < 5 ? it.padStart(widest(i)) : name(it))))));
  if (rows === 0)
    print(text`No row${topic === undefined ? '' : ` with topic ${topic}`} has an entry id in this time.`);
  else if (lost === 0 && unreadable === 0) print(text`Nothing is missing.`);
  else if (!repair)
    print(
      text`${counted(lost, 'entry is', 'entries are')} missing; the same command with --repair publishes ${lost === 1 ? 'it' : 'them'} again.`,
    );
  else
    print(
      text`The relay publishes ${unpublished} of ${counted(lost, 'missing entry', 'missing entries')} again, in order.`,
    );
  if (unreadable > 0)
    print(
      text`${counted(unreadable, 'row was', 'rows were')} not compared: the key of the topic is no stream, or must not be read.`,
    );
}
