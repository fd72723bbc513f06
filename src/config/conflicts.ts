/** Values that are good alone and wrong together. Those about where Redis is are in redis-places.ts. */
import type { RelayConfig } from './config.ts';
import { allowing, quoted } from './topics.ts';

const DAY_MS = 86_400_000;

/** One variable that is wrong. `problem` holds nothing secret. */
export type ConfigProblem = Readonly<{ variable: string; problem: string }>;

/** Longest time that a retry may wait. BullMQ's delayed set counts milliseconds in 41 bits: years are out of reach. */
const MAX_RETRY_DELAY_MS = 365 * DAY_MS;

/** Values that are good alone and wrong together. A value that could not be read takes part in none. */
export function conflicts(config: Partial<RelayConfig>): ConfigProblem[] {
  const problems: ConfigProblem[] = [];
  const wrong = (variable: `RELAY_${string}`, problem: string) => problems.push({ variable, problem });
  // No comparison with NaN is true.
  const { publishTimeoutMs: publishMs = Number.NaN, claimLeaseMs: leaseMs = Number.NaN } = config;
  const { batchSize = Number.NaN, maxBatchSize = Number.NaN, maxInFlight = Number.NaN } = config;
  const { publishedRetentionMs: keptMs = Number.NaN, resyncWindowMs: windowMs = Number.NaN } = config;
  const { maxRetryAttempts = Number.NaN, retryBaseDelayMs = Number.NaN } = config;
  if (publishMs >= leaseMs)
    wrong(
      'RELAY_PUBLISH_TIMEOUT',
      `must be shorter than RELAY_CLAIM_LEASE (${leaseMs / 1000} s), is ${publishMs / 1000} s`,
    );
  if (batchSize > maxInFlight)
    wrong('RELAY_BATCH_SIZE', `must be at most RELAY_MAX_IN_FLIGHT (${maxInFlight}), is ${batchSize}`);
  if (maxBatchSize < batchSize)
    wrong('RELAY_MAX_BATCH_SIZE', `must be at least RELAY_BATCH_SIZE (${batchSize}), is ${maxBatchSize}`);
  if (keptMs < windowMs && keptMs > 0)
    wrong(
      'RELAY_PUBLISHED_RETENTION',
      `must be 0 or at least RELAY_RESYNC_WINDOW (${windowMs / 1000} s), whose rows are needed when Redis loses data; is ${keptMs / 1000} s`,
    );
  const longestMs = retryBaseDelayMs * 2 ** (maxRetryAttempts - 1);
  if (longestMs > MAX_RETRY_DELAY_MS)
    wrong(
      'RELAY_RETRY_BASE_DELAY',
      `with RELAY_MAX_RETRY_ATTEMPTS=${maxRetryAttempts} the last retry would wait ${Math.round(longestMs / DAY_MS)} days; at most 365`,
    );
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
  const wrong = (variable: `RELAY_${string}`, problem: string) => problems.push({ variable, problem });
  if (streamName !== undefined && allowedTopics !== undefined && !allowing(allowedTopics)(streamName))
    wrong('RELAY_ALLOWED_TOPICS', `must allow RELAY_STREAM_NAME (${quoted(streamName)})`);
  if (streamName !== undefined && streamName === dlqStreamName)
    wrong('RELAY_DLQ_STREAM_NAME', 'must differ from RELAY_STREAM_NAME');
  if (queuePrefix === undefined) return problems;
  const queueKeys = `${queuePrefix}:`;
  const problem = `must not begin with ${quoted(queueKeys)}: BullMQ's own keys do`;
  if (streamName?.startsWith(queueKeys)) wrong('RELAY_STREAM_NAME', problem);
  if (dlqStreamName?.startsWith(queueKeys)) wrong('RELAY_DLQ_STREAM_NAME', problem);
  return problems;
}
