import type { Redis } from 'ioredis';
import type { RedisClient } from '../clients.ts';
import type { QueuePlace } from '../config/redis-places.ts';
import { FAILS_FAST, openRedis } from '../connections/servers.ts';
import { createQueues } from '../queue/queues.ts';

/** Where the queues are: a configuration, or your Redis client and the names. */
export type BoardQueuesFrom =
  | QueuePlace
  | Readonly<{ redis: RedisClient; queuePrefix?: string; queueName?: string }>;

export type BoardQueues = Readonly<{
  /** For `queues` of createBullBoard, among your own. */
  // biome-ignore lint/suspicious/noExplicitAny: the adapters of whatever version of Bull Board is there
  queues: any[];
  /** For `options.handlerHooks`: refuses, with the reason, what would harm the relay. Does not touch other queues. */
  // biome-ignore lint/suspicious/noExplicitAny: as above
  handlerHooks: { before: (event: any) => any };
  /** Closes the queues, and the connection unless it is yours. */
  close(): Promise<void>;
}>;

/**
 * The relay's two queues for a Bull Board of your own, with readable jobs. Loads `@bull-board/api`.
 *
 * @param options.payloads whether the board shows payloads. Default: false, they may hold personal data.
 */
export async function createBoardQueues(
  from: BoardQueuesFrom,
  { payloads = false }: Readonly<{ payloads?: boolean }> = {},
): Promise<BoardQueues> {
  const { adaptersOf, createGuard } = await import('./board-queues.ts');
  const { queuePrefix = 'bull', queueName = 'relay' } = from;
  const own = 'redis' in from ? undefined : openRedis(from, FAILS_FAST);
  // Bull Board shows that Redis is away.
  own?.on('error', () => {});
  const redis = own ?? (from as unknown as { redis: Redis }).redis;
  // A board adds no jobs, so the retry options do not matter.
  const queues = createQueues(
    redis,
    { queuePrefix, queueName, maxRetryAttempts: 0, retryBaseDelayMs: 0 },
    { debug: () => {} },
  );
  return {
    queues: adaptersOf(queues, () => payloads),
    handlerHooks: { before: createGuard(queues) },
    async close() {
      await queues.close();
      own?.disconnect();
    },
  };
}
