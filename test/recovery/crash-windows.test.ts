/**
 * A pod dies in between two steps, at exactly the moment that the test names, and leaves the state that the test shows.
 * Another pod goes on: every event is in its stream exactly once, or dead with exactly one dead letter, in order.
 */
import { Queue } from 'bullmq';
import { Client } from 'pg';
import { describe, expect, onTestFinished, type TestContext, test } from 'vitest';
import { createRelay, loadConfig, type Relay } from '../../src/index.ts';
import { publishQueueName } from '../../src/queue/queues.ts';
import { createLogger } from '../../src/telemetry/logger.ts';
import type { SampleEvent } from '../demo/sample.ts';
import { atEndOfFile } from '../support/cleanup.ts';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { STREAM, setStage as setFlowStage } from '../support/flow.ts';
import { expectPromisesHeld } from '../support/ledger.ts';
import { type Detail, dieAt, type Moment, startWatchedPod, type Watch } from '../support/mortal-pod.ts';
import { createDatabase, createRedis } from '../support/servers.ts';
import {
  deferred,
  openAdminPool,
  openAdminRedis,
  openPool,
  openRedis,
  readRows,
  readStream,
} from '../support/stages.ts';
import { PATIENCE_MS, waitFor } from '../support/wait.ts';
import { keepWhatFailed } from '../support/what-failed.ts';

const BROKEN_TOPIC = 'not.a.stream';
const OPTIONS = { concurrent: true };
/** No tick comes by itself before the pod dies. */
const NO_TICKS = { RELAY_POLL_INTERVAL: '3600' };
/** One row of an aggregate has its job, those behind it are parked. */
const WINDOW_OF_ONE = { RELAY_MAX_IN_FLIGHT: '4' };
/** The first failure is the last. */
const NO_RETRIES = { RELAY_MAX_RETRY_ATTEMPTS: '0' };
/** A retry comes when the test says so. */
const LATE_RETRIES = { RELAY_MAX_RETRY_ATTEMPTS: '3', RELAY_RETRY_BASE_DELAY: '3600' };

type State = 'fresh' | 'leased' | 'parked' | 'published' | 'dead';

/** The first time that something comes to that moment. */
const at =
  (moment: Moment, isIt: (detail: Detail) => boolean | Promise<boolean> = () => true) =>
  (now: Moment, detail: Detail) =>
    now === moment && isIt(detail);

const hasRows = ({ rows }: Detail) => rows > 0;
/** Of the append script: it has put something into a stream. */
const isAppended = ({ answers }: Detail) => answers.some((it) => it[0] === '+');
/** It has released a job, since what is before its event has failed. */
const isReleased = ({ answers }: Detail) => answers.some((it) => it === '<' || it === '<!');

describe('a pod that claims, and dies', OPTIONS, () => {
  test('after it has taken the rows, before they have jobs: all of it is undone', async (context) => {
    const stage = await setStage(context);
    await stage.diesAt(at('after claim', hasRows));
    expect([await stage.states(), await stage.jobs()]).toEqual([
      ['fresh', 'fresh', 'fresh'],
      [0, 0, 0],
    ]);
    await stage.anotherPodGoesOn();
    await stage.expectAllPublished();
  });

  test('after the jobs were added, before the commit: the jobs are there, the rows are fresh', async (context) => {
    const stage = await setStage(context);
    await stage.publishQueue.pause(); // nobody publishes before the pod is dead
    await stage.diesAt(at('before commit of claim', hasRows));
    expect([await stage.states(), await stage.jobs()]).toEqual([
      ['fresh', 'fresh', 'fresh'],
      [1, 1, 1],
    ]);
    await stage.publishQueue.resume();
    await stage.anotherPodGoesOn();
    await stage.expectAllPublished();
  });

  test('before the commit, when all events are in their stream already, and their jobs are deleted as well', async (context) => {
    const stage = await setStage(context);
    const areAppended = () =>
      waitFor(async () => (await stage.eventsInStream()).length === 3, {
        what: 'the events to be appended',
        pollMs: 15,
      });
    await stage.diesAt(at('before commit of claim', (it) => hasRows(it) && areAppended()));
    expect([await stage.states(), await stage.jobs()]).toEqual([
      ['fresh', 'fresh', 'fresh'],
      [1, 1, 1],
    ]);
    for (const index of [0, 1, 2]) await stage.removeJob(index);
    await stage.anotherPodGoesOn();
    await stage.expectAllPublished();
  });

  test('after the commit, before a job was run', async (context) => {
    const stage = await setStage(context);
    await stage.publishQueue.pause();
    await stage.diesAt(at('after commit of claim', hasRows));
    expect([await stage.states(), await stage.jobs()]).toEqual([
      ['leased', 'leased', 'leased'],
      [1, 1, 1],
    ]);
    await stage.publishQueue.resume();
    await stage.anotherPodGoesOn();
    await stage.expectAllPublished();
  });

  test('after the commit, before a job was run, and Redis loses the jobs as well', async (context) => {
    const stage = await setStage(context);
    await stage.publishQueue.pause();
    await stage.diesAt(at('after commit of claim', hasRows));
    for (const index of [0, 1, 2]) await stage.removeJob(index);
    await stage.publishQueue.resume();
    await stage.anotherPodGoesOn();
    await stage.expectAllPublished();
  });
});

describe('a pod that publishes, and dies', OPTIONS, () => {
  test('after the append, before the acknowledgement', async (context) => {
    const stage = await setStage(context);
    await stage.diesAt(at('after append', (it) => isAppended(it) && stage.becomesLeased(0)));
    expect(await readStream(stage.redis, STREAM)).not.toEqual([]);
    expect([await stage.states(), await stage.jobs()]).toEqual([
      ['leased', 'leased', 'leased'],
      [1, 1, 1],
    ]);
    await stage.anotherPodGoesOn();
    await stage.expectAllPublished();
  });

  test('after the append, before the acknowledgement, and its job is removed as well', async (context) => {
    const stage = await setStage(context);
    await stage.diesAt(at('after append', (it) => isAppended(it) && stage.becomesLeased(0)));
    await stage.removeJob(0);
    await stage.anotherPodGoesOn();
    await stage.expectAllPublished();
  });

  test('after one append, which took along those that waited for it, before any acknowledgement', async (context) => {
    const stage = await setCascade(context);
    await stage.diesAt(at('after append', isCascading));
    expect(await stage.eventsInStream()).toEqual(stage.events.map((it) => it.eventId));
    expect([await stage.states(), await stage.jobs()]).toEqual([
      ['leased', 'leased', 'leased'],
      [1, 1, 1],
    ]);
    await stage.anotherPodGoesOn();
    await stage.expectAllPublished();
  });

  test('after one append, which took along those that waited for it, and its job is removed as well', async (context) => {
    const stage = await setCascade(context);
    await stage.diesAt(at('after append', isCascading));
    await stage.removeJob(0);
    await stage.anotherPodGoesOn();
    await stage.expectAllPublished();
  });

  test('in the acknowledgement, before its commit', async (context) => {
    const stage = await setStage(context);
    await stage.diesAt(at('before commit of acknowledge', (it) => hasRows(it) && stage.becomesLeased(0)));
    expect([await stage.states(), await stage.jobs()]).toEqual([
      ['leased', 'leased', 'leased'],
      [1, 1, 1],
    ]);
    await stage.anotherPodGoesOn();
    await stage.expectAllPublished();
  });

  test('after the acknowledgement, before its job ends', async (context) => {
    const stage = await setStage(context);
    const isFirst = async () => (await stage.states())[0] === 'published';
    await stage.diesAt(at('after commit of acknowledge', isFirst));
    expect([(await stage.states())[0], (await stage.jobs())[0]]).toEqual(['published', 1]);
    await stage.anotherPodGoesOn();
    await stage.expectAllPublished();
  });

  test('after the acknowledgement, before those behind it are freed, and its job is removed as well', async (context) => {
    const stage = await setStage(context, {}, WINDOW_OF_ONE);
    await stage.diesAt(at('after commit of acknowledge', hasRows));
    expect([await stage.states(), await stage.jobs()]).toEqual([
      ['published', 'parked', 'parked'],
      [1, 0, 0],
    ]);
    await stage.removeJob(0);
    await stage.anotherPodGoesOn();
    await stage.expectAllPublished();
  });
});

describe('a pod that releases a job, since the event before it has failed, and dies', OPTIONS, () => {
  test('after the job was released, before it has ended', async (context) => {
    const stage = await setStage(context, { topic: BROKEN_TOPIC }, LATE_RETRIES);
    await stage.diesAt(at('after append', (it) => isReleased(it) && stage.becomesLeased(2)));
    const released = await Promise.all([1, 2].map(stage.isReleased));
    expect(released).toContain(true);
    expect([await stage.states(), await stage.jobs()]).toEqual([
      ['leased', 'leased', 'leased'],
      [1, 1, 1],
    ]);
    await stage.anotherPodGoesOn(async () => {
      await stage.becomes(['leased', 'parked', 'parked']);
      await stage.obstacleIsGone();
    });
    await stage.expectAllPublished();
  });

  test('after the job has ended, before its row is parked', async (context) => {
    const stage = await setStage(context, { topic: BROKEN_TOPIC }, LATE_RETRIES);
    await stage.diesAt(at('before park', () => stage.becomesLeased(2)));
    expect(await stage.states()).toEqual(['leased', 'leased', 'leased']);
    expect(await stage.jobs()).not.toEqual([1, 1, 1]);
    await stage.anotherPodGoesOn(async () => {
      await stage.becomes(['leased', 'parked', 'parked']);
      await stage.obstacleIsGone();
    });
    await stage.expectAllPublished();
  });

  test('after its row is parked, before the aggregate is refilled, when the event before it is published by now', async (context) => {
    const stage = await setStage(context, { topic: BROKEN_TOPIC }, LATE_RETRIES);
    let mayPublish = false;
    let isPublished = false;
    let refills = 0;
    const dies = deferred();
    await stage.diesAt(
      async (moment) => {
        if (moment === 'before refill' && refills > 0) await dies.promise;
        if (moment === 'after commit of refill' && mayPublish) refills++;
        if (moment === 'before park' && !isPublished) {
          await stage.becomesLeased(2);
          mayPublish = true;
          await stage.obstacleIsGone();
          await stage.isPublished(0);
          isPublished = true;
          // Nothing is parked yet for the refill that comes after the acknowledgement.
          await waitFor(() => refills > 0, { what: 'that refill' });
        }
        if (moment !== 'after commit of park') return false;
        // The two behind it may be parked one after the other. A row without its job would wait for the end of its lease.
        const [states, jobs] = await Promise.all([stage.states(), stage.jobs()]);
        if (states.some((state, i) => state === 'leased' && jobs[i] === 0)) return false;
        dies.resolve();
        return true;
      },
      { ...NO_TICKS, RELAY_PUBLISH_TIMEOUT: '60', RELAY_CLAIM_LEASE: '300' },
    );
    const states = await stage.states();
    expect(states[0]).toBe('published');
    expect(states).toContain('parked');
    await stage.anotherPodGoesOn();
    await stage.expectAllPublished();
  });
});

describe('a pod whose event fails, and dies', OPTIONS, () => {
  test('after the attempt, before the row says so: the next pod writes it there', async (context) => {
    const stage = await setStage(context, { topic: BROKEN_TOPIC }, LATE_RETRIES);
    await stage.diesAt(at('before record failure', () => stage.becomesLeased(0)));
    // The one behind it may have been released, and told by parking that this one has failed.
    expect((await readRows(stage.pool))[0]?.errorMessage).toBe(null);
    await stage.anotherPodGoesOn(async () => {
      await waitFor(async () => (await readRows(stage.pool))[0]?.errorMessage, {
        what: 'the failure to be on the row',
      });
      const [row] = await readRows(stage.pool);
      expect([row?.attempts, row?.errorMessage]).toEqual([1, expect.stringMatching(/^WRONGTYPE/)]);
      await stage.obstacleIsGone();
    });
    await stage.expectAllPublished();
  });

  test('after the last attempt, before any handler ran: there is no dead letter', async (context) => {
    const stage = await setStage(context, { topic: BROKEN_TOPIC }, NO_RETRIES);
    await stage.diesAt(at('before letter', () => stage.becomesLeased(0)));
    expect(await stage.publishQueue.getJobState(stage.events[0]?.eventId ?? '')).toBe('failed');
    expect([(await stage.states())[0], await stage.deadLetters()]).toEqual(['leased', []]);
    await stage.anotherPodGoesOn();
    await stage.expectOneDeadLetter();
  });

  test('after the dead letter, before its row is dead', async (context) => {
    const stage = await setStage(context, { topic: BROKEN_TOPIC }, NO_RETRIES);
    await stage.diesAt(at('after letter', () => stage.becomesLeased(0)));
    expect([(await stage.states())[0], (await stage.deadLetters()).length]).toEqual(['leased', 1]);
    await stage.anotherPodGoesOn();
    await stage.expectOneDeadLetter();
  });

  test('after the dead letter, before its row is dead, and its job is removed as well', async (context) => {
    const stage = await setStage(context, { topic: BROKEN_TOPIC }, NO_RETRIES);
    await stage.diesAt(at('after letter', () => stage.becomesLeased(0)));
    await stage.removeJob(0);
    await stage.anotherPodGoesOn();
    await stage.expectOneDeadLetter();
  });

  test('when its row is dead, before the commit', async (context) => {
    const stage = await setStage(context, { topic: BROKEN_TOPIC }, NO_RETRIES);
    await stage.diesAt(at('before commit of bury', () => stage.becomesLeased(0)));
    expect([(await stage.states())[0], (await stage.deadLetters()).length]).toEqual(['leased', 1]);
    await stage.anotherPodGoesOn();
    await stage.expectOneDeadLetter();
  });

  test('after the commit of that, before those behind it are freed', async (context) => {
    const stage = await setStage(context, { topic: BROKEN_TOPIC }, { ...NO_RETRIES, ...WINDOW_OF_ONE });
    await stage.diesAt(at('after commit of bury'));
    // On a busy machine the refill that the claim asked for comes after that commit, and frees the second row.
    const [first, , last] = await stage.states();
    expect([first, last, (await stage.deadLetters()).length]).toEqual(['dead', 'parked', 1]);
    await stage.anotherPodGoesOn();
    await stage.expectOneDeadLetter();
  });
});

describe('a pod that compares table and streams, since Redis has lost everything, and dies', OPTIONS, () => {
  test('when some of the rows are unpublished, and others are not looked at yet', async (context) => {
    const stage = await setStage(context);
    await insertEvents(stage.pool, someEvents(1_500, 30));
    await stage.anotherPodGoesOn();
    await stage.redis.flushall();
    await stage.diesAt(at('after commit of unpublish', hasRows));
    expect(await stage.count('NOT published AND next_attempt_at IS NULL')).toBe(1_000);
    expect(await stage.count('published')).toBe(503);
    expect(await stage.redis.exists(STREAM)).toBe(0);
    await stage.anotherPodGoesOn();
    await stage.expectAllPublished();
  });
});

describe('a pod that lives, but', OPTIONS, () => {
  test('never hears that its acknowledgement was committed', async (context) => {
    const stage = await setStage(context);
    await stage.livesWith(failsOnce('after commit of acknowledge'));
    await stage.expectAllPublished();
  });

  test('never hears that its claim was committed', async (context) => {
    const stage = await setStage(context);
    await stage.livesWith(failsOnce('after commit of claim'));
    await stage.expectAllPublished();
  });

  test('is held up after it has released a job, until the event before it is published', async (context) => {
    const stage = await setStage(
      context,
      { topic: BROKEN_TOPIC },
      { ...LATE_RETRIES, RELAY_PUBLISH_TIMEOUT: '60', RELAY_CLAIM_LEASE: '300' },
    );
    let held = false;
    await stage.livesWith(async (moment, detail) => {
      if (held || moment !== 'after append' || !isReleased(detail)) return;
      held = true;
      await stage.obstacleIsGone();
      await stage.isPublished(0);
    });
    expect(held).toBe(true);
    await stage.expectAllPublished();
  });
});

test('an operator’s repair that is killed in mid-way leaves the later entries missing; the next one brings them, in order', async () => {
  const stage = await setFlowStage();
  const pod = await stage.pod();
  await insertEvents(stage.pool, someEvents(1_500, 30));
  await stage.rested();
  await pod.kill('SIGTERM');
  // So long ago that no pod compares them by itself, and acknowledged in another order than they were appended in.
  await stage.pool.query(
    `UPDATE identity.outbox SET created_at = created_at - interval '3 h',
            published_at = now() - interval '3 h' - id * interval '1 ms'`,
  );
  const [, ...lost] = (await stage.entries()).map(({ entryId }) => entryId);
  await stage.redis.xdel(STREAM, ...lost);
  // The repair takes 1,000 rows at a time: it comes to the second step, and no further.
  const holder = new Client({ connectionString: stage.databaseUrl });
  onTestFinished(() => holder.end());
  await holder.connect();
  await holder.query('BEGIN');
  await holder.query('SELECT FROM identity.outbox WHERE stream_entry_id = ANY ($1) FOR UPDATE', [
    lost.slice(1_000),
  ]);
  const repair = ['verify', '--since', '1d', '--repair'];
  const killed = await stage.spawn(repair, { RELAY_PUBLISH_TIMEOUT: '120', RELAY_CLAIM_LEASE: '240' });
  await waitFor(async () => (await stage.count('NOT published')) === 1_000, {
    what: 'the first rows to be unpublished',
  });
  await killed.kill('SIGKILL');
  await holder.query('ROLLBACK');
  expect(await stage.redis.get('bull:relay:epoch')).toMatch(/^checking:/);

  await stage.pod();
  await stage.rested();
  expect(await stage.redis.xlen(STREAM)).toBe(1_001);
  expect(await stage.count('published')).toBe(1_500);
  expect((await stage.command(repair)).code).toBe(0);
  await stage.rested();
  expect(await stage.expectPromisesHeld()).toMatchObject({ events: 1_500, entries: 1_500 });
});

/** The first time that a step comes to that moment, its answer is lost. */
function failsOnce(moment: Moment): Watch {
  let hasFailed = false;
  return async (now, detail) => {
    if (hasFailed || now !== moment || !hasRows(detail)) return;
    hasFailed = true;
    throw new Error('the connection was lost, and with it the answer');
  };
}

/** The event before them was appended, and they with it. */
function isCascading({ answers }: Detail): boolean {
  const cascaded = answers.at(-1);
  return Array.isArray(cascaded) && cascaded.length === 4;
}

/** Three events of one aggregate; the job of the first one is begun when the others wait for it. */
async function setCascade(context: TestContext) {
  const stage = await setStage(context, {}, { RELAY_CONCURRENCY: '1' });
  await stage.publishQueue.pause();
  await stage.diesAt(at('after commit of claim', hasRows));
  await stage.publishQueue.resume();
  const wait = stage.publishQueue.toKey('wait');
  const { eventId } = stage.events[0] as SampleEvent;
  await stage.redis.multi().lrem(wait, 0, eventId).lpush(wait, eventId).exec();
  return stage;
}

/**
 * Servers of the test's own, with three events of one aggregate.
 *
 * @param first what is special about the first of them
 */
async function setStage(
  context: TestContext,
  first: Partial<SampleEvent> = {},
  variables: Record<string, string> = {},
) {
  const [database, server] = await Promise.all([createDatabase(), createRedis()]);
  const configOf = (more: Record<string, string> = {}) =>
    loadConfig({
      RELAY_DATABASE_URL: database.url,
      RELAY_REDIS_URL: server.url,
      RELAY_POLL_INTERVAL: '0.2',
      RELAY_CLAIM_LEASE: '2',
      RELAY_PUBLISH_TIMEOUT: '1.5',
      RELAY_SHUTDOWN_TIMEOUT: '5',
      ...variables,
      ...more,
    });
  const config = configOf();
  const pool = openAdminPool(database.adminUrl);
  const redis = openAdminRedis(server.adminUrl);
  const lines: string[] = [];
  const logger = createLogger('debug', { write: (line) => lines.push(line.trimEnd()) });
  // Of the context: what vitest exports takes the test that began last, where others run at the same time.
  context.onTestFinished(async () => {
    if (context.task.result?.state !== 'fail') return;
    const streams = [STREAM, config.dlqStreamName];
    await keepWhatFailed(context, { pool, redis, streams, pods: [{ pid: process.pid, lines }] });
  });
  const publishQueue = new Queue(publishQueueName(config.queueName), {
    connection: openRedis(server.url),
    prefix: config.queuePrefix,
  });
  await redis.set(BROKEN_TOPIC, 'a string');
  const { aggregateId } = anEvent();
  const events = [anEvent({ aggregateId, ...first }), anEvent({ aggregateId }), anEvent({ aggregateId })];
  await insertEvents(pool, events);

  /** Whatever the time: a leased row may have expired. */
  async function states(): Promise<State[]> {
    const { rows } = await pool.query<{ state: State }>(
      `SELECT CASE WHEN published THEN 'published' WHEN dead_lettered_at IS NOT NULL THEN 'dead'
                   WHEN next_attempt_at IS NULL THEN 'fresh' WHEN next_attempt_at = 'infinity' THEN 'parked'
                   ELSE 'leased' END AS state
         FROM identity.outbox ORDER BY id`,
    );
    return rows.map((row) => row.state);
  }
  async function count(condition: string): Promise<number> {
    const { rows } = await pool.query(`SELECT count(*)::int AS n FROM identity.outbox WHERE ${condition}`);
    return rows[0].n;
  }
  const becomes = (expected: readonly State[]) =>
    waitFor(async () => (await states()).join() === expected.join(), {
      what: `the rows to be ${expected.join(', ')}`,
    });
  const deadLetters = () => readStream(redis, config.dlqStreamName);

  /** Waits until no event is on its way any more, then looks whether every promise was kept. */
  async function comesToRest(): Promise<void> {
    await waitFor(async () => (await count('NOT published AND dead_lettered_at IS NULL')) === 0, {
      what: 'every row to be published or dead',
    });
    await waitFor(async () => (await publishQueue.getJobCountByTypes('waiting', 'active', 'delayed')) === 0, {
      what: 'no publish job to be left',
    });
    const { dlqStreamName: dlqStream, streamName: defaultStream } = config;
    await expectPromisesHeld({ pool, redis, defaultStream, dlqStream });
  }

  async function comesToRestWith(pod: Relay, meanwhile: () => Promise<void>): Promise<void> {
    try {
      await meanwhile();
      await comesToRest();
    } finally {
      await pod.stop();
    }
  }

  return {
    ...{ pool, redis, publishQueue, events, states, count, becomes, deadLetters },

    /** A job may be quicker than the commit of its claim: waits for that. */
    async becomesLeased(index: number): Promise<true> {
      await waitFor(async () => (await states())[index] === 'leased', {
        what: 'the claim to be committed',
        pollMs: 15,
      });
      return true;
    },
    isPublished: (index: number) =>
      waitFor(async () => (await states())[index] === 'published', {
        what: 'the event to be published',
      }),
    /** How many jobs each event has. */
    jobs: () => Promise.all(events.map((event) => redis.exists(publishQueue.toKey(event.eventId)))),
    isReleased: async (index: number) =>
      (await redis.hexists(publishQueue.toKey(events[index]?.eventId ?? ''), 'relay:released')) === 1,
    eventsInStream: async () => (await readStream(redis, STREAM)).map((entry) => entry.event_id),

    /** What kept the first event from its stream is not there any more, and its retry comes now. */
    async obstacleIsGone(): Promise<void> {
      await redis.del(BROKEN_TOPIC);
      const { eventId } = events[0] as SampleEvent;
      await waitFor(async () => (await publishQueue.getJobState(eventId)) === 'delayed', {
        what: 'the retry',
      });
      await (await publishQueue.getJob(eventId))?.promote();
    },

    /** As an operator's tool may, even while somebody seems to work on it. */
    async removeJob(index: number): Promise<void> {
      const { eventId } = events[index] as SampleEvent;
      const key = (name: string) => publishQueue.toKey(name);
      await redis.del(key(eventId), key(`${eventId}:lock`));
      for (const list of ['active', 'wait', 'paused']) await redis.lrem(key(list), 0, eventId);
      for (const set of ['failed', 'delayed']) await redis.zrem(key(set), eventId);
    },

    async expectAllPublished(): Promise<void> {
      expect(new Set(await states())).toEqual(new Set(['published']));
      expect(await deadLetters()).toEqual([]);
    },

    async expectOneDeadLetter(): Promise<void> {
      expect(await states()).toEqual(['dead', 'published', 'published']);
      const [row] = await readRows(pool);
      const [entry, ...more] = await deadLetters();
      expect(more).toEqual([]);
      expect(entry).toMatchObject({
        ...{ original_event_id: events[0]?.eventId, topic: BROKEN_TOPIC, attempts: '1' },
        error_message: expect.stringMatching(/^WRONGTYPE/),
      });
      expect(row).toMatchObject({ attempts: 1, errorMessage: entry?.error_message });
    },

    /** Runs a pod until that moment, where it is gone at once, as by kill -9. */
    async diesAt(
      isLast: (moment: Moment, detail: Detail) => boolean | Promise<boolean>,
      more: Record<string, string> = {},
    ): Promise<void> {
      const pod = await dieAt(configOf(more), logger, pool, isLast, PATIENCE_MS);
      // Nothing of it reaches a server any more; this ends its timers.
      const stopped = pod.stop();
      atEndOfFile(() => stopped);
    },

    /** Runs a pod to the end that is watched, and may be hindered. */
    async livesWith(watch: Watch): Promise<void> {
      await comesToRestWith(await startWatchedPod(config, logger, watch), async () => {});
    },

    async anotherPodGoesOn(meanwhile: () => Promise<void> = async () => {}): Promise<void> {
      const pod = createRelay(config, {
        ...{ pool: openPool(config.databaseUrl), logger, http: false },
      });
      await pod.start();
      await comesToRestWith(pod, meanwhile);
    },
  };
}
