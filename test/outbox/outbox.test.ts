import { randomUUID } from 'node:crypto';
import type pg from 'pg';
import { beforeAll, beforeEach, describe, expect, test } from 'vitest';
import type { SampleEvent } from '../../src/demo/sample.ts';
import type { OutboxEvent, Receipt } from '../../src/event.ts';
import type { Pool } from '../../src/outbox/database.ts';
import { createOutbox, type Outbox, type OutboxOptions } from '../../src/outbox/outbox.ts';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { createDatabase } from '../support/servers.ts';
import {
  type AdminPool,
  deferred,
  openAdminPool,
  openPool,
  type Row,
  readRows,
  readStates,
} from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const OPTIONS: OutboxOptions = {
  ordering: 'aggregate',
  deadLetterPolicy: 'continue',
  claimLeaseMs: 60_000,
  maxEventBytes: 1_048_576,
  streamName: 'default.stream',
  statementTimeoutMs: 10_000,
};
const USER = randomUUID();
const ANYBODY = { aggregateType: 'user', aggregateId: USER };
const OTHER_USER = randomUUID();

let databaseUrl: string;
let pool: AdminPool;
let relay: pg.Pool;
let outbox: Outbox;
let holding: Outbox;
let unordered: Outbox;

beforeAll(async () => {
  const { url, adminUrl } = await createDatabase();
  databaseUrl = url;
  pool = openAdminPool(adminUrl);
  relay = openPool(url);
  outbox = createOutbox(relay, OPTIONS);
  holding = createOutbox(relay, { ...OPTIONS, deadLetterPolicy: 'hold' });
  unordered = createOutbox(relay, { ...OPTIONS, ordering: 'none' });
});

beforeEach(async () => {
  await pool.query('TRUNCATE identity.outbox RESTART IDENTITY');
});

/** Rows of one user, `count` of them; ids from 1 when the table is empty. */
const insertOfUser = (count: number) =>
  insertEvents(
    pool,
    Array.from({ length: count }, () => anEvent({ aggregateId: USER })),
  );
const insert = (...events: Partial<SampleEvent>[]) => insertEvents(pool, events.map(anEvent));
const set = (id: number | string, assignments: string) =>
  pool.query(`UPDATE identity.outbox SET ${assignments} WHERE id = $1`, [id]);
const PARKED = `next_attempt_at = 'infinity'`;
const LEASED = `next_attempt_at = now() + interval '1 minute'`;
const DUE = `next_attempt_at = now() - interval '1 minute'`;
const PUBLISHED = 'published = true, published_at = now(), next_attempt_at = NULL';
const DEAD = `dead_lettered_at = now(), next_attempt_at = 'infinity'`;

const aggregateOf = async (id: number): Promise<string> =>
  (await pool.query('SELECT aggregate_id FROM identity.outbox WHERE id = $1', [id])).rows[0].aggregate_id;
const states = () => readStates(pool);
const row = async (id: number | string) => (await readRows(pool)).find((it) => it.id === String(id)) as Row;
const claim = (limit = 100, by = outbox) => by.transaction('repeatable', (tx) => by.claimFresh(tx, limit));
const receipt = (id: number | string) => ({ id: String(id), entryId: `1700000000000-${id}` });
const acknowledge = (ids: (number | string)[], by = outbox) =>
  by.transaction('durable', (tx) => by.markPublished(tx, ids.map(receipt)));
const bury = (id: number | string, by = outbox) =>
  by.transaction('durable', (tx) =>
    by.markDead(tx, { ...receipt(id), attempts: 6, reason: 'no permission' }),
  );
const idsOf = (events: readonly { id: string }[]) => events.map((event) => event.id);

describe('a claim', () => {
  test('takes fresh rows in order of id, as many as it may, and leases them', async () => {
    await insertEvents(pool, someEvents(5));
    expect(idsOf((await claim(3)).leased)).toEqual(['1', '2', '3']);
    expect(await states()).toEqual(['leased', 'leased', 'leased', 'fresh', 'fresh']);
    expect(idsOf((await claim(3)).leased)).toEqual(['4', '5']);
    expect((await row(1)).msLeft).toBeGreaterThan(55_000);
    expect((await row(1)).msLeft).toBeLessThanOrEqual(60_000);
  });

  test('leaves alone what is not fresh', async () => {
    await insertEvents(pool, someEvents(5));
    await set(1, PARKED);
    await set(2, LEASED);
    await set(3, DUE);
    await set(4, PUBLISHED);
    await set(5, DEAD);
    const before = await readRows(pool);
    expect(await claim()).toEqual({ leased: [], parked: [], more: false });
    expect((await readRows(pool)).map((it) => it.state)).toEqual(before.map((it) => it.state));
  });

  test('gives the event as its row has it, the payload as PostgreSQL prints it', async () => {
    const payload =
      '{"n": 12345678901234567890.10, "text": "Jörg \\u0001 \\"x\\"", "tenant_id": "t", "correlation_id": "c"}';
    const event = anEvent({ aggregateType: 'account', payload, topic: null });
    await insertEvents(pool, [event]);
    await pool.query(`UPDATE identity.outbox SET attempts = 2, created_at = '2026-01-02T03:04:05.678901+02'`);
    const [stored] = (await pool.query('SELECT payload::text AS text FROM identity.outbox')).rows;
    expect(stored.text).toContain('12345678901234567890.10');
    expect((await claim()).leased).toEqual([
      {
        ...{ id: '1', eventId: event.eventId, eventType: event.eventType },
        ...{ aggregateType: 'account', aggregateId: event.aggregateId, topic: 'default.stream' },
        payload: stored.text,
        occurredAt: '2026-01-02T01:04:05.678901Z',
        ...{ tenantId: 't', correlationId: 'c', attempts: 2, withheld: null, trace: null },
      },
    ]);
  });

  test('knows no tenant where the payload names none, or is no object', async () => {
    await insert(
      { payload: '{"tenant_id": "", "correlation_id": null}' },
      { payload: '[1, 2]' },
      { payload: 'null' },
    );
    const { leased } = await claim();
    expect(leased.map((it) => [it.tenantId, it.correlationId])).toEqual(Array(3).fill([null, null]));
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

  test('takes no more bytes than it may, but always one row, and says that there is more', async () => {
    const payload = (character: string) => ({ text: character.repeat(900_000) }); // 10 kB in the table
    await insertEvents(
      pool,
      [...'abcdefghijkl'].map((character) => anEvent({ payload: payload(character) })),
    );
    const first = await claim();
    expect(idsOf(first.leased)).toEqual(['1', '2', '3', '4', '5', '6', '7', '8', '9', '10']);
    expect(first.more).toBe(true);
    const rest = await claim();
    expect(idsOf(rest.leased)).toEqual(['11', '12']);
    expect(rest.more).toBe(false);
  });

  test('leaves in the table what is larger than allowed, also as a successor', async () => {
    await insertOfUser(2);
    await set(2, `payload = to_jsonb(repeat('x', 2000000))`);
    await claim();
    const withheld = 'event has 2000033 bytes; RELAY_MAX_EVENT_BYTES allows 1048576';
    const [event] = await acknowledge([1]);
    expect(event).toMatchObject({ id: '2', payload: 'null', withheld });
    await set(2, 'next_attempt_at = NULL');
    expect((await claim()).leased).toEqual([event]);
  });

  test('of one row takes it with its payload withheld when PostgreSQL cannot print that, twice', async () => {
    await insert({ payload: '{"tenant_id": "t"}' }, {});
    const failures = ['54000', '53200'];
    const failing = createOutbox(
      {
        ...{ query: relay.query.bind(relay) },
        connect: async () => {
          const client = await relay.connect();
          const query = (config: pg.QueryConfig) => {
            const code = config.text.includes('RETURNING') ? failures.shift() : undefined;
            if (code !== undefined) throw Object.assign(new Error('out of memory'), { code });
            return client.query(config);
          };
          return Object.create(client, { query: { value: query } });
        },
      } as Pool,
      OPTIONS,
    );
    const added: string[] = [];
    const add = async (events: readonly { id: string }[]) => void added.push(...idsOf(events));
    const withheld = 'PostgreSQL cannot print the payload: out of memory';
    expect(await failing.claimAlone(add)).toMatchObject({
      leased: [{ id: '1', payload: 'null', tenantId: null, withheld, attempts: 0 }],
      more: true,
    });
    failures.push('57014');
    expect((await failing.claimAlone(add)).leased).toMatchObject([{ id: '2', withheld: null }]);
    expect(await failing.claimAlone(add)).toEqual({ leased: [], parked: [], more: false });
    expect(added).toEqual(['1', '2']);
    expect(await states()).toEqual(['leased', 'leased']);
  });

  test('parks every row behind an earlier one of its aggregate, in the same batch or claimed before', async () => {
    const [other] = someEvents(1);
    await insertEvents(pool, [
      anEvent({ aggregateId: USER }),
      anEvent({ aggregateId: USER }),
      other as SampleEvent,
    ]);
    const first = await claim();
    expect(idsOf(first.leased)).toEqual(['1', '3']);
    expect(first.parked).toMatchObject([ANYBODY]);
    await insertOfUser(2);
    expect((await claim()).leased).toEqual([]);
    expect(await states()).toEqual(['leased', 'parked', 'leased', 'parked', 'parked']);
  });

  test('takes the same id under another type for another aggregate', async () => {
    await insert({ aggregateId: USER }, { aggregateId: USER, aggregateType: 'account' });
    expect(idsOf((await claim()).leased)).toEqual(['1', '2']);
  });

  test('does not wait for published or dead rows', async () => {
    await insertOfUser(3);
    await set(1, PUBLISHED);
    await set(2, DEAD);
    expect(idsOf((await claim()).leased)).toEqual(['3']);
  });

  test('parks rows behind a dead one when dead rows hold their aggregate', async () => {
    await insertOfUser(2);
    await insert({});
    await set(1, DEAD);
    expect(idsOf((await claim(100, holding)).leased)).toEqual(['3']);
    expect(await states()).toEqual(['dead', 'parked', 'leased']);
  });

  test('leases everything when order does not matter', async () => {
    await insertOfUser(3);
    expect(idsOf((await claim(100, unordered)).leased)).toEqual(['1', '2', '3']);
    expect(await states()).toEqual(['leased', 'leased', 'leased']);
  });

  test('skips rows that somebody else has in hand, without waiting', async () => {
    await insertEvents(pool, someEvents(3));
    await outbox.transaction('repeatable', async (tx) => {
      expect(idsOf((await outbox.claimFresh(tx, 1)).leased)).toEqual(['1']);
      expect(idsOf((await claim()).leased)).toEqual(['2', '3']);
    });
    expect(await states()).toEqual(['leased', 'leased', 'leased']);
  });

  test('leaves every row fresh when it is rolled back', async () => {
    await insertOfUser(2);
    const failing = outbox.transaction('repeatable', async (tx) => {
      expect(idsOf((await outbox.claimFresh(tx, 10)).leased)).toEqual(['1']);
      throw new Error('the jobs could not be added');
    });
    await expect(failing).rejects.toThrow('the jobs could not be added');
    expect(await states()).toEqual(['fresh', 'fresh']);
  });

  test('leaves rows due whose jobs were added, and fresh whose jobs were not, when it fails', async () => {
    await insertOfUser(2);
    await insertEvents(pool, someEvents(1));
    const added: string[] = [];
    const endSession = async (leased: OutboxEvent[]) => {
      added.push(...idsOf(leased));
      // Returns when the backend has ended.
      await pool.query(
        `SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
         WHERE datname = current_database() AND state = 'idle in transaction'`,
      );
    };
    await expect(outbox.claimBatch(10, endSession)).rejects.toThrow();
    expect(added).toEqual(['1', '3']);
    expect(await states()).toEqual(['due', 'fresh', 'due']);

    await set(1, 'next_attempt_at = NULL');
    await expect(outbox.claimAlone(endSession)).rejects.toThrow();
    expect(await states()).toEqual(['due', 'fresh', 'due']);

    await set(1, 'next_attempt_at = NULL');
    await expect(outbox.claimBatch(10, () => Promise.reject(new Error('no Redis')))).rejects.toThrow(
      'no Redis',
    );
    expect(await states()).toEqual(['fresh', 'fresh', 'due']);
    expect(idsOf((await outbox.claimBatch(10, async () => {})).leased)).toEqual(['1']);
    expect(await states()).toEqual(['leased', 'parked', 'due']);
  });

  test('takes a dead row that was made fresh again: it is dead no more', async () => {
    await insertOfUser(1);
    await set(1, DEAD);
    await set(1, 'next_attempt_at = NULL');
    expect(idsOf((await claim()).leased)).toEqual(['1']);
    expect(await row(1)).toMatchObject({ state: 'leased', deadLetteredAt: null });
  });

  test('is one pod’s turn at a time, until that ends, well or badly', async () => {
    const other = createOutbox(openPool(databaseUrl), OPTIONS);
    const turn = async () => 'my turn';
    const taken = await outbox.inClaimTurn(async () => {
      expect(await other.inClaimTurn(turn)).toBe('busy');
      return 'mine';
    });
    expect(taken).toBe('mine');
    await expect(outbox.inClaimTurn(() => Promise.reject(new Error('no room')))).rejects.toThrow('no room');
    expect(await other.inClaimTurn(turn)).toBe('my turn');
  });

  test('that overlaps another keeps the order: what is behind a row in another’s hand is parked', async () => {
    await insertOfUser(4);
    await outbox.transaction('repeatable', async (tx) => {
      expect(idsOf((await outbox.claimFresh(tx, 2)).leased)).toEqual(['1']);
      expect(await claim(2)).toMatchObject({ leased: [], parked: [ANYBODY, ANYBODY] });
    });
    expect(await states()).toEqual(['leased', 'parked', 'parked', 'parked']);
  });
});

describe('an acknowledgement', () => {
  test('marks the row published, with its receipt', async () => {
    await insertOfUser(1);
    await claim();
    expect(await acknowledge([1])).toEqual([]);
    expect(await row(1)).toMatchObject({ state: 'published', streamEntryId: '1700000000000-1' });
  });

  test.each([
    ['fresh', 'next_attempt_at = NULL'],
    ['parked', PARKED],
  ])('leases the next row of the aggregate when that is %s', async (_, state) => {
    await insertOfUser(3);
    await claim();
    await set(2, state);
    const promoted = await acknowledge([1]);
    expect(promoted).toMatchObject([{ id: '2', ...ANYBODY, payload: expect.stringContaining('tenant_id') }]);
    expect(await states()).toEqual(['published', 'leased', 'parked']);
    expect((await row(2)).msLeft).toBeGreaterThan(55_000);
  });

  test('carries a hot aggregate from row to row', async () => {
    await insertOfUser(4);
    await claim();
    const order = [1, 2, 3, 4];
    for (const id of order) expect(idsOf(await acknowledge([id]))).toEqual(id < 4 ? [String(id + 1)] : []);
    expect(await states()).toEqual(['published', 'published', 'published', 'published']);
  });

  test('leaves the next row alone when that is on its way already', async () => {
    await insertOfUser(3);
    await claim();
    await set(2, LEASED);
    const before = await row(2);
    expect(await acknowledge([1])).toEqual([]);
    expect(await states()).toEqual(['published', 'leased', 'parked']);
    expect((await row(2)).msLeft).toBeLessThanOrEqual(before.msLeft as number);
  });

  test('leaves the next row alone when it is due: somebody will ask what became of its job', async () => {
    await insertOfUser(2);
    await claim();
    await set(2, DUE);
    expect(await acknowledge([1])).toEqual([]);
    expect(await states()).toEqual(['published', 'due']);
  });

  test('goes on with a row of a lower id that was committed late', async () => {
    const late = await pool.connect();
    await late.query('BEGIN');
    await insertEvents(late, [anEvent({ aggregateId: USER })]);
    await insertOfUser(2);
    expect(idsOf((await claim()).leased)).toEqual(['2']);
    await late.query('COMMIT');
    late.release();
    expect(idsOf(await acknowledge([2]))).toEqual(['1']);
    expect(await states()).toEqual(['leased', 'published', 'parked']);
    expect(idsOf(await acknowledge([1]))).toEqual(['3']);
  });

  test('of two rows of one aggregate at once promotes the one after both, once', async () => {
    await insertOfUser(4);
    await claim();
    await set(2, LEASED);
    expect(idsOf(await acknowledge([1, 2]))).toEqual(['3']);
    expect(await states()).toEqual(['published', 'published', 'leased', 'parked']);
  });

  test('of many aggregates at once promotes the next row of each', async () => {
    await insertEvents(pool, someEvents(9, 3));
    await claim();
    expect(idsOf(await acknowledge([1, 2, 3])).sort()).toEqual(['4', '5', '6']);
  });

  test('twice is harmless: it renews the receipt and keeps the time', async () => {
    await insertOfUser(3);
    await claim();
    await acknowledge([1]);
    const { publishedAt } = await row(1);
    const again = await outbox.transaction('durable', (tx) =>
      outbox.markPublished(tx, [{ id: '1', entryId: '1800000000000-7' }]),
    );
    expect(again).toEqual([]);
    expect(await row(1)).toMatchObject({ state: 'published', publishedAt, streamEntryId: '1800000000000-7' });
    expect(await states()).toEqual(['published', 'leased', 'parked']);
  });

  test('of a row whose claim was rolled back counts all the same', async () => {
    await insertOfUser(2);
    expect(idsOf(await acknowledge([1]))).toEqual(['2']);
    expect(await states()).toEqual(['published', 'leased']);
  });

  test('of a row that is gone changes nothing', async () => {
    await insertOfUser(1);
    expect(await acknowledge([77])).toEqual([]);
    expect(await states()).toEqual(['fresh']);
  });

  test('does not go past a dead row that holds its aggregate', async () => {
    await insertOfUser(3);
    await set(1, DEAD); // under the policy "continue", so that row 2 was leased
    await set(2, LEASED);
    await set(3, PARKED);
    expect(await acknowledge([2], holding)).toEqual([]);
    expect(await states()).toEqual(['dead', 'published', 'parked']);
  });

  test('promotes nothing when order does not matter', async () => {
    await insertOfUser(2);
    await claim(1, unordered);
    expect(await acknowledge([1], unordered)).toEqual([]);
    expect(await states()).toEqual(['published', 'fresh']);
  });

  test('waits for a claim that has the next row in hand, and promotes it after all', async () => {
    await insertOfUser(2);
    await claim(1);
    let acknowledged: Promise<unknown> = Promise.resolve();
    await outbox.transaction('repeatable', async (tx) => {
      expect(await outbox.claimFresh(tx, 1)).toMatchObject({ leased: [], parked: [ANYBODY] });
      acknowledged = acknowledge([1]);
      await somebodyWaitsForALock();
    });
    expect(await acknowledged).toMatchObject([{ id: '2' }]);
    expect(await states()).toEqual(['published', 'leased']);
  });
});

describe('a dead letter', () => {
  test('marks the row dead with the reason, and lets its aggregate go on', async () => {
    await insertOfUser(3);
    await claim();
    expect(idsOf(await bury(1))).toEqual(['2']);
    expect(await row(1)).toMatchObject({ state: 'dead', attempts: 6, errorMessage: 'no permission' });
    expect(await states()).toEqual(['dead', 'leased', 'parked']);
  });

  test('holds its aggregate where that is the policy', async () => {
    await insertOfUser(3);
    await claim();
    expect(await bury(1, holding)).toEqual([]);
    expect(await states()).toEqual(['dead', 'parked', 'parked']);
  });

  test('twice changes nothing', async () => {
    await insertOfUser(3);
    await claim();
    await bury(1);
    const before = await readRows(pool);
    const again = await outbox.transaction('durable', (tx) =>
      outbox.markDead(tx, { ...receipt(1), attempts: 9, reason: 'another' }),
    );
    expect(again).toEqual([]);
    expect((await row(1)).deadLetteredAt).toEqual(before[0]?.deadLetteredAt);
    expect(await row(1)).toMatchObject({ attempts: 6, errorMessage: 'no permission' });
    expect(await states()).toEqual(['dead', 'leased', 'parked']);
  });

  test.each([
    ['continue', () => outbox],
    ['hold', () => holding],
    ['no order', () => unordered],
  ])('never touches a published row (%s)', async (_, by) => {
    await insertOfUser(2);
    await claim();
    await set(1, PUBLISHED);
    expect(await bury(1, by())).toEqual([]);
    expect(await row(1)).toMatchObject({ state: 'published', attempts: 0, errorMessage: null });
    expect(await states()).toEqual(['published', 'parked']);
  });

  test('promotes nothing when order does not matter', async () => {
    await insertOfUser(2);
    expect(await bury(1, unordered)).toEqual([]);
    expect(await states()).toEqual(['dead', 'fresh']);
  });
});

describe('a failed attempt', () => {
  const fail = (id: number, attempts: number) =>
    outbox.recordFailure({ id: String(id), attempts, reason: `failure ${attempts}`, retryInMs: 120_000 });

  test('is mirrored on its row: how many, why, and when it is tried again', async () => {
    await insertOfUser(1);
    await claim();
    await fail(1, 1);
    expect(await row(1)).toMatchObject({ state: 'leased', attempts: 1, errorMessage: 'failure 1' });
    expect((await row(1)).msLeft).toBeGreaterThan(115_000);
  });

  test('that is told late never lowers the number of attempts', async () => {
    await insertOfUser(1);
    await claim();
    await fail(1, 3);
    await fail(1, 2);
    await outbox.recordFailure({ id: '1', attempts: 3, reason: 'again', retryInMs: 1 });
    expect(await row(1)).toMatchObject({ state: 'leased', attempts: 3, errorMessage: 'failure 3' });
  });

  test('that is quicker than the commit of its claim waits for it, and counts', async () => {
    await insertOfUser(1);
    let failed: Promise<unknown> = Promise.resolve();
    await outbox.transaction('repeatable', async (tx) => {
      await outbox.claimFresh(tx, 1);
      failed = fail(1, 1);
      await somebodyWaitsForALock();
    });
    await failed;
    expect(await row(1)).toMatchObject({ state: 'leased', attempts: 1, errorMessage: 'failure 1' });
    expect((await row(1)).msLeft).toBeGreaterThan(115_000);
  });

  test.each([
    ['published', PUBLISHED],
    ['dead', DEAD],
  ])('never touches a row that is %s', async (state, assignments) => {
    await insertOfUser(1);
    await set(1, assignments);
    await fail(1, 4);
    expect(await row(1)).toMatchObject({ state, attempts: 0, errorMessage: null });
  });
});

test('a dead row whose job was retried by hand is published, and not dead any more', async () => {
  await insertOfUser(2);
  await claim();
  await bury(1);
  await acknowledge([1]);
  expect(await states()).toEqual(['published', 'leased']);
});

describe('due rows', () => {
  const lockDue = (limit = 100) => outbox.transaction('repeatable', (tx) => outbox.lockDue(tx, limit));

  test('are those whose lease has ended, the longest overdue first', async () => {
    await insertEvents(pool, someEvents(8));
    await set(1, DUE);
    await set(2, `next_attempt_at = now() - interval '1 hour'`);
    await set(3, `next_attempt_at = '-infinity'`);
    await set(4, LEASED);
    await set(5, PARKED);
    await set(6, PUBLISHED);
    await set(7, DEAD);
    expect(idsOf(await lockDue())).toEqual(['3', '2', '1']);
    expect(idsOf(await lockDue(2))).toEqual(['3', '2']);
    expect((await lockDue())[0]).toEqual({
      ...{ id: '3', eventId: (await row(3)).eventId, topic: 'identity.user.v1', entryId: null },
    });
  });

  test('that somebody else looks at are skipped', async () => {
    await insertEvents(pool, someEvents(2));
    await set(1, DUE);
    await set(2, DUE);
    await outbox.transaction('repeatable', async (tx) => {
      await outbox.lockDue(tx, 1);
      expect(await lockDue()).toHaveLength(1);
    });
  });

  test('become fresh, or get another lease; a row that was settled meanwhile stays as it is', async () => {
    await insertEvents(pool, someEvents(6));
    for (const id of [1, 2]) await set(id, DUE);
    for (const id of [3, 4]) await set(id, PUBLISHED);
    for (const id of [5, 6]) await set(id, DEAD);
    await outbox.transaction('repeatable', async (tx) => {
      await outbox.returnToFresh(tx, ['1', '3', '5']);
      await outbox.extendLease(tx, ['2', '4', '6']);
    });
    expect(await states()).toEqual(['fresh', 'leased', 'published', 'published', 'dead', 'dead']);
    expect((await row(2)).msLeft).toBeGreaterThan(55_000);
  });

  test('are those whose job vanished, if they were leased', async () => {
    await insertEvents(pool, someEvents(6));
    const assignments = [LEASED, LEASED, PARKED, PUBLISHED, DEAD];
    for (const [at, assignment] of assignments.entries()) await set(at + 1, assignment);
    const vanished = async (ids: number[]) =>
      Promise.all(
        ids.map(async (id) => ({
          id: String(id),
          aggregateType: 'user',
          aggregateId: await aggregateOf(id),
        })),
      );
    await outbox.endLeasesOf(await vanished([1, 3, 4, 5, 6]));
    expect(await states()).toEqual(['due', 'leased', 'parked', 'published', 'dead', 'fresh']);
  });

  test('are those that may have been leased without a job, behind an event that was marked before', async () => {
    await insertOfUser(3);
    await insert({ aggregateId: OTHER_USER }, { aggregateId: OTHER_USER });
    await claim();
    await set(1, PUBLISHED);
    await set(2, LEASED);
    await set(4, `${LEASED}, attempts = 1`);
    const events = [
      { id: '1', ...ANYBODY },
      { id: '99', ...ANYBODY, aggregateId: OTHER_USER },
    ];
    await unordered.endLeasesOf(events);
    expect(await states()).toEqual(['published', 'leased', 'parked', 'leased', 'parked']);
    await outbox.endLeasesOf(events);
    expect(await states()).toEqual(['published', 'due', 'parked', 'leased', 'parked']);
  });

  test('are all that were leased, once Redis lost its jobs', async () => {
    await insertEvents(pool, someEvents(6));
    const assignments = [LEASED, LEASED, PARKED, PUBLISHED, DEAD];
    for (const [at, assignment] of assignments.entries()) await set(at + 1, assignment);
    expect(await outbox.endLeases()).toBe(2);
    expect(await states()).toEqual(['due', 'due', 'parked', 'published', 'dead', 'fresh']);
    expect(await outbox.endLeases()).toBe(0);
  });

  test('of a row that waits for its retry is left: its time comes', async () => {
    await insertEvents(pool, someEvents(2));
    for (const id of [1, 2]) await set(id, LEASED);
    await set(2, 'attempts = 1');
    expect(await outbox.endLeases()).toBe(1);
    expect(await states()).toEqual(['due', 'leased']);
  });
});

describe('an acknowledgement whose transaction failed when the job of the successor was there already', () => {
  /** As `acknowledge`, with the ids of rows whose turn has not come. */
  async function acknowledging(ids: number[], by = outbox, promoting = true) {
    let early: readonly string[] = [];
    const successors = await by.transaction('durable', (tx) =>
      by.markPublished(tx, ids.map(receipt), promoting, (them) => {
        early = them;
      }),
    );
    return { successors: idsOf(successors), early };
  }

  test('comes first: the successor, not leased now, gets no receipt before', async () => {
    await insertOfUser(3);
    await claim();
    expect(await acknowledging([2])).toEqual({ successors: [], early: ['2'] });
    expect(await acknowledging([2], outbox, false)).toEqual({ successors: [], early: ['2'] });
    expect(await states()).toEqual(['leased', 'parked', 'parked']);
    expect((await row(2)).streamEntryId).toBe(null);
    // Together with it, one after the other.
    expect(await acknowledging([2, 1])).toEqual({ successors: ['3'], early: [] });
    expect(await states()).toEqual(['published', 'published', 'leased']);
    const { rows } = await pool.query('SELECT id FROM identity.outbox WHERE published ORDER BY published_at');
    expect(rows.map(({ id }) => id)).toEqual(['1', '2']);
    await insertOfUser(2);
    expect(await acknowledging([5, 3])).toEqual({ successors: ['4'], early: ['5'] });
  });

  test('holds up no row whose turn has come, and none that is gone', async () => {
    await insertEvents(pool, someEvents(6));
    await set(1, LEASED);
    await set(2, DUE);
    await set(3, PUBLISHED);
    await set(4, DEAD);
    await pool.query('DELETE FROM identity.outbox WHERE id = 6');
    await insertOfUser(2);
    expect(await acknowledging([1, 2, 3, 4, 5, 6, 8])).toEqual({ successors: [], early: ['8'] });
    expect(await states()).toEqual([...Array(5).fill('published'), 'fresh', 'fresh']);
    expect(await acknowledging([8], unordered)).toEqual({ successors: [], early: [] });
  });

  test('is published before its successor by its time, too, though the other began earlier', async () => {
    await insertOfUser(2);
    await claim();
    const [begun, leased, waits] = [deferred(), deferred(), deferred()];
    const second = outbox.transaction('durable', async (tx) => {
      await tx.query('SELECT 1');
      begun.resolve();
      await leased.promise;
      const marked = outbox.markPublished(tx, [receipt(2)]);
      waits.resolve();
      return marked;
    });
    await begun.promise;
    await outbox.transaction('durable', async (tx) => {
      expect(idsOf(await outbox.markPublished(tx, [receipt(1)]))).toEqual(['2']);
      leased.resolve();
      await waits.promise;
      await waitFor(
        async () =>
          (await pool.query(`SELECT count(*)::int AS n FROM pg_stat_activity WHERE wait_event_type = 'Lock'`))
            .rows[0].n === 1,
        { what: 'the other one to wait' },
      );
    });
    await second;
    const { rows } = await pool.query('SELECT id FROM identity.outbox ORDER BY published_at');
    expect(rows.map(({ id }) => id)).toEqual(['1', '2']);
  });
});

describe('an event that came along with those before it', () => {
  const mark = (receipts: Receipt[], onEarly: (ids: readonly string[]) => void = () => {}) =>
    outbox.transaction('durable', (tx) => outbox.markPublished(tx, receipts, true, onEarly));
  const led = (id: number) => ({ ...receipt(id), chained: 'before' as const });
  const last = (id: number) => ({ ...receipt(id), chained: 'after' as const });

  test('brings them their receipts, and the aggregate goes on behind it', async () => {
    await insertOfUser(4);
    await claim();
    expect(idsOf(await mark([led(1), led(2), last(3)]))).toEqual(['4']);
    expect(await states()).toEqual(['published', 'published', 'published', 'leased']);
    expect((await row(2)).streamEntryId).toBe(receipt(2).entryId);
  });

  test('changes nothing of those that have theirs, nor of dead ones', async () => {
    await insertOfUser(4);
    await claim();
    await set(1, `${PUBLISHED}, stream_entry_id = '9-9'`);
    await set(2, `${DEAD}, stream_entry_id = '8-8'`);
    const early: string[] = [];
    expect(idsOf(await mark([led(1), led(2), last(3)], (ids) => void early.push(...ids)))).toEqual(['4']);
    expect(await states()).toEqual(['published', 'dead', 'published', 'leased']);
    expect([(await row(1)).streamEntryId, (await row(2)).streamEntryId, early]).toEqual(['9-9', '8-8', []]);
  });

  test('does so where there is no next one to be leased as well', async () => {
    await insertOfUser(2);
    await claim();
    await outbox.transaction('durable', (tx) => outbox.markPublished(tx, [led(1), last(2)], false));
    expect(await states()).toEqual(['published', 'published']);
  });
});

describe('jobs that are added while their rows are live', () => {
  test('are those of rows that are, and nobody publishes these meanwhile', async () => {
    await insertEvents(pool, someEvents(4));
    const { leased } = await claim();
    await set(1, PUBLISHED);
    await set(2, DEAD);
    const added: string[] = [];
    let published = false;
    let publishing: Promise<unknown> | undefined;
    await outbox.whileLive(leased, async (live) => {
      publishing = acknowledge([3]).then(() => {
        published = true;
      });
      await waitFor(
        async () =>
          (await pool.query(`SELECT count(*)::int AS n FROM pg_stat_activity WHERE wait_event_type = 'Lock'`))
            .rows[0].n === 1,
        { what: 'the acknowledgement to wait' },
      );
      added.push(...idsOf(live), String(published));
    });
    await publishing;
    expect(added).toEqual(['3', '4', 'false']);
    await outbox.whileLive(leased.slice(0, 3), () => Promise.reject(new Error('nobody is left')));
  });
});

describe('reading ahead', () => {
  const ahead = async (after: OutboxEvent[], limit = 10, maxBytes = 10_000) =>
    idsOf(await outbox.readAhead(after, limit, maxBytes));

  test('finds what comes next and waits, a few of each aggregate, and changes nothing', async () => {
    await insertOfUser(5);
    await insert({ aggregateId: OTHER_USER }, {}, { aggregateId: OTHER_USER });
    const { leased } = await claim();
    await set(3, 'next_attempt_at = NULL');
    const [first, other, single] = leased as [OutboxEvent, OutboxEvent, OutboxEvent];
    const states_ = await states();
    expect(await ahead([first, other, single], 3)).toEqual(['2', '3', '4', '8']);
    expect(await outbox.readAhead([first], 1, 10_000)).toMatchObject([
      { id: '2', ...ANYBODY, payload: expect.stringContaining('tenant_id') },
    ]);
    expect(await states()).toEqual(states_);
  });

  test.each([
    ['is on its way', LEASED],
    ['is due', DUE],
    ['was refused before', `${PARKED}, attempts = 1`],
  ])('ends before a row that %s', async (_, assignments) => {
    await insertOfUser(5);
    const { leased } = await claim();
    await set(4, assignments);
    expect(await ahead(leased)).toEqual(['2', '3']);
  });

  test('takes no more than so many bytes', async () => {
    await insertOfUser(4);
    const { leased } = await claim();
    const { rows } = await pool.query(
      'SELECT pg_column_size(payload) AS bytes FROM identity.outbox WHERE id = 2',
    );
    expect(await ahead(leased, 10, 2 * rows[0].bytes + 20)).toEqual(['2', '3']);
    expect(await ahead(leased, 10, 10)).toEqual([]);
  });
});

test('rows wait until they are published, dead or gone; those that failed wait for a retry', async () => {
  await insertOfUser(4);
  await set(1, PUBLISHED);
  await set(2, DEAD);
  expect(await outbox.waiting(['1', '2', '99'])).toBe('none');
  expect(await outbox.waiting(['1', '3'])).toBe('some');
  await set(4, 'attempts = 1');
  expect(await outbox.waiting(['3', '4'])).toBe('for-retry');
});

describe('a row that is parked behind nobody', () => {
  test('arises when a claim and an acknowledgement do not see each other, and is released after both', async () => {
    await insertOfUser(1);
    await claim();
    await outbox.transaction('durable', async (acknowledging) => {
      // Its snapshot is older than B, so it finds no successor.
      expect(await outbox.markPublished(acknowledging, [receipt(1)])).toEqual([]);
      await insertOfUser(1);
      // A is not yet published for anybody else, so B is parked behind it.
      expect(await claim()).toMatchObject({ leased: [], parked: [ANYBODY] });
      // The one that commits first looks in vain …
      expect(await outbox.releaseOrphans([ANYBODY])).toBe(0);
    });
    expect(await states()).toEqual(['published', 'parked']);
    // … the one that commits last finds it.
    expect(await outbox.releaseOrphans([ANYBODY])).toBe(1);
    expect(await states()).toEqual(['published', 'fresh']);
    expect(idsOf((await claim()).leased)).toEqual(['2']);
  });

  test('arises from a dead letter in the same way', async () => {
    await insertOfUser(1);
    await claim();
    await outbox.transaction('durable', async (burying) => {
      await outbox.markDead(burying, { ...receipt(1), attempts: 1, reason: 'x' });
      await insertOfUser(1);
      await claim();
    });
    expect(await states()).toEqual(['dead', 'parked']);
    expect(await outbox.releaseOrphans([ANYBODY])).toBe(1);
    expect(await states()).toEqual(['dead', 'fresh']);
  });

  test('is released alone: those behind it go on waiting, for it', async () => {
    await insertOfUser(4);
    await set(1, PUBLISHED);
    for (const id of [2, 3, 4]) await set(id, PARKED);
    expect(await outbox.releaseOrphans([ANYBODY])).toBe(1);
    expect(await outbox.releaseOrphans([ANYBODY])).toBe(0);
    expect(await states()).toEqual(['published', 'fresh', 'parked', 'parked']);
  });

  test.each([
    ['leased', LEASED],
    ['due', DUE],
    ['fresh', 'next_attempt_at = NULL'],
  ])('is none while an earlier one is %s', async (state, assignments) => {
    await insertOfUser(2);
    await set(1, assignments);
    await set(2, PARKED);
    expect(await outbox.releaseOrphans([ANYBODY])).toBe(0);
    expect(await states()).toEqual([state, 'parked']);
  });

  test('is none behind a dead row that holds its aggregate, until that one is published', async () => {
    await insertOfUser(2);
    await set(1, DEAD);
    await set(2, PARKED);
    expect(await holding.releaseOrphans([ANYBODY])).toBe(0);
    expect(await states()).toEqual(['dead', 'parked']);
    await set(1, `${PUBLISHED}, dead_lettered_at = NULL`);
    expect(await holding.releaseOrphans([ANYBODY])).toBe(1);
  });

  test('is released behind a dead row where its aggregate goes on, but a dead row is not', async () => {
    await insertOfUser(3);
    await set(1, DEAD);
    await set(2, PARKED);
    await set(3, DEAD);
    expect(await outbox.releaseOrphans([ANYBODY, { aggregateType: 'none', aggregateId: USER }])).toBe(1);
    expect(await states()).toEqual(['dead', 'fresh', 'dead']);
  });
});

describe('aggregates with parked rows', () => {
  test('are listed once each, from the cursor on, however many rows each has', async () => {
    await insertEvents(pool, someEvents(300, 30, { aggregateType: 'b' }));
    await insertEvents(pool, someEvents(4, 2, { aggregateType: 'a' }));
    await insertEvents(pool, someEvents(3, 3, { aggregateType: 'nothing parked' }));
    await claim(1_000);
    const { rows: expected } = await pool.query(
      `SELECT DISTINCT aggregate_type AS "aggregateType", aggregate_id AS "aggregateId" FROM identity.outbox
        WHERE aggregate_type IN ('a', 'b') ORDER BY 1, 2`,
    );
    expect(expected).toHaveLength(32);
    expect(await outbox.parkedAggregates(null, 100)).toEqual(expected);
    expect(await outbox.parkedAggregates(null, 5)).toEqual(expected.slice(0, 5));
    expect(await outbox.parkedAggregates(expected[4], 10)).toEqual(expected.slice(5, 15));
    expect(await outbox.parkedAggregates(expected[31], 10)).toEqual([]);
  });

  test('do not count dead or published rows', async () => {
    await insertEvents(pool, someEvents(2));
    await set(1, DEAD);
    await set(2, PUBLISHED);
    expect(await outbox.parkedAggregates(null, 10)).toEqual([]);
  });
});

test('without order, rows that were parked become fresh, some at a time; dead ones stay dead', async () => {
  await insertOfUser(4);
  for (const id of [1, 2, 3]) await set(id, PARKED);
  await set(4, DEAD);
  expect(await unordered.unparkAll(2)).toBe(2);
  expect(await unordered.unparkAll(2)).toBe(1);
  expect(await unordered.unparkAll(2)).toBe(0);
  expect(await states()).toEqual(['fresh', 'fresh', 'fresh', 'dead']);
});

test('an event is unsettled until its row is published, dead or gone', async () => {
  await insertEvents(pool, someEvents(6));
  const assignments = [LEASED, DUE, PARKED, PUBLISHED, DEAD];
  for (const [at, assignment] of assignments.entries()) await set(at + 1, assignment);
  const ids = (await readRows(pool)).map((it) => it.eventId);
  const unsettled = await outbox.unsettled([...ids, randomUUID()]);
  expect(unsettled.sort()).toEqual([ids[0], ids[1], ids[2], ids[5]].sort());
  expect(await outbox.unsettled([])).toEqual([]);
});

async function somebodyWaitsForALock(): Promise<void> {
  await waitFor(
    async () =>
      (
        await pool.query(
          `SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`,
        )
      ).rowCount,
    { what: 'a transaction to wait for a lock' },
  );
}
