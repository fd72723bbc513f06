import type { Redis } from 'ioredis';
import { streamOptionsOf } from '../comparison.ts';
import type { RelayConfig } from '../config.ts';
import type { Logger } from '../logger.ts';
import type { Pool } from '../outbox/database.ts';
import { createDeadRows } from '../outbox/dead-rows.ts';
import { createOutbox } from '../outbox/outbox.ts';
import { createReceipts } from '../outbox/receipts.ts';
import { createQueues, type Queues } from '../queue/queues.ts';
import { createScheduler } from '../queue/scheduler.ts';
import { ENTRY } from '../stream/append.ts';
import { createDeadEntries } from '../stream/dead-entries.ts';
import { createRepublisher } from '../stream/republish.ts';
import { createRestorer } from '../stream/restore.ts';
import { createDeadLetters, type DeadLetters } from './dead-letters.ts';
import { createRepublish, type Republish } from './republish.ts';

/** Takes failed jobs away, but for those whose append is remembered: by the jobs themselves, or beside the streams. */
function takingAway(
  queues: Queues,
  streamRedis: Redis,
  markerKey: ((eventId: string) => string) | undefined,
): Queues['takeAway'] {
  if (markerKey === undefined) return queues.takeAway;
  return async (eventIds, memory) => {
    const marked = await Promise.all(eventIds.map((eventId) => streamRedis.exists(markerKey(eventId))));
    const unmarked = eventIds.filter((_, i) => marked[i] === 0);
    const appended = eventIds.filter((_, i) => marked[i] === 1);
    const unclear = await queues.takeAway(unmarked, memory);
    return new Map([...unclear, ...appended.map((eventId) => [eventId, 'appended'] as const)]);
  };
}

export type Operations = Readonly<{
  deadLetters: DeadLetters;
  republish: Republish;
  /** Closes what was opened here, not the connections. */
  close(): Promise<void>;
}>;

/**
 * What operators can do, on connections that are there already: within a relay or beside it.
 * @param servers `redis` and `streamRedis`, which may be the same, neither queue nor resend commands
 * (QUEUE_CONNECTION, APPEND_CONNECTION)
 */
export function openOperations(
  config: RelayConfig,
  servers: Readonly<{ pool: Pool; redis: Redis; streamRedis: Redis; queues?: Queues; logger: Logger }>,
): Operations {
  const { pool, redis, streamRedis, logger } = servers;
  const options = { ...config, statementTimeoutMs: config.publishTimeoutMs };
  const streamOptions = streamOptionsOf(config);
  const restorer = createRestorer(streamRedis, streamOptions);
  const queues = servers.queues ?? createQueues(redis, config, logger);
  const { pollIntervalMs } = config;
  return {
    deadLetters: createDeadLetters({
      rows: createDeadRows(pool, options),
      entries: createDeadEntries(streamRedis, config.dlqStreamName, restorer.findAll),
      jobs: { ...queues, takeAway: takingAway(queues, streamRedis, streamOptions.markerKey) },
      memory: ENTRY,
      inStream: restorer.find,
      release: createOutbox(pool, options).releaseOrphans,
      wake: createScheduler({ queue: queues.claim, redis, pollIntervalMs, logger }).wake,
      logger,
    }),
    republish: createRepublish({
      receipts: createReceipts(pool, options),
      republisher: createRepublisher(streamRedis, streamOptions),
      logger,
    }),
    close: async () => {
      if (servers.queues === undefined) await queues.close();
    },
  };
}
