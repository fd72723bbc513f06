import { compareEntryIds } from '../event.ts';
import type { FinalizedPlace, PublishedRow } from '../outbox/published.ts';
import { fromCursor, toCursor } from './cursor.ts';

/**
 * Which rows a republishing has appended so far.
 *
 * Rows are read in the order in which they were acknowledged, and appended in the order of their entries. The orders
 * differ: an acknowledgement may come after that of a later entry. So rows are held, sorted by entry, and appended in
 * batches, and "everything up to here" cannot be said with one place. It takes a frontier: of the rows up to a place in the
 * order of reading, those are appended whose entries are up to a place in the order of entries.
 *
 * One frontier is enough until *late rows* appear: read after a batch was appended, with entries older than the last one of
 * that batch. (A stream was restored, or an acknowledgement took very long.) They are appended next, before any newer
 * entry, and their own frontier counts them.
 */
export type Progress = Readonly<{
  /** Reading starts after this place. Every row up to it is appended. */
  readAfter: FinalizedPlace;
  main: Frontier;
  /** Of the rows read after `main.read`. Equal to `main` when there are no late rows. */
  late: Frontier;
}>;

/** Of the rows up to `read`, those are appended whose entries are up to `entry`. */
type Frontier = Readonly<{ read: ReadMark; entry: EntryMark }>;

/** A place in the order of reading: by acknowledgement, in microseconds, then by id. */
export type ReadMark = Pick<PublishedRow, 'finalizedUs' | 'id'>;
/** A place in the order of entries: by entry id, then, as two streams may have the same, by the row's id. */
type EntryMark = Pick<PublishedRow, 'entryId' | 'id'>;

/** `index`: its number in the order of reading. */
export type HeldRow = PublishedRow & Readonly<{ index: number }>;

/** Rows that are appended in this order; `progressAt` tells the progress once `row`, and all before it, are appended. */
export type Part = Readonly<{ rows: readonly HeldRow[]; progressAt: (row: HeldRow) => Progress }>;

const NONE: Frontier = { read: { finalizedUs: '0', id: '-1' }, entry: { entryId: '0-0', id: '-1' } };

/** Nothing is appended yet of what was published from `since` on. */
export const noProgress = (since: string): Progress => ({
  readAfter: { finalizedAt: since, id: '-1' },
  main: NONE,
  late: NONE,
});

/** The progress as a cursor for the caller. */
export const cursorOf = ({ readAfter, main, late }: Progress): string =>
  toCursor({
    ...{ finalizedAt: readAfter.finalizedAt, id: readAfter.id },
    ...{ readUs: main.read.finalizedUs, readId: main.read.id },
    ...{ entryId: main.entry.entryId, entryRow: main.entry.id },
    ...{ lateUs: late.read.finalizedUs, lateId: late.read.id },
    ...{ lateEntryId: late.entry.entryId, lateEntryRow: late.entry.id },
  });

const MEMBERS = [
  ...(['finalizedAt', 'id', 'readUs', 'readId', 'entryId', 'entryRow'] as const),
  ...(['lateUs', 'lateId', 'lateEntryId', 'lateEntryRow'] as const),
] as const;

/** @throws {CursorError} when `cursor` is not what `cursorOf` made */
export function progressOf(cursor: string): Progress {
  const it = fromCursor<Record<(typeof MEMBERS)[number], string>>(cursor, MEMBERS);
  return {
    readAfter: { finalizedAt: it.finalizedAt, id: it.id },
    main: {
      read: { finalizedUs: it.readUs, id: it.readId },
      entry: { entryId: it.entryId, id: it.entryRow },
    },
    late: {
      read: { finalizedUs: it.lateUs, id: it.lateId },
      entry: { entryId: it.lateEntryId, id: it.lateEntryRow },
    },
  };
}

/** The progress where a count goes on: by its own cursor, or by that of a run, whose rows are not counted again. */
export function countedTo(cursor: string): Progress {
  const place = fromCursor<FinalizedPlace & { readUs?: string }>(cursor, ['finalizedAt', 'id']);
  if (place.readUs !== undefined) return progressOf(cursor);
  return { ...noProgress(place.finalizedAt), readAfter: place };
}

/** Where a count goes on that began there. */
export const countCursor = (began: Progress, readAfter: FinalizedPlace): string =>
  began.main === NONE ? toCursor({ ...readAfter }) : cursorOf({ ...began, readAfter });

export function isAppended(row: PublishedRow, { main, late }: Progress): boolean {
  if (!isReadAfter(row, main.read)) return !isEntryAfter(row, main.entry);
  return !isReadAfter(row, late.read) && !isEntryAfter(row, late.entry);
}

/**
 * Takes the next batch from the rows that are held: all late rows, then at most `maxDue` others by their entries.
 * @param readTo the last row read, by this run or one before
 * @param readPlace the same of this run, as the statement takes it
 */
export function nextBatch(
  progress: Progress,
  held: readonly HeldRow[],
  { maxDue, readTo, readPlace }: Readonly<{ maxDue: number; readTo: ReadMark; readPlace: FinalizedPlace }>,
): { parts: readonly Part[]; held: HeldRow[] } {
  const { main, late } = progress;
  const sorted = held.toSorted((a, b) => (isEntryAfter(a, b) ? 1 : -1));
  const lateRows = sorted.filter((row) => !isEntryAfter(row, main.entry));
  const due = sorted.slice(lateRows.length, lateRows.length + maxDue);
  const readAfter = beforeFirst(held, readPlace);
  const parts: Part[] = [
    {
      // The run before read these, and ended among them.
      rows: lateRows.filter((row) => !isReadAfter(row, late.read)),
      progressAt: (row) => ({ readAfter, main, late: { read: late.read, entry: row } }),
    },
    {
      // Up to `late.read` all entries up to `main.entry` are appended now.
      rows: lateRows.filter((row) => isReadAfter(row, late.read)),
      progressAt: (row) => ({
        readAfter,
        main: { read: late.read, entry: main.entry },
        late: { read: readTo, entry: row },
      }),
    },
    {
      rows: due,
      progressAt: (row) => {
        const both = { read: readTo, entry: row };
        return { readAfter, main: both, late: both };
      },
    },
  ];
  return { parts, held: sorted.slice(lateRows.length + due.length) };
}

export function isReadAfter(row: ReadMark, mark: ReadMark): boolean {
  if (row.finalizedUs !== mark.finalizedUs) return BigInt(row.finalizedUs) > BigInt(mark.finalizedUs);
  return BigInt(row.id) > BigInt(mark.id);
}

function isEntryAfter(row: EntryMark, mark: EntryMark): boolean {
  const order = compareEntryIds(row.entryId, mark.entryId);
  return order === 0 ? BigInt(row.id) > BigInt(mark.id) : order > 0;
}

/** The place right before the first of these rows in the order of reading; `otherwise` if there are none. */
function beforeFirst(rows: readonly HeldRow[], otherwise: FinalizedPlace): FinalizedPlace {
  const [head, ...others] = rows;
  if (head === undefined) return otherwise;
  const first = others.reduce((best, row) => (best.index < row.index ? best : row), head);
  return { finalizedAt: first.finalizedAt, id: String(BigInt(first.id) - 1n) };
}
