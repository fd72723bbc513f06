/**
 * The order within an aggregate is one condition, which claim, refill and gate share. What it says of single tables is
 * shown one by one; of any other, a model of it says what claim, refill and gate must do.
 */
import { randomUUID } from 'node:crypto';
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { orderOf } from '../../src/outbox/order.ts';
import type { Outbox } from '../../src/outbox/outbox.ts';
import type { Standing } from '../../src/outbox/parked.ts';
import { insertEvents, someEvents } from '../support/events.ts';
import {
  DEAD,
  DISCARDED,
  EXPIRED,
  FRESH,
  idsOf,
  LEASED,
  openOutboxTable,
  PARKED,
  PUBLISHED,
  RETRYING,
  times,
} from '../support/outbox-table.ts';

const table = await openOutboxTable();
const { admin, outbox, claim, insertOf, set, states, row, eventIds } = table;
const holding = table.outboxOf({ deadLetterPolicy: 'hold' });
const unordered = table.outboxOf({ ordering: 'none' });

const USER = randomUUID();
const ANYBODY = { aggregateType: 'user', aggregateId: USER };

test.each([
  [5_000, 256],
  [1_024, 256],
  [1_000, 250],
  [40, 10],
  [4, 1],
  [1, 1],
])('with RELAY_MAX_IN_FLIGHT=%i the window of an aggregate is %i', async (maxInFlight, window) => {
  const order = { ordering: 'aggregate', deadLetterPolicy: 'continue', maxInFlight } as const;
  expect(orderOf(order).window).toBe(window);
  await insertEvents(admin, someEvents(window + 2, 1));
  const { leased, rows } = await claim(1_000, table.outboxOf({ maxInFlight }));
  expect([leased.length, rows]).toEqual([window, window + 2]);
});

describe('a row waits behind an earlier one of its aggregate', () => {
  test.each([
    ['waits for a retry', RETRYING],
    ['waits for a retry whose time has come', `${EXPIRED}, attempts = 1`],
    ['is parked, and waits for a retry', `${PARKED}, attempts = 1`],
  ])('that %s', async (_what, earlier) => {
    await insertOf(USER, earlier, FRESH);
    await claim();
    expect((await states())[1]).toBe('parked');
    expect(await standing(2)).toBe('behind');
  });

  test('that is fresh and locked by another transaction', async () => {
    await insertOf(USER, ...times(4, FRESH));
    await outbox.inEpoch(async (tx) => {
      await tx.query('SELECT FROM identity.outbox WHERE id = 2 FOR UPDATE');
      expect(await claim()).toMatchObject({ leased: [{ id: '1' }], parked: [ANYBODY], rows: 3 });
    });
    expect(await states()).toEqual(['leased', 'fresh', 'parked', 'parked']);
    expect(await standing(3)).toBe('unclaimed');
  });

  test('that is fresh and not taken by this claim', async () => {
    await insertOf(USER, FRESH, LEASED);
    expect(await standing(2)).toBe('unclaimed');
  });

  test('that is parked, since a parked row has no job', async () => {
    await insertOf(USER, LEASED, PARKED, LEASED);
    expect(await standing(3)).toBe('unclaimed');
  });

  test('that waits for a retry, whatever else is before it', async () => {
    await insertOf(USER, FRESH, PARKED, RETRYING, LEASED);
    expect(await standing(2)).toBe('unclaimed');
    expect(await standing(4)).toBe('behind');
  });

  test('that is dead, where dead rows hold their aggregate', async () => {
    await insertOf(USER, DEAD, FRESH, PARKED);
    expect(idsOf((await claim(100, holding)).leased)).toEqual([]);
    expect(await states()).toEqual(['dead', 'parked', 'parked']);
    expect(await standing(2, holding)).toBe('behind');
    expect(await standing(2)).toBe('first');
  });

  test('however far behind', async () => {
    await insertOf(USER, LEASED, RETRYING, ...times(3, FRESH));
    expect((await claim()).leased).toEqual([]);
    expect(await states()).toEqual(['leased', 'leased', ...times(3, 'parked')]);
    for (const id of [3, 4, 5]) expect(await standing(id)).toBe('behind');
  });
});

test('of an early row the live one right before is named, and none where the row is beyond the window', async () => {
  await insertOf(USER, LEASED, PUBLISHED, EXPIRED, DEAD, LEASED, LEASED);
  const [first, third, fifth] = await eventIds(1, 3, 5);
  expect(await standingOf(3)).toEqual({ kind: 'early', after: first });
  expect(await standingOf(5)).toEqual({ kind: 'early', after: third });
  expect(await standingOf(6)).toEqual({ kind: 'early', after: fifth });
  const narrow = table.outboxOf({ maxInFlight: 8 });
  expect(await standingOf(3, narrow)).toEqual({ kind: 'early', after: first });
  expect(await standingOf(6, narrow)).toEqual({ kind: 'early', after: null });
});

describe('a row does not wait behind an earlier one', () => {
  test.each([
    ['is leased', LEASED],
    ['is expired', EXPIRED],
  ])('that %s: it has its job, too, but its append comes later', async (_what, earlier) => {
    await insertOf(USER, earlier, FRESH);
    const { leased } = await claim();
    expect(leased).toMatchObject([{ id: '2', after: (await row(1)).eventId }]);
    expect(await standing(2)).toBe('early');
  });

  test.each([
    ['published', PUBLISHED, 'hold'],
    ['discarded', DISCARDED, 'hold'],
    ['dead, where its aggregate goes on', DEAD, 'continue'],
  ] as const)('that is %s', async (_what, earlier, deadLetterPolicy) => {
    await insertOf(USER, earlier, FRESH);
    const by = table.outboxOf({ deadLetterPolicy });
    expect((await claim(100, by)).leased).toMatchObject([{ id: '2', after: null }]);
    expect(await standing(2, by)).toBe('first');
  });

  test('of another aggregate, nor behind a later one of its own', async () => {
    await insertOf(randomUUID(), RETRYING, PARKED);
    await insertOf(USER, FRESH, RETRYING, DEAD);
    expect(idsOf((await claim(100, holding)).leased)).toEqual(['3']);
    expect(await standing(3, holding)).toBe('first');
  });

  test('when it waits for a retry itself: it is the later ones that wait', async () => {
    await insertOf(USER, `${FRESH}, attempts = 1`, FRESH);
    expect(idsOf((await claim()).leased)).toEqual(['1']);
    expect(await states()).toEqual(['leased', 'parked']);
    expect(await standing(1)).toBe('first');
  });

  test('where order does not matter', async () => {
    await insertOf(USER, RETRYING, DEAD, FRESH, FRESH);
    const both = table.outboxOf({ ordering: 'none', deadLetterPolicy: 'hold' });
    expect((await claim(100, both)).leased).toMatchObject([
      { id: '3', after: null },
      { id: '4', after: null },
    ]);
    expect(await states()).toEqual(['leased', 'dead', 'leased', 'leased']);
    for (const id of [1, 3, 4]) expect(await standing(id, both)).toBe('first');
    expect(await standing(2, unordered)).toBe('first');
  });
});

describe('the row that an event comes after', () => {
  test('is the live one right before it, over published, dead and discarded ones', async () => {
    await insertOf(USER, LEASED, PUBLISHED, DEAD, DISCARDED, FRESH, PUBLISHED, FRESH);
    const { leased } = await claim();
    const [first, fifth] = await eventIds(1, 5);
    expect(leased).toMatchObject([
      { id: '5', after: first },
      { id: '7', after: fifth },
    ]);
  });

  test('is none where there is no live one', async () => {
    await insertOf(USER, PUBLISHED, DEAD, DISCARDED, FRESH);
    expect((await claim()).leased).toMatchObject([{ id: '4', after: null }]);
  });

  test('may have been parked until now', async () => {
    await insertOf(USER, LEASED, PARKED, FRESH);
    const [first, second] = await eventIds(1, 2);
    expect((await claim()).leased.map((it) => it.after)).toEqual([first, second]);
  });

  test('may be one that was committed late: the claim that sees it names it', async () => {
    const late = await admin.connect();
    await late.query('BEGIN');
    await insertEvents(late, someEvents(1, 1, { aggregateId: USER }));
    await insertOf(USER, FRESH);
    expect((await claim()).leased).toMatchObject([{ id: '2', after: null }]);
    await late.query('COMMIT');
    late.release();
    expect((await claim()).leased).toMatchObject([{ id: '1', after: null }]);
    await insertOf(USER, FRESH);
    expect((await claim()).leased).toMatchObject([{ id: '3', after: (await row(2)).eventId }]);
  });
});

describe('the rows say of an event', () => {
  test('that it is over when it is published, discarded or gone', async () => {
    await insertOf(USER, PUBLISHED, DISCARDED);
    for (const id of [1, 2, 3]) expect(await standing(id)).toBe('over');
    expect(await outbox.standingOf([])).toEqual(new Map());
  });

  test('that it is first, early or behind, of many events at once', async () => {
    await insertOf(USER, LEASED, EXPIRED, RETRYING, LEASED);
    await insertOf(randomUUID(), LEASED, LEASED);
    const ids = await eventIds(1, 2, 3, 4, 5, 6, 7);
    const found = await outbox.standingOf(ids.map((eventId) => ({ eventId, before: null })));
    expect(ids.map((it) => found.get(it)?.kind)).toEqual([
      ...['first', 'early', 'early', 'behind'],
      ...['first', 'early', 'over'],
    ]);
  });

  test('of a dead one that an operator retries, what they say of a live one', async () => {
    await insertOf(USER, LEASED, DEAD, RETRYING, DEAD);
    expect(await standing(2)).toBe('early');
    expect(await standing(4)).toBe('behind');
    await set(1, PUBLISHED);
    // Its own row holds back the later ones, not itself.
    expect(await standing(2, holding)).toBe('first');
    expect(await standing(4, holding)).toBe('behind');
  });

  test('that it is first at once when the one before it is known to be published', async () => {
    await insertOf(USER, RETRYING, PUBLISHED, LEASED);
    const [second] = await eventIds(2);
    expect(await standing(3, outbox, second)).toBe('first');
    expect(await standing(3)).toBe('behind');
  });

  test.each([
    ['is leased', LEASED, 'early'],
    ['is discarded: it never was in its stream', DISCARDED, 'behind'],
    ['is dead', DEAD, 'behind'],
    ['is skipped by hand: its entry is its dead letter', `${DISCARDED}, stream_entry_id = '2-2'`, 'behind'],
    ['is published by another system', 'published = true, published_at = now()', 'behind'],
  ])('what all rows say when the one before %s', async (_what, before, expected) => {
    await insertOf(USER, expected === 'behind' ? RETRYING : LEASED, before, LEASED);
    const [second] = await eventIds(2);
    expect(await standing(3, outbox, second)).toBe(expected);
  });

  test('what all rows say when the one before is gone', async () => {
    await insertOf(USER, RETRYING, LEASED);
    expect(await standing(2, outbox, randomUUID())).toBe('behind');
  });
});

async function standingOf(id: number, by: Outbox = outbox, before: string | null = null): Promise<Standing> {
  const [eventId] = (await eventIds(id)) as [string];
  return (await by.standingOf([{ eventId, before }])).get(eventId) as Standing;
}

const standing = async (...of: Parameters<typeof standingOf>) => (await standingOf(...of)).kind;

describe('of any table', () => {
  const { PROPERTY_SEED = '1', PROPERTY_RUNS = '80' } = process.env;
  const seed = PROPERTY_SEED === 'random' ? Date.now() : Number(PROPERTY_SEED);
  const runs = Number(PROPERTY_RUNS);
  const AGGREGATES = [randomUUID(), randomUUID()] as const;
  /** A window of 4, and refill waits until one of these places is free. */
  const MAX_IN_FLIGHT = 16;
  const WINDOW = 4;
  const REFILL_PLACE = 3;

  const STATES = {
    fresh: 'next_attempt_at = NULL',
    leased: LEASED,
    expired: EXPIRED,
    parked: PARKED,
    published: PUBLISHED,
    dead: DEAD,
    discarded: DISCARDED,
  } as const;
  type State = keyof typeof STATES;
  type ModelRow = { id: number; aggregate: number; state: State; attempts: number; isLocked: boolean };

  const anyRow = fc.record({
    aggregate: fc.nat({ max: AGGREGATES.length - 1 }),
    state: fc.oneof(
      { weight: 3, arbitrary: fc.constantFrom<State[]>('fresh', 'leased', 'parked', 'parked') },
      { weight: 1, arbitrary: fc.constantFrom(...(Object.keys(STATES) as State[])) },
    ),
    attempts: fc.constantFrom(0, 0, 0, 0, 0, 1),
    isLocked: fc.constantFrom(false, false, false, false, true),
  });

  const isLive = ({ state }: ModelRow) => ['fresh', 'leased', 'expired', 'parked'].includes(state);

  /** The live rows of an aggregate in its window; `blocks` is asked of the live rows before each. */
  function walk(rows: ModelRow[], aggregate: number, holds: boolean, blocks: (row: ModelRow) => boolean) {
    const own = rows.filter((row) => row.aggregate === aggregate);
    const live = own.filter(isLive);
    return live.slice(0, WINDOW).map((row, i) => ({
      ...{ row, place: i + 1, after: live[i - 1]?.id ?? null },
      isBlocked:
        live.slice(0, i).some(blocks) || (holds && own.some((it) => it.state === 'dead' && it.id < row.id)),
    }));
  }

  function freedBy(rows: ModelRow[], holds: boolean): ModelRow[] {
    return AGGREGATES.flatMap((_, aggregate) => {
      const free = walk(rows, aggregate, holds, (it) => it.attempts > 0 || it.state === 'fresh').find(
        ({ row, place, isBlocked }) => row.state === 'parked' && !isBlocked && place <= REFILL_PLACE,
      );
      return free ? [free.row] : [];
    });
  }

  function claimedBy(rows: ModelRow[], holds: boolean) {
    const isTaken = (it: ModelRow) => it.state === 'fresh' && !it.isLocked;
    const leased = AGGREGATES.flatMap((_, aggregate) => {
      if (!rows.some((it) => it.aggregate === aggregate && isTaken(it))) return [];
      return walk(
        rows,
        aggregate,
        holds,
        (it) => it.attempts > 0 || (it.state === 'fresh' && it.isLocked),
      ).filter(({ row, isBlocked }) => !isBlocked && (isTaken(row) || row.state === 'parked'));
    });
    const parked = rows.filter((it) => isTaken(it) && !leased.some(({ row }) => row === it));
    return { leased: leased.sort((a, b) => a.row.id - b.row.id), parked };
  }

  test(
    'refill frees what the claim leases, the claim leases what the gate lets pass, and parks what it holds back',
    async () => {
      await fc.assert(
        fc.asyncProperty(fc.array(anyRow, { maxLength: 14 }), fc.boolean(), async (drawn, holds) => {
          const rows: ModelRow[] = drawn.map((it, i) => ({
            ...{ ...it, id: i + 1 },
            attempts: isLive({ ...it, id: 0 }) ? it.attempts : 0,
          }));
          await table.empty();
          if (rows.length === 0) return;
          await fill(rows);
          const by = table.outboxOf({
            ...{ maxInFlight: MAX_IN_FLIGHT, deadLetterPolicy: holds ? 'hold' : 'continue' },
          });

          const freed = freedBy(rows, holds);
          const refilled = await by.refill(
            AGGREGATES.map((aggregateId) => ({ aggregateType: 'user', aggregateId })),
          );
          expect(refilled.fresh).toBe(freed.length);
          for (const it of freed) Object.assign(it, { state: 'fresh', isLocked: false });

          const expected = claimedBy(rows, holds);
          const claimed = await claimWhileLocked(rows, by);
          const names = await eventIds(...rows.map((it) => it.id));
          expect(claimed.leased.map(({ id, after }) => [Number(id), after])).toEqual(
            expected.leased.map(({ row, after }) => [row.id, after === null ? null : names[after - 1]]),
          );
          for (const { row } of expected.leased) row.state = 'leased';
          for (const it of expected.parked) it.state = 'parked';
          // The database knows no name for "expired" but "due".
          expect(await states()).toEqual(
            rows.map(({ state }) =>
              state === 'expired' ? 'due' : state === 'discarded' ? 'contradictory' : state,
            ),
          );

          // What refill freed, the claim leased.
          for (const it of freed) expect(it).toMatchObject({ state: 'leased' });
          // What the claim leased, the gate lets pass in its turn.
          const gate = await by.standingOf(names.map((eventId) => ({ eventId, before: null })));
          for (const { row, after } of expected.leased)
            expect(gate.get(names[row.id - 1] as string)).toEqual(
              after === null ? { kind: 'first', after: null } : { kind: 'early', after: names[after - 1] },
            );
          // What it parked within the window, the gate holds back.
          for (const aggregate of AGGREGATES.keys()) {
            const waiting = walk(rows, aggregate, holds, (it) => it.attempts > 0 || !hasJob(it));
            const failing = walk(rows, aggregate, holds, (it) => it.attempts > 0);
            for (const [i, { row, isBlocked }] of waiting.entries())
              if (expected.parked.includes(row))
                expect([row.id, isBlocked, gate.get(names[row.id - 1] as string)?.kind]).toEqual([
                  ...[row.id, true, failing[i]?.isBlocked ? 'behind' : 'unclaimed'],
                ]);
          }
        }),
        { seed, numRuns: runs },
      );
    },
    60_000 + runs * 1_000,
  );

  const hasJob = ({ state }: ModelRow) => state === 'leased' || state === 'expired';

  async function fill(rows: ModelRow[]): Promise<void> {
    await insertEvents(
      admin,
      rows.flatMap(({ aggregate }) => someEvents(1, 1, { aggregateId: AGGREGATES[aggregate] as string })),
    );
    await admin.query(
      rows
        .map(
          ({ id, state, attempts }) =>
            `UPDATE identity.outbox SET ${STATES[state]}, attempts = ${attempts} WHERE id = ${id}`,
        )
        .join(';'),
    );
  }

  async function claimWhileLocked(rows: ModelRow[], by: Outbox) {
    const locked = rows.filter((it) => it.state === 'fresh' && it.isLocked).map((it) => it.id);
    const other = await admin.connect();
    try {
      await other.query('BEGIN');
      await other.query('SELECT FROM identity.outbox WHERE id = ANY ($1) FOR UPDATE', [locked]);
      return await claim(1_000, by);
    } finally {
      await other.query('ROLLBACK');
      other.release();
    }
  }
});
