import type { Redis } from 'ioredis';

/** The dead-letter stream, read: the only record of an event whose row is gone. */

export type DeadEntry = Readonly<{
  entryId: string;
  eventId: string;
  eventType: string;
  aggregateType: string;
  aggregateId: string;
  topic: string;
  /** JSON text. */
  payload: string;
  /** Why the payload is not in the entry, or null. */
  withheld: string | null;
  occurredAt: string;
  attempts: number;
  error: string;
  /** ISO 8601 */
  failedAt: string;
}>;

export type DeadEntries = ReturnType<typeof createDeadEntries>;

/** A page is read at once; an entry may have RELAY_MAX_EVENT_BYTES. */
const PAGE_ENTRIES = 50;

/** @param findAll ids of the entries of these events in the stream, the last one first */
export function createDeadEntries(
  redis: Redis,
  dlqStreamName: string,
  findAll: (stream: string, eventIds: readonly string[]) => Promise<Map<string, string[]>>,
) {
  return {
    /**
     * Entries after that one, the oldest first.
     * @returns with the last entry looked at, or null at the end of the stream
     */
    async page(after: string | null): Promise<{ entries: DeadEntry[]; last: string | null }> {
      const from = after === null ? '-' : `(${after}`;
      const found = await redis.xrange(dlqStreamName, from, '+', 'COUNT', PAGE_ENTRIES);
      return {
        entries: found.flatMap(([entryId, fields]) => parsed(entryId, fields) ?? []),
        last: found.length < PAGE_ENTRIES ? null : (found.at(-1)?.[0] ?? null),
      };
    },

    /** The event's last entry, or null. */
    async read(eventId: string): Promise<DeadEntry | null> {
      const entryId = (await findAll(dlqStreamName, [eventId])).get(eventId)?.[0];
      if (entryId === undefined) return null;
      const [entry] = await redis.xrange(dlqStreamName, entryId, entryId);
      return entry === undefined ? null : parsed(...entry);
    },

    /** Ids of all entries that these events have. */
    async idsOf(eventIds: readonly string[]): Promise<string[]> {
      return [...(await findAll(dlqStreamName, eventIds)).values()].flat();
    },

    async has(entryId: string): Promise<boolean> {
      return (await redis.xrange(dlqStreamName, entryId, entryId)).length > 0;
    },

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
    error: field('error_message'),
    failedAt: field('failed_at'),
  };
}
