import { randomUUID } from 'node:crypto';
import { describe, expect, test } from 'vitest';
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
const { admin, outbox, insertOf, set, states, row, rows, eventIds } = table;

const USER = randomUUID();
/** A dead row whose dead letter Redis has lost. */
const LETTER_LOST = `dead_lettered_at = now(), next_attempt_at = now() - interval '1 second', stream_entry_id = NULL`;
/** Rows in these states have ids from 1 on, in this order. */
const OTHER_STATES = [FRESH, PARKED, PUBLISHED, DEAD, DISCARDED];

const expired = (limit = 100) => outbox.expired(limit);
const extendLeases = (jobs: { eventId: string; attempts: number; reason: string }[], by = outbox) =>
  by.inEpoch((tx) => by.extendLeases(tx, jobs));

describe('expired rows', () => {
  test('are those whose lease has ended, the longest overdue first', async () => {
    await insertEvents(admin, someEvents(8));
    await set(1, EXPIRED);
    await set(2, `next_attempt_at = now() - interval '1 hour', attempts = 2`);
    await set(3, `next_attempt_at = '-infinity'`);
    for (const [i, state] of [LEASED, ...OTHER_STATES.slice(1)].entries()) await set(4 + i, state);
    expect(idsOf(await expired())).toEqual(['3', '2', '1']);
    expect(idsOf(await expired(2))).toEqual(['3', '2']);
  });

  test('are given with what the reaper must know to find their job, their entry or their dead letter', async () => {
    await insertEvents(admin, someEvents(1, 1, { aggregateId: USER, topic: null }));
    await set(1, `${EXPIRED}, attempts = 2, stream_entry_id = '7-7'`);
    const [eventId] = await eventIds(1);
    expect(await expired()).toEqual([
      {
        ...{ id: '1', eventId, aggregateType: 'user', aggregateId: USER, topic: 'default.stream' },
        ...{
          isDead: false,
          knownLetter: '7-7',
          attempts: 2,
          endedAt: expect.stringMatching(/^\d{4}-.*\.\d{6}$/),
        },
      },
    ]);
  });

  test('are also dead rows whose dead letter is lost', async () => {
    await insertOf(USER, LETTER_LOST, DEAD);
    expect(await expired()).toMatchObject([{ id: '1', isDead: true, knownLetter: null }]);
  });

  test('are locked if they are still as they were read, and nobody else has locked them', async () => {
    await insertOf(USER, EXPIRED, EXPIRED, EXPIRED, EXPIRED, EXPIRED);
    const read = await expired();
    const byId = new Map(read.map((it) => [it.id, it.eventId]));
    const lock = () => outbox.inEpoch((tx) => outbox.lockExpired(tx, read));
    expect(await lock()).toEqual(new Set(byId.values()));
    await set(1, `next_attempt_at = next_attempt_at - interval '1 microsecond'`);
    await set(2, PUBLISHED);
    await set(3, LEASED);
    await set(4, `event_id = gen_random_uuid()`);
    expect(await lock()).toEqual(new Set([byId.get('5')]));
    await outbox.inEpoch(async (tx) => {
      await tx.query('SELECT FROM identity.outbox WHERE id = 5 FOR UPDATE');
      expect(await lock()).toEqual(new Set());
    });
  });

  test('become fresh when their jobs are gone; one that was published or given up meanwhile stays', async () => {
    await insertOf(USER, EXPIRED, `${EXPIRED}, attempts = 2`, ...OTHER_STATES.slice(2), EXPIRED);
    await outbox.inEpoch(async (tx) => outbox.returnToFresh(tx, await eventIds(1, 2, 3, 4, 5, 99)));
    expect(await states()).toEqual(['fresh', 'fresh', 'published', 'dead', 'contradictory', 'due']);
    expect((await row(2)).attempts).toBe(2);
  });
});

describe('a lease is extended', () => {
  test('by another one, and a row that was published meanwhile stays', async () => {
    await insertOf(USER, EXPIRED, PUBLISHED, DISCARDED, EXPIRED);
    const jobs = (await eventIds(1, 2, 3, 99)).map((eventId) => ({ eventId, attempts: 0, reason: '' }));
    await extendLeases(jobs, table.outboxOf({ claimLeaseMs: 3_600_000 }));
    expect(await states()).toEqual(['leased', 'published', 'contradictory', 'due']);
    expect((await row(1)).msLeft).toBeGreaterThan(3_000_000);
    expect(await row(1)).toMatchObject({ attempts: 0, errorMessage: null });
  });

  test('of a dead row until its letter is written', async () => {
    await insertOf(USER, LETTER_LOST);
    await extendLeases([{ eventId: (await eventIds(1))[0] as string, attempts: 0, reason: '' }]);
    expect(await row(1)).toMatchObject({ state: 'dead', streamEntryId: null });
    expect((await row(1)).msLeft).toBeGreaterThan(0);
    expect(await expired()).toEqual([]);
  });

  test('with the failures that a dead pod could not mirror; those that are on the row stay', async () => {
    await insertOf(
      USER,
      EXPIRED,
      `${EXPIRED}, attempts = 1, error_message = 'failure 1'`,
      `${EXPIRED}, attempts = 3, error_message = 'failure 3'`,
      `${EXPIRED}, attempts = 2, error_message = 'failure 2'`,
    );
    const [first, second, third, fourth] = (await eventIds(1, 2, 3, 4)) as [string, string, string, string];
    await extendLeases([
      { eventId: first, attempts: 2, reason: 'of the job' },
      { eventId: second, attempts: 2, reason: 'of the job' },
      { eventId: third, attempts: 2, reason: 'of the job' },
      { eventId: fourth, attempts: 2, reason: 'of the job' },
    ]);
    expect(
      (await rows()).map(({ state, attempts, errorMessage }) => [state, attempts, errorMessage]),
    ).toEqual([
      ['leased', 2, 'of the job'],
      ['leased', 2, 'of the job'],
      ['leased', 3, 'failure 3'],
      ['leased', 2, 'failure 2'],
    ]);
  });
});

describe('leases end', () => {
  test('of the rows that are named, those of retries as well', async () => {
    await insertOf(USER, LEASED, RETRYING, LEASED, EXPIRED, ...OTHER_STATES);
    const before = await row(4);
    await outbox.expireLeasesOf(await eventIds(1, 2, 4, 5, 6, 7, 8, 9, 99));
    expect(await states()).toEqual([
      ...['due', 'due', 'leased', 'due'],
      ...['fresh', 'parked', 'published', 'dead', 'contradictory'],
    ]);
    // Its place among those that are overdue is that of its own time.
    expect((await row(4)).msLeft).toBeLessThan((before.msLeft as number) + 1);
    expect(idsOf(await expired()).at(0)).toBe('4');
  });

  test('within a transaction when that is committed', async () => {
    await insertOf(USER, LEASED);
    const ids = await eventIds(1);
    await outbox.inEpoch(async (tx) => {
      await outbox.expireLeases(tx, ids);
      expect(await states()).toEqual(['leased']);
    });
    expect(await states()).toEqual(['due']);
  });

  test('all of them, when Redis may have lost its jobs: the reaper asks about each', async () => {
    await insertOf(USER, LEASED, LEASED, EXPIRED, ...OTHER_STATES);
    expect(await outbox.expireAllLeases()).toBe(2);
    expect(await states()).toEqual([
      ...['due', 'due', 'due'],
      ...['fresh', 'parked', 'published', 'dead', 'contradictory'],
    ]);
    expect(await outbox.expireAllLeases()).toBe(0);
  });

  test('in the order of the ids, as acknowledgements lock their rows', async () => {
    const leases = Array.from(
      { length: 20 },
      (_, i) => `next_attempt_at = now() + interval '${99 - i} minutes'`,
    );
    await insertOf(USER, ...leases);
    const later = Array.from({ length: 12 }, (_, i) => 9 + i);
    await table.whileLocked(
      8,
      () => outbox.expireAllLeases(),
      () => table.expectUnlocked(...later),
    );
    expect(await states()).toEqual(times(20, 'due'));
  });

  test('but those of retries go on: their time comes', async () => {
    await insertOf(USER, LEASED, RETRYING);
    const { msLeft } = await row(2);
    expect(await outbox.expireAllLeases()).toBe(1);
    expect(await states()).toEqual(['due', 'leased']);
    expect((await row(2)).msLeft).toBeLessThanOrEqual(msLeft as number);
    expect((await row(2)).msLeft).toBeGreaterThan(0);
  });
});

test('an event is live until its row is published, dead, discarded or gone', async () => {
  await insertOf(USER, LEASED, EXPIRED, RETRYING, ...OTHER_STATES);
  const all = await eventIds(1, 2, 3, 4, 5, 6, 7, 8);
  const live = await outbox.liveOf([...all, randomUUID()]);
  expect(live.sort()).toEqual(all.slice(0, 5).sort());
  expect(await outbox.liveOf([])).toEqual([]);
});
