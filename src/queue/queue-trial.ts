import { randomUUID } from 'node:crypto';
import { Queue, QueueKeys } from 'bullmq';
import type { Redis } from 'ioredis';
import type { KeyTypes } from '../connections/key-types.ts';
import { claimQueueName, publishQueueName } from './queues.ts';

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
    await queue.add('trial', {}, { attempts: 2, backoff: { type: 'exponential', delay: 1_000 } });
    await queue.addBulk([{ name: 'trial', data: {}, opts: { delay: 60_000 } }]);
    await queue.upsertJobScheduler('trial', { every: 60_000 });
    await queue.removeJobScheduler('trial');
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
