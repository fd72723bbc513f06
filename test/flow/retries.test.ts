import { expect, onTestFinished, test } from 'vitest';
import type { Pod } from '../demo/pod.ts';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { DLQ, type RowChange, recordHistory, STREAM, setStage } from '../support/flow.ts';
import { waitFor } from '../support/wait.ts';

/** By which PostgreSQL's clock and ours may differ in what they round. */
const CLOCK_MS = 5;
const SKEWED_CLOCK = new URL('../chaos/skewed-clock.mjs', import.meta.url).href;
/** A topic whose key holds a string: Redis refuses every append to it. */
const BAD_TOPIC = 'identity.broken.v1';

test('an event that Redis refuses is retried with doubling delays, then dead-lettered once, and only its aggregate waits', async () => {
  const stage = await setStage({ env: { RELAY_RETRY_BASE_DELAY: '0.5', RELAY_MAX_RETRY_ATTEMPTS: '4' } });
  await stage.redis.set(BAD_TOPIC, 'a string');
  const historyOf = await recordHistory(stage.pool);
  await stage.pod();
  const bad = anEvent({
    topic: BAD_TOPIC,
    payload: { tenant_id: '7b0f3c52-4f0e-4a39-9a55-2f5f6a1b8c11', note: 'ünïcode' },
  });
  const successors = someEvents(5, 1, { aggregateId: bad.aggregateId });
  const others = someEvents(200, 50);
  const insertedAt = new Date();
  await insertEvents(stage.pool, [bad, ...others]);
  // Its successors find it between two attempts.
  await waitFor(async () => (await stage.row(bad.eventId)).attempts > 0, { what: 'a first attempt' });
  await insertEvents(stage.pool, successors);
  await stage.rested();

  const history = await historyOf(bad.eventId);
  const dead = await stage.row(bad.eventId);
  expect(dead).toMatchObject({
    published: false,
    published_at: null,
    attempts: 5,
    next_attempt_at: Number.POSITIVE_INFINITY,
    error_message: expect.stringContaining('WRONGTYPE'),
    stream_entry_id: (await stage.entries(DLQ))[0]?.entryId,
  });
  expectRetries(history, [500, 1_000, 2_000, 4_000], insertedAt);

  const deadLetters = await stage.entries(DLQ);
  const envelope = {
    event_id: bad.eventId,
    event_type: bad.eventType,
    topic: BAD_TOPIC,
    schema_version: '1',
    occurred_at: expect.stringMatching(/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3,6}Z$/),
    tenant_id: '7b0f3c52-4f0e-4a39-9a55-2f5f6a1b8c11',
    aggregate_id: bad.aggregateId,
    aggregate_type: 'user',
    payload: dead.payload,
  };
  expect(deadLetters.map((entry) => entry.fields)).toEqual([
    {
      ...envelope,
      original_event_id: bad.eventId,
      error_message: dead.error_message,
      attempts: '5',
      failed_at: expect.stringMatching(/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/),
      created_at: deadLetters[0]?.fields.occurred_at,
    },
  ]);
  expect(Date.parse(deadLetters[0]?.fields.created_at ?? '')).toBe(bad.createdAt.getTime());

  // The others flowed while it was retried, its successors after it was dead, in their order.
  const diedAt = dead.dead_lettered_at as Date;
  const publishedAt = async (eventId: string) => (await stage.row(eventId)).published_at as Date;
  for (const { eventId } of others)
    expect((await publishedAt(eventId)).getTime()).toBeLessThan(diedAt.getTime());
  for (const { eventId } of successors) {
    expect((await publishedAt(eventId)).getTime()).toBeGreaterThanOrEqual(diedAt.getTime());
  }
  await stage.expectPromisesHeld();
  expect(await stage.redis.get(BAD_TOPIC)).toBe('a string');
});

test('what is behind an event that waits for a retry leaves Redis within seconds, and comes back at once after it', async () => {
  const stage = await setStage({ env: { RELAY_RETRY_BASE_DELAY: '4', RELAY_POLL_INTERVAL: '3600' } });
  await stage.redis.set(BAD_TOPIC, 'a string');
  // As many as have their jobs at the same time: each waits for the one before it.
  const events = someEvents(256, 1).map((event, i) => (i === 20 ? { ...event, topic: BAD_TOPIC } : event));
  const bad = events[20] as (typeof events)[number];
  await insertEvents(stage.pool, events);
  await stage.pod();
  await waitFor(async () => (await stage.row(bad.eventId)).attempts === 1, { what: 'a first attempt' });
  const jobs = async () => {
    const keys = await stage.redis.keys('bull:relay-publish:????????-*');
    return keys.map((key) => key.split(':').at(-1));
  };
  await waitFor(async () => (await jobs()).join() === bad.eventId, {
    what: 'its job to be the only one',
  });
  await stage.redis.del(BAD_TOPIC);
  await stage.rested();
  await stage.expectPromisesHeld();
});

test.each([
  ['an hour ahead', 3_600_000],
  ['an hour behind', -3_600_000],
  ['a day ahead', 86_400_000],
])(
  'retries come when they are due although the clock of one pod is %s; it is told, and is a metric',
  async (_, offsetMs) => {
    const stage = await setStage({
      env: { RELAY_RETRY_BASE_DELAY: '2', RELAY_MAX_RETRY_ATTEMPTS: '3', RELAY_CONCURRENCY: '2' },
    });
    await stage.redis.set(BAD_TOPIC, 'a string');
    const historyOf = await recordHistory(stage.pool);
    const [off, right] = await Promise.all([
      stage.pod({ NODE_OPTIONS: `--import=${SKEWED_CLOCK}`, CHAOS_CLOCK_OFFSET_MS: String(offsetMs) }),
      stage.pod(),
    ]);
    // So many that each pod makes some of the attempts.
    const failing = someEvents(24, 24, { topic: BAD_TOPIC });
    await insertEvents(stage.pool, [...failing, ...someEvents(200)]);
    await stage.rested();
    for (const { eventId } of failing) {
      const failed = failures(await historyOf(eventId));
      expect(failed).toHaveLength(3);
      const { dead_lettered_at: diedAt } = await stage.row(eventId);
      const times = [...failed.map((row) => row.at), diedAt as Date].map((time) => time.getTime());
      for (const [i, delay] of [2_000, 4_000, 8_000].entries()) {
        const waited = (times[i + 1] as number) - (times[i] as number);
        // The history sees an attempt some time after it was made, on a busy machine the more so.
        expect(waited, `time until attempt ${i + 2}`).toBeGreaterThan(delay - 1_000);
        expect(waited, `time until attempt ${i + 2}`).toBeLessThan(delay + 10_000);
      }
    }
    await stage.expectPromisesHeld();
    const told = (pod: Pod) =>
      pod.logs().filter((line) => String(line.msg).startsWith('the clock of this pod'));
    expect(told(right)).toEqual([]);
    expect(told(off)).toEqual([
      expect.objectContaining({ aheadSeconds: expect.closeTo(offsetMs / 1_000, -1) }),
    ]);
    const metrics = await (await fetch(`${off.url}/metrics`)).text();
    const ahead = Number(/^relay_pod_clock_ahead_seconds (\S+)$/m.exec(metrics)?.[1]);
    expect(ahead).toBeCloseTo(offsetMs / 1_000, -1);
    // What it writes down for others: its log, its heartbeat.
    for (const { time } of off.logs().slice(-3))
      expect(Math.abs(Date.parse(String(time)) - Date.now())).toBeLessThan(300_000);
  },
);

test('with the default configuration the retries wait 60, 120, 240, 480 and 960 seconds', async () => {
  const stage = await setStage();
  await stage.redis.set(BAD_TOPIC, 'a string');
  const historyOf = await recordHistory(stage.pool);
  await stage.pod();
  const bad = anEvent({ topic: BAD_TOPIC });
  await insertEvents(stage.pool, [bad]);
  const publish = stage.queue('publish');
  for (let attempt = 1; attempt <= 5; attempt++) {
    await waitFor(async () => (await stage.row(bad.eventId)).attempts === attempt, {
      what: `attempt ${attempt} on the row`,
    });
    // Nobody waits 31 minutes for this test.
    const job = await publish.getJob(bad.eventId);
    await job?.promote();
  }
  await stage.rested();
  const history = await historyOf(bad.eventId);
  expect(announcedDelays(history).map((ms) => Math.round(ms / 1_000))).toEqual([60, 120, 240, 480, 960]);
  expect(await stage.row(bad.eventId)).toMatchObject({ attempts: 6, dead_lettered_at: expect.any(Date) });
  expect(await stage.entries(DLQ)).toHaveLength(1);
});

test('an event that can be published again after some retries goes on in its order, without a dead letter', async () => {
  const stage = await setStage({ env: { RELAY_RETRY_BASE_DELAY: '0.2', RELAY_MAX_RETRY_ATTEMPTS: '12' } });
  await stage.redis.set(BAD_TOPIC, 'a string');
  await stage.pod();
  const events = someEvents(30, 2, { topic: BAD_TOPIC });
  await insertEvents(stage.pool, events);
  const first = events[0] as (typeof events)[0];
  await waitFor(async () => (await stage.row(first.eventId)).attempts >= 2, { what: 'two failed attempts' });
  await stage.redis.del(BAD_TOPIC);
  await stage.rested();
  const grade = await stage.expectPromisesHeld();
  expect(grade).toMatchObject({ events: 30, entries: 30, deadLetters: 0 });
});

test('an attempt that fails before the claim that started it is committed counts, and the next one waits its time', async () => {
  const stage = await setStage({ env: { RELAY_RETRY_BASE_DELAY: '0.8', RELAY_MAX_RETRY_ATTEMPTS: '1' } });
  await stage.redis.set(BAD_TOPIC, 'a string');
  // A database whose commits take 300 ms, whenever a row is leased that was fresh or parked.
  await stage.pool.query(`
    CREATE FUNCTION commit_slowly() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN PERFORM pg_sleep(0.3); RETURN NULL; END $$;
    CREATE CONSTRAINT TRIGGER commit_slowly AFTER UPDATE ON identity.outbox DEFERRABLE INITIALLY DEFERRED
      FOR EACH ROW WHEN ((OLD.next_attempt_at IS NULL OR OLD.next_attempt_at = 'infinity')
                         AND NEW.next_attempt_at < 'infinity' AND NEW.topic = '${BAD_TOPIC}')
      EXECUTE FUNCTION commit_slowly()`);
  const historyOf = await recordHistory(stage.pool);
  await stage.pod();
  const claimed = anEvent({ topic: BAD_TOPIC });
  const first = anEvent();
  const promoted = anEvent({ topic: BAD_TOPIC, aggregateId: first.aggregateId });
  await insertEvents(stage.pool, [claimed, first, promoted]);
  await stage.rested();
  for (const { eventId } of [claimed, promoted]) {
    const failed = failures(await historyOf(eventId));
    expect(failed.map((row) => [row.attempts, row.error_message?.includes('WRONGTYPE')])).toEqual([
      [1, true],
    ]);
    expect(await stage.row(eventId)).toMatchObject({ attempts: 2, dead_lettered_at: expect.any(Date) });
  }
});

test('a held aggregate stays behind its dead event until somebody makes that one fresh again', async () => {
  const stage = await setStage({
    env: {
      RELAY_DEAD_LETTER_POLICY: 'hold',
      RELAY_MAX_RETRY_ATTEMPTS: '0',
      RELAY_POLL_INTERVAL: '0.1',
      RELAY_CLAIM_LEASE: '1',
    },
  });
  await stage.redis.set(BAD_TOPIC, 'a string');
  await stage.pod();
  const bad = anEvent({ topic: BAD_TOPIC });
  const successors = someEvents(5, 1, { aggregateId: bad.aggregateId });
  await insertEvents(stage.pool, [bad, ...successors.slice(0, 3)]);
  await waitFor(async () => (await stage.row(bad.eventId)).dead_lettered_at, { what: 'the dead letter' });
  await insertEvents(stage.pool, successors.slice(3));
  // Many claims, ticks and sweeps later (each of these events takes at least one) they are still held.
  for (let i = 0; i < 20; i++) {
    const [other] = someEvents(1);
    await insertEvents(stage.pool, [other as (typeof successors)[0]]);
    await waitFor(async () => (await stage.row(other?.eventId ?? '')).published, {
      what: 'another aggregate',
    });
  }
  await waitFor(async () => (await stage.count(`next_attempt_at IS NULL AND NOT published`)) === 0, {
    what: 'every fresh row to be looked at',
  });
  for (const { eventId } of successors) {
    expect(await stage.row(eventId)).toMatchObject({
      published: false,
      next_attempt_at: Number.POSITIVE_INFINITY,
    });
  }

  await stage.redis.del(BAD_TOPIC);
  await stage.pool.query('UPDATE identity.outbox SET next_attempt_at = NULL WHERE event_id = $1', [
    bad.eventId,
  ]);
  await stage.rested();
  expect(await stage.row(bad.eventId)).toMatchObject({ published: true, dead_lettered_at: null });
  expect((await stage.entries(BAD_TOPIC)).map((entry) => entry.fields.event_id)).toEqual([bad.eventId]);
  await stage.expectPromisesHeld();
});

test('more failing aggregates than jobs may be in Redis do not stop healthy events, and the cap holds', async () => {
  const cap = 20;
  const stage = await setStage({ env: { RELAY_MAX_IN_FLIGHT: String(cap), RELAY_RETRY_BASE_DELAY: '60' } });
  await stage.redis.set(BAD_TOPIC, 'a string');
  const publish = stage.queue('publish');
  const samples: number[] = [];
  let sampling = true;
  onTestFinished(async () => {
    sampling = false;
    await sampler;
  });
  const sampler = (async () => {
    while (sampling) {
      const jobs = await publish.getJobCounts('waiting', 'active', 'delayed', 'prioritized');
      samples.push(Object.values(jobs).reduce((sum, count) => sum + count, 0));
    }
  })();
  await Promise.all([stage.pod(), stage.pod()]);
  const failing = someEvents(180, 60, { topic: BAD_TOPIC });
  const healthy = someEvents(600, 120);
  await insertEvents(stage.pool, failing);
  await insertEvents(stage.pool, healthy);
  const isStuck = `topic = '${STREAM}' AND NOT published`;
  await waitFor(async () => (await stage.count(isStuck)) === 0, {
    what: 'every healthy event to be published',
  });
  // The first of each failing aggregate was tried, and is still alive; nothing overtook it.
  await waitFor(async () => (await stage.count(`attempts = 1 AND topic = '${BAD_TOPIC}'`)) === 60, {
    what: 'a first attempt for each failing aggregate',
  });
  sampling = false;
  await sampler;
  expect(await stage.count(`dead_lettered_at IS NOT NULL`)).toBe(0);
  expect(samples.length).toBeGreaterThan(20);
  expect(Math.max(...samples)).toBeLessThanOrEqual(cap);
  expect((await stage.entries()).length).toBe(600);
});

test('a retry that Redis had no room for comes by its row, at the right time, and its attempts go on counting', async () => {
  const stage = await setStage({
    env: {
      RELAY_MAX_IN_FLIGHT: '2',
      RELAY_RETRY_BASE_DELAY: '0.3',
      RELAY_MAX_RETRY_ATTEMPTS: '3',
      RELAY_POLL_INTERVAL: '0.1',
    },
  });
  await stage.redis.set(BAD_TOPIC, 'a string');
  const historyOf = await recordHistory(stage.pool);
  await stage.pod();
  const failing = someEvents(8, 8, { topic: BAD_TOPIC });
  const insertedAt = Date.now();
  await insertEvents(stage.pool, failing);
  await stage.rested();
  for (const { eventId } of failing) {
    expect(await stage.row(eventId)).toMatchObject({ attempts: 4, dead_lettered_at: expect.any(Date) });
    // Of attempts that follow each other quickly, the row may tell only the later one.
    const announced = failures(await historyOf(eventId));
    expect(announced.length).toBeGreaterThan(0);
    for (const row of announced)
      expectAnnounced(row, 300 * 2 ** (row.attempts - 1), insertedAt + 300 * (2 ** row.attempts - 1));
  }
  const deadLetters = (await stage.entries(DLQ)).map(({ fields }) => [fields.event_id, fields.attempts]);
  expect(deadLetters.toSorted()).toEqual(failing.map(({ eventId }) => [eventId, '4']).toSorted());
});

/** The row's states right after each failed attempt that was not the last one. */
function failures(history: readonly RowChange[]): RowChange[] {
  return history.filter(
    (row, i) => row.attempts > (history[i - 1]?.attempts ?? 0) && row.dead_lettered_at === null,
  );
}

/** How long the row said, at each failed attempt, that the next one would be away; ms. */
function announcedDelays(history: readonly RowChange[]): number[] {
  return failures(history).map((row) => Number(row.next_attempt_at) - row.begun.getTime());
}

/**
 * The row announced its next attempt `delay` after the failed one. The history sees an attempt some time after it was made:
 * on a busy machine only these bounds are firm.
 * @param earliest when that attempt can be made at the earliest: after all delays before it
 */
function expectAnnounced(row: RowChange, delay: number, earliest: number): void {
  const next = Number(row.next_attempt_at);
  const about = `announced by attempt ${row.attempts}`;
  expect(next, about).toBeGreaterThanOrEqual(earliest - CLOCK_MS);
  expect(next, about).toBeLessThanOrEqual(row.at.getTime() + delay + CLOCK_MS);
}

/** Each failed attempt was mirrored on the row, and the next one came when the row had said. */
function expectRetries(
  history: readonly RowChange[],
  delays: readonly number[],
  firstTriedAfter: Date,
): void {
  const failed = failures(history);
  expect(failed.map((row) => row.attempts)).toEqual(delays.map((_, i) => i + 1));
  const died = history.find((row) => row.dead_lettered_at !== null);
  const times = [...failed, died as RowChange].map((row) => row.at.getTime());
  let earliest = firstTriedAfter.getTime();
  for (const [i, delay] of delays.entries()) {
    const row = failed[i] as RowChange;
    expect(row.error_message).toContain('WRONGTYPE');
    earliest += delay;
    expectAnnounced(row, delay, earliest);
    expect(times[i + 1], `time of attempt ${i + 2}`).toBeGreaterThanOrEqual(earliest);
    const waited = (times[i + 1] as number) - (times[i] as number);
    expect(waited, `time until attempt ${i + 2}`).toBeLessThan(delay * 1.2 + 10_000);
  }
}
