import type { Outbox } from '../outbox/outbox.ts';
import type { Lookup } from '../streams/lookup.ts';
import type { Logger } from '../telemetry/logger.ts';

/** Entries that the table is asked about in one transaction. */
const STEP_ENTRIES = 1_000;
/**
 * So long before the latest entries that the table knows of, each entry is acknowledged on its row. An acknowledgement
 * that takes longer still has its job in Redis, which remembers the entry.
 */
const MARGIN_MS = 60_000;

/** What was found of rows that were not published. */
type Found = { entries: number; published: number; dead: number };

export type FindForgotten = ReturnType<typeof createFindForgotten>;

/**
 * PostgreSQL may have forgotten what became of rows: they are fresh, leased, parked or dead, and have been published
 * since, or given up. Before any of them is claimed, each is looked up in its stream: one walk back through each stream,
 * past all that the table knows nothing of, and the table is asked which of these events it has. So the cost is that of
 * the time that was lost, not that of the rows that wait.
 *
 * Rows that are gone leave their entries behind. The epoch is over: nothing is appended or acknowledged meanwhile.
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

  /** @param confirm rejects when another pod compares by now */
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
        for (const { id, eventId, entryId } of rows) {
          const { attempts, reason } = await lookup.letter(entryId);
          await outbox.markDead(tx, { id, eventId, attempts, reason, entryId });
        }
        await confirm();
        return rows.length;
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
