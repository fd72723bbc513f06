import type { Outbox } from '../outbox/outbox.ts';
import type { Lookup } from '../streams/lookup.ts';
import type { Logger } from '../telemetry/logger.ts';

/** Entries that one transaction looks up in the table. */
const STEP_ENTRIES = 1_000;
/**
 * An acknowledgement may come later than those of newer entries, by this much. If it comes later still, the job is still
 * in Redis, and remembers the entry.
 */
const MARGIN_MS = 60_000;

/** What the walk through the streams found, and how many rows it changed. */
type Found = { entries: number; published: number; dead: number };

export type FindForgotten = ReturnType<typeof createFindForgotten>;

/**
 * Finds rows of which PostgreSQL has forgotten what became of them: they are fresh, leased, parked or dead, but their
 * events have been published or given up since. This runs before any of them is claimed.
 *
 * It walks back through each stream, to a minute before the latest entry that the table knows, and asks the table which of
 * these events have a row that is not published. So the cost depends on how much time was lost, not on how many rows wait.
 * Entries whose rows are gone stay as they are. The epoch is over: nothing is appended or acknowledged meanwhile.
 */
export function createFindForgotten(deps: {
  outbox: Pick<
    Outbox,
    'unpublishedTopics' | 'latestEntryMs' | 'inEpoch' | 'markFound' | 'lockUngiven' | 'markDead'
  >;
  lookup: Pick<Lookup, 'walkBack' | 'letter'>;
  dlqStreamName: string;
  logger: Logger;
}) {
  const { outbox, lookup, dlqStreamName, logger } = deps;

  /** @param confirm rejects when another process has begun to compare */
  return async function findForgotten(confirm: () => Promise<void>): Promise<void> {
    const startedAt = Date.now();
    const topics = await outbox.unpublishedTopics();
    if (topics.length === 0) return;
    const sinceMs = (await outbox.latestEntryMs()) - MARGIN_MS;
    const found: Found = { entries: 0, published: 0, dead: 0 };
    for (const topic of topics) {
      for await (const entries of lookup.walkBack(topic, sinceMs, STEP_ENTRIES)) {
        found.entries += entries.length;
        found.published += await outbox.inEpoch(async (tx) => {
          const rows = await outbox.markFound(tx, topic, entries);
          await confirm();
          return rows;
        });
      }
    }
    for await (const letters of lookup.walkBack(dlqStreamName, sinceMs, STEP_ENTRIES)) {
      found.dead += await outbox.inEpoch(async (tx) => {
        const rows = await outbox.lockUngiven(tx, letters);
        let dead = 0;
        for (const { id, eventId, entryId } of rows) {
          const letter = await lookup.letter(entryId);
          if (letter === null) continue;
          await outbox.markDead(tx, { id, eventId, ...letter, entryId });
          dead++;
        }
        await confirm();
        return dead;
      });
    }
    const about = { ...found, streams: topics.length + 1, ms: Date.now() - startedAt };
    if (found.published + found.dead === 0)
      logger.info(about, 'PostgreSQL has forgotten nothing of its rows');
    else
      logger.warn(
        about,
        'PostgreSQL had forgotten that events were published or given up; their rows say so again, and nothing is published twice',
      );
  };
}
