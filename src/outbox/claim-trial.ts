import { asking, type Pool, type Queryable } from '../connections/database.ts';
import { pause } from '../lifecycle.ts';
import { MS, type OutboxOptions } from './conditions.ts';
import { payloadMayBeAtFault } from './event-of-row.ts';
import { type RowName, rowMayBeAtFault } from './finalize.ts';
import { createOutbox } from './outbox.ts';

/** A row that nobody has: the statements are tried where there is no other. */
const NOBODY = { id: '0', eventId: '00000000-0000-0000-0000-000000000000' };
/** How often a running pod asks for a row that it can lock, and how long it waits in between. */
const LOCK_TRIES = 10;
const LOCK_RETRY_MS = 20;

class RolledBack extends Error {}

/** A row to try the statements on. The first fresh one is also claimed, another fresh one leased. */
type Trial = RowName & Readonly<{ isFresh: boolean; isFirst: boolean }>;

/**
 * Claims the first fresh row, marks it dead and published, and makes it unpublished again, in a transaction that is rolled
 * back: with the rights, the types, constraints and triggers that the relay will meet. If a constraint or trigger refuses it,
 * the last fresh rows are tried. Where there is no fresh row, others that are live are marked: if all of them refuse, and not
 * one alone, it is not the fault of a row. Rows that have not waited for `waitedMs` are left alone. Without any row the same
 * statements change nothing.
 * @returns whether the row changes. A trigger may leave it as it is, without an error
 * @throws what the database has against it
 */
export async function tryClaim(pool: Pool, options: OutboxOptions, waitedMs: number): Promise<boolean> {
  // A pod whom PostgreSQL gives one session leaves claiming to others: one has to do for the trial.
  const outbox = createOutbox({ connect: () => pool.connect() }, options);
  await outbox.withClaimLock(async () => {});

  /** @returns whether the row changes; undefined where it could not be locked */
  async function tryStatements(on: Trial | undefined): Promise<boolean | undefined> {
    let changes: boolean | undefined;
    const trial = outbox.inEpoch(
      async (tx) => {
        const wanted = on?.isFirst ? 1 : 0;
        if (on !== undefined && !(await lock(tx, on))) throw new RolledBack();
        const { rows, leased } = await outbox.claimFresh(tx, wanted);
        const row = leased[0] ?? on ?? NOBODY;
        if (on?.isFresh && !on.isFirst)
          await tx.query(
            'UPDATE identity.outbox SET next_attempt_at = now() WHERE id = $1 AND event_id = $2',
            [on.id, on.eventId],
          );
        await outbox.markDead(tx, { ...row, attempts: 1, reason: 'a trial of relay check', entryId: '0-1' });
        await outbox.markPublished(tx, [{ ...row, entryId: '0-1' }]);
        // Runs what waits for the commit, which never comes.
        await tx.query('SET CONSTRAINTS ALL IMMEDIATE');
        // As after Redis has lost its entry. Only a row that is published by now changes.
        const unpublished = await outbox.unpublish([{ ...row, entryId: '0-1' }], tx);
        changes = rows >= wanted && unpublished === (row === NOBODY ? 0 : 1);
        throw new RolledBack();
      },
      { generic: true },
    );
    await trial.catch((error) => {
      if (!(error instanceof RolledBack)) throw error;
    });
    return changes;
  }

  async function tryOnRows(): Promise<boolean | undefined> {
    const candidates = await candidatesOf(asking(pool, options.statementTimeoutMs), waitedMs);
    const refusals: unknown[] = [];
    for (const on of candidates) {
      try {
        const changes = await tryStatements(on);
        if (changes !== undefined) return changes;
      } catch (error) {
        if (!rowMayBeAtFault(error)) throw error;
        refusals.push(error);
      }
    }
    if (refusals.length > (candidates[0]?.isFresh ? 0 : 1)) throw refusals[0];
    return undefined;
  }

  let changes: boolean | undefined;
  try {
    changes = await tryOnRows();
    // A claim or an acknowledgement that fails again and again has its rows locked most of the time.
    for (let tries = 1; changes === undefined && waitedMs > 0 && tries < LOCK_TRIES; tries++) {
      await pause(LOCK_RETRY_MS);
      changes = await tryOnRows();
    }
  } catch (error) {
    // A row that cannot be printed is no fault of the database: the claim knows what to do about it.
    if (!payloadMayBeAtFault(error)) throw error;
  }
  changes ??= await tryStatements(undefined);
  // These are transactions of their own, and change nothing: nobody has that event.
  await outbox.recordFailure({ ...NOBODY, attempts: 1, reason: '', retryInMs: 0 });
  await outbox.park([NOBODY.eventId], []);
  return changes ?? true;
}

/** Locks the row, unless another transaction has it, or it is no longer what it was. */
async function lock(tx: Queryable, { id, eventId, isFresh }: Trial): Promise<boolean> {
  const { rowCount } = await tx.query(
    // CASE, as in STILL_LIVE: the platform's index on `published` seemed empty to the planner, and held the backlog.
    `SELECT FROM identity.outbox o WHERE o.id = $1 AND o.event_id = $2
       AND CASE WHEN o.published THEN false ELSE (o.next_attempt_at IS NULL) = $3 END FOR UPDATE SKIP LOCKED`,
    [id, eventId, isFresh],
  );
  return rowCount === 1;
}

/**
 * The first fresh row and the last two; or else live rows that have jobs: the one whose lease ends first, and those that end
 * last.
 */
async function candidatesOf(db: Queryable, waitedMs: number): Promise<Trial[]> {
  const old = (row: string) => `${row}.created_at <= now() - $1 ${MS}`;
  const leased = (order: string, limit: number) => `
    (SELECT l.id, l.event_id FROM identity.outbox l
     WHERE NOT l.published AND l.next_attempt_at < 'infinity' AND l.dead_lettered_at IS NULL AND ${old('l')}
     ORDER BY l.next_attempt_at ${order} LIMIT ${limit})`;
  const fresh = (order: string, limit: number) => `
    (SELECT f.id, f.event_id, f.created_at FROM identity.outbox f
     WHERE NOT f.published AND f.next_attempt_at IS NULL ORDER BY f.id ${order} LIMIT ${limit})`;
  const { rows } = await db.query<Trial>(
    `WITH fresh AS MATERIALIZED (
       SELECT o.id, o.event_id, o.id = min(o.id) OVER () AS is_first, o.created_at
       FROM (${fresh('ASC', 1)} UNION ${fresh('DESC', 2)}) o
     ), old AS MATERIALIZED (
       SELECT * FROM fresh o WHERE ${old('o')}
     )
     SELECT id::text AS "id", event_id AS "eventId", true AS "isFresh", is_first AS "isFirst" FROM old
     UNION ALL
     SELECT id::text, event_id, false, false FROM (${leased('ASC', 1)} UNION ${leased('DESC', 2)}) l
     WHERE NOT EXISTS (SELECT FROM old) ORDER BY "isFirst" DESC`,
    [waitedMs],
  );
  return rows;
}
