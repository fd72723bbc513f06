import { randomBytes } from 'node:crypto';
import type { Redis } from 'ioredis';
import { NotReadyError } from '../lifecycle.ts';

/**
 * The secret behind the dashboard's sessions: random, made by the first pod that asks, kept in Redis where all pods
 * find it. When Redis has lost it, or an operator has deleted it, there is another one, and people log in again.
 *
 * @returns reads it; while Redis does not answer, as it was last
 * @throws {NotReadyError} when it was never read
 */
export function createBoardSecret(redis: Redis, key: string): () => Promise<string> {
  let last: string | undefined;
  return async () => {
    try {
      const known = await redis.get(key);
      if (known) last = known;
      else {
        await redis.set(key, randomBytes(32).toString('base64url'), 'NX');
        // Another pod may have been faster.
        last = (await redis.get(key)) ?? undefined;
      }
    } catch {
      // The last one is as good until Redis is back.
    }
    if (last === undefined)
      throw new NotReadyError('Redis does not answer, which keeps the secret of sessions: nobody can log in');
    return last;
  };
}
