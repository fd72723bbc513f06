import { beforeEach, describe, expect, onTestFinished, test } from 'vitest';
import type { Aggregate, OutboxEvent } from '../../src/event.ts';
import { type Appended, createAcknowledger } from '../../src/finalize/acknowledger.ts';
import type { LeasedEvent } from '../../src/outbox/outbox.ts';
import { EpochOverError } from '../../src/streams/epoch.ts';
import { openContext } from '../support/context.ts';
import { insertEvents, someEvents } from '../support/events.ts';
import { deferred, readRows, readStates, silent } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const stage = await openContext();
const { pool, context } = stage;
const { outbox } = context;
let epoch: string;

beforeEach(async () => {
  await stage.clear();
  epoch = await stage.currentEpoch();
});

type Deps = Parameters<typeof createAcknowledger>[0];

/** An acknowledger on the real table; `refills` are the aggregates that it asked a refill for. */
function startAcknowledger(
  deps: Partial<Omit<Deps, 'outbox'>> & Readonly<{ outbox?: Partial<Deps['outbox']> }> = {},
) {
  const refills: Aggregate[] = [];
  const acknowledger = createAcknowledger({
    ...{ epoch: context.epoch, memory: context.memory, logger: silent },
    refiller: { request: (aggregates) => void refills.push(...aggregates) },
    ...deps,
    outbox: { ...outbox, ...deps.outbox },
  });
  const acknowledge = (event: OutboxEvent, entryId: string, of = epoch): Promise<void> =>
    acknowledger.acknowledge({ event, entryId, epoch: of } satisfies Appended);
  return { ...acknowledger, acknowledge, refills };
}

/** Rows that were claimed. */
async function claimed(count: number, aggregates = count): Promise<OutboxEvent[]> {
  await insertEvents(pool, someEvents(count, aggregates));
  const events: OutboxEvent[] = [];
  while (events.length < count) events.push(...(await stage.claim()));
  return events;
}

/** The sizes of the transactions that have marked rows published, the largest first. */
async function transactions(): Promise<number[]> {
  const { rows } = await pool.query<{ n: number }>(
    'SELECT count(*)::int AS n FROM identity.outbox WHERE published GROUP BY xmin::text ORDER BY 1 DESC',
  );
  return rows.map((row) => row.n);
}

/** Another session has these rows until `release`, or the end of the test. */
async function holding(condition: string) {
  const client = await pool.connect();
  let isHeld = true;
  const release = async () => {
    if (!isHeld) return;
    isHeld = false;
    await client.query('COMMIT');
    client.release();
  };
  onTestFinished(release);
  await client.query('BEGIN');
  await client.query(`SELECT FROM identity.outbox WHERE ${condition} ORDER BY id FOR UPDATE`);
  return { release };
}

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

describe('an acknowledgement', () => {
  test('is done when the row is published, with the id of its entry', async () => {
    const [event] = (await claimed(1)) as [OutboxEvent];
    await startAcknowledger().acknowledge(event, '1700000000000-3');
    expect(await readRows(pool)).toMatchObject([{ state: 'published', streamEntryId: '1700000000000-3' }]);
  });

  test('marks nothing when the row of that id holds another event by now', async () => {
    const [event] = (await claimed(1)) as [OutboxEvent];
    await pool.query('UPDATE identity.outbox SET event_id = gen_random_uuid()');
    await startAcknowledger().acknowledge(event, '1700000000000-3');
    expect(await readRows(pool)).toMatchObject([{ state: 'leased', streamEntryId: null }]);
  });

  test('of a row that the database refuses to change keeps no other row from being marked', async () => {
    const events = await claimed(40);
    const bad = events[17] as OutboxEvent;
    await pool.query(
      `ALTER TABLE identity.outbox ADD CONSTRAINT never CHECK (NOT (published AND event_id = '${bad.eventId}'))`,
    );
    onTestFinished(async () => void (await pool.query('ALTER TABLE identity.outbox DROP CONSTRAINT never')));
    const { acknowledge } = startAcknowledger();
    const ended = await Promise.allSettled(
      events.map((event, i) => acknowledge(event, `1700000000000-${i}`)),
    );
    expect(ended.filter(({ status }) => status === 'rejected')).toMatchObject([
      { reason: { message: expect.stringContaining('"never"') } },
    ]);
    const states = (await readRows(pool)).filter(({ state }) => state === 'published');
    expect(states).toHaveLength(39);
  });

  test('of rows that the database refuses to change, all of them, is given up after a few', async () => {
    const events = await claimed(400);
    await pool.query('ALTER TABLE identity.outbox ADD CONSTRAINT never CHECK (NOT published)');
    onTestFinished(async () => void (await pool.query('ALTER TABLE identity.outbox DROP CONSTRAINT never')));
    let tries = 0;
    const { acknowledge } = startAcknowledger({
      outbox: {
        inEpoch: (...of) => {
          tries++;
          return outbox.inEpoch(...of);
        },
      },
    });
    const ended = await Promise.allSettled(
      events.map((event, i) => acknowledge(event, `1700000000000-${i}`)),
    );
    expect(ended.every(({ status }) => status === 'rejected')).toBe(true);
    expect(tries).toBeLessThan(40);
  });

  test('makes Redis forget the append, but not before it is committed', async () => {
    const [event] = (await claimed(1)) as [OutboxEvent & LeasedEvent];
    const entryId = await stage.append(event);
    const ended = startAcknowledger({
      epoch: { confirm: () => Promise.reject(new EpochOverError()) },
    });
    await expect(ended.acknowledge(event, entryId)).rejects.toThrow(EpochOverError);
    expect(await context.memory.remembered()).toEqual([event.eventId]);
    await startAcknowledger().acknowledge(event, entryId);
    await waitFor(async () => (await context.memory.remembered()).length === 0, {
      what: 'it to be forgotten',
    });
  });

  test('shares its transaction with those that arrive together', async () => {
    const events = await claimed(50);
    const { acknowledge } = startAcknowledger();
    await Promise.all(events.map((event, i) => acknowledge(event, `1-${i}`)));
    expect(await transactions()).toEqual([50]);
  });

  test('shares it with all that arrived while the database was busy', async () => {
    const events = await claimed(302);
    const { acknowledge } = startAcknowledger();
    const blocker = await holding('id <= 2');
    const all: Promise<void>[] = [];
    // Two transactions at once may wait for the blocked rows; everything else collects meanwhile.
    for (const [i, event] of events.entries()) {
      all.push(acknowledge(event, `1-${i}`));
      if (i < 2) await blockedSessions(i + 1);
    }
    await blocker.release();
    await Promise.all(all);
    expect(await transactions()).toEqual([300, 1, 1]);
  });

  test('under load waits a moment for company', async () => {
    const events = await claimed(42);
    const { acknowledge } = startAcknowledger();
    await Promise.all(events.slice(0, 40).map((event, i) => acknowledge(event, `1-${i}`)));
    const one = acknowledge(events[40] as OutboxEvent, '1-40');
    await new Promise((resolve) => setImmediate(resolve));
    await Promise.all([one, acknowledge(events[41] as OutboxEvent, '1-41')]);
    expect(await transactions()).toEqual([40, 2]);
  });

  test('is never in a transaction of more than 500', async () => {
    const events = await claimed(1_200);
    const { acknowledge } = startAcknowledger();
    await Promise.all(events.map((event, i) => acknowledge(event, `1-${i}`)));
    const sizes = await transactions();
    expect(sizes.reduce((sum, size) => sum + size, 0)).toBe(1_200);
    expect(sizes[0]).toBeLessThanOrEqual(500);
  });

  test('does not wait for that of an earlier event of its aggregate', async () => {
    const [first, second] = (await claimed(2, 1)) as [OutboxEvent, OutboxEvent];
    const { acknowledge } = startAcknowledger();
    const blocker = await holding(`id = ${first.id}`);
    const firstDone = acknowledge(first, '1-1');
    await blockedSessions(1);
    await acknowledge(second, '1-2');
    expect(await readStates(pool)).toEqual(['leased', 'published']);
    await blocker.release();
    await firstDone;
    expect(await readStates(pool)).toEqual(['published', 'published']);
  });

  test('of the same events twice at once, in two orders, is no deadlock', async () => {
    const [first, second, third] = (await claimed(3)) as [OutboxEvent, OutboxEvent, OutboxEvent];
    const warnings: unknown[] = [];
    const logger = { ...silent, warn: (about: unknown) => void warnings.push(about) };
    const { acknowledge } = startAcknowledger({ logger });
    const blocker = await holding(`id = ${third.id}`);
    const forth = [first, third, second].map((event) => acknowledge(event, `1-${event.id}`));
    await blockedSessions(1);
    const back = [second, third, first].map((event) => acknowledge(event, `1-${event.id}`));
    await blockedSessions(2);
    await blocker.release();
    await Promise.all([...forth, ...back]);
    expect(warnings).toEqual([]);
    expect(new Set(await readStates(pool))).toEqual(new Set(['published']));
  });

  test('asks for a refill of the aggregates once it is committed', async () => {
    const events = await claimed(3, 2);
    const seen: Promise<string[]>[] = [];
    const { acknowledge } = startAcknowledger({
      refiller: { request: () => void seen.push(readStates(pool)) },
    });
    await Promise.all(events.map((event, i) => acknowledge(event, `1-${i}`)));
    expect(await Promise.all(seen)).toEqual([['published', 'published', 'published']]);
    const { acknowledge: again, refills } = startAcknowledger();
    await Promise.all(events.map((event, i) => again(event, `1-${i}`)));
    expect(refills.map((it) => it.aggregateId)).toEqual(events.map((it) => it.aggregateId));
  });
});

describe('an epoch that is over', () => {
  test('leaves the row as it is, at once; those of the current epoch beside it are marked', async () => {
    const [old, current] = (await claimed(2)) as [OutboxEvent, OutboxEvent];
    const asked: string[] = [];
    const { acknowledge, refills } = startAcknowledger({
      epoch: {
        confirm(of) {
          asked.push(of);
          return context.epoch.confirm(of);
        },
      },
    });
    const outcomes = await Promise.allSettled([acknowledge(old, '1-1', 'over'), acknowledge(current, '1-2')]);
    expect(outcomes).toMatchObject([
      { status: 'rejected', reason: { name: 'EpochOverError' } },
      { status: 'fulfilled' },
    ]);
    expect(asked.toSorted()).toEqual(['over', epoch].toSorted());
    expect(await readStates(pool)).toEqual(['leased', 'published']);
    expect(refills).toMatchObject([{ aggregateId: current.aggregateId }]);
  });

  test('is compared only when an acknowledgement between its question and its commit has ended', async () => {
    const [event] = (await claimed(1)) as [OutboxEvent];
    const [asked, release] = [deferred(), deferred()];
    const { acknowledge } = startAcknowledger({
      epoch: {
        async confirm() {
          asked.resolve();
          await release.promise;
        },
      },
    });
    const acknowledged = acknowledge(event, '1-1');
    await asked.promise;
    const compared = outbox.epochsEnded().then(() => readStates(pool));
    await blockedSessions(1);
    release.resolve();
    expect(await compared).toEqual(['published']);
    await acknowledged;
  });
});

describe('a write that fails', () => {
  test('is tried again: the events know nothing of it', async () => {
    const events = await claimed(3);
    let failures = 2;
    const { acknowledge } = startAcknowledger({
      outbox: {
        markPublished: (tx, published) =>
          failures-- > 0 ? Promise.reject(new Error('no database')) : outbox.markPublished(tx, published),
      },
    });
    await Promise.all(events.map((event, i) => acknowledge(event, `1-${i}`)));
    expect(await readStates(pool)).toEqual(['published', 'published', 'published']);
  });

  test('although it was committed is harmless to try again', async () => {
    const [event] = (await claimed(1)) as [OutboxEvent];
    let tries = 0;
    const { acknowledge, refills } = startAcknowledger({
      outbox: {
        async inEpoch(work) {
          const result = await outbox.inEpoch(work);
          if (tries++ === 0) throw new Error('connection lost after COMMIT');
          return result;
        },
      },
    });
    await acknowledge(event, '1-1');
    expect(tries).toBe(2);
    expect(await readRows(pool)).toMatchObject([{ state: 'published', streamEntryId: '1-1' }]);
    expect(refills).toMatchObject([{ aggregateId: event.aggregateId }]);
  });

  test('again and again is given back to the job, and the next one is not held up', async () => {
    const [first, second] = (await claimed(2)) as [OutboxEvent, OutboxEvent];
    let broken = true;
    const { acknowledge, drain } = startAcknowledger({
      outbox: {
        markPublished: (tx, published) =>
          broken ? Promise.reject(new Error('no database')) : outbox.markPublished(tx, published),
      },
    });
    await expect(acknowledge(first, '1-1')).rejects.toThrow('no database');
    expect(await readStates(pool)).toEqual(['leased', 'leased']);
    broken = false;
    await acknowledge(second, '1-2');
    await acknowledge(first, '1-1');
    expect(await readStates(pool)).toEqual(['published', 'published']);
    await drain();
  });
});

describe('draining', () => {
  test('ends when everything is written', async () => {
    const events = await claimed(600);
    const { acknowledge, drain } = startAcknowledger();
    const all = Promise.all(events.map((event, i) => acknowledge(event, `1-${i}`)));
    await drain();
    expect(new Set(await readStates(pool))).toEqual(new Set(['published']));
    await all;
  });

  test('ends at once when there is nothing to write', async () => {
    let drained = false;
    await startAcknowledger()
      .drain()
      .then(() => {
        drained = true;
      });
    expect(drained).toBe(true);
  });

  test('waits for a write that is tried again', async () => {
    const [event] = (await claimed(1)) as [OutboxEvent];
    let failures = 1;
    const { acknowledge, drain } = startAcknowledger({
      outbox: {
        markPublished: (tx, published) =>
          failures-- > 0 ? Promise.reject(new Error('no database')) : outbox.markPublished(tx, published),
      },
    });
    const acknowledged = acknowledge(event, '1-1');
    await drain();
    expect(await readStates(pool)).toEqual(['published']);
    await acknowledged;
  });
});
