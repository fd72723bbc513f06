import type { RelayConfig } from './config/config.ts';
import { createGeneration } from './connections/generation.ts';
import { becomeOwner } from './connections/ownership.ts';
import { createWriteProbe } from './connections/preflight.ts';
import type { Servers } from './connections/servers.ts';
import { createAcknowledger } from './finalize/acknowledger.ts';
import { createDeadLetters } from './finalize/dead-letter.ts';
import { createJobRemoval } from './finalize/job-removal.ts';
import { createRefiller } from './finalize/refiller.ts';
import { createMaintenance, schedulesOf } from './maintenance/maintenance.ts';
import { createHeartbeat } from './operations/heartbeat.ts';
import { createBacklog } from './outbox/backlog.ts';
import { createOutbox } from './outbox/outbox.ts';
import type { Clock } from './queue/clock.ts';
import type { Queues } from './queue/queues.ts';
import { createScheduler } from './queue/scheduler.ts';
import { createFindForgotten } from './recovery/forgotten-entries.ts';
import { createCompare, createRecoverLostData } from './recovery/lost-data.ts';
import { streamOptionsOf } from './stream-options.ts';
import { createStreams } from './streams/append.ts';
import { createEpoch } from './streams/epoch-watch.ts';
import { createLookup } from './streams/lookup.ts';
import { createMemory } from './streams/memory.ts';
import type { Logger } from './telemetry/logger.ts';
import { createMetrics } from './telemetry/metrics.ts';
import { createTally } from './telemetry/tally.ts';
import type { Tracing } from './telemetry/tracing.ts';
import { VERSION } from './version.ts';

/** On a healthy database every statement takes less. A statement that is cut off is tried again. */
const STATEMENT_TIMEOUT_MS = 4_000;

export type Context = ReturnType<typeof createContext>;

type State = {
  phase: 'starting' | 'running' | 'stopping';
  /** When this pod last ran a tick, Unix time in ms. */
  tickedAt: number | undefined;
  /** Why the pod has not begun to work yet. */
  waitsFor: string | undefined;
};

/** What the parts of a relay share: the stores and finalize/. Nothing runs yet. */
export function createContext(
  config: RelayConfig,
  servers: Servers,
  queues: Queues,
  tracing: Tracing,
  logger: Logger,
  clock: Clock,
) {
  const { pool, queueRedis, streamRedis, appendRedis } = servers;
  const keyPrefix = `${config.queuePrefix}:${config.queueName}`;
  const hasTwoServers = streamRedis !== queueRedis;
  const statementTimeoutMs = Math.min(config.publishTimeoutMs, STATEMENT_TIMEOUT_MS);
  const startedAt = Date.now();
  const state: State = { phase: 'starting', tickedAt: undefined, waitsFor: undefined };

  const queuesWritable = createWriteProbe(queueRedis, `${keyPrefix}:probe`);
  const streamsWritable = hasTwoServers
    ? createWriteProbe(streamRedis, `${keyPrefix}:probe`)
    : queuesWritable;

  const tally = createTally(logger);
  const heartbeat = createHeartbeat({ redis: queueRedis, prefix: keyPrefix, logger });
  const metrics = createMetrics({ ...config, prefixed: config.metricsPrefix, version: VERSION });
  const generation = createGeneration();
  const outbox = createOutbox({ ...pool, generation }, { ...config, statementTimeoutMs });
  // 100,000 rows are counted, for people and Prometheus.
  const backlog = createBacklog(servers.httpPool, { ...config, statementTimeoutMs });
  const { schedules, retired } = schedulesOf(config);
  const scheduler = createScheduler({
    queue: queues.claim,
    redis: queueRedis,
    pollIntervalMs: config.pollIntervalMs,
    others: schedules,
    retired,
    logger,
  });

  const streamOptions = streamOptionsOf(config);
  const lookup = createLookup(appendRedis, streamOptions);
  const memory = createMemory(appendRedis, streamOptions, hasTwoServers);
  const epoch = createEpoch({
    redis: appendRedis,
    key: streamOptions.epochKey,
    database: outbox.databaseState,
    accept: generation.accept,
    assertOwner: () => becomeOwner(pool, appendRedis, config),
    recover: createRecoverLostData({
      outbox,
      memory,
      findForgotten: createFindForgotten({ outbox, lookup, dlqStreamName: config.dlqStreamName, logger }),
      compare: createCompare({ published: outbox, lookup, dlqStreamName: config.dlqStreamName }),
      windowMs: config.resyncWindowMs,
      onRecovered(found) {
        metrics.recovered(found);
        void scheduler.wake();
      },
      logger,
    }),
    logger,
  });
  generation.watch(epoch.invalidate);
  /** Where the queues have a Redis of their own, it has an epoch too: what that Redis loses are jobs, not entries. */
  const jobEpoch = createEpoch({
    redis: queueRedis,
    key: `${keyPrefix}:jobs`,
    assertOwner: () => becomeOwner(pool, queueRedis, config),
    // A constant: the epoch of the streams alone handles what PostgreSQL forgets.
    database: async () => ({ ...(await outbox.databaseState()), generation: '-' }),
    async recover() {
      await outbox.expireAllLeases();
      void scheduler.wake();
    },
    recovering: 'asking which jobs are there',
    logger,
  });
  const maintenance = createMaintenance({
    config,
    servers,
    statementTimeoutMs,
    epoch: epoch.current,
    logger,
  });
  const streams = createStreams({
    redis: appendRedis,
    epoch,
    options: streamOptions,
    jobFacts: hasTwoServers ? queues.jobFacts : undefined,
    onFirstEntry: maintenance.met,
  });

  const refiller = createRefiller({ outbox, scheduler, options: config, logger });
  const acknowledger = createAcknowledger({ outbox, epoch, memory, refiller, logger });
  const deadLetters = createDeadLetters({
    ...{ streams, outbox, queues, epoch, acknowledger, refiller, metrics, tracing, tally, logger },
  });
  const removeJobs = createJobRemoval({ queues, memory });

  return {
    ...{ config, servers, queues, tracing, logger, keyPrefix, hasTwoServers, statementTimeoutMs },
    ...{ startedAt, state, tally, clock, queuesWritable, streamsWritable, heartbeat, metrics },
    ...{ generation, outbox, backlog, maintenance, scheduler },
    ...{ lookup, memory, epoch, jobEpoch, streams, refiller, acknowledger, deadLetters, removeJobs },
  };
}

export const secondsSince = (time: number): number => (Date.now() - time) / 1_000;
