/**
 * Configuration. Each variable is described once, in `table`; everything that is said about variables elsewhere
 * (`relay start --help`, `.env.example`, docs/configuration.md) is written from it or compared with it.
 */
import type { z } from 'zod';
import { normaliseDatabaseUrl, redactUrls } from './connection-urls.ts';
import { placeConflicts, placeDefaults } from './redis-places.ts';
import { normaliseRedisUrl } from './redis-urls.ts';
import { allowing, keyRule, quoted, STREAM_NAME } from './topics.ts';
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

const variable = <T>(name: `RELAY_${string}`, kind: Kind<T>, defaultText: string, description: string) => ({
  name,
  ...kind,
  default: defaultText,
  description,
});

const LOG_LEVELS = ['trace', 'debug', 'info', 'warn', 'error', 'fatal'] as const;
/** Names of Python's `logging`, which the relay's predecessor used. */
const PYTHON_LOG_LEVELS = { notset: 'trace', warning: 'warn', critical: 'fatal' } as const;

// Every duration ends in a timer. Node takes a delay above 2^31-1 ms (24.8 days) for 1 ms: no maximum comes near it.
const HOUR = 3_600;
const DAY = 86_400;

const table = {
  databaseUrl: variable(
    'RELAY_DATABASE_URL',
    url('a URL like postgresql://user:password@host:5432/database', normaliseDatabaseUrl),
    'postgresql+asyncpg://postgres:postgres@localhost:5432/markdown_manager',
    'PostgreSQL connection; sslmode, sslrootcert, sslcert and sslkey as in libpq, ssl as in asyncpg',
  ),
  databasePoolSize: variable(
    'RELAY_DATABASE_POOL_SIZE',
    wholeNumber(3, 100, 'sessions'),
    '10',
    'Sessions of PostgreSQL that one pod uses at most; it works with fewer where it gets fewer',
  ),
  redisUrl: variable(
    'RELAY_REDIS_URL',
    url('a URL like redis://user:password@host:6379/0 (rediss for TLS)', normaliseRedisUrl),
    'redis://localhost:6379/0',
    'Redis connection, for the queues and the streams; several hosts, separated by commas, are nodes of a cluster',
  ),
  redisCluster: variable(
    'RELAY_REDIS_CLUSTER',
    cluster(),
    'false',
    'true = RELAY_REDIS_URL is a node of a Redis Cluster; or further nodes of it, as host:port,host:port',
  ),
  redisSentinels: variable(
    'RELAY_REDIS_SENTINELS',
    sentinels(),
    'none',
    'Sentinels that are asked where the master is, as host:port,host:port; the rest is as RELAY_REDIS_URL says',
  ),
  redisSentinelName: variable(
    'RELAY_REDIS_SENTINEL_NAME',
    key(keyRule(200)),
    'mymaster',
    'What the sentinels call the master',
  ),
  streamRedisUrl: variable(
    'RELAY_STREAM_REDIS_URL',
    urlOr('same', 'a URL like redis://user:password@host:6379/0 (rediss for TLS)', normaliseRedisUrl),
    'same',
    'Redis of the streams, if it is another server than that of the queues; several hosts are nodes of a cluster',
  ),
  batchSize: variable(
    'RELAY_BATCH_SIZE',
    wholeNumber(1, 10_000, 'events'),
    '100',
    'Events claimed in one transaction; at most RELAY_MAX_IN_FLIGHT',
  ),
  maxBatchSize: variable(
    'RELAY_MAX_BATCH_SIZE',
    wholeNumber(1, 10_000, 'events'),
    '400',
    'Largest claim while there is a backlog; RELAY_BATCH_SIZE if only that is set',
  ),
  pollIntervalMs: variable(
    'RELAY_POLL_INTERVAL',
    seconds(0.05, HOUR),
    '5',
    'Time between two ticks of the schedule, for when nothing wakes the relay up',
  ),
  maxRetryAttempts: variable(
    'RELAY_MAX_RETRY_ATTEMPTS',
    wholeNumber(0, 20, 'retries'),
    '5',
    'Retries after the first attempt, before an event is dead-lettered',
  ),
  retryBaseDelayMs: variable(
    'RELAY_RETRY_BASE_DELAY',
    seconds(0.01, DAY),
    '60',
    'Delay of the first retry; each further retry waits twice as long',
  ),
  maxCrashes: variable(
    'RELAY_MAX_CRASHES',
    wholeNumber(1, 100, 'crashes'),
    '3',
    'Pods that an event may end before it is dead-lettered; 1 counts as 2',
  ),
  streamName: variable(
    'RELAY_STREAM_NAME',
    key(STREAM_NAME),
    'identity.user.v1',
    'Stream of the events whose row names no topic',
  ),
  dlqStreamName: variable(
    'RELAY_DLQ_STREAM_NAME',
    key(STREAM_NAME),
    'identity.user.v1.dlq',
    'Stream that takes the dead letters',
  ),
  allowedTopics: variable(
    'RELAY_ALLOWED_TOPICS',
    patterns(),
    '*',
    'Topics that are relayed; events of any other are dead-lettered at once',
  ),
  maxEventBytes: variable(
    'RELAY_MAX_EVENT_BYTES',
    wholeNumber(1_024, 134_217_728, 'bytes'),
    '1048576',
    'Largest event: payload as JSON text, types and topic together; larger ones are dead-lettered at once',
  ),
  streamMaxLen: variable(
    'RELAY_STREAM_MAXLEN',
    wholeNumber(0, 1_000_000_000, 'entries'),
    '100000',
    'Entries kept in each stream, approximately; 0 = never trim',
  ),
  streamTrim: variable(
    'RELAY_STREAM_TRIM',
    oneOf(['maxlen', 'acknowledged']),
    'maxlen',
    'acknowledged = trim, before that limit, what every consumer group has acknowledged; maxlen = that limit alone',
  ),
  dlqMaxLen: variable(
    'RELAY_DLQ_MAXLEN',
    wholeNumber(0, 1_000_000_000, 'entries'),
    '10000',
    'Entries kept in the dead-letter stream, approximately; 0 = never trim',
  ),
  shutdownTimeoutMs: variable(
    'RELAY_SHUTDOWN_TIMEOUT',
    seconds(0.1, HOUR),
    '25',
    'Longest time from SIGTERM to the end of the process',
  ),
  publishTimeoutMs: variable(
    'RELAY_PUBLISH_TIMEOUT',
    seconds(0.05, HOUR),
    '10',
    'Longest time for one attempt to publish; shorter than RELAY_CLAIM_LEASE (by default at most half of it)',
  ),
  claimLeaseMs: variable(
    'RELAY_CLAIM_LEASE',
    seconds(0.5, DAY),
    '60',
    'Lease of a claimed event: when it has ended without news, the relay asks what became of its job',
  ),
  resyncWindowMs: variable(
    'RELAY_RESYNC_WINDOW',
    seconds(0, 30 * DAY),
    '3600',
    'How far back events are published again when Redis has lost data; 0 = never',
  ),
  publishedRetentionMs: variable(
    'RELAY_PUBLISHED_RETENTION',
    seconds(0, 3_650 * DAY),
    '0',
    'Age at which published rows are deleted from the table, at least RELAY_RESYNC_WINDOW; 0 = never',
  ),
  concurrency: variable(
    'RELAY_CONCURRENCY',
    wholeNumber(1, 1_000, 'jobs'),
    '300',
    'Publish jobs that one pod works on at once',
  ),
  maxInFlight: variable(
    'RELAY_MAX_IN_FLIGHT',
    wholeNumber(1, 1_000_000, 'jobs'),
    '2000',
    'Publish jobs that may be in Redis at once, for all pods together',
  ),
  ordering: variable(
    'RELAY_ORDERING',
    oneOf(['aggregate', 'none']),
    'aggregate',
    'aggregate = events of one aggregate are published in the order of their rows; none = as they come',
  ),
  deadLetterPolicy: variable(
    'RELAY_DEAD_LETTER_POLICY',
    oneOf(['continue', 'hold']),
    'continue',
    'After a dead letter, its aggregate goes on (continue) or waits for an operator (hold)',
  ),
  validation: variable(
    'RELAY_VALIDATION',
    oneOf(['off', 'warn', 'strict']),
    'warn',
    'What to do with a payload that breaks its schema: nothing, log and publish, or dead-letter at once',
  ),
  notify: variable(
    'RELAY_NOTIFY',
    flag(),
    'true',
    'Wake up on NOTIFY from the table; false where LISTEN does not work, as behind PgBouncer',
  ),
  queuePrefix: variable('RELAY_QUEUE_PREFIX', key(keyRule(200)), 'bull', "Prefix of BullMQ's keys in Redis"),
  queueName: variable(
    'RELAY_QUEUE_NAME',
    text('1 to 200 printable characters without white space or ":"', /^[^\s\p{C}:]{1,200}$/u),
    'relay',
    'The queues are called <name>-claim and <name>-publish',
  ),
  httpHost: variable(
    'RELAY_HTTP_HOST',
    text('a host name or an IP address', /^[A-Za-z0-9_.:%-]{1,255}$/),
    '0.0.0.0',
    'Address that the HTTP server listens on',
  ),
  httpPort: variable(
    'RELAY_HTTP_PORT',
    wholeNumber(0, 65_535),
    '8004',
    'Port that the HTTP server listens on; 0 = any free port',
  ),
  board: variable(
    'RELAY_BOARD',
    flag(),
    'false',
    'Serve the dashboard at /board, for those in RELAY_BOARD_USERS',
  ),
  boardUsers: variable(
    'RELAY_BOARD_USERS',
    boardUsers(),
    'none',
    'Who may log in to the dashboard; may be none only where RELAY_HTTP_HOST is a loopback address',
  ),
  boardBasePath: variable(
    'RELAY_BOARD_BASE_PATH',
    basePath(),
    '/',
    'Path under which a proxy serves this HTTP server; the proxy may take it away or leave it',
  ),
  trustedProxies: variable(
    'RELAY_TRUSTED_PROXIES',
    proxies(),
    'none',
    'Proxies whose X-Forwarded-For, -Proto and -Host are believed',
  ),
  logLevel: variable(
    'RELAY_LOG_LEVEL',
    oneOf(LOG_LEVELS, PYTHON_LOG_LEVELS),
    'info',
    'Least severe level that is logged',
  ),
  metricsPrefix: variable(
    'RELAY_METRICS_PREFIX',
    flag(),
    'false',
    'Put relay_ before the names of the five metrics that have no prefix',
  ),
  failedJobsKept: variable(
    'RELAY_FAILED_JOBS_KEPT',
    wholeNumber(1, 1_000_000, 'jobs'),
    '10000',
    'Failed jobs kept in BullMQ for the dashboard',
  ),
  startupTimeoutMs: variable(
    'RELAY_STARTUP_TIMEOUT',
    seconds(0.1, HOUR),
    '30',
    'How long start-up waits for PostgreSQL and Redis',
  ),
};

type Table = typeof table;
type Property = keyof Table;

/** What the relay runs with. Names ending in `Ms` are milliseconds. */
export type RelayConfig = Readonly<{ [P in Property]: z.output<Table[P]['schema']> }>;

/** Every variable, in the order in which people should read them. */
export const VARIABLES: readonly Variable[] = Object.freeze(
  Object.entries(table).map(([property, { schema: _, ...described }]) =>
    Object.freeze({ property, ...described }),
  ),
);

/** One variable that is wrong. `problem` holds nothing secret. */
export type ConfigProblem = Readonly<{ variable: string; problem: string }>;

/** The environment is wrong. The message has one line for each problem. */
export class ConfigError extends Error {
  override readonly name = 'ConfigError';
  readonly problems: readonly ConfigProblem[];

  constructor(problems: readonly ConfigProblem[]) {
    super(problems.map(({ variable: name, problem }) => `${name}: ${problem}`).join('\n'));
    this.problems = problems;
  }
}

/**
 * Reads the configuration from `env`; no other variable of the environment matters to it. The only thing it touches
 * outside of its argument are the TLS files that a connection URL may point to.
 *
 * @throws {ConfigError} naming every wrong variable at once.
 */
export function loadConfig(env: Record<string, string | undefined>): RelayConfig {
  const problems: ConfigProblem[] = [];
  const values: Partial<Record<Property, unknown>> = {};
  for (const property of Object.keys(table) as Property[]) {
    const result = readVariable(table[property], env[table[property].name]);
    if ('problem' in result) problems.push({ variable: table[property].name, problem: result.problem });
    else values[property] = result.value;
  }
  const isGiven = (property: Property) => env[table[property].name] !== undefined;
  fitDefaults(values, isGiven);
  problems.push(
    ...conflicts(values as Partial<RelayConfig>),
    ...placeConflicts(values as Partial<RelayConfig>, isGiven),
  );
  if (problems.length > 0) throw new ConfigError(problems);
  return Object.freeze(values) as RelayConfig;
}

function readVariable(
  described: Table[Property],
  given: string | undefined,
): { value: unknown } | { problem: string } {
  const value = (given ?? described.default).trim();
  if (value === '') return { problem: 'is set but empty; remove it to use the default' };
  const result = (described.schema as z.ZodType<unknown, string>).safeParse(value);
  if (result.success) return { value: result.data };
  const expected = `expected ${result.error.issues[0]?.message ?? described.expected}`;
  if ('secret' in described) return { problem: expected };
  return { problem: `${expected}; got ${quoted(redactUrls(value))}${kubernetesHint(value)}` };
}

/** A Service named `relay-http` makes Kubernetes set RELAY_HTTP_PORT=tcp://10.0.0.1:8004 in every pod. */
function kubernetesHint(value: string): string {
  return /^(?:tcp|udp):\/\//.test(value)
    ? ' (this looks like a variable that Kubernetes sets for a Service: set enableServiceLinks: false in the pod)'
    : '';
}

/**
 * Makes the defaults of the variables that are bounded by another one fit a value that was given for that one:
 * RELAY_MAX_IN_FLIGHT=10 alone is a good configuration, and so is RELAY_REDIS_CLUSTER=true.
 */
function fitDefaults(
  values: Partial<Record<Property, unknown>>,
  isGiven: (property: Property) => boolean,
): void {
  const { batchSize, maxInFlight, publishTimeoutMs, claimLeaseMs } = values as Partial<RelayConfig>;
  if (!isGiven('batchSize') && batchSize !== undefined && maxInFlight !== undefined) {
    values.batchSize = Math.min(batchSize, maxInFlight);
  }
  if (!isGiven('maxBatchSize')) {
    if (isGiven('batchSize')) values.maxBatchSize = batchSize;
    else if (maxInFlight !== undefined)
      values.maxBatchSize = Math.min(Number(values.maxBatchSize), maxInFlight);
  }
  const isTooLong =
    publishTimeoutMs !== undefined && claimLeaseMs !== undefined && publishTimeoutMs >= claimLeaseMs;
  if (!isGiven('publishTimeoutMs') && isTooLong) values.publishTimeoutMs = Math.floor(claimLeaseMs / 2);
  Object.assign(values, placeDefaults(values as Partial<RelayConfig>, isGiven));
}

/** Longest time that a retry may wait. BullMQ's delayed set counts milliseconds in 41 bits: years are out of reach. */
const MAX_RETRY_DELAY_MS = 365 * DAY * 1000;

/** Values that are good alone and wrong together. A value that could not be read takes part in none. */
function conflicts(config: Partial<RelayConfig>): ConfigProblem[] {
  const problems: ConfigProblem[] = [];
  const { publishTimeoutMs, claimLeaseMs, batchSize, maxInFlight, maxRetryAttempts, retryBaseDelayMs } =
    config;
  const { publishedRetentionMs, resyncWindowMs } = config;
  if (publishTimeoutMs !== undefined && claimLeaseMs !== undefined && publishTimeoutMs >= claimLeaseMs) {
    const problem = `must be shorter than RELAY_CLAIM_LEASE (${claimLeaseMs / 1000} s), is ${publishTimeoutMs / 1000} s`;
    problems.push({ variable: 'RELAY_PUBLISH_TIMEOUT', problem });
  }
  if (batchSize !== undefined && maxInFlight !== undefined && batchSize > maxInFlight) {
    const problem = `must be at most RELAY_MAX_IN_FLIGHT (${maxInFlight}), is ${batchSize}`;
    problems.push({ variable: 'RELAY_BATCH_SIZE', problem });
  }
  const { maxBatchSize } = config;
  if (batchSize !== undefined && maxBatchSize !== undefined && maxBatchSize < batchSize) {
    const problem = `must be at least RELAY_BATCH_SIZE (${batchSize}), is ${maxBatchSize}`;
    problems.push({ variable: 'RELAY_MAX_BATCH_SIZE', problem });
  }
  const keepsTooLittle =
    publishedRetentionMs !== undefined &&
    resyncWindowMs !== undefined &&
    publishedRetentionMs < resyncWindowMs;
  if (keepsTooLittle && publishedRetentionMs > 0) {
    const problem = `must be 0 or at least RELAY_RESYNC_WINDOW (${resyncWindowMs / 1000} s), whose rows are needed when Redis loses data; is ${publishedRetentionMs / 1000} s`;
    problems.push({ variable: 'RELAY_PUBLISHED_RETENTION', problem });
  }
  if (maxRetryAttempts !== undefined && retryBaseDelayMs !== undefined) {
    const longestMs = retryBaseDelayMs * 2 ** (maxRetryAttempts - 1);
    if (longestMs > MAX_RETRY_DELAY_MS) {
      const problem = `with RELAY_MAX_RETRY_ATTEMPTS=${maxRetryAttempts} the last retry would wait ${Math.round(longestMs / DAY / 1000)} days; at most 365`;
      problems.push({ variable: 'RELAY_RETRY_BASE_DELAY', problem });
    }
  }
  if (config.board) problems.push(...openBoard(config));
  return [...problems, ...keyConflicts(config)];
}

/** What is wrong about a dashboard that everybody could use; nothing unless RELAY_BOARD_USERS is empty. */
export function openBoard({
  boardUsers,
  httpHost,
  boardBasePath,
  trustedProxies,
}: Partial<RelayConfig>): ConfigProblem[] {
  if (boardUsers === undefined || boardUsers.length > 0) return [];
  const wrong = (why: string): ConfigProblem[] => [
    { variable: 'RELAY_BOARD_USERS', problem: `needs an entry of "relay hash-password": ${why}` },
  ];
  if (httpHost !== undefined && !isLoopback(httpHost))
    return wrong(`the dashboard would be open to everybody who can reach RELAY_HTTP_HOST (${httpHost})`);
  if (boardBasePath || trustedProxies?.length) return wrong('the dashboard is to be used through a proxy');
  return [];
}

const isLoopback = (host: string): boolean => /^(?:localhost|127(?:\.\d{1,3}){3}|::1)$/i.test(host);

/** The streams and BullMQ's keys share one Redis: no key may serve two purposes. */
function keyConflicts(config: Partial<RelayConfig>): ConfigProblem[] {
  const { streamName, dlqStreamName, queuePrefix, allowedTopics } = config;
  const problems: ConfigProblem[] = [];
  if (streamName !== undefined && allowedTopics !== undefined && !allowing(allowedTopics)(streamName)) {
    const problem = `must allow RELAY_STREAM_NAME (${quoted(streamName)})`;
    problems.push({ variable: 'RELAY_ALLOWED_TOPICS', problem });
  }
  if (streamName !== undefined && streamName === dlqStreamName) {
    problems.push({ variable: 'RELAY_DLQ_STREAM_NAME', problem: 'must differ from RELAY_STREAM_NAME' });
  }
  if (queuePrefix === undefined) return problems;
  const queueKeys = `${queuePrefix}:`;
  const problem = `must not begin with ${quoted(queueKeys)}: BullMQ's own keys do`;
  if (streamName?.startsWith(queueKeys)) problems.push({ variable: 'RELAY_STREAM_NAME', problem });
  if (dlqStreamName?.startsWith(queueKeys)) problems.push({ variable: 'RELAY_DLQ_STREAM_NAME', problem });
  return problems;
}

/** Read by the demo and the tests, not by the service. */
const KNOWN_ELSEWHERE = ['RELAY_REDIS_SERVER_BIN', 'RELAY_CHROMIUM_BIN'];

/** What Kubernetes sets for a Service whose name begins with `relay`. */
const KUBERNETES_VARIABLE = /_SERVICE_(?:HOST|PORT)(?:_|$)|_PORT_\d+_(?:TCP|UDP)(?:_|$)/;

/**
 * Variables of `env` that begin with RELAY_ and mean nothing: most likely typing errors. `nearest` is the known name
 * that was probably meant.
 */
export function unknownVariables(
  env: Record<string, string | undefined>,
): { name: string; nearest?: string }[] {
  const known = [...VARIABLES.map(({ name }) => name), ...KNOWN_ELSEWHERE];
  return Object.entries(env)
    .filter(([name]) => /^relay_/i.test(name) && !known.includes(name))
    .filter(([name, value]) => !KUBERNETES_VARIABLE.test(name) && !/^(?:tcp|udp):\/\//.test(value ?? ''))
    .map(([name]) => {
      const nearest = nearestName(name.toUpperCase(), known);
      return { name, ...(nearest !== undefined && { nearest }) };
    });
}

/** The entry of `known` that is fewest edits away from `name`, if these are at most a third of its length. */
function nearestName(name: string, known: readonly string[]): string | undefined {
  const withoutPrefix = (full: string) => full.slice('RELAY_'.length, 100);
  const [best] = known
    .map((candidate) => ({ candidate, edits: editDistance(withoutPrefix(name), withoutPrefix(candidate)) }))
    .sort((a, b) => a.edits - b.edits);
  return best !== undefined && best.edits <= Math.max(2, withoutPrefix(best.candidate).length / 3)
    ? best.candidate
    : undefined;
}

/** Levenshtein distance. */
function editDistance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      const substituted = (row[j - 1] ?? 0) + (a[i - 1] === b[j - 1] ? 0 : 1);
      next.push(Math.min(substituted, (row[j] ?? 0) + 1, (next[j - 1] ?? 0) + 1));
    }
    row = next;
  }
  return row[b.length] ?? 0;
}

/** Every variable with its default and meaning, for `--help`: two lines each, at most `width` columns. */
export function describeVariables(width = 100): string {
  return VARIABLES.map(({ name, default: defaultText, unit, description }) => {
    const value = unit === undefined ? defaultText : `${defaultText} ${unit}`;
    return `  ${name}  (${value})\n${wrapped(description, width - 6)
      .map((line) => `      ${line}`)
      .join('\n')}`;
  }).join('\n');
}

/** `text` in lines of at most `width` columns, broken at spaces. */
export function wrapped(text: string, width: number): string[] {
  const lines: string[] = [];
  for (const word of text.split(' ')) {
    const last = lines.at(-1);
    if (last !== undefined && last.length + 1 + word.length <= width)
      lines[lines.length - 1] = `${last} ${word}`;
    else lines.push(word);
  }
  return lines;
}
