import { inSteps, type OutboxEvent } from '../event.ts';
import type { FinalizedPlace, Published, PublishedFilter, PublishedRow } from '../outbox/published.ts';
import { NotOurEpochError, type Republisher } from '../streams/copies.ts';
import { errorText, type Logger } from '../telemetry/logger.ts';
import { fromCursor, toCursor } from './cursor.ts';

/**
 * Appending once more what was published before, for a consumer that is new, or was broken. The entries are marked
 * with `replayed_at`; rows stay as they are.
 */

export type RepublishRange = Readonly<{
  /** Published from then to then: times of the database. */
  since: string;
  until: string;
  filter: PublishedFilter;
}>;

export type RepublishOptions = Readonly<{
  /** Who does it; it is logged. */
  by: string;
  /** Entries appended at most. Default: all. */
  limit?: number;
  /** `next` of an earlier call with the same range. */
  after?: string;
  /** Asked between two entries: end here. */
  stopped?: () => boolean;
  /** Told how many events were examined so far, and where a new run would go on. */
  onProgress?: (seen: number, next: string) => void;
}>;

export type RepublishResult = Readonly<{
  appended: number;
  /** Left out: their topic or payload is not what may be published (any more), or their stream refuses them. */
  refused: number;
  /** Why the first of them was. */
  reason: string | null;
  /** What ended it early, after something was done; null when nothing did. */
  error: string | null;
  /** Where to go on, if it was not all; give it as `after`. */
  next: string | null;
}>;

/** How many there are, by stream. */
export type RepublishCount = Readonly<{ streams: ReadonlyMap<string, number>; next: string | null }>;

/**
 * Where to go on. Rows are read from `finalizedAt`, `id` on. Appended are, of those up to `readUs`, `readId`, all whose
 * entry is not after `entryId`, `entryRow`; of those between that and `lateUs`, `lateId`, all whose entry is not after
 * `lateEntryId`, `lateEntryRow`. Beyond that, none, however old their entries: where a stream was restored, or an
 * acknowledgement was very late, these go back.
 */
type Place = Readonly<Record<(typeof PLACE)[number], string>>;
const PLACE = [
  ...(['finalizedAt', 'id', 'readUs', 'readId', 'entryId', 'entryRow'] as const),
  ...(['lateUs', 'lateId', 'lateEntryId', 'lateEntryRow'] as const),
] as const;
const START = {
  ...{ readUs: '0', readId: '-1', entryId: '0-0', entryRow: '-1' },
  ...{ lateUs: '0', lateId: '-1', lateEntryId: '0-0', lateEntryRow: '-1' },
};
type Mark = Pick<PublishedRow, 'finalizedUs' | 'id'>;
/** `index`: counts the rows as they are read. */
type Row = PublishedRow & Readonly<{ index: number }>;

const PAGE_ROWS = 1_000;
/**
 * Rows held, to be appended in the order of their entries: they come by the time of their acknowledgement, which may
 * be after that of a successor.
 */
const HELD_ROWS = 5_000;
/** Events read at once: not too many, nor too many stored bytes. */
const STEP_ROWS = 200;
const STEP_BYTES = 4 << 20;
const EPOCH_TIMEOUT_MS = 15_000;

export type Republish = ReturnType<typeof createRepublish>;

export function createRepublish(deps: {
  published: Pick<Published, 'publishedRows' | 'finalizedEvents'>;
  /** Why the event must not be appended, or null: the same check as before it is published. */
  problemOf: (event: OutboxEvent) => string | null;
  republisher: Republisher;
  logger: Logger;
}) {
  const { published, republisher, logger } = deps;

  /** Appends, in whichever epoch it is; a comparison of table and streams is waited for. */
  function createAppend(replayedAt: Date) {
    let epoch: string | undefined;
    return async (event: OutboxEvent): Promise<string | null> => {
      for (;;) {
        epoch ??= await republisher.epoch(EPOCH_TIMEOUT_MS);
        try {
          return await republisher.append(event, replayedAt, epoch);
        } catch (error) {
          if (!(error instanceof NotOurEpochError)) throw error;
          epoch = undefined;
        }
      }
    };
  }

  return {
    /**
     * How many entries that would be, at most `limit` of them.
     * @throws {CursorError} when `after` is not what an earlier call answered
     */
    async count(
      { since, until, filter }: RepublishRange,
      options: Pick<RepublishOptions, 'limit' | 'after'> = {},
    ): Promise<RepublishCount> {
      const { limit = Number.POSITIVE_INFINITY } = options;
      const streams = new Map<string, number>();
      let after =
        options.after === undefined
          ? { finalizedAt: since, id: '-1' }
          : fromCursor<FinalizedPlace>(options.after, ['finalizedAt', 'id']);
      for (let left = limit; ; ) {
        const size = Math.min(PAGE_ROWS, left);
        const page = await published.publishedRows(filter, after, until, size);
        for (const { topic } of page) streams.set(topic, (streams.get(topic) ?? 0) + 1);
        const last = page.at(-1);
        if (last === undefined || page.length < size) return { streams, next: null };
        after = { finalizedAt: last.finalizedAt, id: last.id };
        left -= page.length;
        if (left <= 0) return { streams, next: toCursor(after) };
      }
    },

    /**
     * Appends them, in the order in which they were appended first. Cut off, it goes on after `next`; an entry whose
     * answer was lost may then come twice.
     * @throws {CursorError} when `after` is not what an earlier call answered
     * @throws {NotReadyError} when it is not known whether Redis lost entries, and nobody finds out
     * @throws when a server does not answer; each of these before anything was appended: after that, see `error`
     */
    async run(range: RepublishRange, options: RepublishOptions): Promise<RepublishResult> {
      const { since, until, filter } = range;
      const { limit = Number.POSITIVE_INFINITY, stopped = () => false } = options;
      const append = createAppend(new Date());
      const began =
        options.after === undefined
          ? { ...START, finalizedAt: since, id: '-1' }
          : fromCursor<Place>(options.after, PLACE);
      let place = began;
      let [appended, refused, seen] = [0, 0, 0];
      let reason: string | null = null;
      const end = (next: string | null, error: string | null = null): RepublishResult => {
        logger.info(
          { by: options.by, ...range, appended, refused, more: next !== null },
          'events were republished',
        );
        return { appended, refused, reason, error, next };
      };

      const work = async (): Promise<RepublishResult> => {
        let index = 0;
        let held: Row[] = [];
        let read: FinalizedPlace = { finalizedAt: began.finalizedAt, id: began.id };
        let mark: Mark = { finalizedUs: began.lateUs, id: began.lateId };
        for (;;) {
          const page = await published.publishedRows(filter, read, until, PAGE_ROWS);
          const isLast = page.length < PAGE_ROWS;
          const last = page.at(-1);
          if (last !== undefined) read = { finalizedAt: last.finalizedAt, id: last.id };
          const isOld = last !== undefined && !isBeyond(last, began.lateUs, began.lateId);
          if (last !== undefined && isBeyond(last, mark.finalizedUs, mark.id)) mark = last;
          for (const row of page) if (!isAppended(row, began)) held.push({ ...row, index: index++ });
          if (isLast || (held.length > HELD_ROWS && !isOld)) {
            held.sort((a, b) => (isAfter(a, b.entryId, b.id) ? 1 : -1));
            const first = place;
            const late = held.filter((row) => !isAfter(row, first.entryId, first.entryRow));
            const due = held.slice(late.length, isLast ? held.length : late.length + HELD_ROWS / 2);
            // From a place before every row that is not appended yet.
            const from = earliest(held, read);
            held = held.slice(late.length + due.length);
            const [readUs, readId, lateUs, lateId] = [first.lateUs, first.lateId, mark.finalizedUs, mark.id];
            const parts: [Row[], (row: Row) => Place][] = [
              [
                late.filter((row) => !isBeyond(row, first.lateUs, first.lateId)),
                (row) => ({ ...first, ...from, lateEntryId: row.entryId, lateEntryRow: row.id }),
              ],
              [
                late.filter((row) => isBeyond(row, first.lateUs, first.lateId)),
                (row) => ({
                  ...{ ...first, ...from, readUs, readId, lateUs, lateId },
                  ...{ lateEntryId: row.entryId, lateEntryRow: row.id },
                }),
              ],
              [
                due,
                ({ entryId, id: entryRow }) => ({
                  ...{ ...from, readUs: lateUs, readId: lateId, entryId, entryRow },
                  ...{ lateUs, lateId, lateEntryId: entryId, lateEntryRow: entryRow },
                }),
              ],
            ];
            for (const [rows, placeOf] of parts)
              if (!(await appendAll(rows, placeOf))) return end(toCursor(place));
          }
          if (isLast) return end(null);
        }
      };

      /** Answers whether it came to their end. */
      async function appendAll(rows: readonly Row[], placeOf: (row: Row) => Place): Promise<boolean> {
        for (const step of inSteps(rows, STEP_ROWS, STEP_BYTES)) {
          const found = await published.finalizedEvents(step.map((row) => row.id));
          const events = new Map(found.map((it) => [it.id, it]));
          for (const row of step) {
            if (seen >= limit || stopped()) return false;
            const event = events.get(row.id);
            const refusal = event === undefined ? null : (deps.problemOf(event) ?? (await append(event)));
            if (refusal === null && event !== undefined) appended++;
            if (refusal !== null) refused++;
            reason ??= refusal;
            place = placeOf(row);
            seen++;
            options.onProgress?.(seen, toCursor(place));
          }
        }
        return true;
      }

      try {
        return await work();
      } catch (error) {
        // What was appended is there: an answer without `next` would have it appended again.
        if (seen === 0) throw error;
        logger.error({ err: error }, 'republishing ended early; it can go on');
        return end(toCursor(place), errorText(error as Error));
      }
    },
  };
}

/** By the ids of the entries, `<ms>-<sequence>`; those of two streams may be the same. */
function isAfter(row: Row | PublishedRow, entryId: string, entryRow: string): boolean {
  const [ms = 0n, sequence = 0n] = row.entryId.split('-').map(BigInt);
  const [otherMs = 0n, otherSequence = 0n] = entryId.split('-').map(BigInt);
  if (ms !== otherMs) return ms > otherMs;
  if (sequence !== otherSequence) return sequence > otherSequence;
  return BigInt(row.id) > BigInt(entryRow);
}

/** In the order in which rows are read. */
function isBeyond(row: Mark, finalizedUs: string, id: string): boolean {
  if (row.finalizedUs !== finalizedUs) return BigInt(row.finalizedUs) > BigInt(finalizedUs);
  return BigInt(row.id) > BigInt(id);
}

function isAppended(row: PublishedRow, place: Place): boolean {
  if (!isBeyond(row, place.readUs, place.readId)) return !isAfter(row, place.entryId, place.entryRow);
  if (isBeyond(row, place.lateUs, place.lateId)) return false;
  return !isAfter(row, place.lateEntryId, place.lateEntryRow);
}

/** Right before the first of these rows in the order in which they are read. */
function earliest(rows: readonly Row[], otherwise: Readonly<{ finalizedAt: string; id: string }>) {
  const first = rows.reduce<Row | undefined>(
    (best, row) => (best && best.index < row.index ? best : row),
    undefined,
  );
  return first === undefined
    ? { finalizedAt: otherwise.finalizedAt, id: otherwise.id }
    : { finalizedAt: first.finalizedAt, id: String(BigInt(first.id) - 1n) };
}
