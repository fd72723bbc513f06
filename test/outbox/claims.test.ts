import { randomUUID } from 'node:crypto';
import type pg from 'pg';
import { describe, expect, onTestFinished, test, vi } from 'vitest';
import type { Pool } from '../../src/connections/database.ts';
import { assertNoLockHeldTooLong, LockHeldError } from '../../src/connections/table-lock.ts';
import type { Claim } from '../../src/outbox/claims.ts';
import { createOutbox } from '../../src/outbox/outbox.ts';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import {
  DEAD,
  EXPIRED,
  FRESH,
  idsOf,
  LEASED,
  OUTBOX_OPTIONS,
  openOutboxTable,
  PARKED,
  PUBLISHED,
  times,
} from '../support/outbox-table.ts';
import { createDatabase } from '../support/servers.ts';
import { openAdminPool, openPool } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const table = await openOutboxTable();
const { admin, outbox, claim, insert, insertOf, set, states, row } = table;

const USER = randomUUID();
const OTHER_USER = randomUUID();
const ANYBODY = { aggregateType: 'user', aggregateId: USER };
const NOTHING: Claim = { leased: [], parked: [], rows: 0, more: false };

describe('a claim', () => {
  test('takes fresh rows in order of id, as many as it may, and leases them', async () => {
    await insertEvents(admin, someEvents(5));
    const first = await claim(3);
    expect(idsOf(first.leased)).toEqual(['1', '2', '3']);
    expect(first).toMatchObject({ parked: [], rows: 3, more: true });
    expect(await states()).toEqual(['leased', 'leased', 'leased', 'fresh', 'fresh']);
    const rest = await claim(3);
    expect(idsOf(rest.leased)).toEqual(['4', '5']);
    expect(rest).toMatchObject({ rows: 2, more: false });
    expect((await row(1)).msLeft).toBeGreaterThan(0);
    expect((await row(1)).msLeft).toBeLessThanOrEqual(OUTBOX_OPTIONS.claimLeaseMs);
  });

  test('leases for as long as it is told', async () => {
    await insert({});
    await claim(1, table.outboxOf({ claimLeaseMs: 3_600_000 }));
    expect((await row(1)).msLeft).toBeGreaterThan(3_000_000);
  });

  test('leaves alone what is not fresh', async () => {
    await insertEvents(admin, someEvents(5));
    for (const [i, state] of [PARKED, LEASED, EXPIRED, PUBLISHED, DEAD].entries()) await set(i + 1, state);
    expect(await claim()).toEqual(NOTHING);
    expect(await states()).toEqual(['parked', 'leased', 'due', 'published', 'dead']);
  });

  test('gives the event as its row has it, the payload as PostgreSQL prints it', async () => {
    const payload =
      '{"n": 12345678901234567890.10, "text": "Jörg \\u0001 \\"x\\"", "tenant_id": "t", "correlation_id": "c"}';
    const event = anEvent({ aggregateType: 'account', payload, topic: null });
    await insertEvents(admin, [event]);
    await set(1, `attempts = 2, created_at = '2026-01-02T03:04:05.678901+02'`);
    const [stored] = (await admin.query('SELECT payload::text AS text FROM identity.outbox')).rows;
    expect(stored.text).toContain('12345678901234567890.10');
    expect((await claim()).leased).toEqual([
      {
        ...{ id: '1', eventId: event.eventId, eventType: event.eventType },
        ...{ aggregateType: 'account', aggregateId: event.aggregateId, topic: 'default.stream' },
        payload: stored.text,
        occurredAt: '2026-01-02T01:04:05.678901Z',
        ...{ tenantId: 't', correlationId: 'c', attempts: 2, withheld: null, trace: null },
        ...{ after: null, mayHaveJob: true, knownEntry: null },
      },
    ]);
  });

  test('withholds a row that lacks what an event must have, where an adopted table allows it', async () => {
    await insert({}, {}, {}, {});
    for (const column of ['event_type', 'payload', 'created_at'])
      await admin.query(`ALTER TABLE identity.outbox ALTER ${column} DROP NOT NULL`);
    await set(1, 'event_type = NULL');
    await set(2, 'payload = NULL');
    await set(3, 'created_at = NULL');
    expect((await claim()).leased).toEqual([
      expect.objectContaining({ withheld: 'event_type is null', eventType: '', payload: 'null' }),
      expect.objectContaining({ withheld: 'payload is null', payload: 'null' }),
      expect.objectContaining({ withheld: 'created_at is null', occurredAt: '', payload: 'null' }),
      expect.objectContaining({ withheld: null }),
    ]);
  });

  test('knows no tenant where the payload names none, or is no object', async () => {
    await insert(
      { payload: '{"tenant_id": "", "correlation_id": null}' },
      { payload: '[1, 2]' },
      { payload: 'null' },
    );
    const { leased } = await claim();
    expect(leased.map((it) => [it.tenantId, it.correlationId])).toEqual(times(3, [null, null]));
    expect(leased.map((it) => it.payload)).toEqual([
      '{"tenant_id": "", "correlation_id": null}',
      '[1, 2]',
      'null',
    ]);
  });

  test('survives a row whose time of creation is infinite', async () => {
    await insert({});
    await set(1, `created_at = '-infinity'`);
    expect((await claim()).leased).toMatchObject([{ occurredAt: '-infinity' }]);
  });

  test.each([
    ['0044-03-15 12:00:00.25+00 BC', '-000043-03-15T12:00:00.250000Z'],
    ['0001-12-31 23:59:59+00 BC', '+000000-12-31T23:59:59.000000Z'],
    ['0001-01-01 00:00:00+00', '0001-01-01T00:00:00.000000Z'],
    ['12026-01-02 03:04:05+00', '+012026-01-02T03:04:05.000000Z'],
  ])('names the era of %s', async (createdAt, occurredAt) => {
    await insert({});
    await set(1, `created_at = '${createdAt}'`);
    expect((await claim()).leased).toMatchObject([{ occurredAt }]);
  });

  test('leaves in the table what is larger than allowed, also of a row that was parked', async () => {
    await insertOf(USER, FRESH, PARKED);
    await set(2, `payload = to_jsonb(repeat('x', 2000000))`);
    const withheld = 'event has 2000033 bytes; RELAY_MAX_EVENT_BYTES allows 1048576';
    expect((await claim()).leased).toMatchObject([
      { id: '1', withheld: null },
      { id: '2', payload: 'null', withheld },
    ]);
    await set(2, 'next_attempt_at = NULL');
    expect((await claim()).leased).toMatchObject([{ id: '2', payload: 'null', withheld }]);
  });

  test('takes the same id under another type for another aggregate', async () => {
    await insert({ aggregateId: USER }, { aggregateId: USER, aggregateType: 'account' });
    expect((await claim()).leased).toMatchObject([
      { id: '1', after: null },
      { id: '2', after: null },
    ]);
  });

  test('skips rows that another transaction has locked, without waiting', async () => {
    await insertEvents(admin, someEvents(3));
    await outbox.inEpoch(async (tx) => {
      expect(idsOf((await outbox.claimFresh(tx, 1)).leased)).toEqual(['1']);
      expect(idsOf((await claim()).leased)).toEqual(['2', '3']);
    });
    expect(await states()).toEqual(['leased', 'leased', 'leased']);
  });

  test('does not wait for a parked row that another transaction has locked, nor do others wait for it', async () => {
    await insertOf(USER, PARKED, FRESH);
    await insertOf(OTHER_USER, FRESH);
    await outbox.inEpoch(async (tx) => {
      await tx.query('SELECT FROM identity.outbox WHERE id = 1 FOR UPDATE');
      // The gate holds back what comes behind the locked row.
      expect(idsOf((await claim()).leased)).toEqual(['2', '3']);
    });
    expect(await states()).toEqual(['parked', 'leased', 'leased']);
  });

  test('leaves every row as it was when it is rolled back', async () => {
    await insertOf(USER, FRESH, PARKED);
    const failing = outbox.inEpoch(async (tx) => {
      expect(idsOf((await outbox.claimFresh(tx, 10)).leased)).toEqual(['1', '2']);
      throw new Error('the jobs could not be added');
    });
    await expect(failing).rejects.toThrow('the jobs could not be added');
    expect(await states()).toEqual(['fresh', 'parked']);
  });

  test('says of a row that failed, was replayed or was published before that it may have a job', async () => {
    await insertEvents(admin, someEvents(4));
    await set(2, 'attempts = 1');
    await set(3, 'replayed_at = now()');
    await set(4, 'published_at = now()');
    expect((await claim()).leased.map((it) => it.mayHaveJob)).toEqual([false, true, true, true]);
  });

  test('takes a dead row that an operator made fresh by hand: it is dead no more', async () => {
    await insertOf(USER, DEAD);
    await set(1, FRESH);
    expect(await claim()).toMatchObject({ leased: [], parked: [ANYBODY] });
    expect(await row(1)).toMatchObject({ state: 'parked', deadLetteredAt: null });
    await outbox.refill([ANYBODY]);
    expect(idsOf((await claim()).leased)).toEqual(['1']);
  });
});

describe('of an aggregate, a claim', () => {
  test('leases many rows together, each after the one before it', async () => {
    await insertEvents(admin, someEvents(6, 2));
    const { leased, parked } = await claim();
    const eventIds = leased.map((it) => it.eventId);
    expect(leased.map((it) => it.after)).toEqual([null, null, ...eventIds.slice(0, 4)]);
    expect(parked).toEqual([]);
  });

  test('leases parked rows that its window has room for, with the fresh row that it takes', async () => {
    await insertOf(USER, FRESH, PARKED, PARKED);
    await insertOf(OTHER_USER, PARKED);
    const { leased, rows } = await claim();
    expect(leased).toMatchObject([
      { id: '1', after: null },
      { id: '2', after: leased[0]?.eventId, payload: expect.stringContaining('tenant_id') },
      { id: '3', after: leased[1]?.eventId },
    ]);
    expect(rows).toBe(3);
    // It took no fresh row of the other aggregate.
    expect(await states()).toEqual(['leased', 'leased', 'leased', 'parked']);
  });

  test('leases parked rows before a fresh one that came later', async () => {
    await insertOf(USER, LEASED, PARKED, PARKED, FRESH);
    expect(idsOf((await claim()).leased)).toEqual(['2', '3', '4']);
  });

  test('never leases more rows than its window has room for, and parks the others', async () => {
    const narrow = table.outboxOf({ maxInFlight: 16 });
    await insertOf(USER, LEASED, ...times(6, FRESH));
    const first = await claim(1_000, narrow);
    expect(idsOf(first.leased)).toEqual(['2', '3', '4']);
    expect(first).toMatchObject({ parked: [ANYBODY], rows: 6, more: false });
    expect(await states()).toEqual([...times(4, 'leased'), ...times(3, 'parked')]);
    // Whatever is added later.
    await insertOf(USER, ...times(3, FRESH));
    expect(await claim(1_000, narrow)).toMatchObject({ leased: [], rows: 3 });
    expect(await states()).toEqual([...times(4, 'leased'), ...times(6, 'parked')]);
  });

  test('that cannot take all leases the first rows of others before the later ones of a hot aggregate', async () => {
    await insertOf(USER, FRESH, ...times(100, PARKED));
    await insertEvents(admin, someEvents(99));
    const { leased, more } = await claim(100);
    const from = (id: number, count: number) => Array.from({ length: count }, (_, i) => String(id + i));
    expect(idsOf(leased)).toEqual([...from(1, 31), ...from(102, 69)]);
    expect(more).toBe(true);
    expect(leased[30]?.after).toBe(leased[29]?.eventId);
  });

  test('names each aggregate of which it parked rows once', async () => {
    const narrow = table.outboxOf({ maxInFlight: 4 });
    await insertOf(USER, FRESH, FRESH, FRESH);
    await insertOf(OTHER_USER, FRESH, FRESH);
    expect((await claim(1_000, narrow)).parked.map((it) => it.aggregateId)).toEqual([USER, OTHER_USER]);
  });
});

describe('the limit of a claim', () => {
  test('is one on the rows that it leases: parked ones count', async () => {
    await insertOf(USER, FRESH, ...times(5, PARKED));
    const first = await claim(3);
    expect(idsOf(first.leased)).toEqual(['1', '2', '3']);
    expect(first).toMatchObject({ rows: 3, more: true });
    expect(await states()).toEqual([...times(3, 'leased'), ...times(3, 'parked')]);
  });

  test('leaves fresh what it took and has no room for: it is not parked', async () => {
    await insertOf(USER, LEASED, ...times(3, PARKED), FRESH);
    await insertOf(OTHER_USER, FRESH);
    const first = await claim(2);
    expect(idsOf(first.leased)).toEqual(['2', '3']);
    expect(first).toMatchObject({ parked: [], rows: 2, more: true });
    expect(await states()).toEqual([...times(3, 'leased'), 'parked', 'fresh', 'fresh']);
    expect(idsOf((await claim(2)).leased)).toEqual(['4', '5']);
    expect(idsOf((await claim(2)).leased)).toEqual(['6']);
  });

  test('is one on bytes as well, but for the first row; the others stay fresh', async () => {
    const payload = (character: string) => ({ text: character.repeat(900_000) }); // 10 kB in the table
    await insert(...[...'abcdefghijkl'].map((it) => ({ aggregateId: USER, payload: payload(it) })));
    const first = await claim();
    expect(idsOf(first.leased)).toEqual(['1', '2', '3', '4', '5', '6', '7', '8', '9', '10']);
    expect(first).toMatchObject({ parked: [], more: true });
    expect(await states()).toEqual([...times(10, 'leased'), 'fresh', 'fresh']);
    const rest = await claim();
    expect(rest.leased).toMatchObject([{ id: '11', after: first.leased[9]?.eventId }, { id: '12' }]);
    expect(rest.more).toBe(false);
  });

  test('on bytes leaves a large event all the same, alone', async () => {
    const wide = table.outboxOf({ maxEventBytes: 20_000_000 });
    await insert({ payload: { text: 'x'.repeat(9_000_000) } }, {});
    const first = await claim(10, wide);
    expect(first).toMatchObject({ leased: [{ id: '1', withheld: null }], more: true });
    expect(idsOf((await claim(10, wide)).leased)).toEqual(['2']);
  });
});

describe('the claim of the first row alone', () => {
  const claimFirst = (by = outbox) => by.inEpoch((tx) => by.claimFirst(tx));

  test('leaves out a row that refuses to be changed, and after a minute tries it again', async () => {
    const mine = table.outboxOf({});
    await insertEvents(admin, someEvents(20, 20));
    await admin.query('ALTER TABLE identity.outbox ADD CONSTRAINT old CHECK (id > 18) NOT VALID');
    onTestFinished(async () => {
      await admin.query('ALTER TABLE identity.outbox DROP CONSTRAINT IF EXISTS old');
    });
    for (let id = 1; id <= 18; id++) {
      const { eventId } = await row(id);
      await expect(claimFirst(mine)).rejects.toMatchObject({ name: 'RowRefusedError', eventId });
    }
    expect(idsOf((await claim(20, mine)).leased)).toEqual(['19', '20']);
    await admin.query('ALTER TABLE identity.outbox DROP CONSTRAINT old');
    expect(await claim(20, mine)).toEqual(NOTHING);
    const { now } = performance;
    const later = vi.spyOn(performance, 'now').mockImplementation(() => now.call(performance) + 61_000);
    onTestFinished(() => later.mockRestore());
    // Some of them. The database refuses them no longer, so all are claimed from then on.
    expect((await claim(20, mine)).leased).toHaveLength(16);
    expect((await claim(20, mine)).leased).toHaveLength(2);
  });

  test('takes the first fresh row that nobody has locked, and no parked one', async () => {
    await insertOf(USER, FRESH, PARKED);
    await insertOf(OTHER_USER, FRESH);
    await outbox.inEpoch(async (tx) => {
      expect(idsOf((await outbox.claimFirst(tx)).leased)).toEqual(['1']);
      expect(await claimFirst()).toMatchObject({ leased: [{ id: '3', after: null }], rows: 1, more: true });
    });
    expect(await states()).toEqual(['leased', 'parked', 'leased']);
    expect(await claimFirst()).toEqual(NOTHING);
  });

  test.each([
    ['a parked', PARKED],
    ['a retrying', `${EXPIRED}, attempts = 1`],
  ])('parks it behind %s row', async (_what, earlier) => {
    await insertOf(USER, earlier, FRESH);
    expect(await claimFirst()).toMatchObject({ leased: [], parked: [ANYBODY], rows: 1 });
    expect((await states())[1]).toBe('parked');
  });

  test('leases it behind a leased row, and names that', async () => {
    await insertOf(USER, LEASED, FRESH);
    expect((await claimFirst()).leased).toMatchObject([{ id: '2', after: (await row(1)).eventId }]);
  });

  test('takes it with its payload withheld when PostgreSQL cannot print that, twice', async () => {
    await insert({ payload: '{"tenant_id": "t"}' }, {});
    const failures = ['54000', '53200'];
    const failing = createOutbox(failingPool(failures), OUTBOX_OPTIONS);
    const withheld = 'PostgreSQL cannot print the payload: out of memory';
    expect(await claimFirst(failing)).toMatchObject({
      leased: [{ id: '1', payload: 'null', tenantId: null, withheld, attempts: 0 }],
    });
    failures.push('57014');
    expect((await claimFirst(failing)).leased).toMatchObject([{ id: '2', withheld: null }]);
    expect(await claimFirst(failing)).toEqual(NOTHING);
    expect(await states()).toEqual(['leased', 'leased']);
  });

  test('fails by what is not the payload’s fault, and leaves the row fresh', async () => {
    await insert({});
    await expect(claimFirst(createOutbox(failingPool(['40001']), OUTBOX_OPTIONS))).rejects.toThrow();
    expect(await states()).toEqual(['fresh']);
  });

  test('takes it with its payload withheld when its print got no answer twice, each time by itself', async () => {
    await insert({}, {});
    const silent = createOutbox(failingPool(['no answer', 'no answer']), OUTBOX_OPTIONS);
    for (const _ of times(2, 'try')) await expect(claimFirst(silent)).rejects.toThrow('Query read timeout');
    expect(await states()).toEqual(['fresh', 'fresh']);
    const withheld = 'PostgreSQL does not print the payload in time';
    expect((await claimFirst(silent)).leased).toMatchObject([{ id: '1', withheld }]);
    expect((await claimFirst(silent)).leased).toMatchObject([{ id: '2', withheld: null }]);
  });
});

describe('the claim lock', () => {
  test('is one pod’s at a time, until its work ends, well or badly', async () => {
    const other = createOutbox(openPool(table.url), OUTBOX_OPTIONS);
    const done: string[] = [];
    let second: Promise<unknown> = Promise.resolve();
    await outbox.withClaimLock(async () => {
      second = other.withClaimLock(async () => done.push('second'));
      await table.aTransactionWaits();
      done.push('first');
    });
    await second;
    expect(done).toEqual(['first', 'second']);
    await expect(outbox.withClaimLock(() => Promise.reject(new Error('no room')))).rejects.toThrow('no room');
    expect(await other.withClaimLock(async () => 'claimed')).toBe('claimed');
  });

  test.each([
    ['relay_claim_lock', () => outbox.withClaimLock(async () => 'claimed')],
    ['relay_epoch_lock', () => outbox.inEpoch(async () => 'in the epoch', { deadlineMs: 1_000 })],
  ])('whoever holds %s for too long is named', async (name, take) => {
    // Of the relay's own role: how long others hold it is hidden.
    const holder = await openPool(table.url).connect();
    onTestFinished(() => holder.release(true));
    await holder.query(`SET application_name = 'psql of somebody'`);
    const { rows } = await holder.query('SELECT pg_backend_pid() AS pid');
    await holder.query(`BEGIN; LOCK TABLE identity.${name} IN EXCLUSIVE MODE`);
    await expect(take()).rejects.toThrow(
      new RegExp(
        `identity.${name}, which process ${rows[0].pid} of PostgreSQL holds \\(application "psql of somebody"`,
      ),
    );
    await holder.query('ROLLBACK');
    await take();
  });

  test('is not said to be held while sessions of other roles, which may be pods, have it one after the other', async () => {
    let holder = await admin.connect();
    onTestFinished(() => holder.release(true));
    const take = async () => {
      holder = await admin.connect();
      await holder.query('BEGIN; LOCK TABLE identity.relay_claim_lock IN EXCLUSIVE MODE');
    };
    holder.release(true);
    await take();
    await assertNoLockHeldTooLong(table.relay);
    holder.release(true);
    await take();
    await assertNoLockHeldTooLong(table.relay);
    const elsewhere = await createDatabase();
    const holderElsewhere = await openAdminPool(elsewhere.adminUrl).connect();
    onTestFinished(() => holderElsewhere.release(true));
    await holderElsewhere.query('BEGIN; LOCK TABLE identity.relay_claim_lock IN EXCLUSIVE MODE');
    // The same one for ten seconds, on both databases of a process that runs two relays.
    const relays: Pool[] = [table.relay, openPool(elsewhere.url)];
    const isTold = (relay: Pool) =>
      assertNoLockHeldTooLong(relay).then(
        () => false,
        (error) => error instanceof LockHeldError,
      );
    await waitFor(async () => (await Promise.all(relays.map(isTold))).every((told) => told), {
      what: 'both holders to be told',
    });
  });

  test('does not make a claim by hand wait, nor keep it from the order', async () => {
    await insertOf(USER, FRESH, FRESH);
    await outbox.withClaimLock(() =>
      outbox.inEpoch(async (tx) => {
        expect(idsOf((await outbox.claimFresh(tx, 1)).leased)).toEqual(['1']);
        expect(await claim()).toMatchObject({ leased: [], parked: [ANYBODY] });
      }),
    );
    expect(await states()).toEqual(['leased', 'parked']);
  });
});

/** The relay's pool; its next statements that take rows fail with these codes. */
function failingPool(codes: string[]): Pool {
  const { relay } = table;
  return {
    query: relay.query.bind(relay),
    connect: async () => {
      const client = await relay.connect();
      const query = (config: pg.QueryConfig) => {
        const code = config.text.includes('RETURNING') ? codes.shift() : undefined;
        if (code === 'no answer') throw new Error('Query read timeout');
        if (code !== undefined) throw Object.assign(new Error('out of memory'), { code, severity: 'ERROR' });
        return client.query(config);
      };
      return Object.create(client, { query: { value: query } });
    },
  } as Pool;
}
