import type { RelayConfig } from './config/config.ts';
import { isCluster, streamPlace } from './config/redis-places.ts';
import { createTopicCheck } from './config/topics.ts';
import { publishJobKey } from './queue/queues.ts';
import type { StreamOptions } from './streams/append.ts';

/** What the configuration says about streams and the keys beside them. */
export const streamOptionsOf = (config: RelayConfig): StreamOptions => ({
  ...config,
  jobKey: (eventId) => publishJobKey(config, eventId),
  memoryPrefix: `${config.queuePrefix}:${config.queueName}`,
  epochKey: `${config.queuePrefix}:${config.queueName}:epoch`,
  topicProblem: createTopicCheck({
    ...config,
    queueKeyPrefix: `${config.queuePrefix}:`,
    neighbour: isCluster(streamPlace(config)) ? config.streamName : undefined,
  }),
});
