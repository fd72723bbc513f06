import type { Logger } from '../logger.ts';
import type { Failure } from './dead-letter.ts';
import type { Found, JoblessRow } from './lost-jobs.ts';

const BATCH = 100;
/** Batches of one round; the next tick goes on. */
const MAX_BATCHES = 50;

/**
 * Looks after rows whose lease has ended: what became of their jobs? Alive: another lease. Gone: the row is
 * fresh again, unless its entry or dead letter is in the stream: the job was removed between append and
 * acknowledgement, and with it the memory of the append. Failed: its dead letter was not finished (a pod died in
 * between), so finish it.
 */
export function createReconcile<Tx>(deps: {
  transaction: <T>(work: (tx: Tx) => Promise<T>) => Promise<T>;
  lockDue: (tx: Tx, limit: number) => Promise<JoblessRow[]>;
  returnToFresh: (tx: Tx, ids: string[]) => Promise<void>;
  extendLease: (tx: Tx, ids: string[]) => Promise<void>;
  jobFate: (eventId: string) => Promise<'alive' | 'failed' | 'missing'>;
  failedJob: (eventId: string) => Promise<Failure | null>;
  /** Of these events, by event id, what is in the streams and no row knows of yet. */
  appended: (rows: readonly JoblessRow[]) => Promise<ReadonlyMap<string, Found>>;
  /** Gives the rows their receipts: they are published, or dead. */
  settle: (found: readonly (Found & Readonly<{ id: string }>)[]) => Promise<void>;
  deadLetter: (failure: Failure) => Promise<void>;
  /** Told how many leases had ended, by what became of their jobs. */
  onExpired?: (seen: Readonly<Record<'alive' | 'failed' | 'missing', number>>) => void;
  logger: Logger;
}) {
  const { logger } = deps;

  return async function reconcile(): Promise<void> {
    const seen = { alive: 0, failed: 0, missing: 0 };
    let settled = 0;
    for (let batch = 0; batch < MAX_BATCHES; batch++) {
      const { rows, found } = await deps.transaction(async (tx) => {
        const due = await deps.lockDue(tx, BATCH);
        if (due.length === 0) return { rows: [], found: [] };
        // Under the rows' locks: nobody can add their jobs meanwhile.
        const fates = await Promise.all(due.map((row) => deps.jobFate(row.eventId)));
        const judged = due.map((row, i) => ({ ...row, fate: fates[i] as 'alive' | 'failed' | 'missing' }));
        for (const row of judged) seen[row.fate]++;
        const missing = judged.filter((row) => row.fate === 'missing');
        const appended = missing.length > 0 ? await deps.appended(missing) : new Map<string, Found>();
        const again = missing.filter((row) => !appended.has(row.eventId)).map((row) => row.id);
        const others = judged.filter((row) => !again.includes(row.id)).map((row) => row.id);
        if (again.length > 0) await deps.returnToFresh(tx, again);
        if (others.length > 0) await deps.extendLease(tx, others);
        return {
          rows: judged,
          found: missing.flatMap(({ id, eventId }) => {
            const what = appended.get(eventId);
            return what === undefined ? [] : { id, ...what };
          }),
        };
      });
      if (found.length > 0) await deps.settle(found);
      settled += found.length;
      for (const row of rows) {
        if (row.fate !== 'failed') continue;
        const failure = await deps.failedJob(row.eventId);
        if (failure) await deps.deadLetter(failure);
      }
      if (rows.length < BATCH) break;
    }
    deps.onExpired?.(seen);
    if (seen.missing > 0)
      logger.warn(
        { events: seen.missing, settled },
        'publish jobs were lost; their events are claimed again, but for those that are in their stream',
      );
    if (seen.failed > 0)
      logger.warn({ events: seen.failed }, 'finished dead letters that had been left half done');
    if (seen.alive > 0) logger.debug({ events: seen.alive }, 'leases extended');
  };
}
