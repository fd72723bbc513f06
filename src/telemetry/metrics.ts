import { Counter, collectDefaultMetrics, Gauge, Histogram, Registry } from 'prom-client';
import type { RelayConfig } from '../config/config.ts';
import { type Attempt, brief, type OutboxEvent } from '../event.ts';
import type { Check } from '../http/health.ts';
import { overall } from '../http/health.ts';
import { withDeadline } from '../lifecycle.ts';
import { entriesAtRisk, type SharedFigures } from '../operations/figures.ts';
import { inFlight } from '../operations/fleet-status.ts';

/** Most pairs of topic and event type that get series of their own. All further pairs are `other`. */
const MAX_LABELLED = 100;
const OTHER = 'other';
/** Sources that do not answer in time are left out. Prometheus waits 10 s by default. */
const DEADLINE_MS = 1_500;

const PROCESSING_BUCKETS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10];
const LATENCY_BUCKETS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60, 300, 1_800];
const BATCH_BUCKETS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 5_000, 10_000];

/** Maps error texts to the label `reason`, whose values must be few. The first match counts. */
const REASONS: readonly (readonly [name: string, pattern: RegExp])[] = [
  ['oom', /^OOM/],
  ['wrongtype', /WRONGTYPE/],
  ['noperm', /NOPERM|ACL failure/],
  ['readonly', /READONLY|MASTERDOWN/],
  ['loading', /LOADING|MISCONF|NOREPLICAS|BUSY/],
  ['resync', /may have lost/],
  ['acknowledge', /row could not be marked/],
  ['timeout', /no answer within|timed? ?out|in time/i],
  ['connection', /ECONN|EPIPE|connect|isn't writeable|closed|socket/i],
];
const reasonOf = (text: string): string => REASONS.find(([, pattern]) => pattern.test(text))?.[0] ?? OTHER;

/** Metrics of the Node.js process: made once, as a process may run several relays. */
let ofProcess: Registry | undefined;
function processMetrics(): Registry {
  if (ofProcess !== undefined) return ofProcess;
  ofProcess = new Registry();
  collectDefaultMetrics({ register: ofProcess });
  // prom-client names these gauges like counters. Each is also there by type, without the suffix.
  for (const what of ['handles', 'requests', 'resources'])
    ofProcess.removeSingleMetric(`nodejs_active_${what}_total`);
  return ofProcess;
}

export type Metrics = ReturnType<typeof createMetrics>;

/** What is read at each scrape. */
export type MetricsSources = Readonly<{
  /** Publish jobs in progress. */
  inProgress: () => number;
  /** Seconds since this pod last ran a tick, or started. */
  tickSecondsAgo: () => number;
  /** How far this machine's clock is ahead of that of Redis. */
  clockAheadMs: () => number;
  epochIsKnown: () => boolean;
  isRunning: () => boolean;
  ready: () => Promise<Record<string, Check>>;
  /** The checks of `ready` that are about servers. */
  servers: readonly string[];
  figures: () => Promise<SharedFigures | undefined>;
}>;

/**
 * The metrics. Stages report what happened; states are read at each scrape. Figures of the fleet are the same on every
 * pod.
 */
export function createMetrics(
  deps: Pick<RelayConfig, 'concurrency' | 'maxInFlight' | 'streamMaxLen' | 'dlqStreamName' | 'dlqMaxLen'> & {
    /** Whether the five metrics without a prefix get `relay_`: see RELAY_METRICS_PREFIX. */
    prefixed: boolean;
    version: string;
  },
) {
  const registry = new Registry();
  const registers = [registry];
  const old = deps.prefixed ? 'relay_' : '';
  const ABOUT = ['topic', 'event_type'] as const;

  const counter = <L extends string = never>(name: string, help: string, labelNames: readonly L[] = []) =>
    new Counter({ name, help, labelNames, registers });
  const gauge = <L extends string = never>(name: string, help: string, labelNames: readonly L[] = []) =>
    new Gauge({ name, help, labelNames, registers });

  // What this pod has done.
  const processed = counter(`${old}events_processed_total`, 'Events published and acknowledged', ABOUT);
  const failed = counter(`${old}events_failed_total`, 'Attempts to publish that failed', ABOUT);
  const dead = counter(`${old}events_dlq_total`, 'Events moved to the dead-letter stream', ABOUT);
  const processing = new Histogram({
    name: `${old}processing_duration_seconds`,
    help: 'Time from taking a publish job to its outcome',
    labelNames: ABOUT,
    buckets: PROCESSING_BUCKETS,
    registers,
  });
  const batches = new Histogram({
    name: `${old}batch_size_histogram`,
    help: 'Events claimed in one transaction',
    buckets: BATCH_BUCKETS,
    registers,
  });
  const latency = new Histogram({
    name: 'relay_commit_to_stream_seconds',
    help: 'Time from created_at (clock of the database) to the id of the entry (clock of Redis)',
    labelNames: ABOUT,
    buckets: LATENCY_BUCKETS,
    registers,
  });
  const retries = counter(
    'relay_retries_total',
    'Attempts that failed because of the event (the last one too), and attempts that were postponed because of a server and do not count for the event, by reason',
    ['kind', 'reason'],
  );
  const expired = counter('relay_leases_expired_total', 'Leases that ended, by the state of the job', [
    'found',
  ]);
  const resyncs = counter(
    'relay_resyncs_total',
    'Comparisons of table and streams after Redis may have lost data',
  );
  const resynced = counter(
    'relay_resync_entries_total',
    'Entries that Redis lost (restored: published again), and rows whose stream cannot be read (refused)',
    ['outcome'],
  );

  // The state of this pod.
  gauge('relay_build_info', 'Always 1; the version is in the labels', ['version', 'node_version']).set(
    { version: deps.version, node_version: process.version },
    1,
  );
  const ready = gauge('relay_ready', 'Whether the pod runs, and database and Redis are as it needs them');
  const healthy = gauge('relay_server_healthy', 'Whether the server answered this pod, and takes writes', [
    'server',
  ]);
  const epochKnown = gauge(
    'relay_epoch_known',
    'Whether the pod knows that Redis has lost nothing, and so may append',
  );
  const tickAge = gauge(
    'relay_tick_age_seconds',
    'Time since this pod ran a tick of the schedule, or started',
  );
  const clockAhead = gauge(
    'relay_pod_clock_ahead_seconds',
    "Clock of this pod's machine minus that of Redis; the relay goes by that of Redis",
  );
  const inProgress = gauge('relay_jobs_in_hand', 'Publish jobs that the pod works on');
  gauge('relay_jobs_in_hand_limit', 'RELAY_CONCURRENCY').set(deps.concurrency);
  gauge('relay_jobs_in_flight_limit', 'RELAY_MAX_IN_FLIGHT').set(deps.maxInFlight);

  // The state of the fleet: the same on every pod, read by one of them.
  const fleet = {
    age: gauge('relay_figures_age_seconds', 'Age of the figures that all pods share'),
    backlog: gauge('relay_backlog_events', 'Rows that are not published, by state; each counted to 100,000', [
      'state',
    ]),
    waiting: gauge(
      'relay_oldest_waiting_seconds',
      'Age of the oldest event that should be out already; 0 = none',
    ),
    retrying: gauge('relay_oldest_retrying_seconds', 'Age of the oldest event in backoff; 0 = none'),
    parked: gauge('relay_oldest_parked_seconds', 'Age of the oldest event behind another one; 0 = none'),
    dead: gauge('relay_oldest_dead_seconds', 'Time since the oldest dead row was given up; 0 = none'),
    jobs: gauge('relay_queue_jobs', 'Jobs in BullMQ', ['queue', 'state']),
    paused: gauge('relay_queue_paused', 'Whether an operator has paused the queue', ['queue']),
    inFlight: gauge('relay_jobs_in_flight', 'Publish jobs in Redis that are not failed'),
    entries: gauge('relay_stream_entries', 'Entries in the stream', ['stream']),
    entriesLimit: gauge('relay_stream_entries_limit', 'Entries kept in the stream, about; 0 = all', [
      'stream',
    ]),
    lag: gauge('relay_group_lag_entries', 'Entries that the group has not been given yet', [
      'stream',
      'group',
    ]),
    pending: gauge('relay_group_pending_entries', 'Entries given and not acknowledged', ['stream', 'group']),
    atRisk: gauge(
      'relay_group_at_risk_entries',
      'Unacknowledged entries that are trimmed when a tenth of the limit is appended',
      ['stream', 'group'],
    ),
    notifyQueue: gauge(
      'relay_notify_queue_usage_ratio',
      "Share of the database's NOTIFY queue that waits to be read; at 1 writers fail",
    ),
    clocks: gauge('relay_clock_difference_seconds', 'Clock of the database minus that of Redis'),
  };

  for (const kind of ['failed', 'postponed'])
    for (const reason of [...REASONS.map(([name]) => name), OTHER]) retries.inc({ kind, reason }, 0);
  for (const found of ['alive', 'failed', 'missing']) expired.inc({ found }, 0);
  for (const outcome of ['restored', 'refused']) resynced.inc({ outcome }, 0);

  /** Series by topic and event type. Looking them up by labels costs more than counting. */
  const known = new Map<string, Map<string, ReturnType<typeof series>>>();
  let labelled = 0;
  let others: ReturnType<typeof series> | undefined;

  function series(topic: string, eventType: string) {
    const labels = [brief(topic), brief(eventType)] as const;
    const made = {
      processed: processed.labels(...labels),
      failed: failed.labels(...labels),
      dead: dead.labels(...labels),
      processing: processing.labels(...labels),
      latency: latency.labels(...labels),
    };
    for (const count of [made.processed, made.failed, made.dead]) count.inc(0);
    return made;
  }

  function of({ topic, eventType }: Pick<OutboxEvent, 'topic' | 'eventType'>) {
    const found = known.get(topic)?.get(eventType);
    if (found !== undefined) return found;
    if (labelled >= MAX_LABELLED) {
      others ??= series(OTHER, OTHER);
      return others;
    }
    labelled++;
    const made = series(topic, eventType);
    const ofTopic = known.get(topic);
    if (ofTopic) ofTopic.set(eventType, made);
    else known.set(topic, new Map([[eventType, made]]));
    return made;
  }

  /** Undefined: the metric is left out, which is not the same as 0. */
  function show(it: Gauge, value: number | null | undefined): void {
    if (value === undefined) it.remove();
    else it.set(value ?? 0);
  }

  function showFigures(shared: SharedFigures | undefined): void {
    const { backlog, queues, streams = [], clockDifferenceMs, notifyQueueUsage } = shared?.figures ?? {};
    show(fleet.age, shared?.ageSeconds);
    show(fleet.waiting, backlog?.oldestSeconds.waiting);
    show(fleet.retrying, backlog?.oldestSeconds.retrying);
    show(fleet.parked, backlog?.oldestSeconds.parked);
    show(fleet.dead, backlog?.oldestSeconds.dead);
    show(fleet.notifyQueue, notifyQueueUsage);
    show(fleet.clocks, clockDifferenceMs === undefined ? undefined : clockDifferenceMs / 1_000);
    const { publish } = queues ?? {};
    show(fleet.inFlight, publish && inFlight(publish));
    const { backlog: rows, jobs, paused, entries, entriesLimit, lag, pending, atRisk } = fleet;
    for (const it of [rows, jobs, paused, entries, entriesLimit, lag, pending, atRisk]) it.reset();
    if (backlog)
      for (const state of ['fresh', 'leased', 'retrying', 'due', 'parked', 'dead'] as const)
        rows.set({ state }, backlog[state]);
    for (const [queue, { isPaused, limits: _, ...counts }] of Object.entries(queues ?? {})) {
      paused.set({ queue }, isPaused ? 1 : 0);
      for (const [state, count] of Object.entries(counts)) jobs.set({ queue, state }, count);
    }
    for (const { stream, length, groups } of streams) {
      const limit = stream === deps.dlqStreamName ? deps.dlqMaxLen : deps.streamMaxLen;
      entries.set({ stream }, length);
      entriesLimit.set({ stream }, limit);
      for (const it of groups) {
        const labels = { stream, group: brief(it.group) };
        lag.set(labels, it.lag);
        pending.set(labels, it.pending);
        atRisk.set(labels, entriesAtRisk(it.unacknowledged, limit));
      }
    }
  }

  /** All metrics in Prometheus' text format, within 2 s. */
  async function render(sources: MetricsSources): Promise<string> {
    const inTime = <T>(work: Promise<T>) => withDeadline(DEADLINE_MS, work).catch(() => undefined);
    const [figures, checks = {}] = await Promise.all([inTime(sources.figures()), inTime(sources.ready())]);
    for (const server of sources.servers) {
      const check = checks[server];
      healthy.set({ server }, check !== undefined && check.status !== 'unhealthy' ? 1 : 0);
    }
    const isReady = sources.isRunning() && checks.database !== undefined && overall(checks) !== 'unhealthy';
    ready.set(isReady ? 1 : 0);
    epochKnown.set(sources.epochIsKnown() ? 1 : 0);
    tickAge.set(sources.tickSecondsAgo());
    clockAhead.set(sources.clockAheadMs() / 1_000);
    inProgress.set(sources.inProgress());
    showFigures(figures);
    const texts = await Promise.all([registry.metrics(), processMetrics().metrics()]);
    return texts.join('\n');
  }

  return {
    contentType: Registry.PROMETHEUS_CONTENT_TYPE,
    render,

    /** @param entryId `<ms>-<sequence>`, by the clock of Redis */
    published(event: OutboxEvent, entryId: string): void {
      const it = of(event);
      it.processed.inc();
      const seconds = (Number.parseInt(entryId, 10) - Date.parse(event.occurredAt)) / 1_000;
      // `created_at` may be null or infinity, and clocks may differ.
      if (Number.isFinite(seconds)) it.latency.observe(Math.max(0, seconds));
    },

    attempted(event: OutboxEvent, outcome: Attempt, seconds: number): void {
      const it = of(event);
      it.processing.observe(seconds);
      if (outcome.kind === 'done' || outcome.kind === 'wait' || outcome.kind === 'release') return;
      if (outcome.kind === 'postpone') retries.inc({ kind: 'postponed', reason: reasonOf(outcome.reason) });
      else it.failed.inc();
      if (outcome.kind === 'retry') retries.inc({ kind: 'failed', reason: reasonOf(outcome.reason) });
    },

    /** Redis refused a worker's command to take or to end a job. */
    refused(reason: string): void {
      retries.inc({ kind: 'postponed', reason: reasonOf(reason) });
    },

    deadLettered(event: OutboxEvent): void {
      of(event).dead.inc();
    },

    claimed(events: number): void {
      batches.observe(events);
    },

    /** Leases that ended, by the state of the job. */
    leasesExpired(seen: Readonly<Record<'alive' | 'failed' | 'missing', number>>): void {
      for (const [found, count] of Object.entries(seen)) expired.inc({ found }, count);
    },

    /** Table and streams were compared. */
    recovered(found: Readonly<{ unpublished: number; unreadable: number }>): void {
      resyncs.inc();
      resynced.inc({ outcome: 'restored' }, found.unpublished);
      resynced.inc({ outcome: 'refused' }, found.unreadable);
    },
  };
}
