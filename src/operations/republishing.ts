import { inSteps, type OutboxEvent } from '../event.ts';
import type { Published, PublishedFilter } from '../outbox/published.ts';
import type { Republisher } from '../streams/copies.ts';
import { errorText, type Logger } from '../telemetry/logger.ts';
import {
  countCursor,
  countedTo,
  cursorOf,
  type HeldRow,
  isAppended,
  isReadAfter,
  nextBatch,
  noProgress,
  type Part,
  progressOf,
  type ReadMark,
} from './republish-progress.ts';

/**
 * Appending once more what was published before, for a consumer that is new, or was broken. The entries are marked
 * with `replayed_at`; rows stay as they are.
 */

type RepublishRange = Readonly<{
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

type RepublishResult = Readonly<{
  appended: number;
  /** Events that are left out: their topic or payload may not be published (any more), or Redis refuses them. */
  refused: number;
  /** Why the first of them was refused. */
  reason: string | null;
  /** The error that ended it early, after something was done; else null. */
  error: string | null;
  /** Cursor to continue with, as `after`; null if everything was done. See republish-progress.ts. */
  next: string | null;
}>;

/** Number of events, by stream. */
type RepublishCount = Readonly<{ streams: ReadonlyMap<string, number>; next: string | null }>;

const PAGE_ROWS = 1_000;
/** Rows that wait to be appended in the order of their entries. A batch is appended when there are more. */
const HELD_ROWS = 5_000;
/** Events read at once: not too many, nor too many stored bytes. */
const STEP_ROWS = 200;
const STEP_BYTES = 4 << 20;

export type Republish = ReturnType<typeof createRepublish>;

export function createRepublish(deps: {
  published: Pick<Published, 'publishedRows' | 'finalizedEvents'>;
  /** Why the event must not be appended, or null: the same check as before it is published. */
  problemOf: (event: OutboxEvent) => string | null;
  republisher: Republisher;
  logger: Logger;
}) {
  const { published, logger } = deps;

  return {
    /**
     * How many entries `run` would append, at most `limit` of them; also with the `next` of a run that was cut off.
     * @throws {CursorError} when `after` is not what an earlier call answered
     */
    async count(
      { since, until, filter }: RepublishRange,
      options: Pick<RepublishOptions, 'limit' | 'after'> = {},
    ): Promise<RepublishCount> {
      const { limit = Number.POSITIVE_INFINITY } = options;
      const streams = new Map<string, number>();
      const began = options.after === undefined ? noProgress(since) : countedTo(options.after);
      let after = began.readAfter;
      for (let left = limit; ; ) {
        const size = Math.min(PAGE_ROWS, left);
        const page = await published.publishedRows(filter, after, until, size);
        for (const row of page)
          if (!isAppended(row, began)) streams.set(row.topic, (streams.get(row.topic) ?? 0) + 1);
        const last = page.at(-1);
        if (last === undefined || page.length < size) return { streams, next: null };
        after = { finalizedAt: last.finalizedAt, id: last.id };
        left -= page.length;
        if (left <= 0) return { streams, next: countCursor(began, after) };
      }
    },

    /**
     * Appends the events again, in the order of their first entries. After an interruption, `next` continues it; an entry
     * whose answer was lost may then be appended twice.
     * @throws {CursorError} when `after` is not what an earlier call answered
     * @throws {NotReadyError} when Redis may have lost entries, and no pod compares it with the table in time
     * @throws when a server does not answer; each of these before anything was appended: after that, see `error`
     */
    async run(range: RepublishRange, options: RepublishOptions): Promise<RepublishResult> {
      const { since, until, filter } = range;
      const { limit = Number.POSITIVE_INFINITY, stopped = () => false } = options;
      const append = deps.republisher(new Date());
      const began = options.after === undefined ? noProgress(since) : progressOf(options.after);
      let progress = began;
      let [appended, refused, seen] = [0, 0, 0];
      let reason: string | null = null;

      /** Reads rows, holds them, and appends them in batches. Returns whether all are appended. */
      async function appendRange(): Promise<boolean> {
        let held: HeldRow[] = [];
        let index = 0;
        let readPlace = began.readAfter;
        let readTo: ReadMark = began.late.read;
        for (;;) {
          const page = await published.publishedRows(filter, readPlace, until, PAGE_ROWS);
          for (const row of page) if (!isAppended(row, began)) held.push({ ...row, index: index++ });
          const last = page.at(-1);
          if (last !== undefined) {
            readPlace = { finalizedAt: last.finalizedAt, id: last.id };
            if (isReadAfter(last, readTo)) readTo = last;
          }
          const isLast = page.length < PAGE_ROWS;
          // The progress will speak of all rows up to `readTo`, which may be where an earlier run had read to: read on
          // to there before the first batch.
          const isReadAgain = last !== undefined && !isReadAfter(last, began.late.read);
          if (isLast || (held.length > HELD_ROWS && !isReadAgain)) {
            const maxDue = isLast ? Number.POSITIVE_INFINITY : HELD_ROWS / 2;
            const batch = nextBatch(progress, held, { maxDue, readTo, readPlace });
            for (const part of batch.parts) if (!(await appendPart(part))) return false;
            held = batch.held;
          }
          if (isLast) return true;
        }
      }

      /** Returns whether all rows of the part are appended or refused. */
      async function appendPart({ rows, progressAt }: Part): Promise<boolean> {
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
            progress = progressAt(row);
            seen++;
            options.onProgress?.(seen, cursorOf(progress));
          }
        }
        return true;
      }

      const end = (next: string | null, error: string | null = null): RepublishResult => {
        logger.info(
          { by: options.by, ...range, appended, refused, more: next !== null },
          'events were republished',
        );
        return { appended, refused, reason, error, next };
      };

      try {
        return end((await appendRange()) ? null : cursorOf(progress));
      } catch (error) {
        // What was appended is there: an answer without `next` would have it appended again.
        if (seen === 0) throw error;
        logger.error({ err: error }, 'republishing ended early; it can go on');
        return end(cursorOf(progress), errorText(error as Error));
      }
    },
  };
}
