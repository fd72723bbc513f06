import { UnrecoverableError } from 'bullmq';
import { beforeEach, describe, expect, onTestFinished, test } from 'vitest';
import type { Aggregate } from '../../src/event.ts';
import { createDeadLetters } from '../../src/finalize/dead-letter.ts';
import type { LeasedEvent } from '../../src/outbox/outbox.ts';
import { createLeaseReaper } from '../../src/recovery/lease-reaper.ts';
import { openContext } from '../support/context.ts';
import { insertEvents, someEvents } from '../support/events.ts';
import { RELAY_USER, redisRules } from '../support/least-privilege.ts';
import { deferred, readRows, readStates, readStream } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const EPOCH_KEY = 'bull:relay:epoch';
const LEASE_MS = 60_000;

const stage = await openContext({
  ...{ RELAY_CLAIM_LEASE: String(LEASE_MS / 1_000), RELAY_RETRY_BASE_DELAY: '3600' },
  RELAY_MAX_RETRY_ATTEMPTS: '2',
});
const { pool, redis, context } = stage;
const { outbox, queues, lookup, epoch } = context;
const { dlqStreamName: DLQ } = stage.config;

beforeEach(() => stage.clear());

type Deps = Parameters<typeof createLeaseReaper>[0];
type Seen = Parameters<Deps['metrics']['leasesExpired']>[0];

/** One round on the real servers; answers what it told the metrics, and the aggregates that it asked a refill for. */
async function reap(deps: Partial<Deps> = {}) {
  const seen: Seen[] = [];
  const refills: Aggregate[] = [];
  const letters: string[] = [];
  const refiller = { request: (aggregates: readonly Aggregate[]) => void refills.push(...aggregates) };
  await createLeaseReaper({
    ...context,
    refiller,
    deadLetters: createDeadLetters({
      ...{ ...context, refiller },
      metrics: { deadLettered: ({ eventId }) => void letters.push(eventId) },
    }),
    metrics: { leasesExpired: (counts) => void seen.push(counts) },
    ...deps,
  })();
  return { seen: seen[0], refills, letters };
}

/** The leases of these rows are over, or of all. */
async function expire(events: readonly LeasedEvent[] | 'all' = 'all'): Promise<void> {
  await pool.query(
    `UPDATE identity.outbox SET next_attempt_at = now() - interval '1 s'
     WHERE NOT published AND next_attempt_at < 'infinity' AND ($1::uuid[] IS NULL OR event_id = ANY ($1))`,
    [events === 'all' ? null : events.map((it) => it.eventId)],
  );
}

/** Rows that were claimed and whose lease is over, with their jobs. */
async function expired(count: number): Promise<LeasedEvent[]> {
  await insertEvents(pool, someEvents(count));
  const events: LeasedEvent[] = [];
  while (events.length < count) events.push(...(await stage.claim()));
  await expire();
  return events;
}

async function acknowledge({ id, eventId }: LeasedEvent, entryId: string): Promise<void> {
  await outbox.inEpoch((tx) => outbox.markPublished(tx, [{ id, eventId, entryId }]));
}

/** As for all pods, when something may be lost. */
async function endEpoch(): Promise<void> {
  const before = await stage.currentEpoch();
  epoch.endFor(before);
  await waitFor(() => ![undefined, before].includes(epoch.current()), { what: 'the next epoch' });
}

const everything = async () => (await pool.query('SELECT * FROM identity.outbox ORDER BY id')).rows;
const letFail = (reason: string) => stage.runJobs(() => Promise.reject(new UnrecoverableError(reason)));

test('a row that the database refuses to change keeps the reaper from no other row', async () => {
  const events = await expired(9);
  const bad = events[4] as LeasedEvent;
  await pool.query(
    `ALTER TABLE identity.outbox ADD CONSTRAINT never CHECK (event_id <> '${bad.eventId}') NOT VALID`,
  );
  onTestFinished(async () => void (await pool.query('ALTER TABLE identity.outbox DROP CONSTRAINT never')));
  const { seen } = await reap();
  expect(seen).toMatchObject({ alive: 8 });
  const { rows } = await pool.query('SELECT event_id FROM identity.outbox WHERE next_attempt_at <= now()');
  expect(rows).toEqual([{ event_id: bad.eventId }]);
});

test('a row that refuses to be dead keeps no other failed job from its dead letter', async () => {
  const events = await expired(4);
  await letFail('broken');
  const bad = events[0] as LeasedEvent;
  await pool.query(
    `ALTER TABLE identity.outbox ADD CONSTRAINT never CHECK (dead_lettered_at IS NULL OR event_id <> '${bad.eventId}')`,
  );
  onTestFinished(async () => void (await pool.query('ALTER TABLE identity.outbox DROP CONSTRAINT never')));
  await reap();
  expect((await readStates(pool)).toSorted()).toEqual(['dead', 'dead', 'dead', 'leased']);
});

test('a round that fails half-way tells what it has done by then, and asks for a claim of what is fresh', async () => {
  const [failed] = (await expired(1)) as [LeasedEvent];
  await letFail('broken');
  const [lost] = (await expired(1)) as [LeasedEvent];
  await queues.remove(lost.eventId);
  const told: unknown[] = [];
  const round = reap({
    deadLetters: { bury: () => Promise.reject(new Error('no database')), writeAgain: async () => {} },
    metrics: { leasesExpired: (counts) => void told.push(counts) },
    scheduler: { wake: async () => void told.push('claim') },
    logger: { ...context.logger, warn: (fields) => void told.push(fields) },
  });
  await expect(round).rejects.toThrow('no database');
  const states = (await readRows(pool)).map(({ eventId, state }) => [eventId, state]);
  expect(new Map(states as [string, string][])).toEqual(
    new Map([
      [failed.eventId, 'leased'],
      [lost.eventId, 'fresh'],
    ]),
  );
  expect(told).toEqual([{ alive: 0, failed: 1, missing: 1 }, 'claim', { events: 1, found: 0 }]);
});

describe('a row whose lease has ended', () => {
  test('gets another one when its job is alive: waiting, delayed, or in progress', async () => {
    const [delayed] = (await expired(1)) as [LeasedEvent];
    await stage.runJobs(() => Promise.reject(new Error('no')));
    const [busy] = (await expired(1)) as [LeasedEvent];
    const [begun, end] = [deferred(), deferred()];
    const run = stage.runJobs(async () => {
      begun.resolve();
      await end.promise;
    });
    await begun.promise;
    await queues.publish.pause();
    const [waiting] = (await expired(1)) as [LeasedEvent];
    const { seen } = await reap();
    const states = await Promise.all([delayed, busy, waiting].map((it) => queues.jobState(it.eventId)));
    end.resolve();
    await queues.publish.resume();
    await run;
    expect(states).toEqual(['delayed', 'active', 'waiting']);
    expect(seen).toEqual({ alive: 3, failed: 0, missing: 0 });
    const rows = await readRows(pool);
    expect(rows.map((row) => row.state)).toEqual(['leased', 'leased', 'leased']);
    for (const { msLeft } of rows) expect(msLeft).toBeGreaterThan(LEASE_MS / 2);
  });

  test('is named when a worker has kept its job for minutes, as another program’s on this queue may', async () => {
    const [kept] = (await expired(1)) as [LeasedEvent];
    const [begun, end] = [deferred(), deferred()];
    const run = stage.runJobs(async () => {
      begun.resolve();
      await end.promise;
    });
    await begun.promise;
    const told: unknown[] = [];
    const logger = {
      ...context.logger,
      warn: (fields: object, text: string) => void told.push({ ...fields, text }),
    };
    await reap({ logger });
    expect(told).toEqual([]);
    await redis.hset(queues.jobKey(kept.eventId), 'processedOn', Date.now() - 150_000);
    await expire();
    const { seen } = await reap({ logger });
    end.resolve();
    await run;
    expect(seen).toMatchObject({ alive: 1 });
    expect(told).toEqual([
      { events: 1, eventIds: [kept.eventId], text: expect.stringContaining('a worker keeps publish jobs') },
    ]);
  });

  test('is fresh again when its job is gone, by itself or with everything', async () => {
    const [first] = (await expired(2)) as [LeasedEvent];
    await queues.remove(first.eventId);
    expect((await reap()).seen).toEqual({ alive: 1, failed: 0, missing: 1 });
    expect(await readStates(pool)).toEqual(['fresh', 'leased']);
    await redis.flushall();
    epoch.invalidate();
    await stage.currentEpoch();
    await expire();
    await reap();
    expect(await readStates(pool)).toEqual(['fresh', 'fresh']);
  });

  test('is published when its job is gone, but its entry is in the stream of its topic', async () => {
    await insertEvents(pool, [...someEvents(2), ...someEvents(2, 2, { topic: 'dictionary.word.v1' })]);
    const events = await stage.claim();
    const [, appended, , word] = events as [LeasedEvent, LeasedEvent, LeasedEvent, LeasedEvent];
    const entryIds = [await stage.append(appended), await stage.append(word)];
    for (const event of events) await queues.remove(event.eventId);
    await expire();
    const { refills } = await reap();
    expect(await readRows(pool)).toMatchObject([
      { state: 'fresh' },
      { state: 'published', streamEntryId: entryIds[0] },
      { state: 'fresh' },
      { state: 'published', streamEntryId: entryIds[1] },
    ]);
    expect(refills.map((it) => it.aggregateId)).toEqual([appended.aggregateId, word.aggregateId]);
    expect(await context.memory.remembered()).toEqual([]);
  });

  test('is dead when its job is gone, but its dead letter is in the stream, as that says', async () => {
    const [event] = (await expired(1)) as [LeasedEvent];
    await letFail('WRONGTYPE');
    const broken = { ...outbox, markDead: () => Promise.reject(new Error('the pod died')) };
    const failing = createDeadLetters({ ...context, outbox: broken });
    await expect(reap({ deadLetters: failing })).rejects.toThrow('the pod died');
    await queues.remove(event.eventId);
    await expire();
    const { letters, refills } = await reap();
    const [[entryId] = []] = await redis.xrange(DLQ, '-', '+');
    expect(await readRows(pool)).toMatchObject([
      { state: 'dead', attempts: 1, errorMessage: 'WRONGTYPE', streamEntryId: entryId },
    ]);
    expect([letters, await redis.xlen(DLQ)]).toEqual([[], 1]);
    expect(refills).toMatchObject([{ aggregateId: event.aggregateId }]);
  });

  test('is fresh when the dead letter that is in the stream is that of before its replay', async () => {
    const [event] = (await expired(1)) as [LeasedEvent];
    await letFail('WRONGTYPE');
    await reap();
    await queues.remove(event.eventId);
    await pool.query(
      'UPDATE identity.outbox SET dead_lettered_at = NULL, attempts = 0, replayed_at = now(), next_attempt_at = now()',
    );
    await reap();
    expect(await readStates(pool)).toEqual(['fresh']);
  });

  test('has its dead letter finished when its job has failed; that may be tried again and again', async () => {
    const [event] = (await expired(1)) as [LeasedEvent];
    await letFail('WRONGTYPE');
    const { deadLetters } = context;
    const broken = { ...deadLetters, bury: () => Promise.reject(new Error('no database')) };
    await expect(reap({ deadLetters: broken })).rejects.toThrow('no database');
    expect([await readStates(pool), await redis.exists(DLQ)]).toEqual([['leased'], 0]);
    await expire();
    const { seen, letters } = await reap();
    expect([seen, letters]).toEqual([{ alive: 0, failed: 1, missing: 0 }, [event.eventId]]);
    expect(await readRows(pool)).toMatchObject([{ state: 'dead', attempts: 1, errorMessage: 'WRONGTYPE' }]);
    expect(await readStream(redis, DLQ)).toMatchObject([{ original_event_id: event.eventId, attempts: '1' }]);
  });

  test('has its dead letter written though another program has overwritten the job: with the event of the row', async () => {
    const [event] = (await expired(1)) as [LeasedEvent];
    await letFail('WRONGTYPE');
    await redis.hset(stage.keyOf(event.eventId), 'data', '{');
    await reap();
    expect(await readRows(pool)).toMatchObject([{ state: 'dead', attempts: 1, errorMessage: 'WRONGTYPE' }]);
    const { eventId, payload } = event;
    expect(await readStream(redis, DLQ)).toMatchObject([{ original_event_id: eventId, payload }]);
  });

  test('is published when its job has failed, but remembers an entry: it is never buried', async () => {
    const [event] = (await expired(1)) as [LeasedEvent];
    const entryId = await stage.append(event);
    await letFail('no answer');
    await reap();
    expect(await readRows(pool)).toMatchObject([{ state: 'published', streamEntryId: entryId }]);
    expect([await redis.exists(DLQ), await redis.xlen(event.topic)]).toEqual([0, 1]);
  });

  test('gets the failures of its job that a dead pod did not mirror, and none fewer than it has', async () => {
    const events = await expired(2);
    await pool.query('UPDATE identity.outbox SET attempts = 7, error_message = $1 WHERE id = 2', ['mine']);
    await stage.runJobs(() => Promise.reject(new Error('WRONGTYPE')));
    await reap();
    const expected = [
      { state: 'leased', attempts: 1, errorMessage: 'WRONGTYPE' },
      { state: 'leased', attempts: 7, errorMessage: 'mine' },
    ];
    expect(await readRows(pool)).toMatchObject(expected);
    // A job that was made again goes on counting.
    const [first] = events as [LeasedEvent];
    await queues.remove(first.eventId);
    await queues.addPublishJobs([{ ...first, attempts: 1 }]);
    await stage.runJobs(() => Promise.reject(new Error('READONLY')));
    await expire();
    await reap();
    expect(await readRows(pool)).toMatchObject([
      { state: 'leased', attempts: 2, errorMessage: 'READONLY' },
      expected[1],
    ]);
  });

  describe('and Redis refuses to tell whether its event was appended', () => {
    const OWN = ['~bull:relay*'];

    /** The relay may use these keys only, until the test ends. */
    async function limitedTo(...keys: string[]): Promise<void> {
      await redis.call('ACL', 'SETUSER', RELAY_USER, 'resetkeys', ...keys);
      onTestFinished(allowed);
    }
    const allowed = async () => void (await redis.call('ACL', 'SETUSER', RELAY_USER, ...redisRules()));

    test('waits, and is published when the relay may read the stream again, also in another epoch', async () => {
      await insertEvents(pool, someEvents(3));
      const [first, second, third] = (await stage.claim()) as [LeasedEvent, LeasedEvent, LeasedEvent];
      const entryIds = [await stage.append(first), await stage.append(second)];
      await acknowledge(first, entryIds[0] as string);
      for (const { eventId } of [second, third]) await queues.remove(eventId);
      await limitedTo(...OWN, `~${DLQ}`);
      for (const end of [async () => {}, endEpoch]) {
        await end();
        await expire();
        expect((await reap()).seen).toEqual({ alive: 2, failed: 0, missing: 0 });
        expect(await readStates(pool)).toEqual(['published', 'leased', 'leased']);
      }
      await allowed();
      await expire();
      await reap();
      expect(await readRows(pool)).toMatchObject([
        { state: 'published' },
        { state: 'published', streamEntryId: entryIds[1] },
        { state: 'fresh' },
      ]);
    });

    test('waits for the dead-letter stream as well', async () => {
      const [dead, other] = (await expired(2)) as [LeasedEvent, LeasedEvent];
      await letFail('WRONGTYPE');
      const broken = { ...outbox, markDead: () => Promise.reject(new Error('the pod died')) };
      const failing = createDeadLetters({ ...context, outbox: broken });
      await expect(reap({ deadLetters: failing })).rejects.toThrow('the pod died');
      for (const { eventId } of [dead, other]) await queues.remove(eventId);
      await limitedTo(...OWN, `~${dead.topic}`);
      await expire();
      await reap();
      expect(await readStates(pool)).toEqual(['leased', 'leased']);
      await allowed();
      await expire();
      await reap();
      expect((await readStates(pool)).toSorted()).toEqual(['dead', 'fresh']);
    });

    test('does not wait for a stream in which the relay has no entries: the next attempt says why', async () => {
      const [event] = (await expired(1)) as [LeasedEvent];
      await queues.remove(event.eventId);
      await limitedTo(...OWN);
      await reap();
      expect(await readStates(pool)).toEqual(['fresh']);
    });
  });

  test('is left alone when another pod asked meanwhile, and its job was made again', async () => {
    const [event] = (await expired(1)) as [LeasedEvent];
    await queues.remove(event.eventId);
    let before: unknown;
    const { seen } = await reap({
      lookup: {
        ...lookup,
        async find(stream, eventIds) {
          const found = await lookup.find(stream, eventIds);
          await reap();
          await stage.claim();
          await expire();
          before = await everything();
          return found;
        },
      },
    });
    expect(seen).toEqual({ alive: 0, failed: 0, missing: 0 });
    expect(await everything()).toEqual(before);
  });

  test('is looked for without a transaction: a walk through a long stream takes seconds', async () => {
    const [event] = (await expired(1)) as [LeasedEvent];
    await queues.remove(event.eventId);
    let open: unknown[] = [];
    await reap({
      lookup: {
        ...lookup,
        async find(stream, eventIds) {
          const { rows } = await pool.query(
            `SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in transaction%'`,
          );
          open = rows;
          return lookup.find(stream, eventIds);
        },
      },
    });
    expect([open, await readStates(pool)]).toEqual([[], ['fresh']]);
  });

  test('is looked for with all others in one walk through each stream', async () => {
    await insertEvents(pool, [...someEvents(150), ...someEvents(2, 150, { topic: 'dictionary.word.v1' })]);
    const events: LeasedEvent[] = [];
    while (events.length < 152) events.push(...(await stage.claim()));
    for (const event of events) await queues.remove(event.eventId);
    await expire();
    const walks: string[] = [];
    await reap({
      lookup: {
        ...lookup,
        find(stream, eventIds) {
          walks.push(String(eventIds.length));
          return lookup.find(stream, eventIds);
        },
      },
    });
    expect(walks.toSorted()).toEqual(['150', '2']);
    expect(new Set(await readStates(pool))).toEqual(new Set(['fresh']));
  });

  test('stays as it is when Redis cannot be asked', async () => {
    await expired(2);
    const before = await everything();
    const broken = { ...queues, jobFate: () => Promise.reject(new Error('no Redis')) };
    await expect(reap({ queues: broken })).rejects.toThrow('no Redis');
    expect(await everything()).toEqual(before);
    for (const event of await lookedUp()) await queues.remove(event.eventId);
    const blind = { ...lookup, find: () => Promise.reject(new Error('no Redis')) };
    await expect(reap({ lookup: blind })).rejects.toThrow('no Redis');
    expect(await everything()).toEqual(before);
  });

  test('stays as it is while no epoch is known', async () => {
    await expired(1);
    await redis.del(stage.keyOf((await lookedUp())[0]?.eventId ?? ''));
    const before = await everything();
    const { seen } = await reap({ epoch: { ...epoch, current: () => undefined } });
    expect([await everything(), seen]).toEqual([before, { alive: 0, failed: 0, missing: 0 }]);
  });

  test('stays as it is when the epoch is over before the commit: what was found may be lost', async () => {
    const [event] = (await expired(1)) as [LeasedEvent];
    await stage.append(event);
    await queues.remove(event.eventId);
    const before = await everything();
    const losing = {
      ...lookup,
      async find(stream: string, eventIds: readonly string[]) {
        const found = await lookup.find(stream, eventIds);
        await redis.set(EPOCH_KEY, 'checking:somebody');
        return found;
      },
    };
    await expect(reap({ lookup: losing })).rejects.toThrow('may have lost');
    expect(await everything()).toEqual(before);
    await stage.currentEpoch();
  });

  async function lookedUp(): Promise<{ eventId: string }[]> {
    return (await pool.query<{ eventId: string }>('SELECT event_id AS "eventId" FROM identity.outbox')).rows;
  }
});

describe('a dead row whose dead letter is lost', () => {
  let event: LeasedEvent;

  /** As a comparison of table and streams leaves it. */
  beforeEach(async () => {
    [event] = (await expired(1)) as [LeasedEvent];
    await letFail('WRONGTYPE');
    await reap();
    await queues.remove(event.eventId);
    await pool.query('UPDATE identity.outbox SET stream_entry_id = NULL, next_attempt_at = now()');
  });

  const rowOfLetter = async () => {
    const [[entryId] = []] = await redis.xrange(DLQ, '-', '+');
    return { state: 'dead', attempts: 1, errorMessage: 'WRONGTYPE', streamEntryId: entryId };
  };

  test('gets it written again, once, by several pods at once as well, and comes to rest', async () => {
    const { deadLetteredAt } = (await readRows(pool))[0] ?? {};
    await redis.xtrim(DLQ, 'MAXLEN', 0);
    const rounds = await Promise.all([reap(), reap(), reap()]);
    expect(rounds.flatMap((it) => it.letters)).toEqual([event.eventId]);
    expect(rounds.map((it) => it.seen)).toEqual(Array(3).fill({ alive: 0, failed: 0, missing: 0 }));
    expect(await readStream(redis, DLQ)).toMatchObject([
      {
        ...{ original_event_id: event.eventId, event_type: event.eventType, topic: event.topic },
        ...{ error_message: 'WRONGTYPE', attempts: '1', failed_at: deadLetteredAt?.toISOString() },
      },
    ]);
    const [row] = await readRows(pool);
    expect(row).toMatchObject(await rowOfLetter());
    // By its old time the next comparison would not look for the new letter.
    expect(row?.deadLetteredAt?.getTime()).toBeGreaterThan(deadLetteredAt?.getTime() ?? Number.NaN);
    expect((await reap()).letters).toEqual([]);
  });

  test('takes it when it is there after all', async () => {
    const { letters } = await reap();
    expect([letters, await redis.xlen(DLQ)]).toEqual([[], 1]);
    expect(await readRows(pool)).toMatchObject([await rowOfLetter()]);
  });

  test('takes it when a pod that wrote it again died before it had changed the row', async () => {
    await redis.xtrim(DLQ, 'MAXLEN', 0);
    const broken = { ...outbox, markDead: () => Promise.reject(new Error('the pod died')) };
    const deadLetters = createDeadLetters({ ...context, outbox: broken });
    await expect(reap({ deadLetters })).rejects.toThrow('the pod died');
    expect((await reap()).letters).toEqual([]);
    expect(await redis.xlen(DLQ)).toBe(1);
    await expire();
    await reap();
    expect([await redis.xlen(DLQ), await readRows(pool)]).toMatchObject([1, [await rowOfLetter()]]);
  });

  test('is asked about again when Redis does not take it', async () => {
    await redis.xtrim(DLQ, 'MAXLEN', 0);
    await redis.config('SET', 'maxmemory', '1');
    try {
      await reap();
    } finally {
      await redis.config('SET', 'maxmemory', '0');
    }
    expect((await reap()).letters).toEqual([]);
    await expire();
    expect((await reap()).letters).toEqual([event.eventId]);
    expect(await readRows(pool)).toMatchObject([await rowOfLetter()]);
  });
});

test('all rows whose lease has ended are asked about in one round, by several pods at once as well', async () => {
  const events = await expired(350);
  for (const event of events.slice(0, 150)) await queues.remove(event.eventId);
  await Promise.all([reap(), reap(), reap()]);
  const states = await readStates(pool);
  expect(states.filter((it) => it === 'fresh')).toHaveLength(150);
  expect(states.filter((it) => it === 'leased')).toHaveLength(200);
});

test('a round has an end, however many leases have ended: the next tick goes on', async () => {
  let batches = 0;
  const rows = Array.from({ length: 1_000 }, (_, i) => ({
    ...{ id: String(i + 1), eventId: someEvents(1)[0]?.eventId ?? '', aggregateType: 'user', endedAt: '' },
    ...{ aggregateId: '', topic: 'identity.user.v1', isDead: false, knownLetter: null, attempts: 0 },
  }));
  const endless = {
    ...outbox,
    async expired() {
      batches++;
      return rows;
    },
    lockExpired: async () => new Set(rows.map((it) => it.eventId)),
  };
  const alive = { state: 'alive', attempts: 0, reason: '' } as const;
  const { seen } = await reap({ outbox: endless, queues: { ...queues, jobFate: async () => alive } });
  expect([batches, seen]).toEqual([5, { alive: 5_000, failed: 0, missing: 0 }]);
});
