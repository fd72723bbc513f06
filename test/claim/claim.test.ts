import { beforeEach, describe, expect, test } from 'vitest';
import { type ClaimOptions, type ClaimOutcome, createClaim, roomFor } from '../../src/claim/claim.ts';
import type { Aggregate } from '../../src/event.ts';
import type { Claim, LeasedEvent } from '../../src/outbox/outbox.ts';
import { EpochOverError, epochId } from '../../src/streams/epoch.ts';
import { openContext } from '../support/context.ts';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { readRows, readStates, readStream } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const stage = await openContext({ RELAY_MAX_RETRY_ATTEMPTS: '0' });
const { context, pool } = stage;
const { outbox, queues } = context;

type Deps = Parameters<typeof createClaim>[0];

const OPTIONS: ClaimOptions = { maxInFlight: 1_000, batchSize: 100, maxBatchSize: 400 };

beforeEach(() => stage.clear());

/** The claim as a pod has it, with parts of it played by the test. */
function setUp(overrides: Partial<Omit<Deps, 'options'>> = {}, options: Partial<ClaimOptions> = {}) {
  const refilled: Aggregate[] = [];
  const counted: number[] = [];
  const claim = createClaim({
    ...context,
    refiller: { request: (aggregates) => void refilled.push(...aggregates) },
    metrics: { claimed: (rows) => void counted.push(rows) },
    ...overrides,
    options: { ...OPTIONS, ...options },
  });
  return { claim, refilled, counted };
}

const insert = (...events: Partial<ReturnType<typeof anEvent>>[]) => insertEvents(pool, events.map(anEvent));
const states = () => readStates(pool);
const eventIds = async () => (await readRows(pool)).map((row) => row.eventId);
const set = (id: number, assignments: string) =>
  pool.query(`UPDATE identity.outbox SET ${assignments} WHERE id = $1`, [id]);
const jobOf = async (eventId: string | undefined) => (await queues.publish.getJob(eventId as string))?.data;
const counts = (waiting: number, active: number, delayed = 0) => ({
  ...{ waiting, active, delayed, prioritized: 0, failed: 0, total: waiting + active + delayed },
});
const USER = '11111111-1111-4111-8111-111111111111';

describe('room for further jobs', () => {
  test('an empty queue takes a batch, a full one nothing, one that is nearly full nothing either', () => {
    expect(roomFor(counts(0, 0), 100, 1_000)).toBe(100);
    expect(roomFor(counts(800, 200), 100, 1_000)).toBe(0);
    expect(roomFor(counts(800, 100), 100, 1_000)).toBe(100);
    // Too few to be worth a transaction.
    expect(roomFor(counts(800, 101), 100, 1_000)).toBe(0);
    expect(roomFor(counts(1_200, 0), 100, 1_000)).toBe(0);
    expect(roomFor(counts(0, 0), 5_000, 1_000)).toBe(1_000);
  });

  test.each([...Array.from({ length: 40 }, (_, i) => i + 1), 100, 1_000])(
    'is never for more than %i jobs, and there is some whatever waits for its retry',
    (maxInFlight) => {
      for (let delayed = 0; delayed <= maxInFlight / 4; delayed += Math.ceil(maxInFlight / 40)) {
        let waiting = 0;
        for (;;) {
          const room = roomFor(counts(waiting, 0, delayed), Math.min(100, maxInFlight), maxInFlight);
          if (room === 0) break;
          waiting += room;
        }
        expect(waiting + delayed).toBeLessThanOrEqual(maxInFlight);
        expect(waiting, 'there is always room for some').toBeGreaterThan(0);
      }
    },
  );

  test('there is none when there are as many jobs as allowed: no row is asked for', async () => {
    const { claim } = setUp({
      queues: { ...queues, inFlight: async () => counts(1_000, 0) },
      outbox: { ...outbox, inEpoch: () => Promise.reject(new Error('asked')) },
    });
    expect(await claim()).toEqual({ kind: 'no-room' });
  });

  test('grows while there is more, as far as there is soon room for it, and begins anew', async () => {
    const limits: number[] = [];
    let more = true;
    const claimFresh = async (_: unknown, limit: number): Promise<Claim> => {
      limits.push(limit);
      return { leased: [], parked: [], rows: 0, more };
    };
    const claimsOf = async (options: Partial<ClaimOptions>) => {
      limits.length = 0;
      const { claim } = setUp({ outbox: { ...outbox, claimFresh } }, options);
      for (let i = 0; i < 4; i++) await claim();
      more = false;
      expect(await claim()).toEqual({ kind: 'all', events: 0 });
      more = true;
      expect(await claim()).toEqual({ kind: 'more', events: 0 });
      return limits;
    };
    expect(await claimsOf({ maxInFlight: 5_000 })).toEqual([100, 200, 400, 400, 400, 100]);
    expect(await claimsOf({ maxInFlight: 1_000 })).toEqual([100, 200, 250, 250, 250, 100]);
    expect(await claimsOf({ maxInFlight: 100 })).toEqual([100, 100, 100, 100, 100, 100]);
    expect(await claimsOf({ maxInFlight: 5_000, maxBatchSize: 50 })).toEqual([100, 100, 100, 100, 100, 100]);
  });
});

describe('a claim', () => {
  test('leases fresh rows; their jobs hold the events, with the one before each and the epoch', async () => {
    await insert({ aggregateId: USER }, {}, { aggregateId: USER });
    const { claim, counted, refilled } = setUp();
    expect(await claim()).toEqual({ kind: 'all', events: 3 });
    expect(await states()).toEqual(['leased', 'leased', 'leased']);
    const ids = await eventIds();
    const epoch = epochId(await stage.currentEpoch());
    const [first, second, third] = await Promise.all(ids.map(jobOf));
    expect(first).toMatchObject({ id: '1', eventId: ids[0], after: null, epoch, attempts: 0 });
    expect(second).toMatchObject({ id: '2', after: null, epoch });
    expect(third).toMatchObject({ id: '3', after: ids[0], epoch });
    expect(first).not.toHaveProperty('mayHaveJob');
    expect(first).not.toHaveProperty('knownEntry');
    expect([counted, refilled]).toEqual([[3], []]);
    expect(await claim()).toEqual({ kind: 'all', events: 0 });
    expect(counted).toEqual([3]);
  });

  test('takes as many rows as it may, and says that there may be more', async () => {
    await insertEvents(pool, someEvents(5));
    const { claim } = setUp({}, { batchSize: 4 });
    expect(await claim()).toEqual({ kind: 'more', events: 4 });
    expect(await claim()).toEqual({ kind: 'all', events: 1 });
  });

  test('has added the jobs, and confirmed the epoch that it read first, when it commits', async () => {
    await insert({}, {});
    const steps: string[] = [];
    const { claim } = setUp({
      outbox: {
        ...outbox,
        claimFresh(tx, limit) {
          steps.push('rows are read');
          return outbox.claimFresh(tx, limit);
        },
      },
      epoch: {
        known() {
          steps.push('epoch is read');
          return context.epoch.known();
        },
        async confirm(epoch) {
          steps.push(`epoch is confirmed: ${epoch === context.epoch.current()}`);
          await context.epoch.confirm(epoch);
          steps.push(...(await states()), `${(await queues.inFlight()).waiting} jobs`);
        },
      },
    });
    await claim();
    expect(steps).toEqual([
      ...['epoch is read', 'rows are read', 'epoch is confirmed: true', 'fresh', 'fresh', '2 jobs'],
    ]);
    expect(await states()).toEqual(['leased', 'leased']);
  });

  test('is undone when the epoch ends in between: the rows are fresh', async () => {
    await insert({}, {});
    const { claim, counted } = setUp({
      queues: {
        ...queues,
        async addPublishJobs(events) {
          await queues.addPublishJobs(events);
          await stage.redis.set('bull:relay:epoch', 'of another pod');
        },
      },
    });
    await expect(claim()).rejects.toThrow(EpochOverError);
    expect([await states(), counted]).toEqual([['fresh', 'fresh'], []]);
    // The next one leases them; their jobs, of another epoch, are there.
    await stage.currentEpoch();
    expect(await setUp().claim()).toEqual({ kind: 'all', events: 2 });
    expect(await states()).toEqual(['leased', 'leased']);
    expect(await queues.inFlight()).toMatchObject({ waiting: 2 });
  });

  test('is undone when the jobs cannot be added: the rows are fresh', async () => {
    await insert({});
    const { claim } = setUp({
      queues: { ...queues, addPublishJobs: () => Promise.reject(new Error('OOM')) },
    });
    await expect(claim()).rejects.toThrow('OOM');
    expect(await states()).toEqual(['fresh']);
  });

  test('takes nothing while it is not known whether Redis lost anything', async () => {
    await insert({});
    const { claim } = setUp({ epoch: { known: async () => undefined, confirm: async () => {} } });
    expect(await claim()).toEqual({ kind: 'no-room' });
    expect([await states(), (await queues.inFlight()).total]).toEqual([['fresh'], 0]);
  });

  test('parks what waits behind an earlier row, and asks for a refill of its aggregate after its commit', async () => {
    await insert({ aggregateId: USER }, { aggregateId: USER }, {});
    await set(1, `attempts = 1, next_attempt_at = now() + interval '1 minute'`);
    const seen: Promise<string[]>[] = [];
    const requested: Aggregate[] = [];
    const { claim, counted } = setUp({
      refiller: {
        request(aggregates) {
          seen.push(states());
          requested.push(...aggregates);
        },
      },
    });
    expect(await claim()).toEqual({ kind: 'all', events: 1 });
    expect(await Promise.all(seen)).toEqual([['leased', 'parked', 'leased']]);
    expect(requested).toMatchObject([{ aggregateType: 'user', aggregateId: USER }]);
    expect(counted).toEqual([2]);
    expect((await queues.inFlight()).total).toBe(1);
  });

  test('shows the events to the trace, whose contexts go with the jobs', async () => {
    await insert({});
    const trace = { traceparent: `00-${'a'.repeat(32)}-${'b'.repeat(16)}-01` };
    const { claim } = setUp({
      tracing: { claim: (events, add) => add(events.map((event) => ({ ...event, trace }))) },
    });
    await claim();
    expect((await jobOf((await eventIds())[0]))?.trace).toEqual(trace);
  });
});

describe('a row that had a job before', () => {
  const again = () => set(1, 'attempts = 1, next_attempt_at = NULL');

  test('gets a new one in the place of the failed one', async () => {
    await insert({});
    await stage.claim();
    await stage.runJobs(() => Promise.reject(new Error('no')));
    const [eventId] = await eventIds();
    await waitFor(async () => (await queues.jobState(eventId as string)) === 'failed', {
      what: 'the job to fail',
    });
    await again();
    expect(await setUp().claim()).toEqual({ kind: 'all', events: 1 });
    expect(await queues.jobState(eventId as string)).toBe('waiting');
    expect(await queues.publish.getJob(eventId as string)).toMatchObject({
      ...{ attemptsMade: 0, data: { attempts: 1, epoch: epochId(await stage.currentEpoch()) } },
    });
    expect(await states()).toEqual(['leased']);
  });

  test('gets none when the old one remembers its entry: the row expires, and the lease reaper asks', async () => {
    await insert({}, {});
    const [event] = await stage.claim(1);
    await stage.append(event as LeasedEvent);
    await again();
    const before = await stage.redis.hgetall(stage.keyOf(event?.eventId as string));
    const added: string[] = [];
    const { claim } = setUp({
      queues: {
        ...queues,
        addPublishJobs(events) {
          added.push(...events.map(({ id }) => id));
          return queues.addPublishJobs(events);
        },
      },
    });
    await claim();
    expect(added).toEqual(['2']);
    expect(await states()).toEqual(['due', 'leased']);
    expect(await stage.redis.hgetall(stage.keyOf(event?.eventId as string))).toEqual(before);
    expect((await queues.inFlight()).total).toBe(2);
    expect(await readStream(stage.redis, 'identity.user.v1')).toHaveLength(1);
  });

  test.each([
    ['was replayed', 'replayed_at = now()'],
    ['was published, and its entry is lost', 'published_at = now()'],
    ['failed', 'attempts = 1'],
  ])('is one that %s; no other row’s job is asked for', async (_, assignment) => {
    await insert({}, {});
    await set(1, assignment);
    const asked: string[] = [];
    const { claim } = setUp({
      async removeJobs(events) {
        asked.push(...events.map(({ eventId }) => eventId));
        return new Map();
      },
    });
    expect(await claim()).toEqual({ kind: 'all', events: 2 });
    expect(asked).toEqual((await eventIds()).slice(0, 1));
    expect((await queues.inFlight()).total).toBe(2);
  });

  test('is leased with the old one when a worker has that', async () => {
    await insert({});
    await set(1, 'attempts = 1');
    const [eventId] = await eventIds();
    const { claim } = setUp({ removeJobs: async () => new Map([[eventId as string, 'busy' as const]]) });
    expect(await claim()).toEqual({ kind: 'all', events: 1 });
    expect(await states()).toEqual(['leased']);
  });

  test('stays fresh when Redis cannot be asked about it', async () => {
    await insert({});
    await set(1, 'attempts = 1');
    const { claim } = setUp({ removeJobs: () => Promise.reject(new Error('no Redis')) });
    await expect(claim()).rejects.toThrow('no Redis');
    expect(await states()).toEqual(['fresh']);
  });
});

describe('when a payload may be unprintable', () => {
  const atFault = Object.assign(new Error('out of memory'), { code: '53200' });

  /** A table in which no batch can be read while that row is fresh, which alone is taken with its payload withheld. */
  const tableWith = (unprintable: string, deadlines: unknown[] = []): Deps['outbox'] => ({
    ...outbox,
    inEpoch(work, options) {
      deadlines.push(options?.deadlineMs);
      return outbox.inEpoch(work, options);
    },
    async claimFresh(tx, limit) {
      const { rows } = await tx.query(
        'SELECT FROM identity.outbox WHERE id = $1 AND next_attempt_at IS NULL',
        [unprintable],
      );
      if (rows.length > 0) throw atFault;
      return outbox.claimFresh(tx, limit);
    },
    async claimFirst(tx) {
      const { leased, ...claimed } = await outbox.claimFirst(tx);
      const withheld = 'PostgreSQL cannot print the payload';
      return { ...claimed, leased: leased.map((it) => (it.id === unprintable ? { ...it, withheld } : it)) };
    },
  });

  test('rows are taken one by one up to the culprit, whose job says what it is; then as ever', async () => {
    await insertEvents(pool, someEvents(5));
    const deadlines: unknown[] = [];
    const { claim, counted } = setUp({ outbox: tableWith('3', deadlines) });
    expect(await claim()).toEqual({ kind: 'more', events: 3 } satisfies ClaimOutcome);
    expect(await states()).toEqual(['leased', 'leased', 'leased', 'fresh', 'fresh']);
    const ids = await eventIds();
    expect(await jobOf(ids[2])).toMatchObject({ withheld: 'PostgreSQL cannot print the payload' });
    expect(await jobOf(ids[1])).toMatchObject({ withheld: null });
    // Each row in its own transaction, which has the time that printing may take.
    expect(deadlines).toEqual([undefined, ...Array(3).fill(outbox.printDeadlineMs)]);
    expect(await claim()).toEqual({ kind: 'all', events: 2 });
    expect(counted).toEqual([3, 2]);
  });

  test('no more rows are taken one by one than there is room for', async () => {
    await insertEvents(pool, someEvents(5));
    const { claim } = setUp({ outbox: tableWith('5') }, { batchSize: 2, maxBatchSize: 2 });
    expect(await claim()).toEqual({ kind: 'more', events: 2 });
    expect(await states()).toEqual(['leased', 'leased', 'fresh', 'fresh', 'fresh']);
  });

  test('rows that are parked count, and their aggregates are refilled', async () => {
    await insert({ aggregateId: USER }, { aggregateId: USER }, {}, {});
    await set(1, `attempts = 1, next_attempt_at = now() + interval '1 minute'`);
    const { claim, counted, refilled } = setUp({ outbox: tableWith('3') });
    expect(await claim()).toEqual({ kind: 'more', events: 1 });
    expect(await states()).toEqual(['leased', 'parked', 'leased', 'fresh']);
    expect([counted, refilled]).toMatchObject([[2], [{ aggregateId: USER }]]);
  });

  test('each of them is undone by itself when the epoch ends in between', async () => {
    await insertEvents(pool, someEvents(3));
    const confirmed: string[] = [];
    const { claim } = setUp({
      outbox: tableWith('3'),
      epoch: {
        known: context.epoch.known,
        async confirm(epoch) {
          if (confirmed.push(epoch) === 2) throw new EpochOverError();
        },
      },
    });
    await expect(claim()).rejects.toThrow(EpochOverError);
    expect(await states()).toEqual(['leased', 'fresh', 'fresh']);
  });

  test('an error that is no payload’s fault is the claim’s: no row is taken alone', async () => {
    await insert({});
    const { claim } = setUp({
      outbox: {
        ...outbox,
        claimFresh: () => Promise.reject(Object.assign(new Error('serialization'), { code: '40001' })),
        claimFirst: () => Promise.reject(new Error('taken alone')),
      },
    });
    await expect(claim()).rejects.toThrow('serialization');
    expect(await states()).toEqual(['fresh']);
  });
});
