import type { Redis } from 'ioredis';
import type { RedisClient } from '../clients.ts';
import type { QueuePlace } from '../config/redis-places.ts';
import { openRedis } from '../connections/servers.ts';
import { createQueues, QUEUE_CONNECTION } from '../queue/queues.ts';

/** Where the queues are: a configuration, or a client of yours and the names. */
export type BoardQueuesFrom =
  | QueuePlace
  | Readonly<{ redis: RedisClient; queuePrefix?: string; queueName?: string }>;

export type BoardQueues = Readonly<{
  /** For `queues` of createBullBoard, among your own. */
  // biome-ignore lint/suspicious/noExplicitAny: the adapters of whatever version of Bull Board is there
  queues: any[];
  /** For `options.handlerHooks`: refuses what would harm the relay, with the reason; other queues are left alone. */
  // biome-ignore lint/suspicious/noExplicitAny: as above
  handlerHooks: { before: (event: any) => any };
  /** Closes what was opened; a client that was given stays open. */
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
  const own = 'redis' in from ? undefined : openRedis(from, QUEUE_CONNECTION);
  // The board shows that Redis is away.
  own?.on('error', () => {});
  const redis = own ?? (from as unknown as { redis: Redis }).redis;
  // Nothing is added by a board, so nothing is retried by these.
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
