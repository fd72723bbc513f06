import { expect, test } from 'vitest';
import type { SampleEvent } from '../demo/sample.ts';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { DLQ, STREAM, setStage } from '../support/flow.ts';
import { startLoad } from '../support/load.ts';
import { catchMidAppend } from '../support/mid-append.ts';
import { waitFor } from '../support/wait.ts';

/** A topic whose key holds a string: Redis refuses every append to it. */
const BROKEN = 'identity.broken.v1';
const SHORT_LEASE = { RELAY_CLAIM_LEASE: '2', RELAY_PUBLISH_TIMEOUT: '1' };

test('FLUSHALL under load: everything is there again, once and in order, without a restart', async () => {
  const stage = await setStage();
  await Promise.all([stage.pod(), stage.pod()]);
  await insertEvents(stage.pool, someEvents(1_000, 50));
  const load = startLoad(stage.pool);
  for (let round = 1; round <= 3; round++) {
    const before = await stage.redis.xlen(STREAM);
    await waitFor(async () => (await stage.redis.xlen(STREAM)) > before + 200, {
      what: `entries before flush ${round}`,
    });
    await stage.redis.flushall();
  }
  await load.stop();
  await stage.rested();
  const grade = await stage.expectPromisesHeld();
  expect(grade.deadLetters).toBe(0);
  expect((await stage.rows()).every((row) => row.attempts === 0)).toBe(true);
});

test('a hot aggregate goes on at once when the epoch ends while its jobs wait', async () => {
  const stage = await setStage();
  await Promise.all([stage.pod(), stage.pod()]);
  const publish = stage.queue('publish');
  await publish.pause();
  await insertEvents(stage.pool, someEvents(250, 1));
  await waitFor(async () => (await publish.getWaitingCount()) === 250, { what: 'a job for each event' });
  const epoch = await stage.redis.getdel('bull:relay:epoch');
  await waitFor(async () => ![null, epoch].includes(await stage.redis.get('bull:relay:epoch')), {
    what: 'another epoch',
  });
  await publish.resume();
  // Two seconds where a call appends many; 250 where each try appends one.
  await waitFor(async () => (await stage.count('NOT published')) === 0, {
    what: 'all to be published',
    timeoutMs: 60_000,
  });
  await stage.expectPromisesHeld();
});

test('FLUSHALL of an idle relay: what was published is there again, dead letters too, and later events arrive', async () => {
  const stage = await setStage({
    env: { RELAY_POLL_INTERVAL: '1', RELAY_RETRY_BASE_DELAY: '0.1', RELAY_MAX_RETRY_ATTEMPTS: '1' },
  });
  await stage.redis.set(BROKEN, 'a string');
  await stage.pod();
  const bad = anEvent({ topic: BROKEN });
  await insertEvents(stage.pool, [...someEvents(2_500, 100), bad]);
  await stage.rested();
  const [letter] = await stage.entries(DLQ);
  // Acknowledged long after the append, as where the database was away meanwhile: behind its successors.
  await stage.pool.query(
    `UPDATE identity.outbox SET published_at = now() + interval '1 s' WHERE published AND id <= 300`,
  );
  await stage.redis.flushall();
  await waitFor(
    async () => (await stage.redis.xlen(STREAM)) === 2_500 && (await stage.redis.xlen(DLQ)) === 1,
    {
      what: 'the entries to be there again',
    },
  );
  const [again] = await stage.entries(DLQ);
  expect({ ...again?.fields, failed_at: '' }).toEqual({ ...letter?.fields, failed_at: '' });
  await insertEvents(stage.pool, someEvents(5));
  await stage.rested();
  const grade = await stage.expectPromisesHeld();
  expect(grade).toMatchObject({ entries: 2_505, deadLetters: 1 });
  // Each row knows its new entry.
  const ids = [...(await stage.entries()), ...(await stage.entries(DLQ))].map(({ entryId }) => entryId);
  expect((await stage.rows()).map((row) => row.stream_entry_id).toSorted()).toEqual(ids.toSorted());
  await waitFor(async () => (await stage.queue('claim').getJobSchedulersCount()) === 1, {
    what: 'the schedule to be back',
  });
});

test('FLUSHALL with dead letters: each is written again once, its event stays dead, and a replay works', async () => {
  const stage = await setStage({
    env: { RELAY_POLL_INTERVAL: '0.5', RELAY_MAX_RETRY_ATTEMPTS: '0', RELAY_DEAD_LETTER_POLICY: 'hold' },
  });
  await stage.redis.set(BROKEN, 'a string');
  await Promise.all([stage.pod(), stage.pod()]);
  // More than the lease reaper takes at once. The one behind each waits for it.
  const dead = someEvents(230, 230, { topic: BROKEN });
  const behind = dead.map(({ aggregateId }) => anEvent({ aggregateId }));
  await insertEvents(stage.pool, [...dead, ...behind]);
  const deaths = async () =>
    (await stage.rows())
      .filter((row) => row.dead_lettered_at !== null)
      // Both are those of the letter, which is a new one.
      .map(({ stream_entry_id: _, dead_lettered_at: __, ...row }) => row);
  const areDead = async () => (await deaths()).length === 230;
  await waitFor(areDead, { what: 'the dead letters' });
  const before = await deaths();
  await stage.redis.flushall();
  const haveTheirs = 'dead_lettered_at IS NOT NULL AND stream_entry_id IS NOT NULL';
  await waitFor(async () => (await stage.redis.xlen(DLQ)) >= 230 && (await stage.count(haveTheirs)) === 230, {
    what: 'the dead letters to be written again',
  });
  expect(await deaths()).toEqual(before);
  const letters = await stage.entries(DLQ);
  expect(letters.map(({ fields }) => fields.original_event_id).toSorted()).toEqual(
    dead.map((event) => event.eventId).toSorted(),
  );
  for (const { entryId, fields } of letters)
    expect((await stage.row(fields.original_event_id as string)).stream_entry_id).toBe(entryId);
  expect(await stage.redis.xlen(STREAM)).toBe(0);

  // The key that held a string is gone as well.
  const replay = await stage.command(['dlq', 'replay', '--topic', BROKEN, '--yes']);
  expect(replay.code, replay.lines.join('\n')).toBe(0);
  await stage.rested();
  expect(await stage.expectPromisesHeld()).toMatchObject({ entries: 460, deadLetters: 0 });
});

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
});

test('an event that was appended when its job and its pod were lost is acknowledged, not appended again', async () => {
  const stage = await setStage({ env: SHORT_LEASE });
  const { pod, release } = await catchMidAppend(stage);
  await pod.kill('SIGKILL');
  await stage.queue('publish').obliterate({ force: true });
  await stage.queue('publish').resume();
  await release();
  await stage.pod();
  await stage.rested();
  const grade = await stage.expectPromisesHeld();
  expect(grade).toMatchObject({ events: 60, entries: 60 });
});

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
});

test('events whose jobs were removed one by one come back when their lease ends, once and in order', async () => {
  const stage = await setStage({ env: SHORT_LEASE });
  await stage.pod();
  const publish = stage.queue('publish');
  await publish.pause();
  const events: SampleEvent[] = someEvents(40, 10);
  await insertEvents(stage.pool, events);
  await waitFor(async () => (await publish.getWaitingCount()) === 40, { what: 'the jobs of all events' });
  const jobs = await publish.getWaiting();
  expect(jobs.map((job) => job.id).toSorted()).toEqual(events.map((it) => it.eventId).toSorted());
  // Of some aggregates the first event, of others one in the middle or the last.
  const removed = new Set(events.filter((_, i) => i % 3 === 0).map((it) => it.eventId));
  for (const job of jobs) if (removed.has(job.id ?? '')) await job.remove();
  await publish.resume();
  await stage.rested();
  const grade = await stage.expectPromisesHeld();
  expect(grade).toMatchObject({ events: 40, entries: 40, deadLetters: 0 });
});

test('a retry whose job was removed comes back at its time, and its attempts go on counting', async () => {
  const stage = await setStage({
    env: { RELAY_RETRY_BASE_DELAY: '1', RELAY_MAX_RETRY_ATTEMPTS: '2', RELAY_POLL_INTERVAL: '0.2' },
  });
  await stage.redis.set(BROKEN, 'a string');
  await stage.pod();
  const publish = stage.queue('publish');
  const bad = anEvent({ topic: BROKEN });
  await insertEvents(stage.pool, [bad]);
  await waitFor(async () => (await stage.row(bad.eventId)).attempts > 0, { what: 'a first attempt' });
  await (await publish.getJob(bad.eventId))?.remove();
  await stage.rested();
  expect(await stage.row(bad.eventId)).toMatchObject({ attempts: 3, dead_lettered_at: expect.any(Date) });
  expect(await stage.entries('identity.user.v1.dlq')).toHaveLength(1);
  // What Redis counted: three tries, not one and then three.
  expect(/errorstat_WRONGTYPE:count=(\d+)/.exec(await stage.redis.info('errorstats'))?.[1]).toBe('3');
});
