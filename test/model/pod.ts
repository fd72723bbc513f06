/** A pod made of the relay's own parts. What the walk decides are the moments: of its calls, jobs, ticks and refills. */
import type { Job, Worker } from 'bullmq';
import type { Redis } from 'ioredis';
import type pg from 'pg';
import { createClaim } from '../../src/claim/claim.ts';
import { type Aggregate, aggregateKey, type OutboxEvent } from '../../src/event.ts';
import { createAcknowledger } from '../../src/finalize/acknowledger.ts';
import { createDeadLetters } from '../../src/finalize/dead-letter.ts';
import { createJobRemoval } from '../../src/finalize/job-removal.ts';
import { createRefiller } from '../../src/finalize/refiller.ts';
import { createDeadLetters as createDeadLetterActions } from '../../src/operations/dead-letters.ts';
import { createDeadRows } from '../../src/outbox/dead-rows.ts';
import { createOutbox, type OutboxOptions } from '../../src/outbox/outbox.ts';
import { createParker } from '../../src/publish/parker.ts';
import { createPublish } from '../../src/publish/publish.ts';
import { createRowQuestions } from '../../src/publish/row-questions.ts';
import type { Queues } from '../../src/queue/queues.ts';
import type { Run } from '../../src/queue/workers.ts';
import { createCompare, createRecoverLostData } from '../../src/recovery/lost-data.ts';
import { createRecovery } from '../../src/recovery/recovery.ts';
import { createStreams, type JobFacts, type StreamOptions, type Streams } from '../../src/streams/append.ts';
import { NOT_KNOWN } from '../../src/streams/append-outcome.ts';
import { createDeadEntries } from '../../src/streams/dead-entries.ts';
import { createLookup } from '../../src/streams/lookup.ts';
import { createMemory } from '../../src/streams/memory.ts';
import type { Logger } from '../../src/telemetry/logger.ts';
import { createTally } from '../../src/telemetry/tally.ts';
import { untraced } from '../../src/telemetry/tracing.ts';
import { silent } from '../support/stages.ts';
import type { Interleaving } from './interleaving.ts';
import { createModelEpoch, type EpochWorld } from './model-epoch.ts';

/** A job that is put off, or retried, waits until the walk promotes it. */
export const FAR_OFF_MS = 86_400_000;
const PUBLISH_TIMEOUT_MS = 3_600_000;
const WINDOW_MS = 3_600_000;
const FAILED_JOBS_KEPT = 1;

/** Why an event may be put off, retried or given up. */
const EXPECTED_REASON = /Redis may have lost|WRONGTYPE|the connection broke|doomed/;

const LABELS: Record<string, string> = { addPublishJobs: 'add', remove: 'remove' };

const NOTHING = new Proxy({}, { get: () => () => {} }) as never;

export type PodDeps = Readonly<{
  interleaving: Interleaving;
  pool: pg.Pool;
  /** With the rights of operators. */
  operators: pg.Pool;
  redis: Redis;
  queues: Queues;
  worker: Worker;
  epochWorld: EpochWorld;
  outboxOptions: OutboxOptions;
  streamOptions: StreamOptions;
  /** Whether jobs and streams are told apart as if each had a Redis of its own. */
  hasTwoServers: boolean;
  /** `e3`, by event id. */
  nameOf: (eventId: string) => string;
  /** Whether an attempt finds the event invalid. */
  isDoomed: (eventId: string) => boolean;
  /** Told of what no walk may bring about. */
  onUnexpected: (error: unknown, what: string) => void;
}>;

export type Pod = ReturnType<typeof createPod>;

export function createPod(deps: PodDeps, name: string) {
  const { interleaving, redis, worker, epochWorld, outboxOptions, streamOptions, hasTwoServers, nameOf } =
    deps;
  const { hold, fly, gated, poolOf } = interleaving;
  const { maxInFlight } = outboxOptions;
  const actor = interleaving.anActor(name);
  const outboxOf = (stage: string) => createOutbox(poolOf(actor, stage, deps.pool), outboxOptions);

  const note = (what: string) => (error: unknown) => {
    if (!actor.isDead) deps.onUnexpected(error, what);
  };
  const report = (fields: unknown, what?: string) => {
    const { err, reason } = fields as { err?: unknown; reason?: string };
    if (err !== undefined) note(what ?? '')(err);
    else if (reason !== undefined && !EXPECTED_REASON.test(reason)) note(what ?? '')(reason);
  };
  const logger: Logger = { ...silent, warn: report, error: report };

  const eventName = (of: unknown) => nameOf(typeof of === 'string' ? of : (of as OutboxEvent).eventId);

  const queues = gated(
    ...([actor, 'queue', deps.queues] as const),
    {
      gates: ['addPublishJobs', 'remove', ...(hasTwoServers ? (['jobFacts'] as const) : [])],
      plain: ['jobKey', 'claim', 'publish'],
    },
    (method, [of]) => `${LABELS[method]} ${[of].flat().map(eventName).join(' ')}`,
  );
  const lookup = gated(actor, 'lookup', createLookup(redis, streamOptions), {
    gates: ['find', 'findAllDeadLetters', 'findDeadLetters', 'absent'],
  });
  const memory = gated(actor, 'memory', createMemory(redis, streamOptions, hasTwoServers), {
    gates: ['appendedOf', 'forget', 'remembered'],
  });

  const recoverOutbox = outboxOf('recover');
  const recover = createRecoverLostData({
    outbox: recoverOutbox,
    memory,
    findForgotten: async () => {},
    compare: createCompare({ published: recoverOutbox, lookup, dlqStreamName: streamOptions.dlqStreamName }),
    windowMs: WINDOW_MS,
    onRecovered: () => {},
    logger,
  });
  const epoch = createModelEpoch(interleaving, actor, epochWorld, () =>
    recover({ checkpoint: null, forgotten: false, confirm: async () => {} }),
  );

  /** Time passes between what the jobs' server says and the append. */
  async function jobFacts(eventIds: readonly string[]): Promise<JobFacts[]> {
    const facts = await queues.jobFacts(eventIds);
    await hold(actor, `jobs of ${eventIds.map(nameOf).join(' ')}`);
    return facts;
  }
  const appends = createStreams({
    ...{ redis: counted(redis, ['appendInOrder', 'appendLetter'], fly), epoch, options: streamOptions },
    jobFacts: hasTwoServers ? jobFacts : undefined,
  });
  const streams: Streams = {
    isAppended: appends.isAppended,
    mayHaveForgotten: appends.mayHaveForgotten,
    async publish(event, how) {
      const { server } = epochWorld;
      await hold(actor, `append ${eventName(event)} (${how.gate})`);
      // It is sent in the turn in which the epoch was asked for: a connection that is lost meanwhile takes it along.
      return server === epochWorld.server ? appends.publish(event, how) : NOT_KNOWN;
    },
    async deadLetter(failure, madeAt) {
      await hold(actor, `dead letter of ${eventName(failure.event)}`);
      return appends.deadLetter(failure, madeAt);
    },
    untilAppended: (of) => hold(actor, `early: ${nameOf(of[0] as string)}`),
  };

  let requested = new Map<string, Aggregate>();
  const refiller = {
    ...createRefiller({
      outbox: outboxOf('sweep'),
      scheduler: NOTHING,
      options: { ...outboxOptions },
      logger,
    }),
    request(aggregates: readonly Aggregate[]): void {
      for (const it of aggregates) requested.set(aggregateKey(it), it);
    },
  };
  const tally = createTally(logger);
  const removeJobs = createJobRemoval({ queues, memory });
  const acknowledger = createAcknowledger({
    outbox: outboxOf('acknowledge'),
    ...{ epoch, memory, refiller, logger },
  });
  const deadLetters = createDeadLetters({
    ...{ streams, queues, epoch, acknowledger, refiller, tally, logger },
    ...{ outbox: outboxOf('dead letter'), metrics: NOTHING, tracing: untraced },
  });
  const parker = createParker({ outbox: outboxOf('park'), refiller, logger });
  const publish = createPublish({
    ...{ streams, lookup, epoch, queues, removeJobs, acknowledger, deadLetters, parker, tally, logger },
    outbox: outboxOf('publish'),
    rows: createRowQuestions(outboxOf('ask rows')),
    check: {
      problemOf: ({ eventId }) => (deps.isDoomed(eventId) ? 'doomed' : null),
      refusedEverything: async () => null,
    },
    guard: {
      together: (_, append) => append(),
      alone: (_, __, append) => append(),
      clear: async () => {},
      stop: () => {},
    },
    ...{ metrics: NOTHING, tracing: untraced, onPublished: () => {} },
    options: { publishTimeoutMs: PUBLISH_TIMEOUT_MS, maxInFlight },
  });
  const claim = createClaim({
    ...{ outbox: outboxOf('claim'), queues, epoch, removeJobs, refiller, logger },
    ...{ metrics: NOTHING, tracing: untraced, tally: NOTHING },
    options: { maxInFlight, batchSize: 3, maxBatchSize: 6 },
  });
  const { maintain } = createRecovery({
    scheduler: NOTHING,
    ...{ outbox: outboxOf('tick'), queues, memory, removeJobs, refiller, logger, lookup, epoch, deadLetters },
    ...{ acknowledger, metrics: NOTHING, config: { failedJobsKept: FAILED_JOBS_KEPT }, state: {} },
  } as unknown as Parameters<typeof createRecovery>[0]);
  const refills = outboxOf('refill');
  const { discard, replay } = createDeadLetterActions({
    rows: createDeadRows(poolOf(actor, 'operator', deps.operators), outboxOptions),
    entries: gated(
      ...([actor, 'dead entries'] as const),
      createDeadEntries(redis, streamOptions.dlqStreamName, lookup.findAllDeadLetters),
      { gates: ['remove'], plain: ['idsOf'] },
    ),
    ...{ queues, removeJobs, lookup, outbox: refills, wake: async () => {}, logger },
  });

  /** Jobs that the pod works on, by the token of each run. */
  const runs = new Map<string, string>();
  const tasks = new Set<string>();

  /** Does `work` beside everything else. */
  function begin(task: string, work: () => Promise<unknown>): Promise<void> {
    tasks.add(task);
    void work()
      .catch(note(task))
      .finally(() => tasks.delete(task));
    return interleaving.settle();
  }

  /** What a worker does (src/queue/workers.ts, and BullMQ's own), but for the moments. */
  async function work(job: Job<OutboxEvent>, token: string): Promise<void> {
    const fate = await publish.process(runOf(job));
    await hold(actor, `end: ${eventName(job.data)} ${fate.kind}`);
    if (fate.kind === 'delayed') {
      await fly('job', () => job.moveToDelayed(Date.now() + FAR_OFF_MS, token));
    } else if (fate.kind === 'completed') {
      await fly('job', () => job.moveToCompleted(fate.result as never, token, false));
      publish.onCompleted(runOf(job), fate.result);
    } else {
      const error = new Error(fate.reason);
      await fly('job', () => job.moveToFailed(error, token, false));
      const failedForGoodAt = job.finishedOn ? new Date(job.finishedOn) : null;
      publish.onFailed({ ...runOf(job), error, failedForGoodAt, retryInMs: job.delay });
    }
  }

  return {
    ...{ name, actor, epoch, runs, tasks },
    hasWork: () => tasks.size > 0 || runs.size > 0,
    requested: () => requested.size,

    /** Takes the next job that waits. Answers its event, or undefined. */
    async fetch(token: string): Promise<string | undefined> {
      const job: Job<OutboxEvent> | undefined = await fly('job', () =>
        worker.getNextJob(token, { block: false }),
      );
      if (job?.id === undefined) return undefined;
      runs.set(token, job.id);
      void work(job, token)
        .catch((error) => {
          // A run whose lock is lost does not end the job.
          if (!/lock|Missing key/i.test((error as Error).message))
            note(`run of ${eventName(job.data)}`)(error);
        })
        .finally(() => runs.delete(token));
      await interleaving.settle();
      return job.id;
    },
    claim: (task: string) => begin(task, claim),
    tick: () => begin('tick', maintain),
    look: () => begin('look', epoch.look),
    endEpoch: () => begin('look', epoch.end),
    /** As when the server of the queues was started anew. */
    expireLeases: () => begin('jobs lost', () => outboxOf('jobs lost').expireAllLeases()),
    refill(): Promise<void> {
      const aggregates = [...requested.values()];
      requested = new Map();
      return begin('refill', () => refills.refill(aggregates));
    },
    replay: (eventId: string) => begin('operator', () => replay({ eventIds: [eventId] }, { by: 'the walk' })),
    discard: (eventId: string) =>
      begin('operator', () => discard({ eventIds: [eventId] }, 'given up', { by: 'the walk' })),
  };
}

/** The connection, some of whose commands are counted until they are answered. */
function counted(redis: Redis, commands: readonly string[], fly: Interleaving['fly']): Redis {
  return new Proxy(redis, {
    get(target, name) {
      const value: unknown = Reflect.get(target, name);
      if (typeof value !== 'function') return value;
      if (!commands.includes(String(name))) return value.bind(target);
      return (...args: unknown[]) => fly(String(name), () => value.apply(target, args));
    },
  });
}

const runOf = (job: Job<OutboxEvent>): Run<OutboxEvent> => ({
  id: job.id ?? '',
  name: job.name,
  data: job.data,
  madeAt: job.timestamp,
  failures: job.attemptsMade,
  starts: job.attemptsStarted,
  stalls: job.stalledCounter,
});
