import type { Pool } from '../connections/database.ts';
import { MS, type OutboxOptions } from './conditions.ts';
import { payloadMayBeAtFault } from './event-of-row.ts';
import { createOutbox } from './outbox.ts';

/** A row that nobody has: the statements are tried where there is no other. */
const NOBODY = { id: '0', eventId: '00000000-0000-0000-0000-000000000000' };

class RolledBack extends Error {}

/**
 * Claims the first fresh row and marks it published and dead, in a transaction that is rolled back: with the rights, the
 * types and the triggers that the relay will meet. Where there is no such row, or it has not waited for `waitedMs` yet, the
 * same statements change nothing.
 * @returns whether the row changes. A trigger may leave it as it is, without an error
 * @throws what the database has against it
 */
export async function tryClaim(pool: Pool, options: OutboxOptions, waitedMs: number): Promise<boolean> {
  // A pod whom PostgreSQL gives one session leaves claiming to others: one has to do for the trial.
  const outbox = createOutbox({ connect: () => pool.connect() }, options);
  await outbox.withClaimLock(async () => {});
  let changes = true;
  const trial = outbox.inEpoch(
    async (tx) => {
      const fresh = await tx.query(
        `SELECT FROM identity.outbox o WHERE o.id = (
           SELECT f.id FROM identity.outbox f WHERE NOT f.published AND f.next_attempt_at IS NULL ORDER BY f.id LIMIT 1)
         AND NOT o.published AND o.next_attempt_at IS NULL AND o.created_at <= now() - $1 ${MS}
         FOR UPDATE SKIP LOCKED`,
        [waitedMs],
      );
      // A row that cannot be printed is no fault of the database: the claim knows what to do about it.
      const { leased, rows } = await outbox.claimFresh(tx, Number(fresh.rowCount));
      const [row = NOBODY] = leased;
      await outbox.markDead(tx, { ...row, attempts: 1, reason: 'a trial of relay check', entryId: '0-1' });
      await outbox.markPublished(tx, [{ ...row, entryId: '0-1' }]);
      const left = await tx.query('SELECT FROM identity.outbox WHERE event_id = $1 AND NOT published', [
        row.eventId,
      ]);
      changes = rows >= Number(fresh.rowCount) && left.rowCount === 0;
      throw new RolledBack();
    },
    { generic: true },
  );
  await trial.catch((error) => {
    if (!(error instanceof RolledBack || payloadMayBeAtFault(error))) throw error;
  });
  // These are transactions of their own, and change nothing: nobody has that event.
  await outbox.recordFailure({ ...NOBODY, attempts: 1, reason: '', retryInMs: 0 });
  await outbox.park([NOBODY.eventId], []);
  return changes;
}
