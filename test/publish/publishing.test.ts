/** The publish stage as a pod has it, on real servers; the test claims. */
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import type { Context } from '../../src/context.ts';
import { withDeadline } from '../../src/lifecycle.ts';
import { createPublishing, type Publishing } from '../../src/publish/publishing.ts';
import type { SampleEvent } from '../demo/sample.ts';
import { openContext } from '../support/context.ts';
import { insertEvents, someEvents } from '../support/events.ts';
import { deferred, type Row, readRows, readStates, readStream } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const STREAM = 'identity.user.v1';
const DLQ = 'identity.user.v1.dlq';
/** A key that is no stream: its events are refused. */
const BROKEN = 'broken';

const one = await openContext();
const hopeless = await openContext({ RELAY_MAX_RETRY_ATTEMPTS: '0' });
const two = await openContext({}, { twoServers: true });

const running: Publishing[] = [];

beforeEach(async () => {
  for (const stage of [one, hopeless, two]) await stage.clear();
});

afterEach(async () => {
  await Promise.all(running.splice(0).map((it) => it.stop(1_000)));
});

type Stage = typeof one;

function start(stage: Stage, overrides: Partial<Context> = {}): Publishing {
  const publishing = createPublishing({ ...stage.context, ...overrides });
  running.push(publishing);
  publishing.start();
  return publishing;
}

/** Rows of one aggregate, leased, with their jobs; the first of them is refused, if so wished. */
async function claimed(stage: Stage, count: number, { isRefused = false } = {}): Promise<SampleEvent[]> {
  const events = someEvents(count, 1).map((event, i) => ({
    ...event,
    ...(isRefused && i === 0 && { topic: BROKEN }),
  }));
  if (isRefused) await stage.streamRedis.set(BROKEN, 'no stream');
  await insertEvents(stage.pool, events);
  expect(await stage.claim()).toHaveLength(count);
  return events;
}

const becomes = async (stage: Stage, ...states: Row['state'][]) =>
  waitFor(async () => (await readStates(stage.pool)).join() === states.join(), {
    what: `the rows to be ${states.join()}`,
  });
const idsIn = async (stage: Stage, stream = STREAM) =>
  (await readStream(stage.streamRedis, stream)).map((fields) => fields.event_id);
const idsOf = (events: readonly SampleEvent[]) => events.map((event) => event.eventId);
const noJobs = (stage: Stage) =>
  waitFor(async () => (await stage.context.queues.inFlight()).total === 0, { what: 'all jobs to end' });
const jobsOf = (stage: Stage, events: readonly SampleEvent[]) =>
  Promise.all(events.map(({ eventId }) => stage.context.queues.jobState(eventId)));

/** Redis is taken for another one: a new epoch begins. */
async function anotherEpoch(stage: Stage): Promise<void> {
  const before = await stage.currentEpoch();
  await stage.streamRedis.del(...(await stage.streamRedis.keys('*:epoch')));
  stage.context.epoch.invalidate();
  await waitFor(() => stage.context.epoch.current() !== before && stage.context.epoch.current(), {
    what: 'the next epoch',
  });
}

describe.each([
  ['one server', one],
  ['two servers', two],
])('on %s', (_, stage) => {
  test('an event gets its entry, its row says so, and its job is gone', async () => {
    const [event] = await claimed(stage, 1);
    start(stage);
    await becomes(stage, 'published');
    await noJobs(stage);
    const [entry] = await stage.streamRedis.xrange(STREAM, '-', '+');
    const [row] = await readRows(stage.pool);
    expect(row).toMatchObject({ streamEntryId: entry?.[0], attempts: 0 });
    expect(await idsIn(stage)).toEqual([event?.eventId]);
    expect(await jobsOf(stage, [event as SampleEvent])).toEqual(['unknown']);
  });

  test('events of an aggregate come into their stream in their order, in whatever order their jobs are taken', async () => {
    const events = await claimed(stage, 40);
    const wait = stage.context.queues.publish.toKey('wait');
    const ids = await stage.redis.lrange(wait, 0, -1);
    await stage.redis
      .multi()
      .del(wait)
      .rpush(wait, ...ids.toReversed())
      .exec();
    start(stage);
    await becomes(stage, ...events.map(() => 'published' as const));
    expect(await idsIn(stage)).toEqual(idsOf(events));
  });

  test('what comes behind a refused event is parked, and has no job; then all come in order', async () => {
    const events = await claimed(stage, 4, { isRefused: true });
    start(stage);
    await becomes(stage, 'leased', 'parked', 'parked', 'parked');
    expect(await jobsOf(stage, events)).toEqual(['delayed', 'unknown', 'unknown', 'unknown']);
    expect(await idsIn(stage)).toEqual([]);
    const [refused] = await readRows(stage.pool);
    expect(refused?.attempts).toBe(1);
    // Nothing is freed while the first one waits for its retry.
    const aggregates = [{ aggregateType: 'user', aggregateId: events[0]?.aggregateId as string }];
    expect(await stage.context.outbox.refill(aggregates)).toMatchObject({ fresh: 0 });
    await stage.streamRedis.del(BROKEN);
    await (await stage.context.queues.publish.getJob(events[0]?.eventId as string))?.promote();
    // It was published, and its aggregate refilled: the claim goes on.
    await waitFor(async () => (await stage.claim()).length > 0, { what: 'parked rows to be free' });
    await becomes(stage, ...events.map(() => 'published' as const));
    expect(await idsIn(stage)).toEqual(idsOf(events.slice(1)));
    expect(await idsIn(stage, BROKEN)).toEqual(idsOf(events.slice(0, 1)));
  });

  test('a job of another epoch asks its row, which says that it is over: nothing is appended', async () => {
    const [event] = await claimed(stage, 1);
    await anotherEpoch(stage);
    await stage.pool.query(
      'UPDATE identity.outbox SET published = true, dead_lettered_at = now(), next_attempt_at = NULL',
    );
    start(stage);
    await noJobs(stage);
    expect(await idsIn(stage)).toEqual([]);
    expect(await jobsOf(stage, [event as SampleEvent])).toEqual(['unknown']);
  });

  test('a job of another epoch asks the rows, which say that an earlier one has no job: it is parked', async () => {
    const events = await claimed(stage, 2);
    await anotherEpoch(stage);
    // As if its entry was lost: it is fresh again, and has no job.
    await stage.context.queues.remove(events[0]?.eventId as string);
    await stage.pool.query('UPDATE identity.outbox SET next_attempt_at = NULL WHERE event_id = $1', [
      events[0]?.eventId,
    ]);
    await stage.pool.query(
      `UPDATE identity.outbox SET next_attempt_at = now() + interval '1 minute' WHERE event_id = $1`,
      [events[1]?.eventId],
    );
    start(stage);
    await becomes(stage, 'fresh', 'parked');
    await waitFor(async () => (await stage.claim()).length > 0, { what: 'the first one to be leased' });
    await waitFor(
      async () => {
        await stage.claim();
        return (await readStates(stage.pool)).every((it) => it === 'published');
      },
      { what: 'both to be published' },
    );
    expect(await idsIn(stage)).toEqual(idsOf(events));
  });

  test('a job of another epoch whose rows say that it is first is published', async () => {
    const events = await claimed(stage, 3);
    await anotherEpoch(stage);
    start(stage);
    await becomes(stage, 'published', 'published', 'published');
    expect(await idsIn(stage)).toEqual(idsOf(events));
  });
});

test('an event that was given up, and is retried from a dashboard, asks the rows: it has its entry, and no dead letter any more', async () => {
  const events = await claimed(hopeless, 2, { isRefused: true });
  start(hopeless);
  await waitFor(
    async () => {
      // Where the other one came too early, it was parked.
      await hopeless.claim();
      return (await readStates(hopeless.pool)).join() === 'dead,published';
    },
    { what: 'the one to be dead, and the other one published' },
  );
  expect(await idsIn(hopeless, DLQ)).toEqual(idsOf(events.slice(0, 1)));
  await hopeless.streamRedis.del(BROKEN);
  const job = await hopeless.context.queues.publish.getJob(events[0]?.eventId as string);
  await job?.retry();
  await becomes(hopeless, 'published', 'published');
  expect(await idsIn(hopeless, BROKEN)).toEqual(idsOf(events.slice(0, 1)));
  expect(await idsIn(hopeless, DLQ)).toEqual([]);
});

test('on two servers a job that is older than its idempotency key looks for its entry in the stream', async () => {
  const [event] = await claimed(two, 1);
  const { eventId } = event as SampleEvent;
  const [leased] = await two.context.outbox.inEpoch(async (tx) => {
    const { rows } = await tx.query<{ id: string }>('SELECT id::text AS id FROM identity.outbox');
    return rows;
  });
  // Appended an hour ago, by a pod that did not come to its acknowledgement.
  const madeAt = Date.now() - 3_600_000;
  await two.redis.hset(two.keyOf(eventId), 'timestamp', madeAt);
  const entryId = await two.streamRedis.xadd(STREAM, '*', 'event_id', eventId);
  start(two);
  await becomes(two, 'published');
  expect(await readRows(two.pool)).toMatchObject([{ id: leased?.id, streamEntryId: entryId }]);
  expect(await idsIn(two)).toEqual([eventId]);
});

test('a job whose pod stopped is taken over, and that is logged', async () => {
  const [event] = await claimed(one, 1);
  const { publish } = one.context.queues;
  await one.redis.lmove(publish.toKey('wait'), publish.toKey('active'), 'RIGHT', 'LEFT');
  const warned: unknown[] = [];
  const warn = (eventId: string) => void warned.push(eventId);
  start(one, { tally: { ...one.context.tally, warn } });
  await becomes(one, 'published');
  expect(await idsIn(one)).toEqual([event?.eventId]);
  expect(warned).toEqual([event?.eventId]);
});

describe('stopping', () => {
  /** Stops, and answers in `order` when its workers have stopped, and when it has. */
  function stop(publishing: Publishing): { order: string[]; stopping: Promise<void> } {
    const order: string[] = [];
    const stopWorkers = publishing.workers.stop;
    publishing.workers.stop = async (deadlineMs) => {
      await stopWorkers(deadlineMs);
      order.push('workers stopped');
    };
    return { order, stopping: publishing.stop(20_000).then(() => void order.push('stopped')) };
  }

  test('waits for the dead letter that is being written', async () => {
    const [begun, finish] = [deferred(), deferred()];
    await claimed(hopeless, 1, { isRefused: true });
    const publishing = start(hopeless, {
      deadLetters: {
        ...hopeless.context.deadLetters,
        bury: async () => {
          begun.resolve();
          await finish.promise;
          order.push('written');
        },
      },
    });
    await begun.promise;
    const { order, stopping } = stop(publishing);
    await waitFor(() => order.length > 0, { what: 'the workers to stop' });
    await new Promise(setImmediate);
    finish.resolve();
    await withDeadline(15_000, stopping);
    expect(order).toEqual(['workers stopped', 'written', 'stopped']);
  });

  test('waits until the rows of released jobs are parked', async () => {
    const [begun, finish] = [deferred(), deferred()];
    await claimed(one, 2, { isRefused: true });
    const publishing = start(one, {
      outbox: {
        ...one.context.outbox,
        park: async () => {
          begun.resolve();
          await finish.promise;
          order.push('parked');
        },
      },
    });
    await begun.promise;
    const { order, stopping } = stop(publishing);
    await waitFor(() => order.length > 0, { what: 'the workers to stop' });
    await new Promise(setImmediate);
    finish.resolve();
    await withDeadline(15_000, stopping);
    expect(order).toEqual(['workers stopped', 'parked', 'stopped']);
  });
});
