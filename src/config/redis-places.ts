/** Where the configuration says that Redis is, and what does not go together there. */
import type { RelayConfig } from './config.ts';
import type { ConfigProblem } from './conflicts.ts';
import { redisNodes, redisOptions } from './redis-urls.ts';
import { hashTagOf, patternsOf, quoted, slotOf } from './topics.ts';

/** What of the configuration says where a Redis is. */
type RedisPlace = Partial<
  Pick<RelayConfig, 'redisUrl' | 'redisCluster' | 'redisSentinels' | 'redisSentinelName'>
>;

/** Where the queues are: what of the configuration says so. */
export type QueuePlace = Pick<RelayConfig, 'redisUrl' | 'queuePrefix' | 'queueName'> & RedisPlace;

/** Whether it is a cluster: said so, or several nodes of one are named. */
export const isCluster = ({ redisCluster = false, redisUrl }: RedisPlace): boolean =>
  redisCluster !== false || (redisUrl !== undefined && redisNodes(redisUrl).length > 1);

const hasSentinels = ({ redisSentinels = 'none' }: RedisPlace): boolean => redisSentinels !== 'none';

/** Where the streams are; the very same object where that is where the queues are. */
export const streamPlace = <C extends Partial<RelayConfig>>(config: C): C =>
  config.streamRedisUrl === undefined || config.streamRedisUrl === 'same'
    ? config
    : { ...config, redisUrl: config.streamRedisUrl, redisCluster: false, redisSentinels: 'none' };

/** What some variables mean by default depends on where Redis is. */
export function placeDefaults(
  config: Partial<RelayConfig>,
  isGiven: (property: keyof RelayConfig) => boolean,
): Partial<RelayConfig> {
  const { redisUrl, streamRedisUrl, streamName } = config;
  const isPlain = !isCluster(config) && !hasSentinels(config);
  // The same server twice is one server.
  if (isPlain && streamRedisUrl !== undefined && streamRedisUrl === redisUrl)
    return { streamRedisUrl: 'same' };
  const streamsInCluster = isCluster(streamPlace(config));
  if (streamName === undefined || !(isCluster(config) || streamsInCluster)) return {};
  const tag = `{${hashTagOf(streamName) ?? streamName}}`;
  return {
    ...(!isGiven('queuePrefix') && { queuePrefix: tag }),
    ...(!isGiven('dlqStreamName') && streamsInCluster && { dlqStreamName: `${tag}.dlq` }),
  };
}

const ONE_DATABASE = 'names a database (the number after the host) other than 0, the only one of a cluster';

/** What is wrong about where Redis is said to be, and about keys that a cluster would keep apart. */
export function placeConflicts(
  config: Partial<RelayConfig>,
  isGiven: (property: keyof RelayConfig) => boolean,
): ConfigProblem[] {
  const { redisUrl, redisCluster, redisSentinels, redisSentinelName, streamRedisUrl = 'same' } = config;
  const problems: ConfigProblem[] = [];
  const wrong = (variable: `RELAY_${string}`, problem: string) => problems.push({ variable, problem });
  if (redisSentinels === 'none' && redisSentinelName !== undefined && redisSentinelName !== 'mymaster')
    wrong('RELAY_REDIS_SENTINEL_NAME', 'means nothing without RELAY_REDIS_SENTINELS');
  if (redisUrl === undefined || redisCluster === undefined) return problems;
  if (isCluster(config)) {
    if (hasSentinels(config)) {
      const why =
        redisCluster === false ? 'RELAY_REDIS_URL names several nodes' : 'RELAY_REDIS_CLUSTER is set';
      wrong('RELAY_REDIS_SENTINELS', `a cluster has no sentinels, and ${why}: remove one of the two`);
    } else if (redisCluster === false && isGiven('redisCluster')) {
      wrong('RELAY_REDIS_CLUSTER', 'is false, but RELAY_REDIS_URL names several nodes of a cluster');
    }
    if (redisOptions(redisUrl).db !== 0) wrong('RELAY_REDIS_URL', ONE_DATABASE);
  }
  if (streamRedisUrl !== 'same' && isCluster(streamPlace(config)) && redisOptions(streamRedisUrl).db !== 0)
    wrong('RELAY_STREAM_REDIS_URL', ONE_DATABASE);
  return [...problems, ...slotConflicts(config)];
}

/** In a cluster everything of one relay is in one slot: no step of it is atomic otherwise. */
function slotConflicts(config: Partial<RelayConfig>): ConfigProblem[] {
  const { queuePrefix, queueName, streamName, dlqStreamName, allowedTopics } = config;
  if (queuePrefix === undefined || queueName === undefined || streamName === undefined) return [];
  const problems: ConfigProblem[] = [];
  const wrong = (variable: `RELAY_${string}`, problem: string) => problems.push({ variable, problem });
  const keys = `${queuePrefix}:${queueName}`;
  const slot = slotOf(streamName);
  const tag = hashTagOf(streamName) ?? streamName;
  if (!isCluster(streamPlace(config))) {
    if (isCluster(config) && hashTagOf(keys) === undefined)
      wrong('RELAY_QUEUE_PREFIX', 'must bring the queues into one slot of the cluster: put it into { }');
    return problems;
  }
  if (slotOf(`{${tag}}`) !== slot) {
    wrong(
      'RELAY_STREAM_NAME',
      'has a } in it, so nothing can share its slot of the cluster: put a part of it into { }',
    );
    return problems;
  }
  const beside = `the slot of RELAY_STREAM_NAME (${quoted(streamName)}, slot ${slot} of the cluster)`;
  if (hashTagOf(keys) === undefined || slotOf(keys) !== slot)
    wrong('RELAY_QUEUE_PREFIX', `must bring the queues into ${beside}: set it to {${tag}}`);
  if (dlqStreamName !== undefined && slotOf(dlqStreamName) !== slot)
    wrong(
      'RELAY_DLQ_STREAM_NAME',
      `must be in ${beside}, is in slot ${slotOf(dlqStreamName)}: set it to {${tag}}.dlq`,
    );
  const names = patternsOf(allowedTopics ?? '').filter((name) => name !== '' && !/[*?]/.test(name));
  const elsewhere = names.filter((name) => slotOf(name) !== slot).map(quoted);
  if (elsewhere.length > 0)
    wrong(
      'RELAY_ALLOWED_TOPICS',
      `must be in ${beside}, and ${elsewhere.join(', ')} is not: put {${tag}} into the name, or run another relay for it`,
    );
  return problems;
}
