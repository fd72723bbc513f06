import type { Redis } from 'ioredis';

/** Type of a key, by its name: as the command TYPE says it. */
export type KeyTypes = Readonly<Record<string, 'string' | 'hash' | 'list' | 'set' | 'zset' | 'stream'>>;

/**
 * What is wrong with the first of these keys that has another type, and what to do; undefined where none has. Redis answers
 * WRONGTYPE to all who need such a key, and does not name it.
 * @throws when Redis does not answer
 */
export async function keyTypeProblem(redis: Redis, types: KeyTypes): Promise<string | undefined> {
  const found = await Promise.all(
    Object.entries(types).map(async ([key, type]) => ({ key, type, is: await redis.type(key) })),
  );
  const wrong = found.find(({ type, is }) => is !== 'none' && is !== type);
  return (
    wrong &&
    `the key ${wrong.key} holds a ${wrong.is}, and should be a ${wrong.type}: something else has written to it; delete this key, or set another RELAY_QUEUE_PREFIX`
  );
}
