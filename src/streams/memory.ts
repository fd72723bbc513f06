import type { Redis } from 'ioredis';
import { memoryKeyOf, type StreamOptions } from './append.ts';
import { keysOf } from './epoch-script.ts';

export type Memory = ReturnType<typeof createMemory>;

/** Fields that one step of HSCAN asks for. */
const STEP_FIELDS = 1_000;

/** What is remembered of appends. */
export function createMemory(
  redis: Redis,
  options: Pick<StreamOptions, 'epochKey' | 'memoryPrefix'>,
  hasTwoServers: boolean,
) {
  const { appended } = keysOf(options.epochKey);

  return {
    /**
     * Those of the events whose append is remembered, whatever became of the entry.
     * @throws when Redis does not answer
     */
    async appendedOf(eventIds: readonly string[]): Promise<ReadonlySet<string>> {
      if (eventIds.length === 0) return new Set();
      const memories = hasTwoServers
        ? await redis.mget(eventIds.map(memoryKeyOf(options)))
        : await redis.hmget(appended, ...eventIds);
      return new Set(eventIds.filter((_, i) => memories[i]?.startsWith('released ') === false));
    },

    /**
     * The rows of these events are published, or gone: they are not appended again. What this leaves, since Redis does not
     * answer, goes before the next epoch.
     */
    forget(eventIds: readonly string[]): void {
      if (!hasTwoServers && eventIds.length > 0) redis.hdel(appended, ...eventIds).catch(() => {});
    },

    /**
     * The events that are remembered beside their jobs: those whose rows are not marked published yet, and a few that nobody
     * has forgotten, since a pod died or Redis did not answer.
     * @throws when Redis does not answer
     */
    async remembered(): Promise<string[]> {
      const eventIds: string[] = [];
      for (let cursor = '0'; ; ) {
        const [next, pairs] = await redis.hscan(appended, cursor, 'COUNT', STEP_FIELDS);
        eventIds.push(...pairs.filter((_, i) => i % 2 === 0));
        if (next === '0') return eventIds;
        cursor = next;
      }
    },
  };
}
