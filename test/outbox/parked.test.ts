import { randomUUID } from 'node:crypto';
import pg from 'pg';
import { describe, expect, test } from 'vitest';
import type { Aggregate } from '../../src/event.ts';
import type { RowName } from '../../src/outbox/finalize.ts';
import { migrate } from '../../src/outbox/migrations.ts';
import { createOutbox } from '../../src/outbox/outbox.ts';
import { insertEvents, someEvents } from '../support/events.ts';
import { grantLeast } from '../support/least-privilege.ts';
import {
  DEAD,
  deadAs,
  EXPIRED,
  FRESH,
  idsOf,
  LEASED,
  OUTBOX_OPTIONS,
  openOutboxTable,
  PARKED,
  PUBLISHED,
  publishedAs,
  RETRYING,
  times,
} from '../support/outbox-table.ts';
import { createDatabase } from '../support/servers.ts';
import { openAdminPool, openPool, silent } from '../support/stages.ts';

const table = await openOutboxTable();
const { admin, outbox, claim, insertOf, set, states, publish, bury, names } = table;
const holding = table.outboxOf({ deadLetterPolicy: 'hold' });
/** A window of 4, of which refill leaves the last place free. */
const narrow = table.outboxOf({ maxInFlight: 16 });

const USER = randomUUID();
const ANYBODY = { aggregateType: 'user', aggregateId: USER };
const ONE = { fresh: 1, waiting: 1 };
const NONE_BUT_WAITING = { fresh: 0, waiting: 1 };
const NOTHING = { fresh: 0, waiting: 0 };

describe('refill', () => {
  test('frees the first parked row alone, and no other while that is fresh', async () => {
    await insertOf(USER, PUBLISHED, PARKED, PARKED, PARKED);
    expect(await outbox.refill([ANYBODY])).toEqual(ONE);
    expect(await outbox.refill([ANYBODY])).toEqual(NONE_BUT_WAITING);
    expect(await states()).toEqual(['published', 'fresh', 'parked', 'parked']);
  });

  test.each([
    ['leased', LEASED, 'leased'],
    ['expired', EXPIRED, 'due'],
    ['published', PUBLISHED, 'published'],
    ['dead, and its aggregate goes on', DEAD, 'dead'],
  ])('frees a row behind one that is %s', async (_what, earlier, state) => {
    await insertOf(USER, earlier, PARKED);
    expect(await outbox.refill([ANYBODY])).toEqual(ONE);
    expect(await states()).toEqual([state, 'fresh']);
  });

  test.each([
    ['is fresh', FRESH, 'fresh'],
    ['waits for a retry', RETRYING, 'leased'],
    ['waits for a retry whose time has come', `${EXPIRED}, attempts = 1`, 'due'],
  ])('frees no row behind one that %s', async (_what, earlier, state) => {
    await insertOf(USER, LEASED, earlier, LEASED, PARKED);
    expect(await outbox.refill([ANYBODY])).toEqual(NONE_BUT_WAITING);
    expect(await states()).toEqual(['leased', state, 'leased', 'parked']);
  });

  test('frees no row behind a dead one that holds its aggregate, until that is out of the way', async () => {
    await insertOf(USER, DEAD, PARKED, DEAD, PARKED);
    expect(await holding.refill([ANYBODY])).toEqual(NONE_BUT_WAITING);
    await set(1, `${PUBLISHED}, dead_lettered_at = NULL`);
    expect(await holding.refill([ANYBODY])).toEqual(ONE);
    expect(await states()).toEqual(['published', 'fresh', 'dead', 'parked']);
    await publish(2);
    expect(await holding.refill([ANYBODY])).toEqual(NONE_BUT_WAITING);
    expect(await states()).toEqual(['published', 'published', 'dead', 'parked']);
  });

  test('frees a row that waits for a retry itself: it is the later ones that wait', async () => {
    await insertOf(USER, `${PARKED}, attempts = 1`, PARKED);
    expect(await outbox.refill([ANYBODY])).toEqual(ONE);
    expect(idsOf((await claim()).leased)).toEqual(['1']);
    expect(await outbox.refill([ANYBODY])).toEqual(NONE_BUT_WAITING);
  });

  test('waits until a quarter of the window is free: then one claim leases many rows', async () => {
    await insertOf(USER, LEASED, EXPIRED, LEASED, PARKED, PARKED, PARKED);
    expect(await narrow.refill([ANYBODY])).toEqual(NONE_BUT_WAITING);
    expect(await states()).toEqual(['leased', 'due', 'leased', ...times(3, 'parked')]);
    await publish(1);
    expect(await narrow.refill([ANYBODY])).toEqual(ONE);
    expect(idsOf((await claim(100, narrow)).leased)).toEqual(['4', '5']);
    expect(await states()).toEqual(['published', 'due', ...times(3, 'leased'), 'parked']);
  });

  test('frees one row after the other where the window has one place', async () => {
    const narrowest = table.outboxOf({ maxInFlight: 3 });
    await insertOf(USER, LEASED, PARKED, PARKED);
    expect(await narrowest.refill([ANYBODY])).toEqual(NONE_BUT_WAITING);
    await publish(1);
    expect(await narrowest.refill([ANYBODY])).toEqual(ONE);
    expect(await claim(100, narrowest)).toMatchObject({ leased: [{ id: '2' }], rows: 1 });
    expect(await states()).toEqual(['published', 'leased', 'parked']);
  });

  test('and claim take a hot aggregate through its window in order, never more than it has room for', async () => {
    const [user, count] = [{ ...ANYBODY }, 23];
    await insertEvents(admin, someEvents(count, 1, { aggregateId: USER }));
    const published: string[] = [];
    let before: string | null = null;
    const leasedNow: string[] = [];
    for (let round = 0; round < 3 * count && published.length < count; round++) {
      await narrow.refill([user]);
      const { leased } = await claim(100, narrow);
      for (const event of leased) {
        expect(event.after).toBe(leasedNow.length === 0 ? null : before);
        before = event.eventId;
        leasedNow.push(event.id);
      }
      expect(leasedNow.length).toBeLessThanOrEqual(4);
      const first = leasedNow.shift();
      if (first === undefined) continue;
      await publish(Number(first));
      published.push(first);
    }
    expect(published).toEqual(Array.from({ length: count }, (_, i) => String(i + 1)));
    expect(await narrow.refill([user])).toEqual(NOTHING);
  });

  test('frees the first row of each aggregate, however often that is named', async () => {
    await insertEvents(admin, someEvents(6, 3));
    for (const id of [1, 2, 4, 5]) await set(id, PARKED);
    const { rows } = await admin.query(
      `SELECT aggregate_type AS "aggregateType", aggregate_id AS "aggregateId" FROM identity.outbox`,
    );
    const nobody = { aggregateType: 'none', aggregateId: USER };
    expect(await outbox.refill([...rows, nobody])).toMatchObject({ fresh: 2 });
    expect(await states()).toEqual(['fresh', 'fresh', 'fresh', 'parked', 'parked', 'fresh']);
  });

  test('counts the aggregates that have parked rows, whether it frees any or not', async () => {
    await insertOf(USER, RETRYING, PARKED);
    const other = { aggregateType: 'user', aggregateId: randomUUID() };
    await insertOf(other.aggregateId, PARKED);
    const third = { aggregateType: 'user', aggregateId: randomUUID() };
    await insertOf(third.aggregateId, FRESH, DEAD, PUBLISHED);
    expect(await outbox.refill([ANYBODY, other, third])).toEqual({ fresh: 1, waiting: 2 });
    expect(await outbox.refill([])).toEqual(NOTHING);
  });

  test('skips a row that another transaction has locked, without waiting', async () => {
    await insertOf(USER, PARKED, PARKED);
    await outbox.inEpoch(async (tx) => {
      await tx.query('SELECT FROM identity.outbox WHERE id = 1 FOR UPDATE');
      expect(await outbox.refill([ANYBODY])).toEqual(NONE_BUT_WAITING);
    });
    expect(await states()).toEqual(['parked', 'parked']);
    expect(await outbox.refill([ANYBODY])).toEqual(ONE);
  });
});

describe('a row that is parked behind nobody', () => {
  test('arises when a claim and an acknowledgement do not see each other, and is freed after both', async () => {
    await insertOf(USER, RETRYING);
    await outbox.inEpoch(async (acknowledging) => {
      await outbox.markPublished(acknowledging, (await names(1)).map(publishedAs));
      await insertOf(USER, FRESH);
      // For the claim the first row is not published yet, so it parks the second one.
      expect(await claim()).toMatchObject({ leased: [], parked: [ANYBODY] });
      // The one that commits first refills in vain …
      expect(await outbox.refill([ANYBODY])).toEqual(NONE_BUT_WAITING);
    });
    expect(await states()).toEqual(['published', 'parked']);
    // … the one that commits last does not.
    expect(await outbox.refill([ANYBODY])).toEqual(ONE);
    expect((await claim()).leased).toMatchObject([{ id: '2', after: null }]);
  });

  test('arises from a dead letter in the same way', async () => {
    await insertOf(USER, RETRYING);
    const [name] = (await names(1)) as [RowName];
    await outbox.inEpoch(async (burying) => {
      await outbox.markDead(burying, deadAs(name));
      await insertOf(USER, FRESH);
      expect(await claim()).toMatchObject({ parked: [ANYBODY] });
      expect(await outbox.refill([ANYBODY])).toEqual(NONE_BUT_WAITING);
    });
    expect(await states()).toEqual(['dead', 'parked']);
    expect(await outbox.refill([ANYBODY])).toEqual(ONE);
  });

  test('is freed when the one before it is dead, or published, whichever comes first', async () => {
    await insertOf(USER, RETRYING, PARKED, PARKED);
    await bury(1);
    expect(await outbox.refill([ANYBODY])).toEqual(ONE);
    expect(idsOf((await claim()).leased)).toEqual(['2', '3']);
  });
});

describe('aggregates with parked rows', () => {
  test('are listed once each, from the cursor on, however many rows each has', async () => {
    await insertEvents(admin, someEvents(300, 30, { aggregateType: 'b' }));
    await insertEvents(admin, someEvents(4, 2, { aggregateType: 'a' }));
    await insertEvents(admin, someEvents(3, 3, { aggregateType: 'nothing parked' }));
    await claim(1_000, table.outboxOf({ maxInFlight: 4 }));
    const { rows: expected } = await admin.query(
      `SELECT DISTINCT aggregate_type AS "aggregateType", aggregate_id AS "aggregateId" FROM identity.outbox
        WHERE aggregate_type IN ('a', 'b') ORDER BY 1, 2`,
    );
    expect(expected).toHaveLength(32);
    expect(await outbox.parkedAggregates(null, 100)).toEqual(expected);
    expect(await outbox.parkedAggregates(null, 5)).toEqual(expected.slice(0, 5));
    expect(await outbox.parkedAggregates(expected[4], 10)).toEqual(expected.slice(5, 15));
    expect(await outbox.parkedAggregates(expected[31], 10)).toEqual([]);
  });

  test('are listed once each where the order of texts is that of a language', async () => {
    const { url, adminUrl } = await createDatabase({ locale: 'en' });
    const client = new pg.Client(adminUrl);
    await client.connect();
    await migrate(client, true, silent).finally(() => client.end());
    await grantLeast(adminUrl);
    const english = openAdminPool(adminUrl);
    // In the order of their bytes the second is the first.
    const types = ['account', 'Order', 'user'];
    const events = types.flatMap((aggregateType) => someEvents(3, 3, { aggregateType }));
    await insertEvents(english, events);
    await english.query(`UPDATE identity.outbox SET ${PARKED}`);
    const listed: Aggregate[] = [];
    const relay = createOutbox(openPool(url), OUTBOX_OPTIONS);
    for (let i = 0; i <= events.length; i++)
      listed.push(...(await relay.parkedAggregates(listed.at(-1) ?? null, 1)));
    expect(listed.map((it) => it.aggregateType)).toEqual(types.flatMap((type) => [type, type, type]));
    expect(new Set(listed.map((it) => it.aggregateId)).size).toBe(events.length);
  });

  test('do not count dead or published rows', async () => {
    await insertEvents(admin, someEvents(2));
    await set(1, DEAD);
    await set(2, PUBLISHED);
    expect(await outbox.parkedAggregates(null, 10)).toEqual([]);
  });
});

test('without order, rows that were parked become fresh, some at a time; dead ones stay dead', async () => {
  const unordered = table.outboxOf({ ordering: 'none' });
  await insertOf(USER, PARKED, PARKED, PARKED, DEAD);
  expect(await unordered.unparkAll(2)).toBe(2);
  expect(await unordered.unparkAll(2)).toBe(1);
  expect(await unordered.unparkAll(2)).toBe(0);
  expect(await states()).toEqual(['fresh', 'fresh', 'fresh', 'dead']);
});
