import { randomUUID } from 'node:crypto';
import { describe, expect, test } from 'vitest';
import type { RowName } from '../../src/outbox/finalize.ts';
import { insertEvents, someEvents } from '../support/events.ts';
import {
  DEAD,
  DISCARDED,
  deadAs,
  EXPIRED,
  entryIdOf,
  FRESH,
  LEASED,
  openOutboxTable,
  PARKED,
  PUBLISHED,
  publishedAs,
  RETRYING,
  times,
} from '../support/outbox-table.ts';
import { deferred } from '../support/stages.ts';

const table = await openOutboxTable();
const { admin, outbox, claim, insert, insertOf, states, row, rows, names, eventIds, publish, bury } = table;

const USER = randomUUID();
const ANYBODY = { aggregateType: 'user', aggregateId: USER };
const NOBODY = randomUUID();

const fail = (name: RowName, attempts: number) =>
  outbox.recordFailure({ ...name, attempts, reason: `failure ${attempts}`, retryInMs: 3_600_000 });
describe('an acknowledgement', () => {
  test.each([
    ['fresh, as when its claim was rolled back', FRESH],
    ['leased', LEASED],
    ['expired', EXPIRED],
    ['parked', PARKED],
    ['waiting for a retry', RETRYING],
    ['dead, since its job was retried by hand', DEAD],
  ])('marks a row published that is %s, with its entry id', async (_what, assignments) => {
    await insertOf(USER, assignments);
    await publish(1);
    expect(await row(1)).toMatchObject({
      state: 'published',
      streamEntryId: entryIdOf(1),
      deadLetteredAt: null,
    });
  });

  test('marks many rows at once, and no other', async () => {
    await insertEvents(admin, someEvents(40, 3));
    await claim();
    await publish(...Array.from({ length: 20 }, (_, i) => 2 * i + 1));
    expect(await states()).toEqual(Array.from({ length: 40 }, (_, i) => (i % 2 ? 'leased' : 'published')));
    expect((await row(39)).streamEntryId).toBe(entryIdOf(39));
  });

  test('twice is harmless: it renews the entry id and keeps the time', async () => {
    await insertOf(USER, LEASED, LEASED);
    await publish(1);
    const { publishedAt } = await row(1);
    const [name] = (await names(1)) as [RowName];
    await outbox.inEpoch((tx) => outbox.markPublished(tx, [{ ...name, entryId: '1800000000000-7' }]));
    expect(await row(1)).toMatchObject({ state: 'published', publishedAt, streamEntryId: '1800000000000-7' });
    expect(await states()).toEqual(['published', 'leased']);
  });

  test('gives a row that became unpublished its new time', async () => {
    await insertOf(USER, `${LEASED}, published_at = '2020-01-01'`);
    await publish(1);
    expect((await row(1)).publishedAt?.getFullYear()).toBeGreaterThan(2020);
  });

  test('never touches a discarded row', async () => {
    await insertOf(USER, DISCARDED);
    const before = await rows();
    await publish(1);
    expect(await rows()).toEqual(before);
  });

  test('of a row that is gone changes nothing', async () => {
    await insertOf(USER, FRESH);
    await outbox.inEpoch((tx) => outbox.markPublished(tx, [publishedAs({ id: '77', eventId: NOBODY })]));
    expect(await states()).toEqual(['fresh']);
  });

  test('locks its rows one after the other: two that overlap do not deadlock', async () => {
    await insertEvents(admin, someEvents(60));
    const ids = Array.from({ length: 60 }, (_, i) => i + 1);
    await table.whileLocked(
      20,
      () => publish(...ids),
      () => table.expectUnlocked(...ids.slice(20)),
    );
    expect(await states()).toEqual(times(60, 'published'));
  });

  test('has the time of its own statement, however long its transaction has waited', async () => {
    await insertOf(USER, LEASED, LEASED);
    const [first, second] = (await names(1, 2)) as [RowName, RowName];
    const [begun, committed] = [deferred(), deferred()];
    const late = outbox.inEpoch(async (tx) => {
      await tx.query('SELECT 1');
      begun.resolve();
      await committed.promise;
      await outbox.markPublished(tx, [publishedAs(second)]);
    });
    await begun.promise;
    await outbox.inEpoch((tx) => outbox.markPublished(tx, [publishedAs(first)]));
    committed.resolve();
    await late;
    const { rows: inTime } = await admin.query(
      'SELECT id::int FROM identity.outbox ORDER BY published_at, id',
    );
    expect(inTime.map((it) => it.id)).toEqual([1, 2]);
  });
});

describe('a dead letter', () => {
  test.each([
    ['leased', LEASED],
    ['waiting for a retry', RETRYING],
    ['expired', EXPIRED],
    ['fresh', FRESH],
    ['parked', PARKED],
  ])('marks a row dead that is %s, with its reason and its entry id', async (_what, assignments) => {
    await insertOf(USER, assignments, LEASED);
    await bury(1);
    expect(await row(1)).toMatchObject({
      ...{ state: 'dead', attempts: 6, errorMessage: 'no permission', streamEntryId: entryIdOf(1) },
    });
    expect(await states()).toEqual(['dead', 'leased']);
  });

  test('twice changes nothing', async () => {
    await insertOf(USER, LEASED);
    await bury(1);
    const before = await rows();
    await bury(1, { attempts: 9, reason: 'another', entryId: '9-9' });
    expect(await rows()).toEqual(before);
  });

  test('that was lost is written anew, with a new time: the next comparison looks for it', async () => {
    await insertOf(
      USER,
      `dead_lettered_at = '2026-01-01', next_attempt_at = now(), attempts = 6, error_message = 'x'`,
    );
    await bury(1, { entryId: '9-9' });
    expect(await row(1)).toMatchObject({ state: 'dead', streamEntryId: '9-9', msLeft: null });
    const { deadLetteredAt } = await row(1);
    expect(deadLetteredAt?.getTime()).toBeGreaterThan(Date.parse('2026-01-02T00:00:00Z'));
  });

  test.each([
    ['published', PUBLISHED],
    ['discarded', DISCARDED],
  ])('never touches a row that is %s', async (_what, assignments) => {
    await insertOf(USER, assignments);
    const before = await rows();
    await bury(1);
    expect(await rows()).toEqual(before);
  });
});

describe('a failed attempt', () => {
  test('is mirrored on its row: how many, why, and when it is tried again', async () => {
    await insertOf(USER, LEASED);
    const [name] = (await names(1)) as [RowName];
    await fail(name, 1);
    expect(await row(1)).toMatchObject({ state: 'leased', attempts: 1, errorMessage: 'failure 1' });
    expect((await row(1)).msLeft).toBeGreaterThan(3_000_000);
  });

  test('that is told late never lowers the number of attempts', async () => {
    await insertOf(USER, LEASED);
    const [name] = (await names(1)) as [RowName];
    await fail(name, 3);
    await fail(name, 2);
    expect(await row(1)).toMatchObject({ state: 'leased', attempts: 3, errorMessage: 'failure 3' });
  });

  test('that is quicker than the commit of its claim waits for it, and counts', async () => {
    await insertOf(USER, FRESH);
    const [name] = (await names(1)) as [RowName];
    let failed: Promise<unknown> = Promise.resolve();
    await outbox.inEpoch(async (tx) => {
      await outbox.claimFresh(tx, 1);
      failed = fail(name, 1);
      await table.aTransactionWaits();
    });
    await failed;
    expect(await row(1)).toMatchObject({ state: 'leased', attempts: 1, errorMessage: 'failure 1' });
    expect((await row(1)).msLeft).toBeGreaterThan(3_000_000);
  });

  test.each([
    ['published', PUBLISHED],
    ['dead', DEAD],
    ['discarded', DISCARDED],
  ])('never touches a row that is %s', async (_what, assignments) => {
    await insertOf(USER, assignments);
    const before = await rows();
    await fail((await names(1))[0] as RowName, 4);
    expect(await rows()).toEqual(before);
  });
});

describe('the release of a job', () => {
  test('parks its row', async () => {
    await insertOf(USER, LEASED, EXPIRED, RETRYING, LEASED);
    await outbox.park(await eventIds(1, 2, 3), []);
    expect(await states()).toEqual(['parked', 'parked', 'parked', 'leased']);
    expect((await rows()).map((it) => it.attempts)).toEqual([0, 0, 1, 0]);
  });

  test.each([
    ['is fresh: the reaper found that its job was gone', FRESH],
    ['is parked', PARKED],
    ['is published', PUBLISHED],
    ['is dead', DEAD],
    ['is discarded', DISCARDED],
  ])('never touches a row that %s', async (_what, assignments) => {
    await insertOf(USER, assignments, assignments);
    const before = await rows();
    const [first, second] = (await eventIds(1, 2)) as [string, string];
    await outbox.park([first, NOBODY], [second]);
    expect(await rows()).toEqual(before);
  });

  test('says on the row before that it failed, if nobody has: refill frees nothing behind it', async () => {
    await insertOf(USER, LEASED, LEASED);
    const { msLeft } = await row(1);
    const [first, second] = (await eventIds(1, 2)) as [string, string];
    await outbox.park([second], [first]);
    expect(await row(1)).toMatchObject({ state: 'leased', attempts: 1, errorMessage: null });
    expect((await row(1)).msLeft).toBeLessThanOrEqual(msLeft as number);
    expect(await outbox.refill([ANYBODY])).toEqual({ fresh: 0, waiting: 1 });
    expect(await states()).toEqual(['leased', 'parked']);
  });

  test('leaves what the row before says of its failures', async () => {
    await insertOf(USER, `${LEASED}, attempts = 3, error_message = 'failure 3'`, LEASED);
    const [first, second] = (await eventIds(1, 2)) as [string, string];
    await outbox.park([second], [first]);
    expect(await row(1)).toMatchObject({ state: 'leased', attempts: 3, errorMessage: 'failure 3' });
  });

  test('does both to a row that failed and waits itself', async () => {
    await insertOf(USER, LEASED, LEASED, LEASED);
    const [first, second, third] = (await eventIds(1, 2, 3)) as [string, string, string];
    await outbox.park([second, third], [first, second]);
    expect((await rows()).map(({ state, attempts }) => [state, attempts])).toEqual([
      ['leased', 1],
      ['parked', 1],
      ['parked', 0],
    ]);
  });

  test('that is quicker than the commit of its claim waits for it, and parks the row', async () => {
    await insertOf(USER, FRESH, FRESH);
    const [first, second] = (await eventIds(1, 2)) as [string, string];
    let parked: Promise<unknown> = Promise.resolve();
    await outbox.inEpoch(async (tx) => {
      await outbox.claimFresh(tx, 2);
      parked = outbox.park([second], [first]);
      await table.aTransactionWaits();
    });
    await parked;
    expect((await rows()).map(({ state, attempts }) => [state, attempts])).toEqual([
      ['leased', 1],
      ['parked', 0],
    ]);
  });

  test('locks its rows in the order of their ids, whatever order they are named in', async () => {
    await insertOf(USER, ...times(12, LEASED));
    const ids = Array.from({ length: 12 }, (_, i) => i + 1);
    const named = (await eventIds(...ids)).reverse();
    await table.whileLocked(
      5,
      () => outbox.park(named.slice(0, 6), named.slice(6)),
      () => table.expectUnlocked(...ids.slice(5)),
    );
    expect(await states()).toEqual([...times(6, 'leased'), ...times(6, 'parked')]);
  });
});

describe('where an id was given out twice, the row that has it now', () => {
  const STATES = [FRESH, LEASED, EXPIRED, PARKED, PUBLISHED, DEAD];

  test.each<[string, (name: RowName) => Promise<unknown>]>([
    ['an acknowledgement', (it) => outbox.inEpoch((tx) => outbox.markPublished(tx, [publishedAs(it)]))],
    ['a dead letter', (it) => outbox.inEpoch((tx) => outbox.markDead(tx, deadAs(it)))],
    ['a failed attempt', (it) => fail(it, 1)],
    ['the release of a job', ({ eventId }) => outbox.park([eventId], [eventId])],
    [
      'the loss of an entry',
      (it) =>
        outbox.unpublish([{ ...it, entryId: '1-1' }]).then(async () => {
          await outbox.unpublish([{ ...it, entryId: '2-2' }]);
        }),
    ],
    [
      'the end of a lease',
      async ({ eventId }) => {
        await outbox.expireLeasesOf([eventId]);
        await outbox.inEpoch((tx) => outbox.returnToFresh(tx, [eventId]));
        await outbox.inEpoch((tx) => outbox.extendLeases(tx, [{ eventId, attempts: 1, reason: 'x' }]));
      },
    ],
  ])('is left alone by %s of the event that had it', async (_what, work) => {
    const old = await insert({ aggregateId: USER });
    const [was] = (await names(1)) as [RowName];
    expect(old).toEqual(['1']);
    for (const state of STATES) {
      await table.empty();
      await insertOf(USER, state);
      const before = await rows();
      expect(before).toMatchObject([{ id: '1' }]);
      await work(was);
      expect(stable(await rows())).toEqual(stable(before));
    }
  });

  test('is found by its own name all the same', async () => {
    await insert({});
    await table.empty();
    await insert({});
    await publish(1);
    expect(await states()).toEqual(['published']);
  });

  /** Without the time that goes by. */
  const stable = (all: Awaited<ReturnType<typeof rows>>) => all.map(({ msLeft: _, ...it }) => it);
});
