import type { Redis } from 'ioredis';
import { createClaiming } from './claim/claiming.ts';
import type { PgPool, RedisClient } from './clients.ts';
import type { RelayConfig } from './config/config.ts';
import type { Pool } from './connections/database.ts';
import { becomeOwner } from './connections/ownership.ts';
import { meetRequirements, watchRequirements } from './connections/requirements.ts';
import { openServers, type Servers } from './connections/servers.ts';
import { waitForServers } from './connections/wait-for-servers.ts';
import { type Context, createContext, secondsSince } from './context.ts';
import { createHttp } from './http/http.ts';
import { createLifecycle, createTask, type Lifecycle, succeedsWithin } from './lifecycle.ts';
import { createFleetReader, waitForOtherProtocols } from './operations/heartbeat.ts';
import { migrateDatabase } from './operations/migration.ts';
import { createPublishing } from './publish/publishing.ts';
import { createClock, redisTime } from './queue/clock.ts';
import { openQueues } from './queue/queues.ts';
import { createRecovery } from './recovery/recovery.ts';
import { createLogger, type Logger } from './telemetry/logger.ts';
import { isTracerRegistered, type Tracing, untraced } from './telemetry/tracing.ts';
import { VERSION } from './version.ts';

/** What an embedding program may give. The relay never closes it. */
export type RelayDeps = Readonly<{
  /** node-postgres pool with at least 6 connections to spare. Default: one of its own. */
  pool?: PgPool;
  /** ioredis client; duplicates of it are used, with the relay's own options but for its address. Default: from `config.redisUrl`. */
  redis?: RedisClient;
  logger?: Logger;
  /** Whether to serve the health endpoints. Default: true. */
  http?: boolean;
  /**
   * Makes `Date.now()` of this process answer so much less than the clock of its machine, which differs by that from the
   * clock of Redis; see Clocks in the documentation. Default: the difference is only told.
   */
  adjustClock?: (aheadMs: number) => void;
  /** Whether to make spans, if a tracer is registered with OpenTelemetry by the time of `start`. Default: true. */
  tracing?: boolean;
}>;

export type Relay = Readonly<{
  /**
   * What `relay migrate` does: makes or adopts the table, with the role of `config.databaseUrl`. Before `start`; safe when
   * several pods do it at once, and when it is done again. Without `notify` no trigger wakes the relay up (default: as
   * `config.notify` says).
   * @throws {NotReadyError} when PostgreSQL cannot be reached
   * @throws {RequirementError} when there is a table that cannot be adopted: nothing was done
   */
  migrate(options?: Readonly<{ notify?: boolean }>): Promise<void>;
  /**
   * Resolves when the relay is at work.
   * @throws {NotReadyError} when database or Redis cannot be reached in time, or the table is not ready
   * @throws {RequirementError} when a server or the table is not as the relay needs it; see `relay check`
   */
  start(): Promise<void>;
  /** Stops claiming, finishes or hands back what is running, closes. Resolves within `shutdownTimeoutMs`. */
  stop(): Promise<void>;
  /** Port of the HTTP server, while it runs. */
  httpPort(): number | undefined;
  /** What `/metrics` answers, for an HTTP server of your own; '' before the start. Resolves within 2 s. */
  metrics(): Promise<string>;
}>;

/** Imports OpenTelemetry only where there is a tracer: the import is slow. */
async function tracingOf(config: RelayConfig): Promise<Tracing> {
  if (!isTracerRegistered()) return untraced;
  const { createTracing } = await import('./telemetry/spans.ts');
  return createTracing(VERSION, config.dlqStreamName);
}

type Running = Readonly<{
  lifecycle: Lifecycle;
  beginStop: () => void;
  httpPort: () => number | undefined;
  metrics: () => Promise<string>;
}>;

/** The parts of a relay, in the order in which they start. */
function assemble(context: Context, http: boolean): Running {
  const { config, servers, queues, state, heartbeat, epoch, jobEpoch, scheduler, logger } = context;
  const publishing = createPublishing(context);
  const recovery = createRecovery(context);
  const duties = createTask((goesOn) => recovery.maintain(goesOn));
  const claiming = createClaiming(context, () => {
    state.tickedAt = Date.now();
    heartbeat.beat(); // "relay status" shows when the last tick was
    duties.begin();
  });
  const workers = { publish: publishing.workers, claim: claiming.workers };
  const requirements = watchRequirements(config, servers, logger);
  const { server, progress, metrics } = createHttp(context, workers, requirements.unmet);

  const beat = () =>
    heartbeat.start(() => ({
      version: VERSION,
      phase: state.phase,
      upSeconds: secondsSince(context.startedAt),
      inProgress: workers.publish.inProgress(),
      concurrency: config.concurrency,
      tickSecondsAgo: state.tickedAt === undefined ? null : secondsSince(state.tickedAt),
    }));
  const waitForOthers = () =>
    waitForOtherProtocols({
      fleet: createFleetReader(servers.queueRedis, context.keyPrefix),
      onWaiting(reason) {
        state.waitsFor = reason;
      },
      stopped: () => state.phase === 'stopping',
      logger,
    });

  const lifecycle = createLifecycle([
    { name: 'HTTP server', ...(http && { start: server.start, stop: server.stop }) },
    { name: 'queues', stop: queues.close },
    { name: 'clock', start: context.clock.start, stop: context.clock.stop },
    { name: 'heartbeat', start: beat, stop: heartbeat.stop },
    { name: 'pods of another build', start: waitForOthers },
    {
      name: 'epoch',
      // Most of the time it is known at once; a long comparison, by this or another pod, is not waited for.
      async start() {
        epoch.start();
        await epoch.known();
      },
      stop: epoch.stop,
    },
    {
      name: 'epoch of the jobs',
      ...(context.hasTwoServers && { start: jobEpoch.start, stop: jobEpoch.stop }),
    },
    { name: 'log of many events', stop: context.tally.flush },
    { name: 'refill', stop: context.refiller.stop },
    { name: 'acknowledgements', stop: context.acknowledger.drain },
    { name: 'publish workers', start: publishing.start, stop: publishing.stop },
    { name: 'wake-up', ...claiming.wakeup },
    { name: 'maintenance', stop: context.maintenance.stop },
    { name: 'recovery', stop: duties.stop },
    { name: 'claim worker', start: claiming.start, stop: claiming.stop },
    { name: 'scheduler', start: scheduler.start, stop: scheduler.stop },
    { name: 'progress watch', start: progress.start, stop: progress.stop },
    { name: 'first claim', start: scheduler.wake },
    {
      name: 'readiness',
      start() {
        state.phase = 'running';
        heartbeat.beat();
      },
    },
    { name: 'requirements', start: requirements.start, stop: requirements.stop },
  ]);

  return {
    lifecycle,
    beginStop() {
      state.phase = 'stopping';
    },
    httpPort: () => (http ? server.port() : undefined),
    metrics: metrics.render,
  };
}

const CLOSE_TIMEOUT_MS = 1_000;
/** Of the time to stop, this much is for finishing what runs; the rest is for closing. */
const DRAINING_SHARE = 0.8;

export function createRelay(config: RelayConfig, deps: RelayDeps = {}): Relay {
  const logger = deps.logger ?? createLogger(config.logLevel);
  let starting: Promise<void> | undefined;
  let stopping: Promise<void> | undefined;
  /** If not, it is a failed start that closes what it opened: nothing stopped that had started. */
  let stopCalled = false;
  let servers: Servers | undefined;
  let running: Running | undefined;

  async function start(): Promise<void> {
    servers = openServers(config, deps as { pool?: Pool; redis?: Redis }, logger);
    const { pool, queueRedis, streamRedis, appendRedis, workerRedis } = servers;
    const isOne = streamRedis === queueRedis;
    const redis = [queueRedis, workerRedis, ...(isOne ? [appendRedis] : [])];
    const { startupTimeoutMs: timeoutMs } = config;
    await waitForServers({ pool, redis, streamRedis: [streamRedis, appendRedis], timeoutMs, logger });
    const stopped = () => stopping !== undefined;
    await meetRequirements(config, { pool, queueRedis, streamRedis }, { timeoutMs, stopped, logger });
    if (stopped()) return;
    // Of two that find an empty Redis at the same moment, one is refused here.
    for (const it of new Set([queueRedis, streamRedis])) await becomeOwner(pool, it, config);
    const tracing = deps.tracing === false ? untraced : await tracingOf(config);
    const queues = await openQueues(queueRedis, config, logger, config.startupTimeoutMs);
    // Before any time is written down.
    const clock = createClock({ redisTime: () => redisTime(queueRedis), adjust: deps.adjustClock, logger });
    await clock.compare();
    const context = createContext(config, servers, queues, tracing, logger, clock);
    running = assemble(context, deps.http !== false);
    await running.lifecycle.start();
  }

  async function close(): Promise<void> {
    running?.beginStop();
    const drainingMs = config.shutdownTimeoutMs * DRAINING_SHARE;
    const stopped = await running?.lifecycle.stop(drainingMs);
    const { overran, failed } = stopped ?? { overran: [], failed: [] };
    for (const { name, error } of failed) {
      logger.warn({ part: name, err: error }, 'a part did not stop cleanly');
    }
    if (overran.length > 0) {
      logger.warn({ parts: overran }, 'not everything ended in time; other pods take over what was left');
    }
    await succeedsWithin(CLOSE_TIMEOUT_MS, servers?.close() ?? Promise.resolve());
    if (stopCalled) logger.info({}, 'stopped');
  }

  return {
    migrate: ({ notify = config.notify } = {}) => migrateDatabase(config, notify, logger),
    async start() {
      if (stopping !== undefined)
        throw new Error('a relay that was stopped does not start again: create another');
      starting ??= start();
      try {
        await starting;
      } catch (error) {
        stopping ??= close();
        await stopping;
        throw error;
      }
    },
    async stop() {
      if (starting === undefined) return;
      stopCalled = true;
      stopping ??= close();
      await stopping;
    },
    httpPort: () => running?.httpPort(),
    metrics: async () => running?.metrics() ?? '',
  };
}
