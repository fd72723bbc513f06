import { pause } from '../lifecycle.ts';
import {
  FIRST_PLACE,
  type KeptRow,
  PRUNABLE_KINDS,
  type PruneResult,
  type PruneStep,
} from '../outbox/pruner.ts';

/** How old published rows leave the table: by the schedule, and by `relay prune`. */

/** Rows of one transaction: their locks are held for about 10 ms. */
const STEP_ROWS = 1_000;
/** Between two steps at least; and if that is longer, so many times as long as the step took: events come first. */
const PAUSE_MS = 10;
const PAUSE_SHARE = 3;
/** Asks again so soon while another process is deleting. */
const BUSY_PAUSE_MS = 50;
/**
 * Rows are kept for so much longer than the resync window. A comparison that begins right after we looked for one
 * looks back from then on, so it needs rows that are older by what one step takes; this is more than that.
 */
const MARGIN_MS = 60_000;

export type Retention = ReturnType<typeof createRetention>;

/** Table and streams are being compared: rows that may have to be appended again must stay. */
export class ComparingError extends Error {
  override readonly name = 'ComparingError';
  constructor() {
    super('Redis has lost data and is being compared with the table; nothing is deleted meanwhile');
  }
}

export function createRetention(deps: {
  step: (step: PruneStep) => Promise<PruneResult | 'busy'>;
  ago: (ms: number) => Promise<string>;
  /** Whether table and streams are being compared. */
  comparing: () => Promise<boolean>;
  /** Told of rows that are old enough, and that the database keeps. */
  onKept: (rows: readonly KeptRow[]) => void;
  resyncWindowMs: number;
}) {
  async function* walk(
    olderThanMs: number,
    options: Readonly<{ dryRun?: boolean; goesOn?: () => boolean }>,
  ): AsyncGenerator<PruneResult | 'busy'> {
    const { dryRun = false, goesOn = () => true } = options;
    const before = await deps.ago(Math.max(olderThanMs, deps.resyncWindowMs + MARGIN_MS));
    for (const kind of PRUNABLE_KINDS) {
      for (let after: typeof FIRST_PLACE | null = FIRST_PLACE; after !== null && goesOn(); ) {
        if (!dryRun && (await deps.comparing())) throw new ComparingError();
        const startedAt = Date.now();
        const result = await deps.step({ kind, after, before, limit: STEP_ROWS, dryRun });
        yield result;
        if (result === 'busy') await pause(BUSY_PAUSE_MS);
        else {
          if (result.kept.length > 0) deps.onKept(result.kept);
          after = result.next;
          if (!dryRun && after !== null)
            await pause(Math.max(PAUSE_MS, PAUSE_SHARE * (Date.now() - startedAt)));
        }
      }
    }
  }

  return {
    /**
     * Deletes published rows older than `olderThanMs` (never one that a resync may need) in short transactions, until
     * none is left, `goesOn` says no, or another process is found doing it. Returns how many.
     * @throws {ComparingError}
     */
    async run(olderThanMs: number, goesOn: () => boolean): Promise<number> {
      let deleted = 0;
      for await (const result of walk(olderThanMs, { goesOn })) {
        if (result === 'busy') break;
        deleted += result.deleted;
      }
      return deleted;
    },

    /** The same by hand: waits for a relay that does it as well. Yields how many rows each step deleted. */
    async *byHand(olderThanMs: number, dryRun: boolean): AsyncGenerator<number> {
      for await (const result of walk(olderThanMs, { dryRun })) if (result !== 'busy') yield result.deleted;
    },
  };
}
