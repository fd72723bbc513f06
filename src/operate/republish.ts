import type { OutboxEvent } from '../event.ts';
import type { Logger } from '../logger.ts';
import type { PublishedFilter, Receipts, SettledRow } from '../outbox/receipts.ts';
import type { Republisher } from '../stream/republish.ts';
import { NotOurEpochError } from '../stream/restore.ts';
import { fromCursor, toCursor } from './cursor.ts';

/**
 * Appending once more what was published before, for a consumer that is new, or was broken. The entries are marked
 * with `replayed_at`; rows and receipts stay as they are.
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
  /** Told how many events were looked at so far, and where a new run would go on. */
  onProgress?: (seen: number, next: string) => void;
}>;

export type RepublishResult = Readonly<{
  appended: number;
  /** Left out, since their stream refuses them, or they are above a limit that was lowered since. */
  refused: number;
  /** Why the first of them was. */
  reason: string | null;
  /** Where to go on, if it was not all; give it as `after`. */
  next: string | null;
}>;

/** Place in the order of publishing from which rows are read, and the entry after which they are appended. */
type Place = Readonly<{ settledAt: string; id: string; entryId: string; entryRow: string }>;
/** `turn`: counts the rows as they are read. */
type Row = SettledRow & Readonly<{ topic: string; turn: number }>;

const PAGE_ROWS = 1_000;
/**
 * Rows held, to be appended in the order of their entries: they come by the time of their acknowledgement, which may
 * be after that of a successor. See resync.ts.
 */
const HELD_ROWS = 5_000;
/** Events read at once: not too many, nor too many stored bytes. */
const STEP_ROWS = 200;
const STEP_BYTES = 4 << 20;
const EPOCH_TIMEOUT_MS = 15_000;

export type Republish = ReturnType<typeof createRepublish>;

export function createRepublish(deps: {
  receipts: Pick<Receipts, 'published' | 'events'>;
  republisher: Republisher;
  logger: Logger;
}) {
  const { receipts, republisher, logger } = deps;

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
    /** How many entries that would be, by stream. */
    async count({ since, until, filter }: RepublishRange): Promise<Map<string, number>> {
      const counts = new Map<string, number>();
      let after = { settledAt: since, id: '-1' };
      for (;;) {
        const page = await receipts.published(filter, after, until, PAGE_ROWS);
        for (const { topic } of page) counts.set(topic, (counts.get(topic) ?? 0) + 1);
        const last = page.at(-1);
        if (last === undefined || page.length < PAGE_ROWS) return counts;
        after = last;
      }
    },

    /**
     * Appends them, in the order in which they were appended first. Cut off, it goes on after `next`; an entry whose
     * answer was lost may then come twice.
     * @throws {CursorError} when `after` is not what an earlier call answered
     * @throws {NotReadyError} when it is not known whether Redis lost entries, and nobody finds out
     * @throws when a server does not answer
     */
    async run(range: RepublishRange, options: RepublishOptions): Promise<RepublishResult> {
      const { since, until, filter } = range;
      const { limit = Number.POSITIVE_INFINITY, stopped = () => false } = options;
      const append = createAppend(new Date());
      const began =
        options.after === undefined
          ? { settledAt: since, id: '-1', entryId: '0-0', entryRow: '-1' }
          : fromCursor<Place>(options.after, ['settledAt', 'id', 'entryId', 'entryRow']);
      let place = began;
      let [appended, refused, seen] = [0, 0, 0];
      let reason: string | null = null;
      const end = (next: string | null): RepublishResult => {
        logger.info(
          { by: options.by, ...range, appended, refused, more: next !== null },
          'events were republished',
        );
        return { appended, refused, reason, next };
      };

      let turn = 0;
      let held: Row[] = [];
      let read = { settledAt: began.settledAt, id: began.id };
      for (;;) {
        const page = await receipts.published(filter, read, until, PAGE_ROWS);
        const rows = page.map((row) => ({ ...row, turn: turn++ }));
        held.push(...rows.filter((row) => isAfter(row, began)));
        const isLast = page.length < PAGE_ROWS;
        if (isLast || held.length > HELD_ROWS) {
          held.sort((a, b) => (isAfter(a, { entryId: b.entryId, entryRow: b.id }) ? 1 : -1));
          const due = held.slice(0, isLast ? held.length : HELD_ROWS / 2);
          held = held.slice(due.length);
          // From a place before every row that is not appended yet.
          const from = earliest([...due, ...held], page.at(-1) ?? read);
          for (const step of steps(due)) {
            const events = new Map(
              (await receipts.events(step.map((row) => row.id))).map((it) => [it.id, it]),
            );
            for (const row of step) {
              if (seen >= limit || stopped()) return end(toCursor(place));
              const event = events.get(row.id);
              const refusal = event === undefined ? null : (event.withheld ?? (await append(event)));
              if (refusal === null && event !== undefined) appended++;
              if (refusal !== null) refused++;
              reason ??= refusal;
              place = { ...from, entryId: row.entryId, entryRow: row.id };
              seen++;
              options.onProgress?.(seen, toCursor(place));
            }
          }
        }
        const last = page.at(-1);
        if (isLast || last === undefined) return end(null);
        read = { settledAt: last.settledAt, id: last.id };
      }
    },
  };
}

/** By the ids of the entries, `<ms>-<sequence>`; those of two streams may be the same. */
function isAfter(row: Row, other: Readonly<{ entryId: string; entryRow: string }>): boolean {
  const [ms = 0n, sequence = 0n] = row.entryId.split('-').map(BigInt);
  const [otherMs = 0n, otherSequence = 0n] = other.entryId.split('-').map(BigInt);
  if (ms !== otherMs) return ms > otherMs;
  if (sequence !== otherSequence) return sequence > otherSequence;
  return BigInt(row.id) > BigInt(other.entryRow);
}

/** Right before the first of these rows in the order in which they are read. */
function earliest(rows: readonly Row[], otherwise: Readonly<{ settledAt: string; id: string }>) {
  const first = rows.reduce<Row | undefined>(
    (best, row) => (best && best.turn < row.turn ? best : row),
    undefined,
  );
  return first === undefined
    ? { settledAt: otherwise.settledAt, id: otherwise.id }
    : { settledAt: first.settledAt, id: String(BigInt(first.id) - 1n) };
}

function steps(rows: readonly Row[]): Row[][] {
  const result: Row[][] = [];
  let bytes = Number.POSITIVE_INFINITY;
  for (const row of rows) {
    bytes += row.bytes;
    if (bytes > STEP_BYTES || result.at(-1)?.length === STEP_ROWS) {
      result.push([]);
      bytes = row.bytes;
    }
    result.at(-1)?.push(row);
  }
  return result;
}
