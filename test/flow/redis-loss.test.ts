import { expect, test } from 'vitest';
import type { SampleEvent } from '../../src/demo/sample.ts';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { STREAM, type Stage, setStage } from '../support/flow.ts';
import { startLoad } from '../support/load.ts';
import { waitFor } from '../support/wait.ts';

const SHORT_LEASE = { RELAY_CLAIM_LEASE: '2', RELAY_PUBLISH_TIMEOUT: '1' };

/** Empties Redis and answers, from the same moment, which events were in the stream. */
async function flush(stage: Stage): Promise<Set<string>> {
  const reply = await stage.redis.multi().xrange(STREAM, '-', '+').flushall().exec();
  const entries = reply?.[0]?.[1] as [string, string[]][];
  return new Set(entries.map(([, fields]) => fields[1] as string));
}

test('FLUSHALL under load: whatever was not in the stream yet arrives once and in order, without a restart', async () => {
  const stage = await setStage();
  await Promise.all([stage.pod(), stage.pod()]);
  await insertEvents(stage.pool, someEvents(1_000, 50));
  const load = startLoad(stage.pool);
  const gone = new Set<string>();
  let waiting: string[] = [];
  for (let round = 1; round <= 3; round++) {
    await waitFor(async () => (await stage.redis.xlen(STREAM)) > 200, {
      what: `entries before flush ${round}`,
      timeoutMs: 30_000,
    });
    for (const eventId of await flush(stage)) gone.add(eventId);
    waiting = (await stage.rows()).filter((row) => !row.published).map((row) => row.event_id);
  }
  await load.stop();
  await stage.rested();

  const published = (await stage.entries()).map(({ fields }) => fields);
  const rows = await stage.rows();
  const ids = published.map((fields) => fields.event_id);
  expect(new Set(ids).size, 'no event is doubled').toBe(ids.length);
  const missing = rows.filter((row) => !ids.includes(row.event_id) && !gone.has(row.event_id));
  expect(missing, 'no event is lost').toEqual([]);
  // Also one that was in the stream but not acknowledged: PostgreSQL did not call it published when Redis was emptied.
  const arrived = new Set(ids);
  expect(waiting.length).toBeGreaterThan(0);
  expect(
    waiting.filter((eventId) => !arrived.has(eventId)),
    'what was not published arrives',
  ).toEqual([]);
  expect(rows.every((row) => row.published && row.attempts === 0)).toBe(true);
  const place = new Map(rows.map((row) => [row.event_id, BigInt(row.id)]));
  const latest = new Map<string, bigint>();
  for (const { event_id: eventId = '', aggregate_id: aggregateId = '' } of published) {
    // An entry that was flushed away is appended again, maybe behind a successor that was on its way already.
    if (gone.has(eventId)) continue;
    const id = place.get(eventId) ?? -1n;
    expect(id > (latest.get(aggregateId) ?? -1n), `${eventId} in its order`).toBe(true);
    latest.set(aggregateId, id);
  }
}, 120_000);

test('FLUSHALL of an idle relay is healed: later events are claimed by poll and by wake-up', async () => {
  const stage = await setStage({ env: { RELAY_POLL_INTERVAL: '1' } });
  await stage.pod();
  await insertEvents(stage.pool, [anEvent()]);
  await stage.rested();
  await stage.redis.flushall();
  const later = someEvents(5);
  await insertEvents(stage.pool, later);
  await stage.rested();
  expect((await stage.entries()).map(({ fields }) => fields.event_id).toSorted()).toEqual(
    later.map(({ eventId }) => eventId).toSorted(),
  );
  await waitFor(async () => (await stage.queue('claim').getJobSchedulersCount()) === 1, {
    what: 'the schedule to be back',
  });
}, 60_000);

test('with the queues obliterated under load every event is published once and in order', async () => {
  const stage = await setStage({ env: SHORT_LEASE });
  await Promise.all([stage.pod(), stage.pod()]);
  await insertEvents(stage.pool, someEvents(1_000, 50));
  const load = startLoad(stage.pool);
  await waitFor(async () => (await stage.redis.xlen(STREAM)) > 200, { what: 'the load to flow' });
  for (const kind of ['publish', 'claim'] as const) {
    const queue = stage.queue(kind);
    await queue.obliterate({ force: true });
    // Obliterating pauses a queue first, and that survives.
    await queue.resume();
  }
  await load.stop();
  await stage.rested();
  const grade = await stage.expectPromisesHeld();
  expect(grade.deadLetters).toBe(0);
}, 120_000);

test('a schedule that somebody removed comes back', async () => {
  const stage = await setStage({ env: { RELAY_NOTIFY: 'false', RELAY_POLL_INTERVAL: '0.5' } });
  await stage.pod();
  const claim = stage.queue('claim');
  for (const removeTick of [false, true]) {
    const schedule = await waitFor(async () => (await claim.getJobSchedulers())[0], { what: 'the schedule' });
    // Once the schedule itself; once only the next tick, without which it makes no further one.
    if (removeTick) await claim.drain(true);
    else await claim.removeJobScheduler(schedule.key);
    const event = anEvent();
    await insertEvents(stage.pool, [event]);
    await waitFor(async () => (await stage.row(event.eventId)).published, {
      what: 'the event to be published',
    });
  }
  await stage.expectPromisesHeld();
}, 60_000);

test('events whose jobs were removed one by one come back when their lease ends, once and in order', async () => {
  const stage = await setStage({ env: SHORT_LEASE });
  await stage.pod();
  const publish = stage.queue('publish');
  await publish.pause();
  const events: SampleEvent[] = someEvents(40, 10);
  await insertEvents(stage.pool, events);
  await waitFor(async () => (await publish.getWaitingCount()) === 10, {
    what: 'the jobs of the first event of each aggregate',
  });
  const jobs = await publish.getWaiting();
  expect(jobs.map((job) => job.id).toSorted()).toEqual(
    events
      .slice(0, 10)
      .map((it) => it.eventId)
      .toSorted(),
  );
  for (const job of jobs) await job.remove();
  await publish.resume();
  await stage.rested();
  const grade = await stage.expectPromisesHeld();
  expect(grade).toMatchObject({ events: 40, entries: 40, deadLetters: 0 });
}, 60_000);

test('a retry whose job was removed comes back at its time, and its attempts go on counting', async () => {
  const stage = await setStage({
    env: { RELAY_RETRY_BASE_DELAY: '1', RELAY_MAX_RETRY_ATTEMPTS: '2', RELAY_POLL_INTERVAL: '0.2' },
  });
  await stage.redis.set('identity.broken.v1', 'a string');
  await stage.pod();
  const publish = stage.queue('publish');
  const bad = anEvent({ topic: 'identity.broken.v1' });
  await insertEvents(stage.pool, [bad]);
  await waitFor(async () => (await stage.row(bad.eventId)).attempts === 1, { what: 'a first attempt' });
  await (await publish.getJob(bad.eventId))?.remove();
  await stage.rested();
  expect(await stage.row(bad.eventId)).toMatchObject({ attempts: 3, dead_lettered_at: expect.any(Date) });
  expect(await stage.entries('identity.user.v1.dlq')).toHaveLength(1);
  // What Redis counted: three tries, not one and then three.
  expect(/errorstat_WRONGTYPE:count=(\d+)/.exec(await stage.redis.info('errorstats'))?.[1]).toBe('3');
}, 60_000);
