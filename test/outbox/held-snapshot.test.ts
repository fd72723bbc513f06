/**
 * A snapshot that somebody holds open (a dump, a forgotten session) keeps the index entries of all that was published
 * since: nobody may remove them. A claim passes those before its first fresh row, and no others.
 */
import { randomUUID } from 'node:crypto';
import { expect, test } from 'vitest';
import { openOutboxTable } from '../support/outbox-table.ts';

const PUBLISHES = 200_000;
const ROWS = 100;
/** The machine is busy with other tests: the best try tells. */
const TRIES = 40;
const SETUP_LIMIT_MS = 240_000;

const table = await openOutboxTable();
const { admin, outbox } = table;

test.each([
  ['many aggregates', 'gen_random_uuid()', 100],
  // What the aggregate has published is passed twice: among the fresh rows, and as its own.
  ['one aggregate', `'${randomUUID()}'::uuid`, 400],
])(
  'the claim of 100 rows is quick, with a snapshot held open after 200,000 publishes of %s',
  async (_what, aggregateId, limitMs) => {
    await admin.query('ALTER TABLE identity.outbox SET (autovacuum_enabled = off)');
    const holder = await admin.connect();
    await holder.query('BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM identity.outbox');
    try {
      const insert = (rows: number) =>
        admin.query(`
          INSERT INTO identity.outbox (event_type, aggregate_id, payload)
          SELECT 'UserCreated', ${aggregateId}, '{}' FROM generate_series(1, ${rows})`);
      await insert(PUBLISHES);
      await admin.query(`UPDATE identity.outbox SET next_attempt_at = now() + interval '1 minute'`);
      await admin.query(`
        UPDATE identity.outbox
        SET published = true, published_at = now(), next_attempt_at = NULL, stream_entry_id = '1-1'`);
      await insert(ROWS);
      const { rows } = await admin.query<{ eventId: string }>(
        'SELECT event_id AS "eventId" FROM identity.outbox WHERE NOT published',
      );
      const questions = rows.map(({ eventId }) => ({ eventId, before: null }));

      expect(await bestMs(limitMs, claimAndUndo)).toBeLessThanOrEqual(limitMs);
      // The gate asks by the same walk.
      expect(await bestMs(limitMs, () => outbox.standingOf(questions))).toBeLessThanOrEqual(limitMs);
    } finally {
      await holder.query('ROLLBACK');
      holder.release();
    }
  },
  SETUP_LIMIT_MS,
);

async function claimAndUndo(): Promise<void> {
  const claimed = outbox.inEpoch(
    async (tx) => {
      expect((await outbox.claimFresh(tx, ROWS)).leased).toHaveLength(ROWS);
      throw UNDO;
    },
    { generic: true },
  );
  await expect(claimed).rejects.toBe(UNDO);
}

/** The least time of some tries, and of no more than are needed. */
async function bestMs(limitMs: number, work: () => Promise<unknown>): Promise<number> {
  let best = Number.POSITIVE_INFINITY;
  for (let i = 0; i < TRIES && best > limitMs; i++) {
    const startedAt = performance.now();
    await work();
    best = Math.min(best, performance.now() - startedAt);
  }
  return best;
}

const UNDO = new Error('undo');
