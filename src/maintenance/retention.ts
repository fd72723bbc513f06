import { pause } from '../lifecycle.ts';
import {
  FIRST_PLACE,
  type KeptRow,
  PRUNABLE_KINDS,
  type PruneResult,
  type PruneStep,
} from '../outbox/pruner.ts';

/** Deletes old published rows, for the schedule and for `relay prune`. */

/** Rows in one transaction: it holds their locks for about 10 ms. */
const STEP_ROWS = 1_000;
/** Pause between two steps: PAUSE_SHARE times as long as the step took, at least PAUSE_MS. Events come first. */
const PAUSE_MS = 10;
const PAUSE_SHARE = 3;
/** Interval at which a pause asks whether the relay stops: after a step of 4 s it lasts 12 s, and a stop must not. */
const ASK_MS = 100;
/** Retry interval while another process deletes. */
const BUSY_PAUSE_MS = 50;
/**
 * Rows are kept for this much longer than the resync window. Table and streams may begin to be compared right after a step
 * has asked whether they are; that comparison needs the rows of the whole window. The margin is longer than a step.
 */
const MARGIN_MS = 60_000;

/** Pauses for `ms`, or until the relay stops. */
async function rest(ms: number, goesOn: () => boolean): Promise<void> {
  for (let left = ms; left > 0 && goesOn(); left -= ASK_MS) await pause(Math.min(left, ASK_MS));
}

export function createRetention(deps: {
  step: (step: PruneStep) => Promise<PruneResult | 'busy'>;
  ago: (ms: number) => Promise<string>;
  /** Whether table and streams are being compared. */
  comparing: () => Promise<boolean>;
  /** Called with rows that are old enough but that the database refused to delete. */
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
        // Rows may have to be published again.
        if (!dryRun && (await deps.comparing()))
          throw new Error(
            'Redis may have lost data and is being compared with the table; nothing is deleted meanwhile',
          );
        const startedAt = performance.now();
        const result = await deps.step({ kind, after, before, limit: STEP_ROWS, dryRun });
        yield result;
        if (result === 'busy') await pause(BUSY_PAUSE_MS);
        else {
          if (result.kept.length > 0) deps.onKept(result.kept);
          after = result.next;
          if (!dryRun && after !== null)
            await rest(Math.max(PAUSE_MS, PAUSE_SHARE * (performance.now() - startedAt)), goesOn);
        }
      }
    }
  }

  return {
    /**
     * Deletes published rows older than `olderThanMs`, except those that a resync may need, in short transactions. Ends when
     * none is left, `goesOn` returns false, or another process deletes.
     * @returns the number of deleted rows
     * @throws when table and streams are being compared
     */
    async run(olderThanMs: number, goesOn: () => boolean): Promise<number> {
      let deleted = 0;
      for await (const result of walk(olderThanMs, { goesOn })) {
        if (result === 'busy') break;
        deleted += result.deleted;
      }
      return deleted;
    },

    /** The same for `relay prune`, but waits while another process deletes. Yields the deleted rows of each step. */
    async *byHand(olderThanMs: number, dryRun: boolean): AsyncGenerator<number> {
      for await (const result of walk(olderThanMs, { dryRun })) if (result !== 'busy') yield result.deleted;
    },
  };
}
