import { randomUUID } from 'node:crypto';
import type { Redis } from 'ioredis';

/** Redis lost its data since the append: the entry is gone, whatever its receipt says. */
export class MemoryLostError extends Error {
  override readonly name = 'MemoryLostError';
  constructor() {
    super('Redis lost its data after the append; the event is published again');
  }
}

export type Memory = Readonly<{
  /** Counts the losses seen so far. An append carries the generation it was sent in. */
  generation(): number;
  /**
   * @throws {MemoryLostError} when Redis has lost its data since that generation
   * @throws when Redis does not answer
   */
  assertIntactSince(generation: number): Promise<void>;
}>;

/**
 * Notices that Redis was emptied, by a key that outlives every job. FLUSHALL breaks
 * no connection, so nothing else tells an append of a moment ago from one that is there.
 *
 * @param redis the append connection: replies keep their order, so when this one answers, every append that was
 * executed before has been answered
 */
export function createMemory(redis: Redis, key: string): Memory {
  let generation = 0;
  let known: string | undefined;

  return {
    generation: () => generation,
    async assertIntactSince(since) {
      const found = await redis.get(key);
      if (known !== undefined && found !== known) generation++;
      known = found ?? undefined;
      if (found === null) {
        // Made again at once, or the next loss would look like this one. Sent before any append of the new generation.
        await redis.set(key, randomUUID(), 'NX');
        known = (await redis.get(key)) ?? undefined;
      }
      if (generation !== since) throw new MemoryLostError();
    },
  };
}
