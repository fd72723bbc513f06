import { beforeAll, beforeEach, describe, expect, test } from 'vitest';
import type { OutboxEvent, Receipt } from '../../src/event.ts';
import { withDeadline } from '../../src/lifecycle.ts';
import { createOutbox, type Outbox } from '../../src/outbox/outbox.ts';
import { type Appended, createAcknowledger } from '../../src/triage/acknowledge.ts';
import { insertEvents, someEvents } from '../support/events.ts';
import { createDatabase } from '../support/servers.ts';
import {
  type AdminPool,
  deferred,
  openAdminPool,
  openPool,
  readRows,
  readStates,
  silent,
} from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const EPOCH = 'epoch';
const NOTHING_BEHIND = { followers: [], mayHaveMore: false };
const FOLLOWER = { id: '8', hasJob: true };

let pool: AdminPool;
let outbox: Outbox;

beforeAll(async () => {
  const { url, adminUrl } = await createDatabase();
  pool = openAdminPool(adminUrl);
  outbox = createOutbox(openPool(url), {
    ...{
      ordering: 'aggregate',
      deadLetterPolicy: 'continue',
      claimLeaseMs: 60_000,
      maxEventBytes: 1_048_576,
    },
    ...{ streamName: 'identity.user.v1', statementTimeoutMs: 10_000 },
  });
});

beforeEach(async () => {
  await pool.query('TRUNCATE identity.outbox RESTART IDENTITY');
});

const writeReceipts = (receipts: Receipt[]) =>
  outbox.transaction('durable', (tx) => outbox.markPublished(tx, receipts));

/** An acknowledger on the real table; `last` are the events that had no successor. */
function startAcknowledger(
  markPublished: (receipts: Receipt[]) => Promise<OutboxEvent[]> = writeReceipts,
  early: readonly string[] = [],
) {
  const last: string[] = [];
  const [markedBefore, unclear, followers]: [string[], string[], string[]] = [[], [], []];
  const acknowledger = createAcknowledger({
    markPublished: async (receipts, _, of) => {
      unclear.push(...of.unclear.map((event) => event.id));
      followers.push(...of.followers.map((it) => it.id));
      return { successors: await markPublished(receipts), early };
    },
    ordered: true,
    onNoSuccessor: (events) => void last.push(...events.map((event) => event.id)),
    onMarkedBefore: (events) => void markedBefore.push(...events.map((event) => event.id)),
    isFinal: (error) => (error as Error).name === 'EpochOverError',
    logger: silent,
  });
  const acknowledge = (event: OutboxEvent, entryId: string, epoch: string, more: Partial<Appended> = {}) =>
    acknowledger.acknowledge(event, {
      entryId,
      epoch,
      before: false,
      preceding: [],
      ...NOTHING_BEHIND,
      ...more,
    });
  return { ...acknowledger, acknowledge, last, markedBefore, unclear, followers };
}

/** Rows that were claimed. */
async function claimed(count: number, aggregates = count): Promise<OutboxEvent[]> {
  await insertEvents(pool, someEvents(count, aggregates));
  return (await outbox.transaction('repeatable', (tx) => outbox.claimFresh(tx, count))).leased;
}

/** In how many transactions the rows were written that are published. */
async function transactions(): Promise<number> {
  const { rows } = await pool.query(
    'SELECT count(DISTINCT xmin::text)::int AS n FROM identity.outbox WHERE published',
  );
  return rows[0].n;
}

describe('an acknowledgement', () => {
  test('waits for that of an earlier event of its aggregate, which others do not', async () => {
    const [first, other] = (await claimed(2)) as [OutboxEvent, OutboxEvent];
    const next = { ...first, id: '99' };
    const release = deferred();
    const batches: string[][] = [];
    const { acknowledge } = startAcknowledger(async (receipts) => {
      batches.push(receipts.map((it) => it.id));
      if (batches.length === 1) await release.promise;
      return [];
    });
    const done = [acknowledge(first, '1-1', EPOCH)];
    await waitFor(() => batches.length === 1, { what: 'the first batch' });
    done.push(acknowledge(next, '1-2', EPOCH), acknowledge(other, '1-3', EPOCH));
    await waitFor(() => batches.length === 2, { what: 'the second batch' });
    expect(batches).toEqual([[first.id], [other.id]]);
    release.resolve();
    await Promise.all(done);
    expect(batches).toEqual([[first.id], [other.id], ['99']]);
  });

  test('of a row that is not marked, since an earlier one is not, is tried again; others beside it are done', async () => {
    const [event, other] = (await claimed(2)) as [OutboxEvent, OutboxEvent];
    const early = [event.id];
    const acknowledger = startAcknowledger(writeReceipts, early);
    const done: string[] = [];
    const both = [event, other].map((it) =>
      acknowledger.acknowledge(it, '1700000000000-3', EPOCH).then(() => done.push(it.id)),
    );
    await both[1];
    expect([done, acknowledger.last]).toEqual([[other.id], [other.id]]);
    early.length = 0;
    await acknowledger.drain();
    expect(done).toEqual([other.id, event.id]);
  });

  test('of such a row is refused in the end', async () => {
    const [event] = (await claimed(1)) as [OutboxEvent];
    const acknowledger = startAcknowledger(writeReceipts, [event.id]);
    await expect(acknowledger.acknowledge(event, '1700000000000-3', EPOCH)).rejects.toThrow('not marked');
    await acknowledger.drain();
  });

  test('of a row that is not marked, since an earlier one is not, is refused; others beside it are not', async () => {
    const [early, other] = (await claimed(2)) as [OutboxEvent, OutboxEvent];
    const acknowledger = startAcknowledger(writeReceipts, [early.id]);
    const outcomes = await Promise.allSettled(
      [early, other].map((event) => acknowledger.acknowledge(event, '1700000000000-3', EPOCH)),
    );
    expect(outcomes.map((it) => it.status)).toEqual(['rejected', 'fulfilled']);
    expect(acknowledger.last).toEqual([other.id]);
  });

  test('is done when the row is published, with its receipt', async () => {
    const [event] = (await claimed(1)) as [OutboxEvent];
    await startAcknowledger().acknowledge(event, '1700000000000-3', EPOCH);
    expect(await readRows(pool)).toMatchObject([{ state: 'published', streamEntryId: '1700000000000-3' }]);
  });

  test('shares its transaction with those that arrive together', async () => {
    const events = await claimed(50);
    const { acknowledge } = startAcknowledger();
    await Promise.all(events.map((event, i) => acknowledge(event, `1-${i}`, EPOCH)));
    expect(new Set(await readStates(pool))).toEqual(new Set(['published']));
    expect(await transactions()).toBe(1);
  });

  test('shares it with all that arrived while the database was busy', async () => {
    const events = await claimed(302);
    const { acknowledge } = startAcknowledger();
    const blocker = await pool.connect();
    await blocker.query('BEGIN');
    await blocker.query('SELECT FROM identity.outbox WHERE id <= 2 FOR UPDATE');
    const all: Promise<void>[] = [];
    // Two transactions at once may wait for the blocked rows; everything else gathers meanwhile.
    for (const [i, event] of events.entries()) {
      all.push(acknowledge(event, `1-${i}`, EPOCH));
      if (i < 2) await blockedSessions(i + 1);
    }
    await blocker.query('COMMIT');
    blocker.release();
    await Promise.all(all);
    expect(new Set(await readStates(pool))).toEqual(new Set(['published']));
    expect(await transactions()).toBe(3);
  });

  test('is never in a transaction of more than 500', async () => {
    const events = await claimed(1_200);
    const { acknowledge } = startAcknowledger();
    await Promise.all(events.map((event, i) => acknowledge(event, `1-${i}`, EPOCH)));
    const { rows } = await pool.query(
      'SELECT count(*)::int AS n FROM identity.outbox WHERE published GROUP BY xmin::text ORDER BY 1 DESC',
    );
    expect(rows.reduce((sum, row) => sum + row.n, 0)).toBe(1_200);
    expect(rows[0].n).toBeLessThanOrEqual(500);
  });

  test('tells of events that nothing follows, once they are committed', async () => {
    const events = await claimed(3, 2); // 1 and 3 are one aggregate's
    const { acknowledge, last } = startAcknowledger();
    await Promise.all(events.map((event, i) => acknowledge(event, `1-${i}`, EPOCH)));
    expect(await readStates(pool)).toEqual(['published', 'published', 'leased']);
    expect(last).toEqual(['2']);
  });
});

describe('a write that fails', () => {
  test('is tried again: the events know nothing of it', async () => {
    const events = await claimed(3);
    let failures = 2;
    const { acknowledge } = startAcknowledger((receipts) =>
      failures-- > 0 ? Promise.reject(new Error('no database')) : writeReceipts(receipts),
    );
    await Promise.all(events.map((event, i) => acknowledge(event, `1-${i}`, EPOCH)));
    expect(await readStates(pool)).toEqual(['published', 'published', 'published']);
  });

  test('although it was committed is harmless to try again', async () => {
    const [event] = (await claimed(3, 1)) as [OutboxEvent];
    let failures = 1;
    const { acknowledge, markedBefore } = startAcknowledger(async (receipts) => {
      const successors = await writeReceipts(receipts);
      if (failures-- > 0) throw new Error('connection lost after COMMIT');
      return successors;
    });
    await acknowledge(event, '1-1', EPOCH);
    expect(await readStates(pool)).toEqual(['published', 'leased', 'parked']);
    // What was leased the first time may have no job: nobody heard of it.
    expect(markedBefore).toEqual([event.id]);
  });

  test('again and again is given back to the job, and the next one is not held up', async () => {
    const events = await claimed(2);
    let broken = true;
    const { acknowledge, drain } = startAcknowledger((receipts) =>
      broken ? Promise.reject(new Error('no database')) : writeReceipts(receipts),
    );
    const [first, second] = events as [OutboxEvent, OutboxEvent];
    await expect(withDeadline(10_000, acknowledge(first, '1-1', EPOCH))).rejects.toThrow('no database');
    expect(await readStates(pool)).toEqual(['leased', 'leased']);
    broken = false;
    await acknowledge(second, '1-2', EPOCH);
    await acknowledge(first, '1-1', EPOCH);
    expect(await readStates(pool)).toEqual(['published', 'published']);
    await drain();
  });
});

describe('the next event of the aggregate', () => {
  test('is looked for where there is none, and its lease where the event had been appended before', async () => {
    const [head, other, third] = (await claimed(6, 3)) as [OutboxEvent, OutboxEvent, OutboxEvent];
    const { acknowledge, last, markedBefore, unclear } = startAcknowledger();
    await acknowledge(head, '1-1', EPOCH);
    expect([last, markedBefore, unclear]).toEqual([[], [], []]);
    await acknowledge(head, '1-1', EPOCH, { before: true, mayHaveMore: true });
    expect(unclear).toEqual([head.id]);
    expect([last, markedBefore]).toEqual([[head.id], [head.id]]);
    await acknowledge(other, '1-2', EPOCH, { before: true }); // the first to mark it after all
    await acknowledge(other, '1-2', EPOCH);
    expect([last, markedBefore]).toEqual([[head.id, other.id], [head.id]]);
    await acknowledge(third, '1-3', EPOCH);
    await acknowledge(third, '1-3', EPOCH, { followers: [FOLLOWER], before: true });
    expect([last, markedBefore]).toEqual([[head.id, other.id], [head.id]]);
  });

  test('that came along brings the receipts of those before it, once each', async () => {
    const batches: Receipt[][] = [];
    const { acknowledge } = startAcknowledger(async (batch) => {
      batches.push(batch);
      return [];
    });
    const [first, other] = (await claimed(2)) as [OutboxEvent, OutboxEvent];
    const [a, b] = [
      { id: '7', entryId: '1-7' },
      { id: first.id, entryId: '1-8' },
    ];
    const second = { ...first, id: '9' };
    const preceding = [a, b];
    await Promise.all([acknowledge(second, '1-9', EPOCH, { preceding }), acknowledge(first, '1-8', EPOCH)]);
    expect(batches).toEqual([
      [{ ...a, chained: 'before' }, b, { id: '9', entryId: '1-9', chained: 'after' }],
    ]);
    await acknowledge(other, '1-2', EPOCH);
    expect(batches[1]).toEqual([{ id: other.id, entryId: '1-2' }]);
  });

  test('that has its job already can wait for company; the others cannot', async () => {
    const batches: string[][] = [];
    const { acknowledge, followers } = startAcknowledger(async (batch) => {
      batches.push(batch.map((it) => it.id));
      return [];
    });
    const [a, b, c] = (await claimed(3)) as [OutboxEvent, OutboxEvent, OutboxEvent];
    const patient = acknowledge(a, '1-1', EPOCH, { followers: [FOLLOWER] });
    await new Promise((resolve) => setTimeout(resolve, 5));
    expect(batches).toEqual([]);
    const urgent = acknowledge(b, '1-2', EPOCH);
    await Promise.all([patient, urgent]);
    await acknowledge(c, '1-3', EPOCH, { followers: [FOLLOWER] });
    expect(batches).toEqual([[a.id, b.id], [c.id]]);
    expect(followers).toEqual(['8', '8']);
  });
});

describe('draining', () => {
  test('ends when everything is written', async () => {
    const events = await claimed(600);
    const { acknowledge, drain } = startAcknowledger();
    const all = Promise.all(events.map((event, i) => acknowledge(event, `1-${i}`, EPOCH)));
    await drain();
    expect(new Set(await readStates(pool))).toEqual(new Set(['published']));
    await all;
  });

  test('ends at once when there is nothing to write', async () => {
    await withDeadline(1_000, startAcknowledger().drain());
  });

  test('waits for a write that is tried again', async () => {
    const [event] = (await claimed(1)) as [OutboxEvent];
    let failures = 1;
    const { acknowledge, drain } = startAcknowledger((receipts) =>
      failures-- > 0 ? Promise.reject(new Error('no database')) : writeReceipts(receipts),
    );
    const acknowledged = acknowledge(event, '1-1', EPOCH);
    await drain();
    expect(await readStates(pool)).toEqual(['published']);
    await acknowledged;
  });
});

async function blockedSessions(count: number): Promise<void> {
  await waitFor(
    async () => {
      const { rowCount } = await pool.query(
        `SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`,
      );
      return rowCount === count;
    },
    { what: `${count} transactions to be blocked` },
  );
}
