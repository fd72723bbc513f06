import { beforeEach, describe, expect, test } from 'vitest';
import type { AppendOutcome } from '../../src/event.ts';
import type { LeasedEvent } from '../../src/outbox/outbox.ts';
import type { FinalizedRow } from '../../src/outbox/published.ts';
import {
  type ComparisonRange,
  createCompare,
  createRecoverLostData,
  type Found,
  totals,
} from '../../src/recovery/lost-data.ts';
import { keysOf } from '../../src/streams/epoch-script.ts';
import { openContext } from '../support/context.ts';
import { insertEvents, someEvents } from '../support/events.ts';
import { deferred, readRows, readStates, silent } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const WORDS = 'dictionary.word.v1';
const WINDOW_MS = 3_600_000;
const NOTES = keysOf('bull:relay:epoch').lastEntries;
const NOTHING: Found = { rows: 0, lost: 0, unpublished: 0, trimmed: 0, unreadable: 0 };

const stage = await openContext({ RELAY_CLAIM_LEASE: '60' });
const { pool, redis, context } = stage;
const { outbox, lookup } = context;
const { streamName: STREAM, dlqStreamName: DLQ } = stage.config;

/** Nobody but the test compares: the epoch would see that a stream is gone. */
beforeEach(async () => {
  await stage.clear();
  await context.epoch.stop();
});

type RecoverDeps = Parameters<typeof createRecoverLostData>[0];
type CompareDeps = Parameters<typeof createCompare>[0];

const compareWith = (deps: Partial<CompareDeps> = {}) =>
  createCompare({ published: outbox, lookup, dlqStreamName: DLQ, ...deps });

const compare = (range: Partial<ComparisonRange> = {}, deps: Partial<CompareDeps> = {}) =>
  compareWith(deps)({ since: '2020-01-01T00:00:00Z', until: 'infinity', ...range });

/** As the epoch has it done when Redis may have lost data; answers what was found. */
async function recover(
  checkpoint: string | null = null,
  deps: Partial<RecoverDeps> & Partial<CompareDeps> = {},
) {
  const found: Found[] = [];
  await createRecoverLostData({
    ...{
      outbox,
      memory: context.memory,
      findForgotten: async () => {},
      compare: compareWith(deps),
      windowMs: WINDOW_MS,
      logger: silent,
    },
    onRecovered: (it) => void found.push(it),
    ...deps,
  })({ checkpoint, forgotten: false, confirm: async () => {} });
  return found[0];
}

type Appended = LeasedEvent & Readonly<{ entryId: string }>;

/** Events that were published, with their entry ids, in order. */
async function published(events = someEvents(4)): Promise<Appended[]> {
  await insertEvents(pool, events);
  const all: Appended[] = [];
  for (const event of await stage.claim()) {
    const entryId = await stage.append(event);
    await outbox.inEpoch((tx) => outbox.markPublished(tx, [{ ...event, entryId }]));
    context.memory.forget([event.eventId]);
    await context.queues.remove(event.eventId);
    all.push({ ...event, entryId });
  }
  return all;
}

/** A dead row with its dead letter. */
async function dead(): Promise<Appended> {
  await insertEvents(pool, someEvents(1));
  const [event] = (await stage.claim()) as [LeasedEvent];
  const failedAt = new Date('2026-01-02T03:04:05.678Z');
  const failure = { event, attempts: 6, reason: 'WRONGTYPE', failedAt };
  const { entryId } = (await context.streams.deadLetter(failure, null)) as AppendOutcome & {
    entryId: string;
  };
  const { id, eventId } = event;
  await outbox.inEpoch((tx) =>
    outbox.markDead(tx, { id, eventId, attempts: 6, reason: 'WRONGTYPE', entryId }),
  );
  await context.queues.remove(eventId);
  return { ...event, entryId };
}

const everything = async () => (await pool.query('SELECT * FROM identity.outbox ORDER BY id')).rows;

describe('rows whose entries are missing', () => {
  test('are fresh again, as if they were new, and only they', async () => {
    const [first, second, third, word] = (await published([
      ...someEvents(3),
      ...someEvents(1, 1, { topic: WORDS }),
    ])) as [Appended, Appended, Appended, Appended];
    await pool.query('UPDATE identity.outbox SET attempts = 2, error_message = $1', ['before']);
    await redis.xdel(STREAM, second.entryId, third.entryId);
    await redis.del(WORDS);
    expect(await recover()).toEqual({ ...NOTHING, rows: 4, lost: 3, unpublished: 3 });
    const fresh = { state: 'fresh', attempts: 0, errorMessage: null, streamEntryId: null };
    expect(await readRows(pool)).toMatchObject([
      { state: 'published', streamEntryId: first.entryId, attempts: 2 },
      // The claim knows by it that there may be a job of before.
      { ...fresh, publishedAt: expect.any(Date) },
      fresh,
      fresh,
    ]);
    expect(word.entryId).toMatch(/^\d+-\d+$/);
    expect(await recover()).toEqual({ ...NOTHING, rows: 1 });
  });

  test('are all of them when the stream is gone, or another one is in its place', async () => {
    await published();
    await redis.del(STREAM);
    await redis.xgroup('CREATE', STREAM, 'consumers', '$', 'MKSTREAM');
    expect(await recover()).toEqual({ ...NOTHING, rows: 4, lost: 4, unpublished: 4 });
    await redis.del(NOTES);
    await published(someEvents(1));
    await redis.del(STREAM);
    expect(await recover()).toEqual({ ...NOTHING, rows: 5, lost: 5, unpublished: 5 });
  });

  test('are those whose id another event has by now', async () => {
    const [first, second] = (await published(someEvents(2))) as [Appended, Appended];
    await redis.del(STREAM);
    await redis.xadd(STREAM, first.entryId, 'event_id', second.eventId);
    expect(await recover()).toMatchObject({ rows: 2, lost: 2, unpublished: 2 });
  });

  test('are not those of what was trimmed, were it everything', async () => {
    const events = await published();
    await redis.xtrim(STREAM, 'MAXLEN', 2);
    const before = await everything();
    expect(await recover()).toEqual({ ...NOTHING, rows: 4, trimmed: 2 });
    await redis.xdel(STREAM, events.at(-1)?.entryId ?? '');
    await redis.xtrim(STREAM, 'MAXLEN', 0);
    expect(await recover()).toEqual({ ...NOTHING, rows: 4, trimmed: 4 });
    expect(await everything()).toEqual(before);
  });

  test('are not those of a stream that cannot be read: they are counted, and others are compared', async () => {
    const [, , lost] = (await published([...someEvents(1), ...someEvents(2, 2, { topic: WORDS })])) as [
      Appended,
      Appended,
      Appended,
    ];
    await redis.xdel(WORDS, lost.entryId);
    await redis.set(STREAM, 'a string');
    expect(await compare({ onLost: outbox.unpublish })).toEqual(
      new Map([
        [STREAM, { ...NOTHING, rows: 1, unreadable: 1 }],
        [WORDS, { ...NOTHING, rows: 2, lost: 1, unpublished: 1 }],
      ]),
    );
    expect(await readStates(pool)).toEqual(['published', 'published', 'fresh']);
  });

  test('are no others beside a forged entry id', async () => {
    await published(someEvents(6));
    const forged = ['garbage', '-', '+', '(1-1', '18446744073709551615-99'];
    for (const [i, entryId] of forged.entries())
      await pool.query('UPDATE identity.outbox SET stream_entry_id = $2 WHERE id = $1', [i + 1, entryId]);
    expect(await recover()).toMatchObject({ rows: 6, lost: 5, unpublished: 5, unreadable: 0 });
    expect(await readStates(pool)).toEqual([...Array(5).fill('fresh'), 'published']);
  });

  test('are found however many rows there are, of one moment as well', async () => {
    const COUNT = 2_345;
    await pool.query(
      `INSERT INTO identity.outbox (event_type, aggregate_id, payload, published, published_at, stream_entry_id)
       SELECT 'UserCreated', gen_random_uuid(), '{}', true, now(), n || '-1' FROM generate_series(1, $1) n`,
      [COUNT],
    );
    const adding = redis.pipeline();
    for (const { stream_entry_id, event_id } of await everything())
      if (!['7-1', '1000-1', '1001-1', '2345-1'].includes(stream_entry_id))
        adding.xadd(STREAM, stream_entry_id, 'event_id', event_id);
    await adding.exec();
    const pages: number[] = [];
    const reading = {
      async finalizedRows(...args: Parameters<typeof outbox.finalizedRows>) {
        const page = await outbox.finalizedRows(...args);
        pages.push(page.length);
        return page;
      },
    };
    expect(await recover(null, { published: reading })).toMatchObject({
      ...{ rows: COUNT, lost: 4, unpublished: 4 },
    });
    expect(pages).toEqual([1_000, 1_000, 345]);
    const fresh = (await readRows(pool)).filter((row) => row.state === 'fresh');
    expect(fresh.map((row) => row.id)).toEqual(['7', '1000', '1001', '2345']);
  });

  test('stay as they are when they changed meanwhile', async () => {
    const [event] = (await published(someEvents(1))) as [Appended];
    const letter = await dead();
    const replayed = await dead();
    await redis.del(STREAM, DLQ);
    const changing = {
      async absent(...args: Parameters<typeof lookup.absent<FinalizedRow>>) {
        const absent = await lookup.absent(...args);
        await pool.query('UPDATE identity.outbox SET stream_entry_id = $2 WHERE id = $1', [event.id, '9-9']);
        // The dead one is published after all, and the other one is replayed.
        await pool.query(
          `UPDATE identity.outbox SET published = true, published_at = now(), dead_lettered_at = NULL,
                  next_attempt_at = NULL, stream_entry_id = '9-8' WHERE id = $1`,
          [letter.id],
        );
        await pool.query(
          'UPDATE identity.outbox SET dead_lettered_at = NULL, next_attempt_at = NULL, attempts = 0 WHERE id = $1',
          [replayed.id],
        );
        return absent;
      },
    } as Pick<typeof lookup, 'absent'>;
    expect(await recover(null, { lookup: changing })).toMatchObject({ lost: 3, unpublished: 0 });
    expect(await readRows(pool)).toMatchObject([
      { state: 'published', streamEntryId: '9-9' },
      { state: 'published', streamEntryId: '9-8' },
      { state: 'fresh', streamEntryId: replayed.entryId },
    ]);
  });

  test('are those of an acknowledgement that commits when the comparison has begun', async () => {
    await insertEvents(pool, someEvents(1));
    const [event] = (await stage.claim()) as [LeasedEvent];
    const [marked, release] = [deferred(), deferred()];
    const acknowledged = outbox.inEpoch(async (tx) => {
      await outbox.markPublished(tx, [{ ...event, entryId: '5-5' }]);
      marked.resolve();
      await release.promise;
    });
    await marked.promise;
    const found = recover();
    await waitFor(
      async () => {
        const { rowCount } = await pool.query(
          `SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'relation'`,
        );
        return rowCount === 1;
      },
      { what: 'the comparison to wait' },
    );
    release.resolve();
    await acknowledged;
    expect(await found).toMatchObject({ rows: 1, lost: 1, unpublished: 1 });
    expect(await readStates(pool)).toEqual(['fresh']);
  });
});

describe('dead rows whose dead letters are missing', () => {
  test('have none, and expire: the lease reaper writes it again; they stay dead, with their reason', async () => {
    const kept = await dead();
    const lost = await dead();
    await redis.xdel(DLQ, lost.entryId);
    const [before] = (await readRows(pool)).slice(1);
    expect(await recover()).toEqual({ ...NOTHING, rows: 2, lost: 1, unpublished: 1 });
    const [first, second] = await readRows(pool);
    expect(first).toMatchObject({ state: 'dead', streamEntryId: kept.entryId });
    expect(second).toMatchObject({
      ...{ attempts: 6, errorMessage: 'WRONGTYPE', streamEntryId: null },
      ...{ deadLetteredAt: before?.deadLetteredAt, publishedAt: null },
    });
    expect(second?.msLeft).toBeLessThanOrEqual(0);
    expect(await outbox.expired(10)).toMatchObject([{ eventId: lost.eventId, isDead: true }]);
  });

  test('are left alone when an operator has discarded them: nothing of them is to be anywhere', async () => {
    await dead();
    await pool.query(
      'UPDATE identity.outbox SET published = true, published_at = now(), next_attempt_at = NULL',
    );
    await redis.del(DLQ);
    const before = await everything();
    expect(await recover()).toMatchObject({ unpublished: 0 });
    expect(await everything()).toEqual(before);
    // As the relay discards: without an entry id.
    await pool.query('UPDATE identity.outbox SET stream_entry_id = NULL');
    expect(await recover()).toEqual(NOTHING);
  });
});

describe('when Redis may have lost data', () => {
  test('leases end, since jobs may be lost; those of retries do not, and what is parked or fresh stays', async () => {
    await pool.query(
      `INSERT INTO identity.outbox (event_type, aggregate_id, payload, attempts, next_attempt_at) VALUES
         ('UserCreated', gen_random_uuid(), '{}', 0, now() + interval '1 h'),
         ('UserCreated', gen_random_uuid(), '{}', 1, now() + interval '1 h'),
         ('UserCreated', gen_random_uuid(), '{}', 0, 'infinity'),
         ('UserCreated', gen_random_uuid(), '{}', 0, NULL)`,
    );
    await recover();
    const rows = await readRows(pool);
    expect(rows[0]?.msLeft).toBeLessThanOrEqual(0);
    expect(rows.slice(1).map((row) => row.state)).toEqual(['leased', 'parked', 'fresh']);
  });

  test('the rows of the window are compared, or of the time in which something can be lost', async () => {
    await published(someEvents(3));
    await redis.del(STREAM);
    await pool.query(`UPDATE identity.outbox SET published_at = now() - ($1::int[])[id] * interval '1 s'`, [
      [2 * (WINDOW_MS / 1_000), WINDOW_MS / 2_000, 0],
    ]);
    const at = async (secondsAgo: number) =>
      (await pool.query(`SELECT (now() - $1 * interval '1 s')::text AS at`, [secondsAgo])).rows[0].at;
    // All but the last few seconds of the clock, which may have stepped back.
    expect(await recover(await at(60))).toMatchObject({ rows: 1, unpublished: 1 });
    expect(await recover(await at(10 * (WINDOW_MS / 1_000)))).toMatchObject({ rows: 1, unpublished: 1 });
    expect(await recover()).toEqual(NOTHING);
    expect(await readStates(pool)).toEqual(['published', 'fresh', 'fresh']);
  });

  test('a row that was published a moment before the last stamp is compared: the database’s clock may step back', async () => {
    await published(someEvents(1));
    await redis.del(STREAM);
    const { rows } = await pool.query(
      `UPDATE identity.outbox SET published_at = now() - interval '3 s' RETURNING now()::text AS now`,
    );
    expect(await recover(rows[0].now)).toMatchObject({ rows: 1, unpublished: 1 });
  });

  test('streams are noted as they are: one that vanishes later is missed though nothing was appended since', async () => {
    const [event] = (await published(someEvents(1))) as [Appended];
    await redis.del(NOTES);
    await compare();
    expect(await redis.exists(NOTES)).toBe(0);
    await recover();
    expect(await redis.hgetall(NOTES)).toEqual({ [STREAM]: event.entryId });
  });

  test('appends are forgotten of events whose rows are published or gone, and no others', async () => {
    await insertEvents(pool, someEvents(3));
    const events = (await stage.claim()) as [LeasedEvent, LeasedEvent, LeasedEvent];
    const [live, done, gone] = events;
    const entryIds = await Promise.all(events.map((event) => stage.append(event)));
    await outbox.inEpoch((tx) =>
      outbox.markPublished(tx, [{ ...done, entryId: entryIds[events.indexOf(done)] as string }]),
    );
    await pool.query('DELETE FROM identity.outbox WHERE event_id = $1', [gone.eventId]);
    expect(await context.memory.remembered()).toHaveLength(3);
    await recover();
    expect(await context.memory.remembered()).toEqual([live.eventId]);
  });

  test('what was found is told, in the log as well: a warning when something is missing, or cannot be read', async () => {
    const lines: [string, Record<string, unknown>][] = [];
    const logger = {
      ...silent,
      info: (about: unknown) => void lines.push(['info', about as Record<string, unknown>]),
      warn: (about: unknown) => void lines.push(['warn', about as Record<string, unknown>]),
    };
    await published(someEvents(2));
    await recover(null, { logger });
    await redis.del(STREAM);
    await recover(null, { logger });
    await redis.del(NOTES);
    await published(someEvents(1));
    await redis.set(STREAM, 'a string');
    await recover(null, { logger });
    expect(lines).toMatchObject([
      ['info', { rows: 2, lost: 0 }],
      ['warn', { rows: 2, lost: 2, unpublished: 2 }],
      ['warn', { unreadable: 3 }],
    ]);
  });
});

describe('a comparison', () => {
  test('changes nothing by itself, and can be of one stream, or up to a time', async () => {
    await published([...someEvents(2), ...someEvents(1, 1, { topic: WORDS })]);
    await dead();
    await redis.del(STREAM, DLQ);
    const before = await everything();
    expect(await compare()).toEqual(
      new Map([
        [STREAM, { ...NOTHING, rows: 2, lost: 2 }],
        [WORDS, { ...NOTHING, rows: 1 }],
        [DLQ, { ...NOTHING, rows: 1, lost: 1 }],
      ]),
    );
    expect(await compare({ stream: WORDS })).toEqual(new Map([[WORDS, { ...NOTHING, rows: 1 }]]));
    const { published_at: until } = before[1];
    expect(totals(await compare({ until: until.toISOString() }))).toMatchObject({ rows: 1 });
    expect(await everything()).toEqual(before);
  });

  test('tells how far it is, and ends between two pages when it is told to', async () => {
    await pool.query(
      `INSERT INTO identity.outbox (event_type, aggregate_id, payload, published, published_at, stream_entry_id)
       SELECT 'UserCreated', gen_random_uuid(), '{}', true, now() + n * interval '1 ms', n || '-1'
       FROM generate_series(1, 2500) n`,
    );
    const places: string[] = [];
    const counted: number[] = [];
    const found = await compare({
      onProgress(at, sofar) {
        places.push(at);
        counted.push(totals(sofar).rows);
      },
      stopped: () => places.length === 2,
    });
    expect([totals(found).rows, counted]).toEqual([2_000, [1_000, 2_000]]);
    const rows = await everything();
    expect(places.map((at) => new Date(at).getTime())).toEqual(
      [999, 1_999].map((index) => rows[index].published_at.getTime()),
    );
  });
});
