import type { Command } from 'commander';
import { InvalidArgumentError } from 'commander';
import type { Redis } from 'ioredis';
import type { RelayConfig } from '../config/config.ts';
import { asking, type Pool } from '../connections/database.ts';
import { assertOurs } from '../connections/ownership.ts';
import { lastErrorOf } from '../connections/preflight.ts';
import { FAILS_FAST } from '../connections/servers.ts';
import { counted } from '../event.ts';
import { pause } from '../lifecycle.ts';
import { createFigures, entriesAtRisk } from '../operations/figures.ts';
import { createStatus, inFlight, isSilent, type Status } from '../operations/fleet-status.ts';
import { createFleetReader } from '../operations/heartbeat.ts';
import { createBacklog } from '../outbox/backlog.ts';
import { lacks, missingFromTable } from '../outbox/required.ts';
import { createQueues } from '../queue/queues.ts';
import { createStreamInspector } from '../streams/inspect.ts';
import { createLogger } from '../telemetry/logger.ts';
import { type Connections, EXIT, withConfig, withConnections } from './command.ts';
import { signalled } from './signals.ts';
import {
  colours,
  columns,
  cut,
  duration,
  folded,
  isTerminal,
  name,
  type Printable,
  printAll,
  printInPlace,
  printJson,
  type Text,
  table,
  tableRows,
  text,
} from './terminal.ts';

type StatusOptions = Readonly<{ json?: boolean; watch?: number | true }>;

/** A server that does not answer within this is left out, and named. */
const DEADLINE_MS = 4_000;
const WATCH_SECONDS = 2;

export function add(command: Command): void {
  command
    .option('--watch [seconds]', `refresh in place, every ${WATCH_SECONDS} s if not told otherwise`, seconds)
    .option('--json', 'print JSON, one object for each refresh')
    .addHelpText('after', '\nExits 0 if database and Redis have answered and belong together, else 1.')
    .action((options: StatusOptions) => withConfig((config) => runStatus(config, options)));
}

function seconds(given: string): number {
  const value = Number(given);
  if (!(value >= 0.1 && value <= 3_600)) throw new InvalidArgumentError('Expected seconds from 0.1 to 3600.');
  return value;
}

/** Waits for no server: one that is away is part of the status. */
const runStatus = (config: RelayConfig, options: StatusOptions): Promise<number> => {
  const timeouts = { connectTimeout: DEADLINE_MS, commandTimeout: DEADLINE_MS };
  const connections = {
    pool: { max: 3, connectionTimeoutMillis: DEADLINE_MS },
    redis: { ...FAILS_FAST, ...timeouts },
  };
  return withConnections(config, 'relay-status', connections, (on) => showStatus(config, options, on));
};

async function showStatus(
  config: RelayConfig,
  options: StatusOptions,
  { pool, redis, streamRedis }: Connections,
): Promise<number> {
  const { answered: connected, whenThere } = watchConnection(redis);
  const streams = watchConnection(streamRedis);
  const inspectStreams = createStreamInspector(streamRedis);
  const backlog = createBacklog(pool, { ...config, statementTimeoutMs: DEADLINE_MS });
  const queues = createQueues(redis, config, createLogger('warn', process.stderr));
  const fleet = createFleetReader(redis, `${config.queuePrefix}:${config.queueName}`);
  const status = createStatus({
    figures: createFigures({
      backlog: backlog.count,
      databaseTime: backlog.time,
      notifyQueueUsage: backlog.notifyQueueUsage,
      queues: () => whenThere(queues.figures),
      fleet: () => whenThere(fleet),
      inspectStreams: (names) => streams.whenThere(() => inspectStreams(names)),
      streams: [config.streamName, config.dlqStreamName],
      ...(streamRedis !== redis && { streamServer: 'stream Redis' }),
      deadlineMs: DEADLINE_MS,
    }),
    oldest: backlog.oldest,
    rates: backlog.rates,
    jobState: (eventId) => whenThere(() => queues.jobState(eventId)),
    async assertOurs() {
      await whenThere(() => assertOurs(pool, redis, config));
      if (streamRedis !== redis) await streams.whenThere(() => assertOurs(pool, streamRedis, config));
    },
    maxInFlight: config.maxInFlight,
    deadlineMs: DEADLINE_MS,
  });
  await Promise.all([connected, streams.answered]);
  const isInPlace = isTerminal() && options.json !== true && options.watch !== undefined;
  let found = await status();
  // If the table is missing or old, say so, instead of the same error for each figure.
  if (found.problems.length > 0) await assertMigrated(pool);
  if (options.watch === undefined) show(found, config, options);
  else {
    const everyMs = (options.watch === true ? WATCH_SECONDS : options.watch) * 1_000;
    const stop = new AbortController();
    void signalled().then(() => stop.abort());
    while (!stop.signal.aborted) {
      show(found, config, options, isInPlace);
      await pause(everyMs, stop.signal);
      if (!stop.signal.aborted) found = await status();
    }
  }
  const isGood = found.problems.length === 0 && found.wrongDatabase === undefined;
  return isGood ? EXIT.done : EXIT.failed;
}

function watchConnection(redis: Redis) {
  const lost = lastErrorOf(redis);
  return {
    /** Resolves when the connection is there, or has failed. */
    answered: new Promise<void>((resolve) => {
      redis.once('error', () => resolve());
      redis.once('ready', () => resolve());
    }),
    /** What ioredis and BullMQ say without a connection tells nobody why there is none. */
    async whenThere<T>(ask: () => Promise<T>): Promise<T> {
      if (redis.status !== 'ready') throw lost() ?? new Error(`the connection is ${redis.status}`);
      return ask();
    },
  };
}

/** @throws when the database answers, and has no outbox that this version can read */
async function assertMigrated(pool: Pool): Promise<void> {
  const missing = await missingFromTable(asking(pool, DEADLINE_MS)).catch(() => []);
  if (missing.length > 0) throw new Error(lacks(missing));
}

function show(status: Status, config: RelayConfig, options: StatusOptions, isInPlace = false): void {
  if (options.json) {
    printJson(status);
    return;
  }
  const lines = describe(status, config);
  if (isInPlace) printInPlace(lines);
  else printAll(lines);
}

/** The status as lines of text, a paragraph for each subject. */
function describe(status: Status, config: RelayConfig): Text[] {
  const paint = colours();
  const { figures, rates } = status;
  const { backlog, queues, fleet, streams } = figures;
  const lines: Text[] = [];
  const width = columns() - 2;
  const paragraph = (title: string, rows: readonly Printable[]) => {
    if (lines.length > 0) lines.push(text``);
    const folds = rows.flatMap((row) => folded(row, width));
    lines.push(paint.bold(title), ...folds.map((line) => text`  ${line}`));
  };
  const unknown = (title: string, server: string) => paragraph(title, [`unknown: ${server} gives no answer`]);
  const wrong = [status.wrongDatabase ?? [], status.problems.map((it) => `no answer: ${it}`)].flat();
  lines.push(...wrong.flatMap((it) => folded(it).map(paint.red)));

  if (backlog) {
    const { oldestSeconds: oldest, limit } = backlog;
    const row = (state: keyof typeof backlog, ageOf: number | null | undefined, isBad = false) => {
      const count = backlog[state] as number;
      const suffix = ageOf === undefined || ageOf === null ? '' : `   oldest ${duration(ageOf)}`;
      const line = `${state.padEnd(9)}${upTo(limit, count).padStart(9)}${suffix}`;
      return isBad && count > 0 ? paint.yellow(line) : line;
    };
    const isLate = (oldest.waiting ?? 0) > 60;
    paragraph('Backlog', [
      row('fresh', undefined),
      row('leased', undefined),
      row('due', undefined),
      row('retrying', oldest.retrying, true),
      row('parked', oldest.parked),
      row('dead', oldest.dead, true),
      (isLate ? paint.red : (it: string) => it)(
        oldest.waiting === null
          ? 'nothing waits that should be out already'
          : `the oldest that should be out already: ${duration(oldest.waiting)}`,
      ),
      ...(backlog.dead > 0 ? ['why events are dead: relay dlq list --group'] : []),
    ]);
  } else unknown('Backlog', 'PostgreSQL');
  if (status.oldest) {
    const indent = text`${' '.repeat(10)}`;
    paragraph(
      'Oldest events',
      status.oldest.length === 0
        ? ['none waits']
        : status.oldest.flatMap((row) => [
            text`${row.state.padEnd(9)} ${row.eventId}${row.ageSeconds === null ? '' : `  ${duration(row.ageSeconds)} old`}`,
            text`${indent}${name(row.eventType)} of ${name(row.aggregateType)}:${row.aggregateId} to ${name(row.topic)}`,
            text`${indent}waits ${cut(row.waitsFor, 2 * width)}`,
          ]),
    );
  } else unknown('Oldest events', 'PostgreSQL');
  if (rates) {
    const row = (name: string, rate: { lastMinute: number; lastFiveMinutes: number }) =>
      `${name.padEnd(12)}${events(60, rate.lastMinute)} in the last minute ${events(300, rate.lastFiveMinutes)} in the last five`;
    paragraph('Rates', [row('published', rates.published), row('dead', rates.dead)]);
  } else unknown('Rates', 'PostgreSQL');
  if (queues) {
    const rows = Object.entries(queues).map(([name, { isPaused, limits, ...counts }]) => [
      text`${config.queueName}-${name}`,
      ...Object.entries(counts).map(([state, count]) => text`${state} ${count}`),
      ...(isPaused ? [paint.yellow('PAUSED')] : []),
      ...limits.map((limit) => paint.yellow(limit)),
    ]);
    paragraph('Queues', [
      ...table(rows, width),
      ...(queues.claim.failed > 0 ? ['a failed tick needs nothing: the next one does its work'] : []),
      `${counted(inFlight(queues.publish), 'job')} in flight, of at most ${status.maxInFlight}`,
    ]);
  } else unknown('Queues', 'Redis');
  if (fleet) {
    const tick = status.lastTickSecondsAgo;
    const noTick = fleet.pods.every(isSilent) ? 'unknown, since no pod runs' : 'none was seen';
    paragraph('Pods', [
      ...table(
        fleet.pods.map((pod) => [
          text`${pod.pod}`,
          text`${pod.version}`,
          ...(isSilent(pod)
            ? [paint.red(`silent for ${duration(pod.heardSecondsAgo)}`)]
            : [
                pod.phase,
                text`up ${duration(pod.upSeconds + pod.heardSecondsAgo)}`,
                text`${pod.inProgress} of ${counted(pod.concurrency, 'job')} in progress`,
              ]),
        ]),
        width,
      ),
      ...(fleet.pods.length === 0 ? [paint.red('no pod is running')] : []),
      `last tick of the schedule: ${tick === null ? noTick : `${duration(tick)} ago`}, due every ${duration(config.pollIntervalMs / 1_000)}`,
    ]);
  } else unknown('Pods', 'Redis');
  if (streams) {
    const limitOf = (stream: string) =>
      stream === config.dlqStreamName ? config.dlqMaxLen : config.streamMaxLen;
    const rows = tableRows(
      streams.map(({ stream, length, groups }) => [
        name(stream),
        `${counted(length, 'entry', 'entries')}${limitOf(stream) === 0 ? '' : ` of about ${limitOf(stream)}`}`,
        ...(groups.length === 0 ? ['no group'] : []),
      ]),
      width,
    );
    const groupsOf = ({ stream, groups, moreGroups }: (typeof streams)[number]) => [
      ...table(
        groups.map((it) => {
          const atRisk = entriesAtRisk(it.unacknowledged, limitOf(stream));
          return [
            text`  ${name(it.group)}`,
            counted(it.consumers, 'consumer'),
            `${it.isEstimate ? 'about ' : ''}${it.lag} to read`,
            `${it.pending} pending`,
            ...(atRisk > 0 ? [paint.red(`${atRisk} about to be trimmed unread`)] : []),
          ];
        }),
        width,
      ),
      ...(moreGroups > 0 ? [`  and ${counted(moreGroups, 'more group')}`] : []),
    ];
    paragraph(
      'Streams',
      streams.length === 0
        ? ['none yet']
        : streams.flatMap((stream, i) => [...(rows[i] ?? []), ...groupsOf(stream)]),
    );
  } else unknown('Streams', fleet ? 'its Redis' : 'Redis');
  return lines;
}

const upTo = (limit: number, count: number) => (count >= limit ? `${limit}+` : String(count));
/** Events in so many seconds, and how many a second where that says more. */
const events = (seconds: number, rate: number) =>
  `${Math.round(rate * seconds)}${rate < 10 ? '' : ` (${Math.round(rate)}/s)`}`.padStart(9);
