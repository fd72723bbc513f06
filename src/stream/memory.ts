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
 * Notices that Redis was emptied, by a key that outlives every job (the scheduler makes it again). FLUSHALL breaks
 * no connection, so nothing else tells an append of a moment ago from one that is there.
 *
 * @param redis the append connection: replies keep their order, so when this one answers, every append that was
 * executed before has been answered
 */
export function createMemory(redis: Redis, key: string): Memory {
  let generation = 0;
  /** undefined: not asked yet; null: nobody has made it, or made it again. */
  let known: string | null | undefined;

  return {
    generation: () => generation,
    async assertIntactSince(since) {
      const found = await redis.get(key);
      // From nothing to something is no loss: the key is made once, or again after a loss that was counted.
      if (typeof known === 'string' && found !== known) generation++;
      known = found;
      if (generation !== since) throw new MemoryLostError();
    },
  };
}
