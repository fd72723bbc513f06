/**
 * Every variable, described once, in `TABLE`. `RelayConfig`, `relay start --help` and `.env.example` are made from it;
 * tests compare docs/configuration.md with it. load-config.ts reads the environment by it.
 */
import { normaliseDatabaseUrl } from './connection-urls.ts';
import { normaliseRedisUrl } from './redis-urls.ts';
import { keyRule, STREAM_NAME } from './topics.ts';
import {
  basePath,
  boardUsers,
  cluster,
  flag,
  type Kind,
  key,
  oneOf,
  patterns,
  proxies,
  seconds,
  sentinels,
  text,
  url,
  urlOr,
  wholeNumber,
} from './variable-kinds.ts';

/** One variable as it is described to people. */
export type Variable = Readonly<{
  /** Name in the environment. */
  name: `RELAY_${string}`;
  /** Name in `RelayConfig`. */
  property: string;
  /** As it would be written in the environment. */
  default: string;
  description: string;
  /** What a good value looks like, e.g. `a whole number of events from 1 to 10000`. */
  expected: string;
  /** Of the value in the environment, e.g. `s`. Durations are milliseconds in `RelayConfig`. */
  unit?: string;
  /** Never shown, not even in part. */
  secret?: true;
}>;

/** The description as a member of an object: the formatter leaves the rest of a call on one line. */
const variable = <T>(
  name: `RELAY_${string}`,
  kind: Kind<T>,
  defaultText: string,
  described: { description: string },
) => ({ name, ...kind, default: defaultText, ...described });

const LOG_LEVELS = ['trace', 'debug', 'info', 'warn', 'error', 'fatal'] as const;
/** Names of Python's `logging`, which the relay's predecessor used. */
const PYTHON_LOG_LEVELS = { notset: 'trace', warning: 'warn', critical: 'fatal' } as const;

const REDIS_URL = 'a URL like redis://user:password@host:6379/0 (rediss for TLS)';

// Every duration ends in a timer. Node takes a delay above 2^31-1 ms (24.8 days) for 1 ms: no maximum comes near it.
const HOUR = 3_600;
const DAY = 86_400;

/** Each variable by its name in `RelayConfig`, in the order in which people should read them. */
export const TABLE = {
  databaseUrl: variable(
    'RELAY_DATABASE_URL',
    url('a URL like postgresql://user:password@host:5432/database', normaliseDatabaseUrl),
    'postgresql+asyncpg://postgres:postgres@localhost:5432/markdown_manager',
    {
      description:
        'PostgreSQL connection; sslmode, sslrootcert, sslcert and sslkey as in libpq, ssl as in asyncpg',
    },
  ),
  databasePoolSize: variable('RELAY_DATABASE_POOL_SIZE', wholeNumber(3, 100, 'sessions'), '10', {
    description: 'Sessions of PostgreSQL that one pod uses at most; it works with fewer where it gets fewer',
  }),
  redisUrl: variable('RELAY_REDIS_URL', url(REDIS_URL, normaliseRedisUrl), 'redis://localhost:6379/0', {
    description:
      'Redis connection, for the queues and the streams; several hosts, separated by commas, are nodes of a cluster',
  }),
  redisCluster: variable('RELAY_REDIS_CLUSTER', cluster(), 'false', {
    description:
      'true = RELAY_REDIS_URL is a node of a Redis Cluster; or further nodes of it, as host:port,host:port',
  }),
  redisSentinels: variable('RELAY_REDIS_SENTINELS', sentinels(), 'none', {
    description:
      'Sentinels that are asked where the master is, as host:port,host:port; the rest is as RELAY_REDIS_URL says',
  }),
  redisSentinelName: variable('RELAY_REDIS_SENTINEL_NAME', key(keyRule(200)), 'mymaster', {
    description: 'What the sentinels call the master',
  }),
  streamRedisUrl: variable('RELAY_STREAM_REDIS_URL', urlOr('same', REDIS_URL, normaliseRedisUrl), 'same', {
    description:
      'Redis of the streams, if it is another server than that of the queues; several hosts are nodes of a cluster',
  }),
  batchSize: variable('RELAY_BATCH_SIZE', wholeNumber(1, 10_000, 'events'), '100', {
    description: 'Events claimed in one transaction; at most RELAY_MAX_IN_FLIGHT',
  }),
  maxBatchSize: variable('RELAY_MAX_BATCH_SIZE', wholeNumber(1, 10_000, 'events'), '400', {
    description: 'Largest claim while there is a backlog; RELAY_BATCH_SIZE if only that is set',
  }),
  pollIntervalMs: variable('RELAY_POLL_INTERVAL', seconds(0.05, HOUR), '5', {
    description: 'Time between two ticks of the schedule, for when nothing wakes the relay up',
  }),
  maxRetryAttempts: variable('RELAY_MAX_RETRY_ATTEMPTS', wholeNumber(0, 20, 'retries'), '5', {
    description: 'Retries after the first attempt, before an event is dead-lettered: 5 make six attempts',
  }),
  retryBaseDelayMs: variable('RELAY_RETRY_BASE_DELAY', seconds(0.01, DAY), '60', {
    description: 'Delay of the first retry; each further retry waits twice as long',
  }),
  maxCrashes: variable('RELAY_MAX_CRASHES', wholeNumber(1, 100, 'crashes'), '3', {
    description: 'Pods that an event may end before it is dead-lettered; 1 counts as 2',
  }),
  streamName: variable('RELAY_STREAM_NAME', key(STREAM_NAME), 'identity.user.v1', {
    description: 'Stream of the events whose row names no topic',
  }),
  dlqStreamName: variable('RELAY_DLQ_STREAM_NAME', key(STREAM_NAME), 'identity.user.v1.dlq', {
    description: 'Stream that takes the dead letters',
  }),
  allowedTopics: variable('RELAY_ALLOWED_TOPICS', patterns(), '*', {
    description: 'Topics that are relayed; events of any other are dead-lettered at once',
  }),
  maxEventBytes: variable('RELAY_MAX_EVENT_BYTES', wholeNumber(1_024, 134_217_728, 'bytes'), '1048576', {
    description:
      'Largest event: payload as JSON text, types and topic together; larger ones are dead-lettered at once',
  }),
  streamMaxLen: variable('RELAY_STREAM_MAXLEN', wholeNumber(0, 1_000_000_000, 'entries'), '100000', {
    description: 'Entries kept in each stream, approximately; 0 = never trim',
  }),
  streamTrim: variable('RELAY_STREAM_TRIM', oneOf(['maxlen', 'acknowledged']), 'maxlen', {
    description:
      'acknowledged = trim, before that limit, what every consumer group has acknowledged; maxlen = that limit alone',
  }),
  dlqMaxLen: variable('RELAY_DLQ_MAXLEN', wholeNumber(0, 1_000_000_000, 'entries'), '10000', {
    description: 'Entries kept in the dead-letter stream, approximately; 0 = never trim',
  }),
  shutdownTimeoutMs: variable('RELAY_SHUTDOWN_TIMEOUT', seconds(0.1, HOUR), '25', {
    description: 'Longest time from SIGTERM to the end of the process',
  }),
  publishTimeoutMs: variable('RELAY_PUBLISH_TIMEOUT', seconds(0.05, HOUR), '10', {
    description:
      'Longest time for one attempt to publish; shorter than RELAY_CLAIM_LEASE (if that is 10 s or less, the default is half of it)',
  }),
  claimLeaseMs: variable('RELAY_CLAIM_LEASE', seconds(0.5, DAY), '60', {
    description:
      'Lease of a claimed event: when it has ended without news, the relay asks what became of its job',
  }),
  resyncWindowMs: variable('RELAY_RESYNC_WINDOW', seconds(0, 30 * DAY), '3600', {
    description: 'How far back events are published again when Redis has lost data; 0 = never',
  }),
  publishedRetentionMs: variable('RELAY_PUBLISHED_RETENTION', seconds(0, 3_650 * DAY), '0', {
    description:
      'Age at which published rows are deleted from the table, at least RELAY_RESYNC_WINDOW; 0 = never',
  }),
  concurrency: variable('RELAY_CONCURRENCY', wholeNumber(1, 1_000, 'jobs'), '300', {
    description: 'Publish jobs that one pod works on at once',
  }),
  maxInFlight: variable('RELAY_MAX_IN_FLIGHT', wholeNumber(1, 1_000_000, 'jobs'), '2000', {
    description: 'Publish jobs that may be in Redis at once, for all pods together; failed ones do not count',
  }),
  ordering: variable('RELAY_ORDERING', oneOf(['aggregate', 'none']), 'aggregate', {
    description:
      'aggregate = events of one aggregate are published in the order of their rows; none = as they come',
  }),
  deadLetterPolicy: variable('RELAY_DEAD_LETTER_POLICY', oneOf(['continue', 'hold']), 'continue', {
    description: 'After a dead letter, its aggregate goes on (continue) or waits for an operator (hold)',
  }),
  validation: variable('RELAY_VALIDATION', oneOf(['off', 'warn', 'strict']), 'warn', {
    description:
      'A payload that breaks its schema: off = not compared; warn = logged, and published; strict = dead-lettered at once',
  }),
  notify: variable('RELAY_NOTIFY', flag(), 'true', {
    description: 'Wake up on NOTIFY from the table; false where LISTEN does not work, as behind PgBouncer',
  }),
  queuePrefix: variable('RELAY_QUEUE_PREFIX', key(keyRule(200)), 'bull', {
    description: "Prefix of BullMQ's keys in Redis",
  }),
  queueName: variable(
    'RELAY_QUEUE_NAME',
    text('1 to 200 printable characters without white space or ":"', /^[^\s\p{C}:]{1,200}$/u),
    'relay',
    {
      description: 'The queues are called <name>-claim and <name>-publish',
    },
  ),
  httpHost: variable(
    'RELAY_HTTP_HOST',
    text('a host name or an IP address', /^[A-Za-z0-9_.:%-]{1,255}$/),
    '0.0.0.0',
    {
      description: 'Address that the HTTP server listens on',
    },
  ),
  httpPort: variable('RELAY_HTTP_PORT', wholeNumber(0, 65_535), '8004', {
    description: 'Port that the HTTP server listens on; 0 = any free port',
  }),
  board: variable('RELAY_BOARD', flag(), 'false', {
    description: 'Serve the dashboard at /board, for those in RELAY_BOARD_USERS',
  }),
  boardUsers: variable('RELAY_BOARD_USERS', boardUsers(), 'none', {
    description:
      'Who may log in to the dashboard; may be none only where RELAY_HTTP_HOST is a loopback address',
  }),
  boardBasePath: variable('RELAY_BOARD_BASE_PATH', basePath(), '/', {
    description: 'Path under which a proxy serves this HTTP server; the proxy may take it away or leave it',
  }),
  trustedProxies: variable('RELAY_TRUSTED_PROXIES', proxies(), 'none', {
    description: 'Proxies whose X-Forwarded-For, -Proto and -Host are believed',
  }),
  logLevel: variable('RELAY_LOG_LEVEL', oneOf(LOG_LEVELS, PYTHON_LOG_LEVELS), 'info', {
    description: 'Least severe level that is logged',
  }),
  metricsPrefix: variable('RELAY_METRICS_PREFIX', flag(), 'false', {
    description: 'Put relay_ before the names of the five metrics that have no prefix',
  }),
  failedJobsKept: variable('RELAY_FAILED_JOBS_KEPT', wholeNumber(1, 1_000_000, 'jobs'), '10000', {
    description: 'Failed jobs kept in BullMQ for the dashboard',
  }),
  startupTimeoutMs: variable('RELAY_STARTUP_TIMEOUT', seconds(0.1, HOUR), '30', {
    description:
      'How long start-up waits for PostgreSQL and Redis, and migrate for an answer; other commands give up after about 10 s',
  }),
};

type Table = typeof TABLE;
/** Name of a variable in `RelayConfig`. */
export type Property = keyof Table;

/** What the relay runs with. Names ending in `Ms` are milliseconds. */
export type RelayConfig = Readonly<{ [P in Property]: ReturnType<Table[P]['read']> }>;

/** What `TABLE` says to people, without how they are read. */
export const VARIABLES: readonly Variable[] = Object.freeze(
  Object.entries(TABLE).map(([property, { read: _, ...described }]) =>
    Object.freeze({ property, ...described }),
  ),
);
