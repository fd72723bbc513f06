import type { Redis } from 'ioredis';

/** Type of a key, by its name: as the command TYPE says it. */
export type KeyTypes = Readonly<Record<string, 'string' | 'hash' | 'list' | 'set' | 'zset' | 'stream'>>;

export class KeyTypeError extends Error {
  override readonly name = 'KeyTypeError';
}

/**
 * Checks that these keys have these types, or are not there. Where one has another type, Redis answers WRONGTYPE to all who
 * need it, and names no key.
 * @throws {KeyTypeError} with the key that holds something else, and what to do
 * @throws when Redis does not answer
 */
export async function assertKeyTypes(redis: Redis, types: KeyTypes): Promise<void> {
  const wrong = await Promise.all(
    Object.entries(types).map(async ([key, type]) => {
      const found = await redis.type(key);
      return found === 'none' || found === type
        ? []
        : [`the key ${key} holds a ${found}, and should be a ${type}`];
    }),
  );
  const [first] = wrong.flat();
  if (first !== undefined)
    throw new KeyTypeError(
      `${first}: something else has written to it; delete this key, or set another RELAY_QUEUE_PREFIX`,
    );
}
