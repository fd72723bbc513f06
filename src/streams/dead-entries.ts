import type { Redis } from 'ioredis';
import type { OutboxEvent } from '../event.ts';

/** The dead-letter stream, read: the only record of an event whose row is gone. */

export type DeadEntry = Pick<
  OutboxEvent,
  'eventId' | 'eventType' | 'aggregateType' | 'aggregateId' | 'topic' | 'payload' | 'occurredAt' | 'attempts'
> &
  Readonly<{
    entryId: string;
    /** Why the payload is not in the entry, or null. */
    withheld: string | null;
    error: string;
    /** ISO 8601 */
    failedAt: string;
  }>;

export type DeadEntries = ReturnType<typeof createDeadEntries>;

/** Read at once; an entry may have RELAY_MAX_EVENT_BYTES. */
const STEP_ENTRIES = 20;
/** A page has no more entries, and ends with the step in which its payloads come to so many characters. */
export const PAGE_ENTRIES = 200;
const PAGE_LENGTH = 4 << 20;
/** Of an error; the relay writes none that is longer. */
const MOST_CHARACTERS = 2_000;

/** @param findAll ids of the entries of these events, the last one first */
export function createDeadEntries(
  redis: Redis,
  dlqStreamName: string,
  findAll: (eventIds: readonly string[]) => Promise<Map<string, string[]>>,
) {
  /** The entry of that id, or null. */
  async function get(entryId: string): Promise<DeadEntry | null> {
    const [entry] = await redis.xrange(dlqStreamName, entryId, entryId);
    return entry === undefined ? null : parsed(...entry);
  }

  return {
    /**
     * At most `limit` entries after that one, the oldest first.
     * @returns with how many were examined, and the last of them, or null at the end of the stream
     */
    async page(
      after: string | null,
      limit = PAGE_ENTRIES,
    ): Promise<{ entries: DeadEntry[]; looked: number; last: string | null }> {
      const entries: DeadEntry[] = [];
      const most = Math.min(limit, PAGE_ENTRIES);
      let [looked, length, last] = [0, 0, after];
      while (looked < most && length < PAGE_LENGTH) {
        const size = Math.min(STEP_ENTRIES, most - looked);
        const from = last === null ? '-' : `(${last}`;
        const found = await redis.xrange(dlqStreamName, from, '+', 'COUNT', size);
        for (const [entryId, fields] of found) {
          const entry = parsed(entryId, fields);
          if (entry === null) continue;
          entries.push(entry);
          length += entry.payload.length;
        }
        looked += found.length;
        last = found.at(-1)?.[0] ?? null;
        if (found.length < size) return { entries, looked, last: null };
      }
      return { entries, looked, last };
    },

    /** The event's last entry, or null. */
    async read(eventId: string): Promise<DeadEntry | null> {
      const entryId = (await findAll([eventId])).get(eventId)?.[0];
      return entryId === undefined ? null : get(entryId);
    },

    get,

    /** Ids of all entries that these events have, by event id, the last one first. Goes through the stream. */
    idsOf: findAll,

    async remove(entryIds: readonly string[]): Promise<void> {
      if (entryIds.length > 0) await redis.xdel(dlqStreamName, ...entryIds);
    },
  };
}

/** Null for an entry that is not ours. */
function parsed(entryId: string, flat: readonly string[]): DeadEntry | null {
  const fields = new Map<string, string>();
  for (let i = 0; i < flat.length; i += 2) fields.set(flat[i] as string, flat[i + 1] as string);
  const field = (name: string) => fields.get(name) ?? '';
  const eventId = fields.get('original_event_id') ?? fields.get('event_id');
  if (eventId === undefined) return null;
  return {
    entryId,
    eventId,
    eventType: field('event_type'),
    // The old relay's entries tell neither this nor the topic; these are the table's defaults.
    aggregateType: fields.get('aggregate_type') ?? 'user',
    aggregateId: field('aggregate_id'),
    topic: fields.get('topic') ?? 'identity.user.v1',
    payload: fields.get('payload') ?? 'null',
    withheld: fields.get('payload_withheld') ?? null,
    occurredAt: field('created_at'),
    attempts: Number(field('attempts')),
    error: field('error_message').slice(0, MOST_CHARACTERS),
    failedAt: field('failed_at'),
  };
}
