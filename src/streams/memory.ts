import type { Redis } from 'ioredis';
import { script } from '../connections/redis-script.ts';
import { memoryKeyOf, type StreamOptions } from './append.ts';
import { epochId } from './epoch.ts';
import { RECALL } from './gate-script.ts';

export type Memory = ReturnType<typeof createMemory>;

/** Asks what jobs remember of appends, before a job is removed. */
export function createMemory(
  redis: Redis,
  options: Pick<StreamOptions, 'memoryPrefix' | 'jobKey' | 'epochKey'>,
  hasTwoServers: boolean,
) {
  const recallEntry = script<string>(redis, 'recallEntry', RECALL(hasTwoServers), 1);
  const memoryKey = hasTwoServers ? memoryKeyOf(options) : options.jobKey;

  return {
    /**
     * Those of the events whose entry is remembered and good, or in a stream that Redis refuses to let the relay read; see
     * gate-script.ts.
     * @throws when Redis does not answer
     */
    async appendedOf(
      events: readonly Readonly<{ eventId: string; topic: string }>[],
    ): Promise<ReadonlySet<string>> {
      if (events.length === 0) return new Set();
      const epoch = epochId((await redis.get(options.epochKey)) ?? '');
      const entryIds = await Promise.all(
        events.map(({ eventId, topic }) => recallEntry(memoryKey(eventId), eventId, epoch, topic)),
      );
      return new Set(events.filter((_, i) => entryIds[i] !== '').map(({ eventId }) => eventId));
    },
  };
}
