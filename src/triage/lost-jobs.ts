import type { Receipt } from '../event.ts';

/** What was appended for an event whose job is gone: its entry, or its dead letter. */
export type Found = Readonly<{
  entryId: string;
  deadLetter?: Readonly<{ attempts: number; reason: string }>;
}>;

/** A row whose job is gone; `entryId`: the receipt that it has, of a dead letter before its replay. */
export type JoblessRow = Readonly<{ id: string; eventId: string; topic: string; entryId: string | null }>;

/**
 * A job that was removed between append and acknowledgement took the memory of the append with it: the streams
 * themselves tell what was appended, and the rows get their receipts late.
 */
export function createLostJobs(deps: {
  /** Entry ids of those events that are among the stream's latest, by event id. */
  find: (stream: string, eventIds: string[]) => Promise<ReadonlyMap<string, string>>;
  /** The same for dead letters but those that are known, by event id. */
  findDeadLetters: (
    eventIds: string[],
    known: ReadonlyMap<string, string | null>,
  ) => Promise<ReadonlyMap<string, Found>>;
  epoch: () => string | undefined;
  markPublished: (receipts: Receipt[], epoch: string) => Promise<unknown>;
  markDead: (
    dead: Receipt & Readonly<{ attempts: number; reason: string }>,
    epoch: string,
  ) => Promise<unknown>;
}) {
  /** In which was looked; should it be over, they are looked for again. */
  let lookedIn: string | undefined;

  return {
    /** Of these events, by event id, what is in the streams and no row knows of yet. */
    async appended(rows: readonly JoblessRow[]): Promise<ReadonlyMap<string, Found>> {
      lookedIn = deps.epoch();
      const known = new Map(rows.map((row) => [row.eventId, row.entryId]));
      const found = new Map(await deps.findDeadLetters([...known.keys()], known));
      for (const topic of new Set(rows.map((row) => row.topic))) {
        const eventIds = rows.filter((row) => row.topic === topic).map((row) => row.eventId);
        for (const [eventId, entryId] of await deps.find(topic, eventIds)) found.set(eventId, { entryId });
      }
      return found;
    },

    /** Gives the rows their receipts: they are published, or dead. */
    async settle(found: readonly (Found & Readonly<{ id: string }>)[]): Promise<void> {
      if (lookedIn === undefined) return;
      const published = found.filter((it) => it.deadLetter === undefined);
      if (published.length > 0) await deps.markPublished(published, lookedIn);
      for (const { id, entryId, deadLetter } of found) {
        if (deadLetter !== undefined) await deps.markDead({ id, entryId, ...deadLetter }, lookedIn);
      }
    },
  };
}
