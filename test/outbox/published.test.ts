import { randomUUID } from 'node:crypto';
import type pg from 'pg';
import { describe, expect, test } from 'vitest';
import type { Pool } from '../../src/connections/database.ts';
import { createOutbox } from '../../src/outbox/outbox.ts';
import type { FinalizedRow } from '../../src/outbox/published.ts';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import {
  DEAD,
  DISCARDED,
  FRESH,
  idsOf,
  LEASED,
  OUTBOX_OPTIONS,
  openOutboxTable,
  PARKED,
  PUBLISHED,
  RETRYING,
} from '../support/outbox-table.ts';

const table = await openOutboxTable();
const { admin, outbox, claim, insertOf, set, states, row, rows, names, publish, bury } = table;

const USER = randomUUID();
const BEGINNING = { finalizedAt: '-infinity', id: '-1' };

const publishedAt = (time: string, entryId = '1-1') =>
  `published = true, published_at = '${time}', stream_entry_id = '${entryId}'`;
const deadAt = (time: string, entryId = '2-2') =>
  `dead_lettered_at = '${time}', next_attempt_at = 'infinity', stream_entry_id = '${entryId}'`;
/** The named rows as the comparison finds them, with the entries that they have. */
const finalized = async (...ids: number[]): Promise<FinalizedRow[]> => {
  const found = await outbox.finalizedRows(BEGINNING, 'infinity', 1_000);
  return ids.map((id) => found.find((it) => it.id === String(id)) as FinalizedRow);
};

describe('rows that have an entry', () => {
  test('are given by the time at which they were published or given up, those of one time by id', async () => {
    await insertEvents(admin, someEvents(6));
    await set(1, publishedAt('2026-01-03T00:00:00Z'));
    await set(2, deadAt('2026-01-01T00:00:00.000001Z'));
    await set(3, publishedAt('2026-01-01T00:00:00Z', '3-0'));
    await set(4, publishedAt('2026-01-01T00:00:00Z', '4-0'));
    await set(5, publishedAt('2025-12-31T00:00:00Z'));
    await set(6, publishedAt('2026-01-04T00:00:00Z'));
    await set(4, `topic = NULL`);
    const after = { finalizedAt: '2025-12-31T00:00:00Z', id: '5' };
    const found = await outbox.finalizedRows(after, '2026-01-03T00:00:00Z', 10);
    expect(idsOf(found)).toEqual(['3', '4', '2', '1']);
    expect(found).toMatchObject([
      { eventId: (await row(3)).eventId, topic: 'identity.user.v1', entryId: '3-0' },
      { topic: 'default.stream', entryId: '4-0' },
      { topic: null, entryId: '2-2' },
      { topic: 'identity.user.v1' },
    ]);
  });

  test('are walked page by page without one being missed or met twice', async () => {
    await insertEvents(admin, someEvents(25));
    await claim();
    await publish(...Array.from({ length: 20 }, (_, i) => i + 1));
    for (const id of [21, 22]) await bury(id);
    const met: string[] = [];
    for (let after = BEGINNING; ; ) {
      const page = await outbox.finalizedRows(after, 'infinity', 3);
      met.push(...idsOf(page));
      const last = page.at(-1);
      if (last === undefined) break;
      after = last;
    }
    expect(met.sort()).toEqual(Array.from({ length: 22 }, (_, i) => String(i + 1)).sort());
  });

  test('are no live ones, none that are discarded, and none of another system', async () => {
    await insertOf(
      USER,
      FRESH,
      LEASED,
      RETRYING,
      PARKED,
      DISCARDED,
      'published = true, published_at = now()',
    );
    expect(await outbox.finalizedRows(BEGINNING, 'infinity', 10)).toEqual([]);
  });

  test('can be narrowed to those in the streams of topics, and by what their events are', async () => {
    const account = { aggregateType: 'account', aggregateId: USER };
    await insertEvents(admin, [
      anEvent({ ...account, eventType: 'A', topic: 'one' }),
      anEvent({ eventType: 'B', topic: 'two' }),
      anEvent({ eventType: 'B', topic: null }),
      anEvent({ eventType: 'B', topic: 'two' }),
    ]);
    for (const id of [1, 2, 3]) await set(id, publishedAt('2026-01-01T00:00:00.000001Z'));
    await set(4, deadAt('2026-01-01T00:00:00Z'));
    const match = async (filter: Parameters<typeof outbox.publishedRows>[0]) =>
      idsOf(await outbox.publishedRows(filter, BEGINNING, 'infinity', 10));
    expect(await match({})).toEqual(['1', '2', '3']);
    expect(await match({ topic: 'two' })).toEqual(['2']);
    expect(await match({ topic: 'default.stream' })).toEqual(['3']);
    expect(await match({ eventType: 'B' })).toEqual(['2', '3']);
    expect(await match(account)).toEqual(['1']);
    expect(await match({ ...account, aggregateType: 'user' })).toEqual([]);
    const [first] = await outbox.publishedRows({}, BEGINNING, 'infinity', 1);
    expect(first).toMatchObject({ finalizedUs: '1767225600000001', bytes: expect.any(Number) });
  });
});

describe('the events of rows that have an entry', () => {
  test('are given as they were published, in order of id', async () => {
    await insertOf(USER, PUBLISHED, DEAD, LEASED, FRESH, PUBLISHED);
    await set(2, `attempts = 6, error_message = 'no permission'`);
    const events = await outbox.finalizedEvents(['5', '4', '3', '2', '1', '77']);
    expect(events).toMatchObject([
      { id: '1', payload: expect.stringContaining('tenant_id'), withheld: null, deadLetteredAt: null },
      {
        ...{ id: '2', attempts: 6, errorMessage: 'no permission' },
        deadLetteredAt: expect.any(Date),
      },
      { id: '5', aggregateId: USER },
    ]);
  });

  test('of rows that are neither published nor dead with a dead letter are those alone', async () => {
    await insertOf(
      USER,
      PUBLISHED,
      DEAD,
      `${DEAD_WITHOUT_LETTER}, attempts = 6, error_message = 'x'`,
      LEASED,
    );
    expect(await outbox.unfinishedEvents(['1', '2', '3', '4', '77'])).toMatchObject([
      { id: '3', attempts: 6, errorMessage: 'x', deadLetteredAt: expect.any(Date) },
      { id: '4', deadLetteredAt: null },
    ]);
  });

  test('have their payload withheld where PostgreSQL cannot print it, and only there', async () => {
    await insertOf(USER, PUBLISHED, `${DEAD}, error_message = 'cannot be printed'`, PUBLISHED);
    const failing = createOutbox(failingOn('2'), OUTBOX_OPTIONS);
    expect(await failing.finalizedEvents(['1', '2', '3'])).toMatchObject([
      { id: '1', withheld: null },
      { id: '2', withheld: 'cannot be printed', payload: 'null' },
      { id: '3', withheld: null },
    ]);
  });
});

describe('when Redis has lost their entries', () => {
  test('published rows are fresh, as if they were new, but the claim looks for their jobs', async () => {
    await insertOf(USER, PUBLISHED, PUBLISHED, PUBLISHED);
    await set(1, `attempts = 3, error_message = 'failure 3'`);
    const lost = await finalized(1, 3);
    expect(await outbox.unpublish(lost)).toBe(2);
    expect(await states()).toEqual(['fresh', 'published', 'fresh']);
    expect(await row(1)).toMatchObject({ attempts: 0, errorMessage: null, streamEntryId: null });
    expect((await claim()).leased).toMatchObject([
      { id: '1', after: null, mayHaveJob: true },
      { id: '3', mayHaveJob: true },
    ]);
    expect(await outbox.unpublish(lost)).toBe(0);
  });

  test('they come before the later events of their aggregate', async () => {
    await insertOf(USER, PUBLISHED, PUBLISHED, LEASED, FRESH);
    await outbox.unpublish(await finalized(1, 2));
    const [first, second, third] = (await rows()).map((it) => it.eventId);
    const gate = await outbox.standingOf([{ eventId: third as string, before: null }]);
    expect(gate.get(third as string)?.kind).toBe('unclaimed');
    expect((await claim()).leased).toMatchObject([
      { id: '1', after: null },
      { id: '2', after: first },
      { id: '4', after: third },
    ]);
    expect(second).toBeDefined();
  });

  test('dead rows stay dead and expire, so that the reaper writes their letters', async () => {
    await insertOf(USER, `${DEAD}, attempts = 6, error_message = 'no permission'`, DEAD);
    const { deadLetteredAt } = await row(1);
    expect(await outbox.unpublish(await finalized(1))).toBe(1);
    expect(await row(1)).toMatchObject({
      ...{ state: 'dead', streamEntryId: null, attempts: 6, errorMessage: 'no permission', deadLetteredAt },
    });
    const expired = await outbox.expired(10);
    expect(expired).toMatchObject([{ id: '1', isDead: true }]);
    expect(await states()).toEqual(['dead', 'dead']);
  });

  test.each([
    ['has another entry by now', PUBLISHED, `stream_entry_id = '9-9'`],
    ['is discarded by now', DEAD, 'published = true, published_at = now(), next_attempt_at = NULL'],
    ['was replayed, and is leased', DEAD, `dead_lettered_at = NULL, ${LEASED}`],
    ['was replayed, and is published', DEAD, `${PUBLISHED.replace('1-1', '9-9')}, dead_lettered_at = NULL`],
  ])('a row stays as it is that %s', async (_what, before, now) => {
    await insertOf(USER, before);
    const lost = await finalized(1);
    await set(1, now);
    const all = await rows();
    expect(await outbox.unpublish(lost)).toBe(0);
    expect((await rows()).map(({ msLeft: _, ...it }) => it)).toEqual(all.map(({ msLeft: _, ...it }) => it));
  });

  test('a row that holds another event under that id stays as it is', async () => {
    await insertOf(USER, PUBLISHED);
    const [lost] = (await finalized(1)) as [FinalizedRow];
    await table.empty();
    await insertOf(USER, PUBLISHED);
    expect(await names(1)).toMatchObject([{ id: lost.id }]);
    expect(await outbox.unpublish([lost])).toBe(0);
    expect(await states()).toEqual(['published']);
  });
});

describe('a comparison begins', () => {
  const since = async (windowMs: number, checkpoint: string | null) =>
    Date.parse(await outbox.comparedFrom(windowMs, checkpoint));
  const HOUR_MS = 3_600_000;

  test('as far back as its window reaches, by the clock of the database', async () => {
    const now = Date.parse(await outbox.ago(0));
    expect(await since(HOUR_MS, null)).toBeGreaterThanOrEqual(now - HOUR_MS - 1_000);
    expect(await since(HOUR_MS, null)).toBeLessThan(now - HOUR_MS + 600_000);
    expect(await since(HOUR_MS, '2020-01-01T00:00:00Z')).toBeGreaterThanOrEqual(now - HOUR_MS - 1_000);
  });

  test('where nothing was lost until then, a little before that: clocks may step back', async () => {
    const checkpoint = await outbox.ago(0);
    expect(await since(HOUR_MS, checkpoint)).toBe(Date.parse(checkpoint) - 5_000);
  });
});

const DEAD_WITHOUT_LETTER = `dead_lettered_at = now(), next_attempt_at = now()`;

/** The relay's pool; a statement that prints the payload of this row fails as one that prints too much. */
function failingOn(id: string): Pool {
  const { relay } = table;
  return {
    query: relay.query.bind(relay),
    connect: async () => {
      const client = await relay.connect();
      const query = (config: pg.QueryConfig) => {
        const prints = config.text.includes('payload') && !config.text.includes('WHERE false OFFSET 0');
        if (prints && (config.values?.[1] as string[] | undefined)?.includes(id))
          throw Object.assign(new Error('out of memory'), { code: '54000' });
        return client.query(config);
      };
      return Object.create(client, { query: { value: query } });
    },
  } as Pool;
}
