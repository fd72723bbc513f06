import type { Redis } from 'ioredis';
import { script } from '../connections/redis-script.ts';
import { compareEntryIds } from '../event.ts';
import { memoryKeyOf, type StreamOptions } from './append.ts';
import { epochId } from './epoch.ts';
import { keysOf } from './epoch-script.ts';
import { LETTER_FIELD, RECALL } from './gate-script.ts';

export type Memory = ReturnType<typeof createMemory>;

/** Fields that one step of HSCAN asks for. */
const STEP_FIELDS = 1_000;

/** What is remembered of appends. */
export function createMemory(
  redis: Redis,
  options: Pick<StreamOptions, 'memoryPrefix' | 'jobKey' | 'epochKey'>,
  hasTwoServers: boolean,
) {
  const recallEntry = script<string>(redis, 'recallEntry', RECALL(hasTwoServers), 2);
  const memoryKey = hasTwoServers ? memoryKeyOf(options) : options.jobKey;
  const { appended } = keysOf(options.epochKey);

  return {
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

    /**
     * Those of the events whose job remembers a dead letter, and the row names neither it nor a later one: someone has set the row
     * back before it was marked dead. Where the streams have a server of their own, nobody is asked.
     * @throws when Redis does not answer
     */
    async unknownLettersOf(
      events: readonly Readonly<{ eventId: string; knownEntry: string | null }>[],
    ): Promise<ReadonlySet<string>> {
      if (hasTwoServers) return new Set();
      const letters = await Promise.all(
        events.map(({ eventId }) => redis.hget(options.jobKey(eventId), LETTER_FIELD)),
      );
      // A later one stands in for it, where Redis had lost it.
      const isUnknown = (letter: string, known: string | null) =>
        known === null || compareEntryIds(letter.split(' ')[1] ?? '', known) > 0;
      return new Set(
        events
          .filter(({ knownEntry }, i) => letters[i] != null && isUnknown(letters[i], knownEntry))
          .map(({ eventId }) => eventId),
      );
    },

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
        events.map(({ eventId, topic }) =>
          recallEntry(options.epochKey, memoryKey(eventId), eventId, epoch, topic),
        ),
      );
      return new Set(events.filter((_, i) => entryIds[i] !== '').map(({ eventId }) => eventId));
    },
  };
}
