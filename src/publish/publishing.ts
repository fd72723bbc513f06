import { keyTypeProblem } from '../connections/key-types.ts';
import type { Context } from '../context.ts';
import type { OutboxEvent } from '../event.ts';
import { succeedsWithin } from '../lifecycle.ts';
import { publishQueueName } from '../queue/queues.ts';
import { createWorkers } from '../queue/workers.ts';
import { streamOptionsOf } from '../stream-options.ts';
import { epochKeyTypes } from '../streams/epoch-script.ts';
import { createEventCheck, rulesOf } from './event-check.ts';
import { createParker } from './parker.ts';
import { createPoisonGuard } from './poison-guard.ts';
import { createPublish, type Released } from './publish.ts';
import { createRowQuestions } from './row-questions.ts';

export type Publishing = ReturnType<typeof createPublishing>;

/** The publish stage: its workers, and what an attempt needs besides the stores. */
export function createPublishing(context: Context) {
  const { config, servers, queues, outbox, tally, logger } = context;
  const { queuePrefix, concurrency, publishTimeoutMs } = config;

  const check = createEventCheck({
    ...rulesOf(config, tally),
    assertPermitted: ({ eventId }) =>
      Promise.all([
        context.queuesWritable(),
        context.streamsWritable(),
        servers.queueRedis.exists(queues.jobKey(eventId)),
      ]),
    keyTypeProblem: () =>
      keyTypeProblem(servers.streamRedis, epochKeyTypes(streamOptionsOf(config).epochKey)),
  });
  const guard = createPoisonGuard({
    redis: servers.queueRedis,
    jobKey: queues.jobKey,
    maxCrashes: config.maxCrashes,
  });
  const parker = createParker({ outbox, refiller: context.refiller, logger });
  const publish = createPublish({
    ...context,
    ...{ check, guard, parker, onPublished: context.heartbeat.appendedTo, options: config },
    rows: createRowQuestions(outbox),
  });
  const workers = createWorkers<OutboxEvent, Released | null>({
    ...{ queuePrefix, concurrency, logger, timeoutMs: publishTimeoutMs },
    queueName: publishQueueName(config.queueName),
    connection: servers.workerRedis,
    process: publish.process,
    onCompleted: publish.onCompleted,
    onFailed: publish.onFailed,
    onRefused: context.metrics.refused,
    async onStalled(eventId) {
      if (await queues.removeUnreadable(queues.publish, eventId).catch(() => false))
        tally.warn(eventId, {}, 'publish jobs that nobody can read, and are not the relay’s, are removed');
      else tally.warn(eventId, {}, 'took over events from a pod that stopped or hung');
    },
    telemetry: context.tracing.jobs,
  });

  return {
    workers,
    start: workers.start,
    /** Takes no more jobs, and waits for those in progress. At the deadline it leaves the rest to the other pods. */
    async stop(deadlineMs: number): Promise<void> {
      await workers.stop(deadlineMs);
      await succeedsWithin(deadlineMs, publish.drain());
      await succeedsWithin(deadlineMs, parker.drain());
      guard.stop();
    },
  };
}
