import type { Socket } from 'node:net';
import { Redis, type RedisOptions } from 'ioredis';
import type { RelayConfig } from '../config/config.ts';
import { isCluster, type QueuePlace, streamPlace } from '../config/redis-places.ts';
import { redisNodes, redisOptions, sentinelOptions } from '../config/redis-urls.ts';
import { slotOf } from '../config/topics.ts';
import { WORKER_CONNECTION } from '../queue/workers.ts';
import { RequirementError } from '../requirement.ts';
import type { Logger } from '../telemetry/logger.ts';
import type { Pool } from './database.ts';
import { createOutage } from './outage.ts';
import { createPool } from './pool.ts';
import { type HealthyPool, healthyPool } from './pool-health.ts';
import { inCluster } from './slot-connector.ts';

/** Every connection of a pod, and its timeouts. */

/**
 * Options of all connections but those of BullMQ's workers. They neither queue nor resend commands across a reconnect, so
 * no transaction stays open in an outage. An append whose answer was lost fails, and its job asks the script again: resent,
 * it might overtake the append of a later event.
 */
export const FAILS_FAST: RedisOptions = {
  enableOfflineQueue: false,
  autoResendUnfulfilledCommands: false,
  maxRetriesPerRequest: 0,
};

/**
 * A connection that gets no answer within this time is replaced. TCP would take 15 minutes to notice that the network is
 * half-open. Longer than any command blocks, and than a healthy Redis is busy with one thing.
 */
const ANSWER_TIMEOUT_MS = 4_000;
/** A healthy server answers within this time. Commands that take longer fail, and are sent again. */
const QUEUE_TIMEOUT_MS = 5_000;
const CONNECT_TIMEOUT_MS = 3_000;
const RECONNECT_DELAY_MS = 1_000;
/** One session for figures, one for viewers, two for operators. */
const HTTP_POOL_SIZE = 4;
/** Most commands that wait for the end of an iteration of the event loop. */
const COLLECTED_WRITES = 32;

/**
 * Sessions are replaced after this time. If an old primary does not know of a failover, a pod would otherwise keep its
 * sessions there and never reach the new primary: it would publish nothing, and look healthy.
 */
const SESSION_LIFETIME_S = 60;
/** Unused sessions are closed soon: the role may have fewer than all pods could use. */
const SESSION_IDLE_MS = 3_000;

/** A connection to one server: the only one, the master that the sentinels name, or the cluster node with our slot. */
export function openRedis(place: QueuePlace, options: RedisOptions): Redis {
  return inItsDatabase(
    new Redis({
      ...redisOptions(place.redisUrl),
      ...whereaboutsOf(place, options.enableOfflineQueue !== false),
      ...options,
    } as LegacyOptions),
  );
}

/** Where SELECT fails, ioredis goes on in database 0, which may be another program's: no command may get there. */
function inItsDatabase(redis: Redis): Redis {
  return redis.on('error', (error: Error & { command?: { name: string } }) => {
    if (error.command?.name === 'select') redis.stream.destroy();
  });
}

/** ioredis' types require `replyMapping`, though this is the default. */
type LegacyOptions = RedisOptions & { replyMapping?: 'legacy' };

/** Connections to the Redis of the queues and that of the streams: the same one, if it is one server. */
export function openBoth(config: RelayConfig, options: RedisOptions): [queues: Redis, streams: Redis] {
  const queues = openRedis(config, options);
  const streams = streamPlace(config);
  return [queues, streams === config ? queues : openRedis(streams, options)];
}

/**
 * Options of a given client that say where and as whom it connects. The relay takes these and no others: with automatic
 * pipelining, key prefixes, numbers as strings or another protocol, BullMQ and the scripts fail or misread replies.
 */
const ADDRESS = new Set([
  ...['host', 'port', 'path', 'family', 'tls', 'keepAlive', 'noDelay', 'natMap', 'Connector'],
  ...['db', 'username', 'password'],
  ...['sentinels', 'name', 'role', 'preferredSlaves', 'enableTLSForSentinelMode', 'sentinelTLS'],
  ...['sentinelUsername', 'sentinelPassword', 'sentinelRetryStrategy', 'sentinelReconnectStrategy'],
  ...['sentinelCommandTimeout', 'sentinelMaxConnections', 'updateSentinels', 'failoverDetector'],
]);

/** Overrides for `duplicate()`: resets all options but those of ADDRESS to ioredis' defaults. */
const withoutHabits = (options: RedisOptions): RedisOptions =>
  Object.fromEntries(
    Object.keys(options).flatMap((name) => (ADDRESS.has(name) ? [] : [[name, undefined]])),
  ) as RedisOptions;

function whereaboutsOf(place: QueuePlace, waits: boolean): RedisOptions {
  const { redisUrl, redisCluster = false, redisSentinels = 'none', redisSentinelName } = place;
  if (redisSentinels !== 'none') {
    return {
      ...sentinelOptions(redisSentinels),
      name: redisSentinelName,
      enableTLSForSentinelMode: redisOptions(redisUrl).tls !== undefined,
      sentinelCommandTimeout: CONNECT_TIMEOUT_MS,
      // The master was demoted but kept the connection: ask the sentinels for the new one.
      reconnectOnError: ({ message }) => /^READONLY\b/.test(message) && (waits ? 2 : 1),
    } as RedisOptions;
  }
  if (!isCluster(place)) return {};
  const nodes = [...redisNodes(redisUrl), ...(redisCluster || [])];
  return inCluster(nodes, slotOf(`${place.queuePrefix}:${place.queueName}`), waits);
}

export type Servers = Readonly<{
  pool: HealthyPool;
  /** For the queues. Commands fail at once while there is no connection. */
  queueRedis: Redis;
  /** For reading streams: `queueRedis`, unless the streams have a server of their own. */
  streamRedis: Redis;
  /** For appending and trimming. Neither queues commands nor sends them again. */
  appendRedis: Redis;
  /** For BullMQ's workers. Commands wait until Redis is back. */
  workerRedis: Redis;
  /**
   * For HTTP and figures: their slow queries must not take sessions from the relay. An embedding program's pool serves both,
   * and half of it is reserved for the relay.
   */
  httpPool: Pool;
  /** Opens connections for HTTP. */
  openHttpRedis(): Readonly<{ queueRedis: Redis; streamRedis: Redis }>;
  close(): Promise<void>;
}>;

/**
 * @param deps clients of an embedding program: used, but never closed
 * @throws {RequirementError} if the client is one for a cluster
 */
export function openServers(
  config: RelayConfig,
  deps: Readonly<{ pool?: Pool; redis?: Redis }>,
  logger: Logger,
): Servers {
  // Its duplicates would be clients for a cluster as well: see slot-connector.ts for why the relay works with none.
  if (deps.redis?.isCluster)
    throw new RequirementError(
      "the relay does not work with ioredis' client for a Redis Cluster: give it no client, and name several nodes in RELAY_REDIS_URL, or one and RELAY_REDIS_CLUSTER=true",
    );
  const pools: ReturnType<typeof createPool>[] = [];
  /** When PostgreSQL stops, all idle sessions end at once: a warning of the first, until a session is opened again. */
  let warnedOfIdle = false;
  const openPool = (max: number, name: string) => {
    const pool = createPool(config.databaseUrl, {
      maxLifetimeSeconds: SESSION_LIFETIME_S,
      idleTimeoutMillis: SESSION_IDLE_MS,
      ...{ max, connectionTimeoutMillis: CONNECT_TIMEOUT_MS, keepAlive: true, pipeline: true },
      application_name: name,
    });
    pool.on('error', (error) => {
      logger[warnedOfIdle ? 'debug' : 'warn']({ err: error }, 'lost an idle database connection');
      warnedOfIdle = true;
    });
    pool.on('connect', () => {
      warnedOfIdle = false;
    });
    pools.push(pool);
    return pool;
  };
  const ownPool = deps.pool ? undefined : openPool(config.databasePoolSize, 'relay-service');
  ownPool?.on('connect', (client) =>
    collectWrites((client as unknown as { connection: { stream: Socket } }).connection.stream),
  );

  const connections: Redis[] = [];
  const streams = streamPlace(config);
  /** The connections that are lost, by their role: an outage of a server, and its end, is told once. */
  const lost = new Map([config, streams].map((place) => [place, new Set<string>()]));
  const connect = (role: string, options: RedisOptions, place: RelayConfig = config): Redis => {
    const all: RedisOptions = {
      socketTimeout: ANSWER_TIMEOUT_MS,
      ...options,
      lazyConnect: false,
      connectTimeout: CONNECT_TIMEOUT_MS,
      connectionName: `relay-${role}`,
      retryStrategy: (tries) => Math.min(tries * 100, RECONNECT_DELAY_MS),
    };
    const redis =
      deps.redis && place === config
        ? inItsDatabase(deps.redis.duplicate({ ...withoutHabits(deps.redis.options), ...all }))
        : openRedis(place, all);
    redis.on('connect', () => collectWrites(redis.stream));
    const lostThere = lost.get(place) as Set<string>;
    const server = place === config ? 'Redis' : 'Redis of the streams';
    redis.on('error', (error) => {
      if (lostThere.size === 0)
        logger.warn({ err: error, server }, 'no connection to Redis; trying again until it is back');
      lostThere.add(role);
    });
    redis.on('ready', () => {
      if (lostThere.delete(role) && lostThere.size === 0)
        logger.info({ server }, 'the connection to Redis is back');
    });
    connections.push(redis);
    return redis;
  };
  const failingFast = { ...FAILS_FAST, commandTimeout: QUEUE_TIMEOUT_MS };
  const queueRedis = connect('queue', failingFast);
  const pgPool = deps.pool ?? (ownPool as Pool);
  const outage = createOutage(logger, (pgPool as { options?: { host?: string } }).options?.host);
  const pool = healthyPool(pgPool, { size: config.databasePoolSize, logger, outage });
  return {
    pool,
    queueRedis,
    streamRedis: streams === config ? queueRedis : connect('streams', failingFast, streams),
    appendRedis: connect('append', { ...FAILS_FAST, commandTimeout: config.publishTimeoutMs }, streams),
    workerRedis: connect('worker', WORKER_CONNECTION),
    httpPool: deps.pool
      ? (pool.leaving?.(Math.floor(config.databasePoolSize / 2)) ?? pool)
      : healthyPool(openPool(HTTP_POOL_SIZE, 'relay-service http'), {
          ...{ size: HTTP_POOL_SIZE, logger, outage },
          base: pool.base,
        }),
    openHttpRedis() {
      const redis = connect('http', failingFast);
      return {
        queueRedis: redis,
        streamRedis: streams === config ? redis : connect('http-streams', failingFast, streams),
      };
    },
    async close() {
      for (const redis of connections) redis.disconnect();
      pool.unwrap();
      await Promise.all(pools.map((it) => it.end()));
    },
  };
}

/**
 * Sends everything that is written in one iteration of the event loop with one system call. The workers finish dozens of
 * jobs at once, and a system call costs this process more than the rest of its command (50 of 190 µs per event,
 * measured). ioredis' own pipelining costs more than it saves.
 */
function collectWrites(socket: Socket): void {
  const write = socket.write.bind(socket) as (...args: unknown[]) => boolean;
  let collected = 0;
  const send = (): void => {
    collected = 0;
    socket.uncork();
  };
  socket.write = (...args: unknown[]) => {
    if (collected === 0) {
      socket.cork();
      process.nextTick(() => {
        if (collected > 0) send();
      });
    }
    collected++;
    const isTaken = write(...args);
    // So that Redis works on these commands while this process writes the next.
    if (collected >= COLLECTED_WRITES) send();
    return isTaken;
  };
}
