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
      const problem = `with RELAY_MAX_RETRY_ATTEMPTS=${maxRetryAttempts} the last retry would wait ${Math.round(longestMs / DAY_MS)} days; at most 365`;
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
