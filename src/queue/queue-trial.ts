import { randomUUID } from 'node:crypto';
import { Queue, QueueKeys } from 'bullmq';
import type { Redis } from 'ioredis';
import type { KeyTypes } from '../connections/key-types.ts';
import { claimQueueName, heldUp, publishQueueName } from './queues.ts';

/**
 * Adds a job and a schedule to a queue beside the real ones, in their slot and with the rights on them, and removes them.
 * @throws what Redis or BullMQ has against it
 */
export async function tryQueue(
  redis: Redis,
  { queuePrefix, queueName }: Readonly<{ queuePrefix: string; queueName: string }>,
): Promise<void> {
  // Its keys begin with `<prefix>:<name>:`, which the user of "relay grants" may use; a queue beside ours it may not.
  const queue = new Queue(`trial-${randomUUID()}`, {
    ...{ connection: redis, prefix: `${queuePrefix}:${queueName}` },
  });
  queue.on('error', () => {}); // what is asked next says so
  try {
    // The first time ioredis sends a script by EVAL, then by EVALSHA.
    for (let times = 0; times < 2; times++)
      await queue.add('trial', {}, { attempts: 2, backoff: { type: 'exponential', delay: 1_000 } });
    await queue.addBulk([{ name: 'trial', data: {}, opts: { delay: 60_000 } }]);
    await queue.upsertJobScheduler('trial', { every: 60_000 });
    await queue.removeJobScheduler('trial');
    // What only retries and the check for stalled jobs take.
    const [stalled, events] = [queue.toKey('stalled'), queue.toKey('events')];
    const asked = redis.pipeline().sadd(stalled, 'trial').smembers(stalled).srem(stalled, 'trial');
    for (const [error] of (await asked.xtrim(events, 'MAXLEN', 10).exec()) ?? []) if (error) throw error;
  } finally {
    await queue.obliterate({ force: true }).catch(() => {});
    await queue.close();
  }
}

const TYPES: KeyTypes = {
  ...{ wait: 'list', active: 'list', paused: 'list', stalled: 'set', meta: 'hash', events: 'stream' },
  ...{
    delayed: 'zset',
    prioritized: 'zset',
    completed: 'zset',
    failed: 'zset',
    repeat: 'zset',
  },
};

/** BullMQ's keys of both queues. */
export function queueKeyTypes({
  queuePrefix,
  queueName,
}: Readonly<{ queuePrefix: string; queueName: string }>): KeyTypes {
  const keys = new QueueKeys(queuePrefix);
  return Object.fromEntries(
    [claimQueueName(queueName), publishQueueName(queueName)].flatMap((queue) =>
      Object.entries(TYPES).map(([name, type]) => [keys.toKey(queue, name), type]),
    ),
  );
}

/** What keeps pods from the jobs of either queue, and what ends it; empty when nothing does. */
export async function whatHoldsUp(
  redis: Redis,
  { queuePrefix, queueName }: Readonly<{ queuePrefix: string; queueName: string }>,
): Promise<string[]> {
  const keys = new QueueKeys(queuePrefix);
  const found = [claimQueueName(queueName), publishQueueName(queueName)].map(async (queue) => {
    const { isPaused, limits } = await heldUp(redis, keys.toKey(queue, 'meta'));
    return [
      ...(isPaused ? [`${queue} is paused: resume it, in the dashboard or by Queue.resume()`] : []),
      ...limits.map(
        (limit) =>
          `${queue} takes ${limit}: remove that by Queue.removeGlobalConcurrency() or Queue.removeGlobalRateLimit()`,
      ),
    ];
  });
  return (await Promise.all(found)).flat();
}
