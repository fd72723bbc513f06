import { isUuid } from '../event.ts';
import type { RemoveJobs } from '../finalize/job-removal.ts';
import { pause } from '../lifecycle.ts';
import type { AggregatePlace, DeadLetterFilter, DeadRow, DeadRows, LockedRow } from '../outbox/dead-rows.ts';
import type { Outbox } from '../outbox/outbox.ts';
import type { Queues } from '../queue/queues.ts';
import type { DeadEntries, DeadEntry } from '../streams/dead-entries.ts';
import type { Lookup } from '../streams/lookup.ts';
import { errorText, type Logger } from '../telemetry/logger.ts';
import { fromCursor, toCursor } from './cursor.ts';
import { createInspection } from './inspection.ts';

/**
 * Dead letters, as operators see them: one notion behind command line, HTTP and board. The row is the truth; where it
 * is gone ("pruned"), its entry in the dead-letter stream is. The stream holds what is dead: an entry is taken away
 * when its event is replayed or discarded.
 */

/** These events, or all dead letters that match. `pruned`: those without a row instead of those with one. */
export type Selection =
  | Readonly<{ eventIds: readonly string[] }>
  | Readonly<{ filter: DeadLetterFilter; pruned?: boolean }>;

type ActionOptions = Readonly<{
  /** Who does it; it is logged. */
  by: string;
  /** Only counts. */
  dryRun?: boolean;
  /** Dead letters examined, at most, of pruned ones entries; `next` goes on from there. Default: all. */
  limit?: number;
  /** `next` of an earlier call with the same selection. */
  after?: string;
  /** Asked between two batches: end here. */
  stopped?: () => boolean;
  /** Told how many were examined so far. */
  onProgress?: (seen: number) => void;
}>;

type Refusal = Readonly<{ eventId: string; reason: string }>;

export type ActionResult = Readonly<{
  /** Events replayed or discarded; in a dry run, that would be. */
  done: number;
  /** How many were left as they are, and why: of the first 100. */
  refused: number;
  refusals: readonly Refusal[];
  /** Where to go on, if it was not all; give it as `after`. */
  next: string | null;
}>;

export type DeadLetters = ReturnType<typeof createDeadLetters>;

/** Rows in one transaction; also what an interruption leaves unfinished at most. */
const BATCH = 200;
/** Entries of the dead-letter stream that are held at once, where events without rows are named. */
const ENTRY_BATCH = 50;
/** Events that may be named one by one. */
const MOST_EVENT_IDS = 10_000;
const MOST_REFUSALS = 100;
/**
 * A replay waits until fewer rows than this are fresh: its events have low ids and are claimed first, so new events
 * would wait behind all of them.
 */
const ROOM = 1_000;
/** When no pod claims, a replay waits for a claim for this time, once. */
const ROOM_TIMEOUT_MS = 5_000;
const ROOM_POLL_MS = 50;

const UNCLEAR = 'its job is being worked on, or has appended it: try again, or replay it';

export function createDeadLetters(deps: {
  rows: DeadRows;
  entries: DeadEntries;
  queues: Pick<Queues, 'view'>;
  removeJobs: RemoveJobs;
  lookup: Pick<Lookup, 'find'>;
  outbox: Pick<Outbox, 'refill'>;
  /** Asks for a claim. */
  wake: () => Promise<void>;
  logger: Logger;
}) {
  const { rows, entries, removeJobs, wake, logger } = deps;
  const inspection = createInspection(deps);

  /** What comes after a commit: it is done, whatever becomes of this. */
  async function afterwards(work: () => Promise<unknown>): Promise<void> {
    try {
      await work();
    } catch (error) {
      logger.warn(
        { err: error },
        'dead letters were replayed or discarded, but tidying up after that failed; the next tick frees what waits',
      );
    }
  }

  /**
   * Entries to delete: those found in the stream before the rows were locked (the search is slow), and the one each row
   * names, which may be newer.
   */
  const closedBy = (held: readonly LockedRow[], entryIds: ReadonlyMap<string, string[]>): string[] => [
    ...new Set(
      held.flatMap(({ eventId, entryId }) => [...(entryIds.get(eventId) ?? []), entryId ?? []].flat()),
    ),
  ];

  /** One transaction: dead rows become fresh, in the order of their aggregates. Answers how many did. */
  async function replayRows(batch: readonly DeadRow[]): Promise<number> {
    const entryIds = await entries.idsOf(eventIdsOf(batch));
    const { locked, closed } = await rows.transaction(async (tx) => {
      // Who has not the right is refused here, before any job is removed.
      await rows.revive(tx, [], []);
      const held = await rows.lock(tx, idsOf(batch));
      if (held.length === 0) return { locked: held, closed: [] };
      // The rows of jobs that were left expire: the lease reaper asks what became of these.
      const left = await removeJobs(held);
      await rows.revive(tx, idsOf(held), idsOf(held.filter((row) => left.has(row.eventId))));
      return {
        locked: held,
        closed: closedBy(
          held.filter((row) => !left.has(row.eventId)),
          entryIds,
        ),
      };
    });
    await afterwards(() => entries.remove(closed));
    if (locked.length > 0) await wake();
    return locked.length;
  }

  /** One transaction: dead rows are given up for good, and nobody waits for them any more. */
  async function discardRows(
    batch: readonly DeadRow[],
    reason: string,
    by: string,
    refuse: Refuse,
  ): Promise<number> {
    const entryIds = await entries.idsOf(eventIdsOf(batch));
    const { gone, closed, unclear } = await rows.transaction(async (tx) => {
      await rows.discard(tx, [], reason, by);
      const held = await rows.lock(tx, idsOf(batch));
      const left = await removeJobs(held);
      const clear = held.filter((row) => !left.has(row.eventId));
      await rows.discard(tx, idsOf(clear), reason, by);
      return { gone: clear, closed: closedBy(clear, entryIds), unclear: [...left.keys()] };
    });
    for (const eventId of unclear) refuse(eventId, UNCLEAR);
    await afterwards(() => entries.remove(closed));
    if (gone.length > 0) {
      await afterwards(() => deps.outbox.refill(gone));
      await wake();
    }
    return gone.length;
  }

  /** The row of a pruned event is written anew; its aggregate's order and all that is promised of rows come with it. */
  async function replayEntry(
    entry: DeadEntry,
    entryIds: readonly string[],
    isInStream: boolean,
    refuse: Refuse,
  ): Promise<number> {
    const { eventId } = entry;
    const no = (reason: string) => {
      refuse(eventId, reason);
      return 0;
    };
    if (entry.withheld !== null) return no('its payload was in its row alone, and that is gone');
    if (!isUuid(eventId) || !isUuid(entry.aggregateId))
      return no('its dead letter names no event, or no aggregate');
    // An operator may have replayed it by other roads, and its row was pruned after that.
    if (isInStream) return no('it is in its stream already');
    // Its failed job, which the row did not take along, would swallow the new one.
    if ((await removeJobs([entry])).size > 0) return no(UNCLEAR);
    try {
      if (!(await rows.insert(entry))) return no('it has a row by now');
    } catch (error) {
      return no(`its row cannot be written: ${errorText(error)}`);
    }
    await afterwards(() => entries.remove(entryIds));
    return 1;
  }

  async function replayEntries(batch: readonly DeadEntry[], refuse: Refuse): Promise<number> {
    // Each of these goes through a stream: once for all.
    const entryIds = await entries.idsOf(eventIdsOf(batch));
    const there = new Set<string>();
    for (const topic of new Set(batch.map((entry) => entry.topic))) {
      const ofTopic = batch.filter((entry) => entry.topic === topic);
      for (const eventId of (await deps.lookup.find(topic, eventIdsOf(ofTopic))).keys()) there.add(eventId);
    }
    let done = 0;
    for (const entry of batch) {
      const { eventId } = entry;
      done += await replayEntry(entry, entryIds.get(eventId) ?? [], there.has(eventId), refuse);
    }
    return done;
  }

  async function discardEntries(batch: readonly DeadEntry[]): Promise<number> {
    await entries.remove([...(await entries.idsOf(eventIdsOf(batch))).values()].flat());
    return batch.length;
  }

  type Refuse = (eventId: string, reason: string) => void;

  /** Runs one of the two through a selection, in bounded batches. */
  async function through(
    selection: Selection,
    options: ActionOptions,
    act: Readonly<{
      rows: (batch: readonly DeadRow[], refuse: Refuse) => Promise<number>;
      entries: (batch: readonly DeadEntry[], refuse: Refuse) => Promise<number>;
    }>,
  ): Promise<ActionResult> {
    const { dryRun = false, limit = Number.POSITIVE_INFINITY, after } = options;
    const refusals: Refusal[] = [];
    let refused = 0;
    const refuse: Refuse = (eventId, reason) => {
      refused++;
      if (refusals.length < MOST_REFUSALS) refusals.push({ eventId, reason });
    };
    let done = 0;
    let seen = 0;
    const result = (next: string | null): ActionResult => ({ done, refused, refusals, next });
    const progress = (count: number) => {
      seen += count;
      options.onProgress?.(seen);
    };
    const room = createRoom();

    if ('eventIds' in selection) {
      const wanted = [...new Set(selection.eventIds)];
      if (wanted.length > MOST_EVENT_IDS)
        throw new RangeError(`at most ${MOST_EVENT_IDS} events can be named`);
      const found = await rows.ofEvents(wanted);
      const dead = found.filter(({ state }) => state === 'dead');
      for (const { eventId, state } of found)
        if (state !== 'dead') refuse(eventId, `it is not dead, but ${state}`);
      for (let i = 0; i < dead.length; i += BATCH) {
        if (options.stopped?.()) return result(null);
        const batch = dead.slice(i, i + BATCH);
        done += dryRun ? batch.length : await act.rows(batch, refuse);
        progress(batch.length);
        if (!dryRun) await room();
      }
      const known = new Set(eventIdsOf(found));
      const unknown = wanted.filter((eventId) => !known.has(eventId));
      for (let i = 0; i < unknown.length; i += ENTRY_BATCH) {
        if (options.stopped?.()) return result(null);
        const batch = unknown.slice(i, i + ENTRY_BATCH);
        const entryIds = await entries.idsOf(batch);
        const letters: DeadEntry[] = [];
        for (const eventId of batch) {
          const entryId = entryIds.get(eventId)?.[0];
          const entry = entryId === undefined ? null : await entries.get(entryId);
          if (entry === null) refuse(eventId, 'neither the table nor the dead-letter stream knows it');
          else letters.push(entry);
        }
        done += dryRun ? letters.length : await act.entries(letters, refuse);
        progress(batch.length);
      }
      return result(null);
    }

    if (selection.pruned) {
      let next: string | null = null;
      for await (const page of inspection.prunedPages(selection.filter, after, limit)) {
        const { entries: batch } = page;
        done += dryRun ? batch.length : await act.entries(batch, refuse);
        progress(batch.length);
        next = page.next;
        if (options.stopped?.()) break;
      }
      return result(next);
    }

    if (dryRun) {
      done = await rows.count(selection.filter);
      return result(null);
    }
    const keys = ['aggregateType', 'aggregateId', 'id'] as const;
    let place = after === undefined ? null : fromCursor<AggregatePlace>(after, keys);
    for (;;) {
      const size = Math.min(BATCH, limit - seen);
      if (size <= 0 || options.stopped?.()) return result(place === null ? null : toCursor(place));
      const batch = await rows.inOrder(selection.filter, place, size);
      if (batch.length > 0) done += await act.rows(batch, refuse);
      progress(batch.length);
      const last = batch.at(-1);
      if (last === undefined || batch.length < size) return result(null);
      place = { aggregateType: last.aggregateType, aggregateId: last.aggregateId, id: last.id };
      await room();
    }
  }

  /** Waits for room among the fresh rows; gives up where nobody claims. */
  function createRoom(): () => Promise<void> {
    let patient = true;
    return async () => {
      const endsAt = Date.now() + ROOM_TIMEOUT_MS;
      while (patient && (await rows.fresh(ROOM)) >= ROOM) {
        if (Date.now() >= endsAt) patient = false;
        else await pause(ROOM_POLL_MS);
      }
    };
  }

  return {
    /** Dead letters that match, the latest first (pruned ones: the oldest first), a page at a time. */
    list: inspection.list,

    /** The same, counted by reason; see createDeadRows. */
    groups: rows.groups,

    /** What is known of an event, dead or not; null when nothing is. */
    show: inspection.show,

    /**
     * Publishes dead events again, with all their attempts, in the order of their aggregates. May be cut off anywhere
     * and run again: what was replayed is not dead any more.
     * @throws {CursorError} when `after` is not what an earlier call answered
     */
    async replay(selection: Selection, options: ActionOptions): Promise<ActionResult> {
      const result = await through(selection, options, { rows: replayRows, entries: replayEntries });
      const { done, refused, next } = result;
      if (!options.dryRun) {
        if (done > 0) await wake();
        logger.info(
          { by: options.by, events: done, refused, more: next !== null },
          'dead letters were replayed',
        );
      }
      return result;
    },

    /**
     * Gives dead events up for good: their rows are kept, with reason and name, and hold nobody any more. Of a pruned
     * event the entry is taken away.
     * @throws {CursorError} when `after` is not what an earlier call answered
     */
    async discard(selection: Selection, reason: string, options: ActionOptions): Promise<ActionResult> {
      const result = await through(selection, options, {
        rows: (batch, refuse) => discardRows(batch, reason, options.by, refuse),
        entries: discardEntries,
      });
      const { done, refused, next } = result;
      if (!options.dryRun)
        logger.info(
          { by: options.by, reason, events: done, refused, more: next !== null },
          'dead letters were discarded',
        );
      return result;
    },
  };
}

const idsOf = (rows: readonly DeadRow[]) => rows.map((row) => row.id);
const eventIdsOf = (those: readonly Readonly<{ eventId: string }>[]) => those.map((it) => it.eventId);
