import { CLAIM_JOB_DEADLINE_MS } from '../claim/claim-worker.ts';
import { sqlState, TOO_MANY_SESSIONS } from '../connections/pool-health.ts';
import { assertWritable, inspectRedis } from '../connections/preflight.ts';
import { assertNoLockHeldTooLong } from '../connections/table-lock.ts';
import { type Context, secondsSince } from '../context.ts';
import { createFigures, shareFigures } from '../operations/figures.ts';
import { createFleetReader } from '../operations/heartbeat.ts';
import { createProgressWatch } from '../queue/progress.ts';
import type { Workers } from '../queue/workers.ts';
import { createStreamInspector } from '../streams/inspect.ts';
import type { MetricsSources } from '../telemetry/metrics.ts';
import { VERSION } from '../version.ts';
import { shareAnswers } from './admission.ts';
import { openDashboard } from './dashboard-options.ts';
import { createHealth } from './health.ts';
import { createWebServer } from './server.ts';

/** Those who ask for the metrics within this time get the same answer. */
const SHARED_MS = 1_000;
/** A pod that has not checked the schedule for this time hangs. */
const STUCK_AFTER_MS = 60_000;

/** The HTTP server of a pod: health, metrics, dashboard and API. */
export function createHttp(
  context: Context,
  workers: Readonly<{ publish: Workers; claim: Workers }>,
  unmet: () => string,
) {
  const { config, servers, queues, backlog, epoch, scheduler, state, logger } = context;
  const { queueRedis, streamRedis } = servers;

  const assertEpoch = () => {
    if (epoch.current() === undefined) throw new Error(epoch.reason());
  };
  const health = createHealth({
    unmet,
    database: async () => {
      const locks = assertNoLockHeldTooLong(servers.httpPool).catch((error) => {
        // PostgreSQL refuses another session for HTTP: the relay's own sessions answer instead.
        if (sqlState(error) === TOO_MANY_SESSIONS) return assertNoLockHeldTooLong(servers.pool);
        throw error;
      });
      await Promise.all([assertWritable(servers.pool), locks]);
      const { size, granted } = servers.pool.sessions();
      return granted < size ? { sessions: granted, sessions_wanted: size } : {};
    },
    redis: async () => {
      await context.queuesWritable();
      if (!context.hasTwoServers) assertEpoch();
      return inspectRedis(queueRedis);
    },
    ...(context.hasTwoServers && {
      streamRedis: async () => {
        await context.streamsWritable();
        assertEpoch();
        return inspectRedis(streamRedis);
      },
    }),
    backlog: backlog.count,
  });

  const progress = createProgressWatch({
    redis: queueRedis,
    workplaces: [
      {
        ...{ workers: workers.publish, queue: queues.publish, oneByOne: false },
        // An attempt, and postponing it.
        deadlineMs: 2 * config.publishTimeoutMs,
      },
      {
        ...{ workers: workers.claim, queue: queues.claim, oneByOne: true },
        deadlineMs: CLAIM_JOB_DEADLINE_MS,
      },
    ],
    assertWritable: context.queuesWritable,
  });

  const sources: MetricsSources = {
    inProgress: workers.publish.inProgress,
    tickSecondsAgo: () => secondsSince(state.tickedAt ?? context.startedAt),
    clockAheadMs: context.clock.aheadMs,
    epochIsKnown: () => epoch.current() !== undefined,
    isRunning: () => state.phase === 'running',
    ready: health.ready,
    servers: ['database', 'redis', ...(context.hasTwoServers ? ['stream_redis'] : [])],
    figures: shareFigures({
      redis: queueRedis,
      key: `${context.keyPrefix}:figures`,
      read: createFigures({
        backlog: backlog.count,
        databaseTime: backlog.time,
        notifyQueueUsage: backlog.notifyQueueUsage,
        queues: queues.figures,
        fleet: createFleetReader(queueRedis, context.keyPrefix),
        inspectStreams: createStreamInspector(streamRedis),
        streams: [config.streamName, config.dlqStreamName],
        deadlineMs: context.statementTimeoutMs,
      }),
    }),
  };
  const { contentType, render } = context.metrics;
  const metrics = { contentType, render: shareAnswers(SHARED_MS, () => render(sources)) };

  const server = createWebServer({
    host: config.httpHost,
    port: config.httpPort,
    version: VERSION,
    health,
    metrics,
    stuck: () => [
      ...(workers.publish.isRunning() ? [] : ['the publish workers do not run']),
      ...(workers.claim.isRunning() ? [] : ['the claim worker does not run']),
      ...(performance.now() - scheduler.lastLookAt() > STUCK_AFTER_MS
        ? ['the claim schedule is no longer checked']
        : []),
      ...progress.reasons(),
    ],
    phase: () => state.phase,
    waitsFor: () => state.waitsFor,
    ...(config.board && {
      dashboard: () => {
        const ownServers = { pool: servers.httpPool, ...servers.openHttpRedis() };
        return openDashboard(config, ownServers, { backlog: backlog.count, version: VERSION, logger });
      },
    }),
    basePath: config.boardBasePath,
    trustedProxies: config.trustedProxies,
  });

  return { server, progress, metrics };
}
