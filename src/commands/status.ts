import type { Command } from 'commander';
import { InvalidArgumentError } from 'commander';
import type { Redis } from 'ioredis';
import picocolors from 'picocolors';
import type { RelayConfig } from '../config/config.ts';
import { createPool } from '../connections/pool.ts';
import { openBoth } from '../connections/servers.ts';
import { createFigures, entriesAtRisk } from '../operations/figures.ts';
import { createStatus, inFlight, isSilent, type Status } from '../operations/fleet-status.ts';
import { createFleetReader } from '../operations/heartbeat.ts';
import { createBacklog } from '../outbox/backlog.ts';
import { createQueues } from '../queue/queues.ts';
import { APPEND_CONNECTION } from '../streams/append.ts';
import { createStreamInspector } from '../streams/inspect.ts';
import { createLogger } from '../telemetry/logger.ts';
import { EXIT, print, withConfig } from './command.ts';

type StatusOptions = Readonly<{ json?: boolean; watch?: number | true }>;

/** A server that does not answer within this is left out, and named. */
const DEADLINE_MS = 4_000;
const WATCH_SECONDS = 2;

export function addStatus(program: Command): void {
  program
    .command('status')
    .description(
      'what the relay is doing: backlog, what the oldest event waits for, rates, queues, pods, streams',
    )
    .option('--watch [seconds]', `refresh in place, every ${WATCH_SECONDS} s if not told otherwise`, seconds)
    .option('--json', 'print JSON, one object for each look')
    .addHelpText('after', '\nExits 0 if database and Redis have answered, else 1.')
    .action((options: StatusOptions) => withConfig((config) => runStatus(config, options)));
}

function seconds(text: string): number {
  const value = Number(text);
  if (!(value >= 0.1 && value <= 3_600)) throw new InvalidArgumentError('Expected seconds from 0.1 to 3600.');
  return value;
}

/** Waits for no server: one that is away is part of the status. */
async function runStatus(config: RelayConfig, options: StatusOptions): Promise<number> {
  const pool = createPool(config.databaseUrl, {
    max: 3,
    application_name: 'relay-status',
    connectionTimeoutMillis: DEADLINE_MS,
  });
  pool.on('error', () => {}); // the next query says so
  const [redis, streamRedis] = openBoth(config, {
    ...APPEND_CONNECTION,
    connectTimeout: DEADLINE_MS,
    commandTimeout: DEADLINE_MS,
    connectionName: 'relay-status',
  });
  const { settled: connected, whenThere } = watchConnection(redis);
  const streams = watchConnection(streamRedis);
  const inspectStreams = createStreamInspector(streamRedis);
  const backlog = createBacklog(pool, { ...config, statementTimeoutMs: DEADLINE_MS });
  const queues = createQueues(redis, config, createLogger('warn', process.stderr));
  const fleet = createFleetReader(redis, `${config.queuePrefix}:${config.queueName}`);
  const status = createStatus({
    figures: createFigures({
      backlog: backlog.count,
      databaseTime: backlog.time,
      queues: () => whenThere(queues.figures),
      fleet: () => whenThere(fleet),
      inspectStreams: (names) => streams.whenThere(() => inspectStreams(names)),
      streams: [config.streamName, config.dlqStreamName],
      deadlineMs: DEADLINE_MS,
    }),
    oldest: backlog.oldest,
    rates: backlog.rates,
    jobState: (eventId) => whenThere(() => queues.jobState(eventId)),
    maxInFlight: config.maxInFlight,
    deadlineMs: DEADLINE_MS,
  });
  try {
    await Promise.all([connected, streams.settled]);
    const isInPlace = process.stdout.isTTY === true && options.json !== true;
    let found = await status();
    if (options.watch === undefined) show(found, config, options);
    else {
      const everyMs = (options.watch === true ? WATCH_SECONDS : options.watch) * 1_000;
      const stop = new AbortController();
      for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, () => stop.abort());
      while (!stop.signal.aborted) {
        // Home, and what is below the new text erased: a cleared screen would flicker.
        if (isInPlace) process.stdout.write('\x1b[H');
        show(found, config, options, isInPlace ? '\x1b[K' : '');
        if (isInPlace) process.stdout.write('\x1b[J');
        await pause(everyMs, stop.signal);
        if (!stop.signal.aborted) found = await status();
      }
    }
    return found.problems.length === 0 ? EXIT.done : EXIT.failed;
  } finally {
    for (const it of [redis, streamRedis]) it.disconnect();
    await pool.end();
  }
}

function watchConnection(redis: Redis) {
  let lost: Error | undefined;
  return {
    /** Resolves when the connection is there, or has failed. */
    settled: new Promise<void>((resolve) => {
      redis.on('error', (error) => {
        lost = error;
        resolve();
      });
      redis.once('ready', () => resolve());
    }),
    /** What ioredis and BullMQ say without a connection tells nobody why there is none. */
    async whenThere<T>(ask: () => Promise<T>): Promise<T> {
      if (redis.status !== 'ready') throw lost ?? new Error(`the connection is ${redis.status}`);
      return ask();
    },
  };
}

const pause = (ms: number, signal: AbortSignal): Promise<void> =>
  new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener('abort', () => {
      clearTimeout(timer);
      resolve();
    });
  });

function show(status: Status, config: RelayConfig, options: StatusOptions, endOfLine = ''): void {
  if (options.json) {
    print(JSON.stringify(status));
    return;
  }
  const colours = picocolors.createColors(process.stdout.isTTY === true && !process.env.NO_COLOR);
  const lines = describe(status, config, colours);
  print(lines.map((line) => `${line}${endOfLine}`).join('\n'));
}

type Colours = ReturnType<typeof picocolors.createColors>;

/** The status as lines of text, a paragraph for each subject. */
function describe(status: Status, config: RelayConfig, paint: Colours): string[] {
  const { figures, rates } = status;
  const { backlog, queues, fleet, streams } = figures;
  const lines: string[] = [];
  const paragraph = (title: string, rows: readonly string[]) => {
    if (lines.length > 0) lines.push('');
    lines.push(paint.bold(title), ...rows.map((row) => `  ${row}`));
  };
  for (const problem of status.problems) lines.push(paint.red(`no answer: ${problem}`));

  if (backlog) {
    const { oldestSeconds: oldest, limit } = backlog;
    const row = (state: keyof typeof backlog, ageOf: number | null | undefined, isBad = false) => {
      const count = backlog[state] as number;
      const text = `${state.padEnd(9)}${counted(count, limit).padStart(9)}`;
      const suffix = ageOf === undefined || ageOf === null ? '' : `   oldest ${duration(ageOf)}`;
      return isBad && count > 0 ? paint.yellow(text + suffix) : text + suffix;
    };
    const isLate = (oldest.waiting ?? 0) > 60;
    paragraph('Backlog', [
      row('fresh', undefined),
      row('leased', undefined),
      row('due', undefined),
      row('retrying', oldest.retrying, true),
      row('parked', oldest.parked),
      row('dead', oldest.dead, true),
      (isLate ? paint.red : (text: string) => text)(
        oldest.waiting === null
          ? 'nothing waits that should be out already'
          : `the oldest that should be out already: ${duration(oldest.waiting)}`,
      ),
    ]);
  }
  if (status.oldest) {
    paragraph(
      'Oldest events',
      status.oldest.length === 0
        ? ['none waits']
        : status.oldest.flatMap((row) => [
            `${row.state.padEnd(9)} ${row.eventId}  ${clean(row.eventType)} of ${clean(row.aggregateType)} ${row.aggregateId}`,
            `${' '.repeat(10)}${row.ageSeconds === null ? '' : `${duration(row.ageSeconds)} old, `}to ${clean(row.topic)}; waits ${clean(row.waitsFor, 300)}`,
          ]),
    );
  }
  if (rates) {
    const row = (name: string, rate: { lastMinute: number; lastFiveMinutes: number }) =>
      `${name.padEnd(12)}${perSecond(rate.lastMinute)} in the last minute ${perSecond(rate.lastFiveMinutes)} in the last five`;
    paragraph('Rates', [row('published', rates.published), row('dead', rates.dead)]);
  }
  if (queues) {
    const rows = Object.entries(queues).map(([name, { isPaused, ...counts }]) =>
      [
        `${config.queueName}-${name}`.padEnd(16),
        ...Object.entries(counts).map(([state, count]) => `${state} ${count}`),
        ...(isPaused ? [paint.yellow('PAUSED')] : []),
      ].join('  '),
    );
    paragraph('Queues', [
      ...rows,
      `${inFlight(queues.publish)} jobs of at most ${status.maxInFlight} in flight`,
    ]);
  }
  if (fleet) {
    const tick = status.lastTickSecondsAgo;
    paragraph('Pods', [
      ...table(
        fleet.pods.map((pod) => [
          clean(pod.pod),
          pod.version,
          isSilent(pod) ? paint.red(`silent for ${duration(pod.heardSecondsAgo)}`) : pod.phase,
          `up ${duration(pod.upSeconds)}`,
          `${pod.inHand} of ${pod.concurrency} jobs in hand`,
        ]),
      ),
      ...(fleet.pods.length === 0 ? [paint.red('none was heard of in the last ten minutes')] : []),
      `last tick of the schedule: ${tick === null ? 'none was seen' : `${duration(tick)} ago`}, due every ${duration(config.pollIntervalMs / 1_000)}`,
    ]);
  }
  if (streams) {
    paragraph(
      'Streams',
      streams.length === 0
        ? ['none yet']
        : streams.flatMap(({ stream, length, groups, moreGroups }) => {
            const maxLength = stream === config.dlqStreamName ? config.dlqMaxLen : config.streamMaxLen;
            return [
              `${clean(stream)}  ${length} entries${maxLength === 0 ? '' : ` of about ${maxLength}`}${groups.length === 0 ? ', no consumer group' : ''}`,
              ...table(
                groups.map((it) => {
                  const atRisk = entriesAtRisk(it.unacknowledged, maxLength);
                  return [
                    `  ${clean(it.group)}`,
                    `${it.consumers} consumers`,
                    `${it.isEstimate ? 'about ' : ''}${it.lag} to read`,
                    `${it.pending} pending`,
                    ...(atRisk > 0 ? [paint.red(`${atRisk} about to be trimmed unread`)] : []),
                  ];
                }),
              ),
              ...(moreGroups > 0 ? [`  and ${moreGroups} more groups`] : []),
            ];
          }),
    );
  }
  return lines;
}

/** Cells in columns, each as wide as its widest. */
function table(rows: readonly (readonly string[])[]): string[] {
  const widths: number[] = [];
  for (const row of rows)
    for (const [i, cell] of row.entries()) widths[i] = Math.max(widths[i] ?? 0, cell.length);
  return rows.map((row) =>
    row.map((cell, i) => (i === row.length - 1 ? cell : cell.padEnd(widths[i] ?? 0))).join('  '),
  );
}

/** A text of a row or a key: no control characters for the terminal, and not too long. */
function clean(text: string, length = 80): string {
  const printable = text.replaceAll(/\p{C}/gu, ' ');
  return printable.length > length ? `${printable.slice(0, length)}...` : printable;
}

const counted = (count: number, limit: number) => (count >= limit ? `${limit}+` : String(count));
const perSecond = (rate: number) => `${rate.toFixed(rate < 10 ? 1 : 0)}/s`.padStart(9);

function duration(seconds: number): string {
  if (seconds < 1) return `${Math.round(seconds * 1_000)} ms`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7_200) return `${Math.round(seconds / 60)} min`;
  return seconds < 172_800 ? `${Math.round(seconds / 3_600)} h` : `${Math.round(seconds / 86_400)} d`;
}
