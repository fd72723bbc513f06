import { createComparison, createRestore, streamOptionsOf } from './comparison.ts';
import type { RelayConfig } from './config.ts';
import { dashboardOf } from './dashboard.ts';
import type { OutboxEvent } from './event.ts';
import { createLifecycle, gathered } from './lifecycle.ts';
import { errorText, type Logger } from './logger.ts';
import { createFigures, shareFigures } from './operate/figures.ts';
import { createFleetReader, createHeartbeat } from './operate/heartbeat.ts';
import { createBacklog } from './outbox/backlog.ts';
import type { Queryable } from './outbox/database.ts';
import { payloadMayBeAtFault } from './outbox/event-of-row.ts';
import { createOutbox } from './outbox/outbox.ts';
import { createReceipts } from './outbox/receipts.ts';
import { createWakeup } from './outbox/wakeup.ts';
import { createWriteProbe, inspectRedis } from './preflight.ts';
import { createClaimWorker, roomAhead } from './queue/claim.ts';
import { createProgressWatch } from './queue/progress.ts';
import { createPublishWorker } from './queue/publish.ts';
import type { Queues } from './queue/queues.ts';
import { createClaimRounds } from './queue/rounds.ts';
import { createScheduler } from './queue/scheduler.ts';
import { createSuspects } from './queue/suspects.ts';
import { isCluster, streamPlace } from './redis-places.ts';
import type { Servers } from './servers.ts';
import { createStream } from './stream/append.ts';
import { createEpoch, EpochOverError } from './stream/epoch.ts';
import { createStreamInspector } from './stream/inspect.ts';
import { createMarkers } from './stream/markers.ts';
import { createRestorer } from './stream/restore.ts';
import { createTurns } from './stream/turn.ts';
import { createValidator } from './stream/validate.ts';
import { createTopicCheck } from './topics.ts';
import type { Tracing } from './tracing/tracing.ts';
import { createAcknowledger } from './triage/acknowledge.ts';
import { createCarry } from './triage/carry.ts';
import { createDeadLetter } from './triage/dead-letter.ts';
import { createHandOver, mayBeFollowed } from './triage/hand-over.ts';
import { createLostJobs } from './triage/lost-jobs.ts';
import { createOrphanWatch } from './triage/orphans.ts';
import { createReconcile } from './triage/reconcile.ts';
import { createUpkeep } from './upkeep.ts';
import { createHealth } from './web/health.ts';
import { createMetrics } from './web/metrics.ts';
import { createWebServer } from './web/server.ts';

/** Wishes to look at rows are gathered for so long. */
const LOOK_AFTER_MS = 25;
/** Jobs that this pod takes before it is told that they are there, at most. */
const MOST_TAKEN = 16;
/** Failed jobs looked through in one round of trimming. */
const TRIM_LIMIT = 1_000;
/** Longest time for a claim job with all its duties: 50 batches of due rows, then a turn. */
const CLAIM_JOB_DEADLINE_MS = 120_000;
/** A pod that has not looked after the schedule for so long hangs. */
const STUCK_AFTER_MS = 60_000;
/** No statement of the relay takes so long on a database that is well; what is cut off is tried again. */
const STATEMENT_TIMEOUT_MS = 4_000;
export function assemble(
  config: RelayConfig,
  servers: Servers,
  queues: Queues,
  logger: Logger,
  http: boolean,
  tracing: Tracing,
) {
  const { pool, queueRedis, streamRedis, appendRedis, workerRedis } = servers;
  const ordered = config.ordering === 'aggregate';
  let phase: 'starting' | 'running' | 'stopping' = 'starting';

  const statementTimeoutMs = Math.min(config.publishTimeoutMs, STATEMENT_TIMEOUT_MS);
  const outbox = createOutbox(pool, { ...config, statementTimeoutMs });
  const backlog = createBacklog(pool, { ...config, statementTimeoutMs });
  const addPublishJobs = async (events: readonly OutboxEvent[]) => {
    const adding = tracing.claim(events, queues.addPublishJobs);
    // By then the command is written. Many jobs keep the workers of all pods busy anyway.
    if (events.length <= MOST_TAKEN) setImmediate(() => publishWorker.worker.take(events.length));
    await adding;
    publishWorker.worker.expect(events.length);
  };
  const receipts = createReceipts(pool, { ...config, statementTimeoutMs });
  const streamOptions = streamOptionsOf(config);
  const keyPrefix = `${config.queuePrefix}:${config.queueName}`;
  const hasTwoServers = streamRedis !== queueRedis;
  const queuesWritable = createWriteProbe(queueRedis, `${keyPrefix}:probe`);
  const streamsWritable = hasTwoServers
    ? createWriteProbe(streamRedis, `${keyPrefix}:probe`)
    : queuesWritable;

  const upkeep = createUpkeep({
    ...{ config, servers, statementTimeoutMs, logger },
    epoch: () => epoch.current(),
  });
  const scheduler = createScheduler({
    queue: queues.claim,
    redis: queueRedis,
    pollIntervalMs: config.pollIntervalMs,
    others: upkeep.schedules,
    retired: upkeep.retired,
    logger,
  });

  const restorer = createRestorer(appendRedis, streamOptions);
  const epoch = createEpoch({
    redis: appendRedis,
    key: streamOptions.epochKey,
    databaseTime: receipts.time,
    restore: createRestore({
      receipts,
      compare: createComparison(restorer, receipts, config.dlqStreamName, logger),
      windowMs: config.resyncWindowMs,
      endLeases: outbox.endLeases,
      onRestored: (found) => {
        metrics.resynced(found);
        void scheduler.wake();
      },
      logger,
    }),
    logger,
  });
  /** Where the queues have a server of their own, its losses are jobs; the streams have their own epochs. */
  const jobEpoch = createEpoch({
    redis: queueRedis,
    key: `${keyPrefix}:jobs`,
    databaseTime: receipts.time,
    restore: async () => {
      await outbox.endLeases();
      void scheduler.wake();
    },
    restoring: 'looking which jobs are there',
    logger,
  });
  const markers = createMarkers(appendRedis, {
    prefix: keyPrefix,
    epochKey: streamOptions.epochKey,
    job: queues.times,
    isSettled: async (eventId) => (await outbox.unsettled([eventId])).length === 0,
    find: async (name, eventId) => (await restorer.find(name, [eventId])).get(eventId),
  });
  const stream = createStream(
    appendRedis,
    epoch,
    createTurns({ isSettled: (id) => handOver.isSettled(id), waiting: outbox.waiting }),
    { ...streamOptions, onFirstEntry: upkeep.met },
    hasTwoServers ? markers : undefined,
  );

  const orphans = createOrphanWatch({
    release: outbox.releaseOrphans,
    parkedAggregates: outbox.parkedAggregates,
    onReleased: () => void scheduler.wake(),
    logger,
  });
  const watchOrphans = (events: readonly { aggregateType: string; aggregateId: string }[]) => {
    if (ordered && phase !== 'stopping') orphans.watch(events);
  };

  const wakeup = createWakeup({ pool, logger, onWake: () => void scheduler.wake() });

  const handOver = createHandOver<Queryable>({
    giving: receipts.giving,
    epoch,
    addJobs: addPublishJobs,
    room: async () => roomAhead(await queues.inFlight(), config),
    // Appends see each other's jobs.
    together: !hasTwoServers,
    whileLive: outbox.whileLive,
    async endLeases(events) {
      await outbox.endLeasesOf(events);
      looks.soon();
    },
    readAhead: ordered && config.deadLetterPolicy === 'continue' ? outbox.readAhead : undefined,
    payloadMayBeAtFault,
    logger,
  });
  const { giveReceipts } = handOver;

  const acknowledger = createAcknowledger({
    async markPublished(batch, epochOfAppends, of) {
      let early: readonly string[] = [];
      const mark = (tx: Queryable, promoting: boolean) => {
        early = [];
        return outbox.markPublished(tx, batch, promoting, (ids) => {
          early = ids;
        });
      };
      const successors = await giveReceipts(epochOfAppends, mark, of);
      if (of.inChains) handOver.settle(batch.map((it) => it.id).filter((id) => !early.includes(id)));
      return { successors, early };
    },
    ordered,
    onNoSuccessor: watchOrphans,
    onMarkedBefore: (events) => {
      outbox.endLeasesOf(events).catch((error) => {
        logger.debug({ err: error }, 'rows are looked at when their leases end');
      });
    },
    isFinal: (error) => error instanceof EpochOverError,
    logger,
  });

  const deadLetter = createDeadLetter({
    append: (event, failure) =>
      tracing.deadLetter(event, failure, (traced) => stream.deadLetter(traced, failure)),
    async markDead(dead, of, event) {
      const unclear = mayBeFollowed(event) ? [event] : [];
      await giveReceipts(of, (tx, promoting) => outbox.markDead(tx, dead, promoting), { unclear });
    },
    onDead: (event) => watchOrphans([event]),
    onWritten: (event) => metrics.deadLettered(event),
    logger,
  });

  const carry = createCarry({
    topicProblem: createTopicCheck({
      ...config,
      queueKeyPrefix: `${config.queuePrefix}:`,
      neighbour: isCluster(streamPlace(config)) ? config.streamName : undefined,
    }),
    violations: config.validation === 'off' ? () => [] : createValidator(),
    strict: config.validation === 'strict',
    ready: epoch.known,
    publish: (event) => tracing.append(event, stream.publish),
    refusedEverything: (event) =>
      Promise.all([
        queuesWritable(),
        streamsWritable(),
        queueRedis.exists(queues.jobKey(event.eventId)),
      ]).then(
        () => null,
        (error) => errorText(error),
      ),
    acknowledge: acknowledger.acknowledge,
    bringAlong: handOver.bringAlong,
    letGo: (event) => outbox.endLeasesOf([event]),
    onPublished: (event, entryId) => {
      metrics.published(event, entryId);
      heartbeat.appendedTo(event.topic);
    },
    logger,
  });

  const publishWorker = createPublishWorker({
    connection: workerRedis,
    options: { ...config, maxDelayed: Math.floor(config.maxInFlight / 4) },
    attempt: carry,
    onAttempted: (event, outcome, seconds) => metrics.attempted(event, outcome, seconds),
    traced: tracing.publish,
    telemetry: tracing.jobs,
    suspects: createSuspects({ redis: queueRedis, jobKey: queues.jobKey, maxCrashes: config.maxCrashes }),
    recordFailure: outbox.recordFailure,
    deadLetter,
    delayedCount: async () => (await queues.inFlight()).delayed,
    forget: queues.remove,
    logger,
  });

  const claim = createClaimRounds({
    inFlight: queues.inFlight,
    options: config,
    claimBatch: (limit) => outbox.claimBatch(limit, addPublishJobs),
    claimAlone: () => outbox.claimAlone(addPublishJobs),
    payloadMayBeAtFault,
    onClaimed: (events) => metrics.claimed(events),
    onParked: watchOrphans,
    logger,
  });

  const lostJobs = createLostJobs({
    find: restorer.find,
    findDeadLetters: restorer.findDeadLetters,
    epoch: epoch.current,
    markPublished: (found, of) =>
      giveReceipts(of, (tx, promoting) => outbox.markPublished(tx, found, promoting), { unclear: 'all' }),
    markDead: (dead, of) =>
      giveReceipts(of, (tx, promoting) => outbox.markDead(tx, dead, promoting), { unclear: 'all' }),
  });
  const reconcile = createReconcile({
    transaction: (work) => outbox.transaction('repeatable', work),
    lockDue: outbox.lockDue,
    returnToFresh: outbox.returnToFresh,
    extendLease: outbox.extendLease,
    jobFate: queues.jobFate,
    failedJob: queues.failedJob,
    ...lostJobs,
    deadLetter,
    onExpired: (seen) => metrics.leasesEnded(seen),
    logger,
  });

  /** Rows whose leases were ended are looked at now, not with the next tick: their aggregates wait for it. */
  const looks = gathered(LOOK_AFTER_MS, async () => {
    if (phase !== 'running') return;
    try {
      await reconcile();
      await scheduler.wake();
    } catch (error) {
      logger.debug({ err: error }, 'the rows are looked at with the next tick');
    }
  });

  /** Failed jobs are kept for the dashboard, so many; never one whose dead letter is not written yet. */
  async function trimFailedJobs(): Promise<void> {
    const excess = await queues.failedBeyond(config.failedJobsKept, TRIM_LIMIT);
    if (excess.length === 0) return;
    const unsettled = new Set(await outbox.unsettled(excess));
    for (const eventId of excess) if (!unsettled.has(eventId)) await queues.remove(eventId);
  }

  async function sweep(): Promise<void> {
    if (ordered) await orphans.sweep();
    else if ((await outbox.unparkAll(config.maxInFlight)) > 0) await scheduler.wake();
  }

  let tickedAt: number | undefined;

  async function maintain(): Promise<void> {
    tickedAt = Date.now();
    for (const [duty, run] of Object.entries({ reconcile, sweep, trimFailedJobs })) {
      try {
        await run();
      } catch (error) {
        logger.warn({ err: error, duty }, 'a duty of the tick failed; the next tick does it');
      }
    }
  }

  const claimWorker = createClaimWorker({
    connection: workerRedis,
    queuePrefix: config.queuePrefix,
    queueName: config.queueName,
    claim,
    exclusively: outbox.inClaimTurn,
    maintain,
    kick: upkeep.kick,
    arm: config.notify ? wakeup.arm : async () => 'deaf',
    wake: scheduler.wake,
    logger,
  });

  const progress = createProgressWatch({
    redis: queueRedis,
    workplaces: [
      {
        worker: publishWorker.worker,
        queue: queues.publish,
        // One attempt, and the postponement of it.
        deadlineMs: 2 * config.publishTimeoutMs,
        oneByOne: false,
      },
      {
        worker: claimWorker.worker,
        queue: queues.claim,
        deadlineMs: CLAIM_JOB_DEADLINE_MS,
        oneByOne: true,
      },
    ],
    assertWritable: queuesWritable,
  });

  const assertEpoch = () => {
    if (epoch.current() === undefined) throw new Error('Redis may have lost entries: they are looked for');
  };
  const health = createHealth({
    database: async () => {
      await pool.query('SELECT 1');
      return {};
    },
    redis: async () => {
      await queuesWritable();
      if (!hasTwoServers) assertEpoch();
      return inspectRedis(queueRedis);
    },
    ...(hasTwoServers && {
      streamRedis: async () => {
        await streamsWritable();
        assertEpoch();
        return inspectRedis(streamRedis);
      },
    }),
    backlog: backlog.count,
  });

  const startedAt = Date.now();
  const heartbeat = createHeartbeat({
    redis: queueRedis,
    prefix: keyPrefix,
    facts: () => ({
      version: VERSION,
      phase,
      upSeconds: secondsSince(startedAt),
      inHand: publishWorker.worker.inHand(),
      concurrency: config.concurrency,
      tickSecondsAgo: tickedAt === undefined ? null : secondsSince(tickedAt),
    }),
    logger,
  });
  const metrics = createMetrics({
    ...config,
    prefixed: config.metricsPrefix,
    version: VERSION,
    inHand: () => publishWorker.worker.inHand(),
    tickSecondsAgo: () => secondsSince(tickedAt ?? startedAt),
    epochIsKnown: () => epoch.current() !== undefined,
    isRunning: () => phase === 'running',
    ready: health.ready,
    figures: shareFigures({
      redis: queueRedis,
      key: `${keyPrefix}:figures`,
      read: createFigures({
        backlog: backlog.count,
        databaseTime: backlog.time,
        queues: queues.figures,
        fleet: createFleetReader(queueRedis, keyPrefix),
        inspectStreams: createStreamInspector(streamRedis),
        streams: [config.streamName, config.dlqStreamName],
        deadlineMs: statementTimeoutMs,
      }),
    }),
  });
  const web = createWebServer({
    host: config.httpHost,
    port: config.httpPort,
    version: VERSION,
    health,
    metrics,
    stuck: () => [
      ...(publishWorker.isRunning() ? [] : ['the publish worker does not run']),
      ...(claimWorker.isRunning() ? [] : ['the claim worker does not run']),
      ...(Date.now() - scheduler.lastLookAt() > STUCK_AFTER_MS
        ? ['nobody looks after the claim schedule']
        : []),
      ...progress.reasons(),
    ],
    phase: () => phase,
    dashboard: config.board ? dashboardOf(config, servers, queues, VERSION, logger) : undefined,
    basePath: config.boardBasePath,
    trustedProxies: config.trustedProxies,
  });

  /** Most of the time it is known at once; a long comparison, by this or another pod, is not waited for. */
  async function startEpoch(): Promise<void> {
    epoch.start();
    await epoch.known();
  }

  const lifecycle = createLifecycle([
    { name: 'HTTP server', ...(http && { start: web.start, stop: web.stop }) },
    { name: 'queues', stop: queues.close },
    { name: 'heartbeat', start: heartbeat.start, stop: heartbeat.stop },
    { name: 'epoch', start: startEpoch, stop: epoch.stop },
    { name: 'epoch of the jobs', ...(hasTwoServers && { start: jobEpoch.start, stop: jobEpoch.stop }) },
    { name: 'acknowledgements', stop: acknowledger.drain },
    { name: 'orphan watch', stop: orphans.stop },
    { name: 'publish worker', start: publishWorker.start, stop: publishWorker.stop },
    { name: 'wake-up', ...(config.notify && { start: wakeup.start, stop: wakeup.stop }) },
    { name: 'upkeep', stop: upkeep.stop },
    { name: 'claim worker', start: claimWorker.start, stop: claimWorker.stop },
    { name: 'scheduler', start: scheduler.start, stop: scheduler.stop },
    { name: 'progress watch', start: progress.start, stop: progress.stop },
    { name: 'first claim', start: scheduler.wake },
    {
      name: 'readiness',
      start: () => {
        phase = 'running';
        heartbeat.beat();
      },
    },
  ]);

  return {
    lifecycle,
    beginStop: () => {
      phase = 'stopping';
    },
    httpPort: () => (http ? web.port() : undefined),
    metrics: metrics.render,
  };
}

export const VERSION = '0.1.0';

const secondsSince = (time: number) => (Date.now() - time) / 1_000;
