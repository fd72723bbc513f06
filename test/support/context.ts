/** What the parts of a relay share (src/context.ts), on servers of the test file's own, for tests of single parts. */
import { type Job, Worker } from 'bullmq';
import { openServers } from '../../src/connections/servers.ts';
import { type Context, createContext } from '../../src/context.ts';
import { loadConfig } from '../../src/index.ts';
import type { LeasedEvent } from '../../src/outbox/outbox.ts';
import { createClock } from '../../src/queue/clock.ts';
import { openQueues } from '../../src/queue/queues.ts';
import { WORKER_CONNECTION } from '../../src/queue/workers.ts';
import { epochId } from '../../src/streams/epoch.ts';
import type { Logger } from '../../src/telemetry/logger.ts';
import { untraced } from '../../src/telemetry/tracing.ts';
import { atEndOfFile } from './cleanup.ts';
import { createDatabase, createRedis } from './servers.ts';
import {
  type AdminPool,
  type AdminRedis,
  openAdminPool,
  openAdminRedis,
  openRedis,
  silent,
} from './stages.ts';
import { waitFor } from './wait.ts';

export type TestContext = Awaited<ReturnType<typeof openContext>>;

/** So that each server's user has its own rights; the address does not matter to them. */
const TWO = { RELAY_STREAM_REDIS_URL: 'redis://streams' };

const STARTUP_MS = 60_000;

/**
 * Neither workers nor ticks run. The epoch is known, and goes on until the file ends.
 *
 * @param env variables of the relay beside the addresses of its servers
 * @param options.twoServers whether the streams have a Redis of their own
 */
export async function openContext(
  env: Readonly<Record<string, string>> = {},
  { twoServers = false, logger = silent }: Readonly<{ twoServers?: boolean; logger?: Logger }> = {},
) {
  const [database, server, streamServer] = await Promise.all([
    createDatabase(),
    createRedis(twoServers ? { env: TWO, on: 'queues' } : {}),
    twoServers ? createRedis({ env: TWO, on: 'streams' }) : undefined,
  ]);
  const config = loadConfig({
    RELAY_DATABASE_URL: database.url,
    RELAY_REDIS_URL: server.url,
    ...(streamServer && { RELAY_STREAM_REDIS_URL: streamServer.url }),
    ...env,
  });
  const servers = openServers(config, {}, silent);
  atEndOfFile(servers.close);
  const queues = await openQueues(servers.queueRedis, config, silent, STARTUP_MS);
  atEndOfFile(queues.close);
  const clock = createClock({ redisTime: async () => Date.now(), logger });
  const context: Context = createContext(config, servers, queues, untraced, logger, clock);
  const { outbox, epoch, refiller } = context;
  atEndOfFile(refiller.stop);
  const pool: AdminPool = openAdminPool(database.adminUrl);
  const redis: AdminRedis = openAdminRedis(server.adminUrl);
  const streamRedis: AdminRedis = streamServer ? openAdminRedis(streamServer.adminUrl) : redis;
  epoch.start();
  atEndOfFile(epoch.stop);

  const currentEpoch = () =>
    waitFor(() => epoch.current(), { what: 'an epoch to begin', timeoutMs: STARTUP_MS });
  const keyOf = (eventId: string) => queues.jobKey(eventId);

  return {
    ...{ context, config, pool, redis, streamRedis, currentEpoch, keyOf, server },

    /** Empties table and Redis; another epoch begins. */
    async clear(): Promise<void> {
      await pool.query('TRUNCATE identity.outbox RESTART IDENTITY');
      await redis.flushall();
      await streamRedis.flushall();
      epoch.start();
      epoch.invalidate();
      await currentEpoch();
    },

    /** Leases and parks what is fresh, as the claim does, and adds the jobs; answers what was leased. */
    async claim(limit = 1_000): Promise<LeasedEvent[]> {
      const of = epochId(await currentEpoch());
      return outbox.inEpoch(async (tx) => {
        const { leased } = await outbox.claimFresh(tx, limit);
        const events = leased.map((event) => ({ ...event, epoch: of }));
        if (events.length > 0) await queues.addPublishJobs(events);
        return events;
      });
    },

    /** Appends the event by its job's script, as a worker does. */
    async append(event: LeasedEvent): Promise<string> {
      const of = await currentEpoch();
      const madeAt = Number(await redis.hget(keyOf(event.eventId), 'timestamp'));
      const outcome = await context.streams.publish(event, { epoch: of, gate: 'open', madeAt });
      if (outcome.status !== 'appended') throw new Error(`the event was not appended: ${outcome.status}`);
      return outcome.entryId;
    },

    /** When the event's job was made, Unix time in ms. */
    madeAt: async (eventId: string): Promise<number> => Number(await redis.hget(keyOf(eventId), 'timestamp')),

    /** Runs each job that waits once; what `processor` throws is the failure of its attempt. */
    async runJobs(processor: (job: Job<LeasedEvent>) => Promise<void>): Promise<void> {
      const worker = new Worker(queues.publish.name, processor, {
        connection: openRedis(server.url, WORKER_CONNECTION),
        concurrency: 50,
      });
      const left = async () => {
        const { waiting, active } = await queues.inFlight();
        return waiting + active;
      };
      await waitFor(async () => (await left()) === 0, { what: 'every job to be run', timeoutMs: 60_000 });
      await worker.close();
    },
  };
}
