/** Each event once, and in order where it is promised, by table and stream; for contenders other than the relay. */
import type { Redis } from 'ioredis';

const PAGE_ENTRIES = 5_000;

export type Written = Readonly<{ eventId: string; aggregate: string; done: boolean }>;

/**
 * @param written in the order in which they were
 * @param entries event ids, in the order of the stream
 * @throws unless each event that is done has its entry, nobody has two, and, where order is promised, none stands before
 *   an earlier one of its aggregate
 */
export function auditEntries(
  written: readonly Written[],
  entries: readonly string[],
  { ordered = true }: Readonly<{ ordered?: boolean }> = {},
): void {
  const place = new Map(written.map((it, i) => [it.eventId, i]));
  const seen = new Set<string>();
  const latest = new Map<string, number>();
  for (const eventId of entries) {
    const at = place.get(eventId);
    if (at === undefined) throw new Error(`an entry of nobody's: ${eventId}`);
    if (seen.has(eventId)) throw new Error(`doubled: ${eventId}`);
    seen.add(eventId);
    const { aggregate } = written[at] as Written;
    if (ordered && (latest.get(aggregate) ?? -1) > at) throw new Error(`out of order: ${eventId}`);
    latest.set(aggregate, at);
  }
  const lost = written.find((it) => it.done && !seen.has(it.eventId));
  if (lost) throw new Error(`lost: ${lost.eventId}`);
}

/** The event ids of a stream's entries, in its order. */
export async function eventIds(redis: Redis, stream: string): Promise<string[]> {
  const ids: string[] = [];
  for (let start = '-'; ; ) {
    const entries = await redis.xrange(stream, start, '+', 'COUNT', PAGE_ENTRIES);
    for (const [, fields] of entries) ids.push(fields[fields.indexOf('event_id') + 1] as string);
    const last = entries.at(-1);
    if (last === undefined || entries.length < PAGE_ENTRIES) return ids;
    start = `(${last[0]}`;
  }
}
