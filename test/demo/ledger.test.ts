import { randomUUID } from 'node:crypto';
import { Redis } from 'ioredis';
import pg from 'pg';
import { beforeAll, beforeEach, expect, test } from 'vitest';
import { atEndOfFile } from '../support/cleanup.ts';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { createDatabase, createRedis } from '../support/servers.ts';
import { gradeLedger, type LedgerOptions, violationsOf } from './ledger.ts';
import type { SampleEvent } from './sample.ts';

const DLQ = 'identity.user.v1.dlq';
const CLEAN = {
  ...{ lost: 0, doubled: 0, outOfOrder: 0, publishedWithoutEntry: 0 },
  ...{ deadWithoutDlq: 0, doubledDeadLetters: 0, leftBehind: 0, unknown: 0 },
};

let pool: pg.Pool;
let redis: Redis;
let options: LedgerOptions;

beforeAll(async () => {
  const [database, server] = await Promise.all([createDatabase(), createRedis()]);
  pool = new pg.Pool({ connectionString: database.adminUrl, max: 2 });
  redis = new Redis(server.adminUrl);
  atEndOfFile(async () => {
    redis.disconnect();
    await pool.end();
  });
  options = { pool, redis, defaultStream: 'identity.user.v1', dlqStream: DLQ };
});

beforeEach(async () => {
  await redis.flushall();
  await pool.query('TRUNCATE identity.outbox');
});

/** As a relay that keeps its promises would. */
async function publish(...events: SampleEvent[]): Promise<void> {
  for (const { eventId, topic } of events) {
    const entryId = await redis.xadd(
      topic ?? 'identity.user.v1',
      '*',
      'event_type',
      'event_id',
      'event_id',
      eventId,
    );
    await pool.query(
      'UPDATE identity.outbox SET published = true, published_at = now(), stream_entry_id = $2 WHERE event_id = $1',
      [eventId, entryId],
    );
  }
}

async function bury({ eventId }: SampleEvent): Promise<void> {
  await redis.xadd(DLQ, '*', 'original_event_id', eventId);
  await pool.query('UPDATE identity.outbox SET dead_lettered_at = now() WHERE event_id = $1', [eventId]);
}

test('a ledger in order has no violation: several topics, no topic, a dead letter, a key that is no stream', async () => {
  const plain = someEvents(20, 3);
  const word = anEvent({ topic: 'dictionary.word.v1', eventType: 'DictionaryWordAdded' });
  const untitled = anEvent({ topic: null });
  const dead = anEvent({ topic: 'broken' });
  await redis.set('broken', 'no stream');
  await insertEvents(pool, [...plain, word, untitled, dead]);
  await publish(...plain, word, untitled);
  await bury(dead);

  const grade = await gradeLedger(options);

  expect(grade).toMatchObject({ ...CLEAN, events: 23, entries: 22, deadLetters: 1 });
  expect(violationsOf(grade)).toEqual([]);
});

test('an event that is published but in no stream is lost', async () => {
  const events = someEvents(3);
  await insertEvents(pool, events);
  await publish(...events);
  const [, [entryId] = ['']] = await redis.xrange('identity.user.v1', '-', '+');
  await redis.xdel('identity.user.v1', entryId);

  const grade = await gradeLedger(options);

  expect(grade).toMatchObject({ ...CLEAN, lost: 1, publishedWithoutEntry: 1 });
  expect(grade.samples.lost).toEqual([events[1]?.eventId]);
  expect(violationsOf(grade)).toHaveLength(2);
});

test('an event that the relay has not come to is left behind', async () => {
  await insertEvents(pool, someEvents(2));

  expect(await gradeLedger(options)).toMatchObject({ ...CLEAN, lost: 2, leftBehind: 2 });
});

test('an event with two entries is doubled, and not out of order too', async () => {
  const [first, second] = someEvents(2, 1) as [SampleEvent, SampleEvent];
  await insertEvents(pool, [first, second]);
  await publish(first, second, first);

  expect(await gradeLedger(options)).toMatchObject({
    ...CLEAN,
    doubled: 1,
    samples: { doubled: [first.eventId] },
  });
});

test('an entry that an operator had republished is a copy where there may be copies, and one without the mark is doubled', async () => {
  const [first, second] = someEvents(2, 1) as [SampleEvent, SampleEvent];
  await insertEvents(pool, [first, second]);
  await publish(first, second, second);
  await redis.xadd(
    'identity.user.v1',
    '*',
    'event_id',
    first.eventId,
    'replayed_at',
    new Date().toISOString(),
  );

  expect(await gradeLedger({ ...options, mayHaveCopies: true })).toMatchObject({
    ...CLEAN,
    ...{ entries: 3, copies: 1, doubled: 1, samples: { doubled: [second.eventId] } },
  });
  expect(await gradeLedger(options)).toMatchObject({ ...CLEAN, doubled: 2, copies: 0 });
});

test('an entry behind a later event of its aggregate is out of order; among other aggregates order is free', async () => {
  const events = someEvents(4, 2) as [SampleEvent, SampleEvent, SampleEvent, SampleEvent];
  await insertEvents(pool, events);
  const [a1, b1, a2, b2] = events;
  await publish(b1, b2, a2, a1);

  const grade = await gradeLedger(options);

  expect(grade).toMatchObject({ ...CLEAN, outOfOrder: 1, samples: { outOfOrder: [a1.eventId] } });
});

test('a dead row without its dead letter, and two dead letters for one event, are found', async () => {
  const [unburied, twice] = someEvents(2) as [SampleEvent, SampleEvent];
  await insertEvents(pool, [unburied, twice]);
  await bury(unburied);
  await redis.del(DLQ);
  await bury(twice);
  await bury(twice);

  expect(await gradeLedger(options)).toMatchObject({
    ...CLEAN,
    lost: 1,
    deadWithoutDlq: 1,
    doubledDeadLetters: 1,
  });
});

test('an entry of an event that was never committed, or in a stream of another topic, is unknown', async () => {
  const event = anEvent();
  await insertEvents(pool, [event]);
  await publish(event);
  await redis.xadd('identity.user.v1', '*', 'event_id', randomUUID());
  const stray = anEvent({ topic: 'dictionary.word.v1' });
  await insertEvents(pool, [stray]);
  await publish(stray);
  await redis.rename('dictionary.word.v1', 'elsewhere');
  await redis.xadd('identity.user.v1', '*', 'event_id', stray.eventId);

  expect(await gradeLedger(options)).toMatchObject({ ...CLEAN, unknown: 2 });
});

test('events to be ignored are, and streams and tables longer than a page are read to the end', async () => {
  const old = someEvents(3);
  const events = someEvents(12_000, 50);
  await insertEvents(pool, [...old, ...events]);
  const adding = redis.pipeline();
  for (const { eventId } of events) adding.xadd('identity.user.v1', '*', 'event_id', eventId);
  await adding.exec();
  await pool.query('UPDATE identity.outbox SET published = true');

  const grade = await gradeLedger({ ...options, ignore: new Set(old.map(({ eventId }) => eventId)) });

  expect(grade).toMatchObject({ ...CLEAN, events: 12_003, entries: 12_000 });
});
