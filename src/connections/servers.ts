import type { Socket } from 'node:net';
import { Redis, type RedisOptions } from 'ioredis';
import type { RelayConfig } from '../config/config.ts';
import { isCluster, type QueuePlace, streamPlace } from '../config/redis-places.ts';
import { redisNodes, redisOptions, sentinelOptions } from '../config/redis-urls.ts';
import { slotOf } from '../config/topics.ts';
import { ANSWER_TIMEOUT_MS, QUEUE_CONNECTION } from '../queue/queues.ts';
import { WORKER_CONNECTION } from '../queue/workers.ts';
import { APPEND_CONNECTION } from '../streams/append.ts';
import type { Logger } from '../telemetry/logger.ts';
import type { Pool } from './database.ts';
import { createPool } from './pool.ts';
import { type HealthyPool, healthyPool } from './pool-health.ts';
import { inCluster } from './slot-connector.ts';

/** Every connection of a pod: what it is for, and how long it is waited for. */

/** Answer of a healthy server; commands that take longer are given up and asked again. */
const QUEUE_TIMEOUT_MS = 5_000;
const CONNECT_TIMEOUT_MS = 3_000;
const RECONNECT_DELAY_MS = 1_000;
/** One for figures, one for viewers, two for operators; closed when nobody has asked for 10 s. */
const HTTP_POOL_SIZE = 4;
/** So many commands at most are held back until the iteration of the event loop has ended. */
const COLLECTED_WRITES = 32;

/**
 * Lifetime of a session. After a failover of which the old primary knows nothing, a pod with enough sessions
 * would otherwise never open one to the new primary: it stands still, and everything says healthy.
 */
const SESSION_LIFETIME_S = 60;
/** A session that is not needed is soon free for another pod: the role may have fewer than all pods could use. */
const SESSION_IDLE_MS = 3_000;

/** One connection to one server: the one that there is, the master that sentinels name, or the node with our slot. */
export function openRedis(place: QueuePlace, options: RedisOptions): Redis {
  return new Redis({
    ...redisOptions(place.redisUrl),
    ...whereaboutsOf(place, options.enableOfflineQueue !== false),
    ...options,
  } as LegacyOptions);
}

/** ioredis' types want the reply mapping said, though this is the default. */
type LegacyOptions = RedisOptions & { replyMapping?: 'legacy' };

/** To the Redis of the queues and that of the streams: the same connection, where it is one server. */
export function openBoth(config: RelayConfig, options: RedisOptions): [queues: Redis, streams: Redis] {
  const queues = openRedis(config, options);
  const streams = streamPlace(config);
  return [queues, streams === config ? queues : openRedis(streams, options)];
}

/**
 * Options of a client that say which server it is, and who we are there. All others are the relay's own: with automatic
 * pipelining, key prefixes, numbers as strings or another protocol, BullMQ and the scripts fail or read something else.
 */
const ADDRESS = new Set([
  ...['host', 'port', 'path', 'family', 'tls', 'keepAlive', 'noDelay', 'natMap', 'Connector'],
  ...['db', 'username', 'password'],
  ...['sentinels', 'name', 'role', 'preferredSlaves', 'enableTLSForSentinelMode', 'sentinelTLS'],
  ...['sentinelUsername', 'sentinelPassword', 'sentinelRetryStrategy', 'sentinelReconnectStrategy'],
  ...['sentinelCommandTimeout', 'sentinelMaxConnections', 'updateSentinels', 'failoverDetector'],
]);

/** For a duplicate: its own options are undone, so that ioredis' defaults are in their place. */
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
      // A master that was demoted without a word: the sentinels know the new one.
      reconnectOnError: ({ message }) => /^READONLY\b/.test(message) && (waits ? 2 : 1),
    } as RedisOptions;
  }
  if (!isCluster(place)) return {};
  const nodes = [...redisNodes(redisUrl), ...(redisCluster || [])];
  return inCluster(nodes, slotOf(`${place.queuePrefix}:${place.queueName}`), waits);
}

export type Servers = Readonly<{
  pool: HealthyPool;
  /** For the queues: fails fast. */
  queueRedis: Redis;
  /** To read streams: the same, unless they are on a server of their own. */
  streamRedis: Redis;
  /** For the streams alone: neither queues nor resends. */
  appendRedis: Redis;
  /** For BullMQ's workers: waits until Redis is back. */
  workerRedis: Redis;
  /**
   * For what is asked over HTTP, and for figures: whatever takes long there takes no connection of the relay's. A pool
   * that was given is used for both, and half of it is left to the relay.
   */
  httpPool: Pool;
  /** The same to Redis; opens them. */
  openHttpRedis(): Readonly<{ queueRedis: Redis; streamRedis: Redis }>;
  close(): Promise<void>;
}>;

/** @param deps what the embedding program brought: used, and never closed */
export function openServers(
  config: RelayConfig,
  deps: Readonly<{ pool?: Pool; redis?: Redis }>,
  logger: Logger,
): Servers {
  const pools: ReturnType<typeof createPool>[] = [];
  const openPool = (max: number, name: string) => {
    const pool = createPool(config.databaseUrl, {
      maxLifetimeSeconds: SESSION_LIFETIME_S,
      idleTimeoutMillis: SESSION_IDLE_MS,
      ...{ max, connectionTimeoutMillis: CONNECT_TIMEOUT_MS, keepAlive: true, pipeline: true },
      application_name: name,
    });
    pool.on('error', (error) => logger.warn({ err: error }, 'lost an idle database connection'));
    pools.push(pool);
    return pool;
  };
  const ownPool = deps.pool ? undefined : openPool(config.databasePoolSize, 'relay-service');
  ownPool?.on('connect', (client) =>
    collectWrites((client as unknown as { connection: { stream: Socket } }).connection.stream),
  );

  const connections: Redis[] = [];
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
        ? deps.redis.duplicate({ ...withoutHabits(deps.redis.options), ...all })
        : openRedis(place, all);
    redis.on('connect', () => collectWrites(redis.stream));
    let lost = false;
    redis.on('error', (error) => {
      if (!lost)
        logger.warn(
          { err: error, connection: role },
          'no connection to Redis; trying again until it is back',
        );
      lost = true;
    });
    redis.on('ready', () => {
      if (lost) logger.warn({ connection: role }, 'the connection to Redis is back');
      lost = false;
    });
    connections.push(redis);
    return redis;
  };
  const failingFast = { ...QUEUE_CONNECTION, commandTimeout: QUEUE_TIMEOUT_MS };
  const queueRedis = connect('queue', failingFast);
  const streams = streamPlace(config);
  const pool = healthyPool(deps.pool ?? (ownPool as Pool), { size: config.databasePoolSize, logger });
  return {
    pool,
    queueRedis,
    streamRedis: streams === config ? queueRedis : connect('streams', failingFast, streams),
    appendRedis: connect(
      'append',
      { ...APPEND_CONNECTION, commandTimeout: config.publishTimeoutMs },
      streams,
    ),
    workerRedis: connect('worker', WORKER_CONNECTION),
    httpPool: deps.pool
      ? (pool.leaving?.(Math.floor(config.databasePoolSize / 2)) ?? pool)
      : healthyPool(openPool(HTTP_POOL_SIZE, 'relay-service http'), { size: HTTP_POOL_SIZE, logger }),
    openHttpRedis() {
      const redis = connect('http', failingFast);
      return {
        queueRedis: redis,
        streamRedis: streams === config ? redis : connect('http-streams', failingFast, streams),
      };
    },
    async close() {
      for (const redis of connections) redis.disconnect();
      await Promise.all(pools.map((it) => it.end()));
    },
  };
}

/**
 * What is written in one iteration of the event loop leaves in one system call. The workers finish jobs by the dozen at once, and
 * each call costs this process more than all the rest of its command (50 of 190 µs per event, measured). ioredis' own
 * pipelining costs more than it spares there.
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
    // Redis works on the first of them while we are busy with the next.
    if (collected >= COLLECTED_WRITES) send();
    return isTaken;
  };
}
