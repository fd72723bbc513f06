/**
 * A snapshot that somebody holds open (a dump, a forgotten session) keeps the index entries of all that was published
 * since: nobody may remove them. A claim passes those before its first fresh row, and no others.
 */
import { randomUUID } from 'node:crypto';
import { expect, test } from 'vitest';
import { openOutboxTable } from '../support/outbox-table.ts';

const PUBLISHES = 200_000;
const ROWS = 100;
const TRIES = 10;

const table = await openOutboxTable();
const { admin, outbox } = table;

test.each([
  ['many aggregates', 'gen_random_uuid()', 5],
  // What the aggregate has published is passed twice, among the fresh rows and as its own. A walk per row would be 100.
  ['one aggregate', `'${randomUUID()}'::uuid`, 25],
])(
  'a claim of 100 rows passes what was published under a held snapshot a few times only, with 200,000 publishes of %s',
  async (_what, aggregateId, mostWalks) => {
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

      const best = {
        walk: Number.POSITIVE_INFINITY,
        claim: Number.POSITIVE_INFINITY,
        gate: Number.POSITIVE_INFINITY,
      };
      for (let i = 0; i < TRIES; i++) {
        best.walk = Math.min(best.walk, await took(walk));
        best.claim = Math.min(best.claim, await took(claimAndUndo));
        // The gate asks by the same walk.
        best.gate = Math.min(best.gate, await took(() => outbox.standingOf(questions)));
      }
      expect(best.claim / best.walk).toBeLessThanOrEqual(mostWalks);
      expect(best.gate / best.walk).toBeLessThanOrEqual(mostWalks);
    } finally {
      await holder.query('ROLLBACK');
      holder.release();
    }
  },
);

/** Passes every fresh row of a moment ago once, by the index of fresh rows. */
async function walk(): Promise<void> {
  const { rows } = await admin.query(`
    SELECT count(*)::int AS fresh FROM (
      SELECT id FROM identity.outbox WHERE NOT published AND next_attempt_at IS NULL ORDER BY id) AS row`);
  expect(rows).toEqual([{ fresh: ROWS }]);
}

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

async function took(work: () => Promise<unknown>): Promise<number> {
  const startedAt = performance.now();
  await work();
  return performance.now() - startedAt;
}

const UNDO = new Error('undo');
