import type { Redis } from 'ioredis';
import type { RelayConfig } from '../config/config.ts';
import type { Pool } from '../connections/database.ts';
import { createJobRemoval } from '../finalize/job-removal.ts';
import { createDeadRows } from '../outbox/dead-rows.ts';
import { createOutbox } from '../outbox/outbox.ts';
import { createProblemOf, rulesOf } from '../publish/event-check.ts';
import { createQueues, type Queues } from '../queue/queues.ts';
import { createWake } from '../queue/scheduler.ts';
import { streamOptionsOf } from '../stream-options.ts';
import { createRepublisher } from '../streams/copies.ts';
import { createDeadEntries } from '../streams/dead-entries.ts';
import { createLookup } from '../streams/lookup.ts';
import { createMemory } from '../streams/memory.ts';
import type { Logger } from '../telemetry/logger.ts';
import { createTally } from '../telemetry/tally.ts';
import { createDeadLetters } from './dead-letters.ts';
import { createRepublish } from './republishing.ts';

export type Operations = ReturnType<typeof openOperations>;

/**
 * What operators can do, on connections that are there already: within a relay or beside it.
 * @param servers `redis` and `streamRedis`, which may be the same, neither queue nor resend commands (FAILS_FAST)
 */
export function openOperations(
  config: RelayConfig,
  servers: Readonly<{ pool: Pool; redis: Redis; streamRedis: Redis; queues?: Queues; logger: Logger }>,
) {
  const { pool, redis, streamRedis, logger } = servers;
  const options = { ...config, statementTimeoutMs: config.publishTimeoutMs };
  const outbox = createOutbox(pool, options);
  const streamOptions = streamOptionsOf(config);
  const lookup = createLookup(streamRedis, streamOptions);
  const queues = servers.queues ?? createQueues(redis, config, logger);
  const tally = createTally(logger);
  return {
    deadLetters: createDeadLetters({
      rows: createDeadRows(pool, options),
      entries: createDeadEntries(streamRedis, config.dlqStreamName, lookup.findAllDeadLetters),
      queues,
      removeJobs: createJobRemoval({
        queues,
        memory: createMemory(streamRedis, streamOptions, streamRedis !== redis),
      }),
      lookup,
      outbox,
      wake: createWake(queues.claim, logger),
      logger,
    }),
    republish: createRepublish({
      published: outbox,
      problemOf: createProblemOf(rulesOf(config, tally)),
      republisher: createRepublisher(streamRedis, streamOptions),
      logger,
    }),
    /** Closes what was opened here, not the connections. */
    close: async (): Promise<void> => {
      tally.flush();
      if (servers.queues === undefined) await queues.close();
    },
  };
}
