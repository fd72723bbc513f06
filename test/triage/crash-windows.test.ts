/**
 * The relay's pod dies in between two steps, at exactly the moment that the test names; another pod goes on.
 * Whatever the window: every event is in its stream exactly once, or dead with exactly one dead letter, in order.
 */
import { Queue } from 'bullmq';
import type { Redis, RedisOptions } from 'ioredis';
import pg from 'pg';
import { describe, expect, test } from 'vitest';
import { createRelay, loadConfig, type RelayConfig } from '../../src/app.ts';
import type { SampleEvent } from '../../src/demo/sample.ts';
import { withDeadline } from '../../src/lifecycle.ts';
import { publishQueueName } from '../../src/queue/queues.ts';
import { atEndOfFile } from '../support/cleanup.ts';
import { anEvent, insertEvents } from '../support/events.ts';
import { expectPromisesHeld } from '../support/ledger.ts';
import { createDatabase, createRedis } from '../support/servers.ts';
import {
  deferred,
  openPool,
  openRedis,
  readRows,
  readStates,
  readStream,
  silent,
} from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const BROKEN_TOPIC = 'not.a.stream';
const WINDOW_DEADLINE_MS = 15_000;
/** A killed pod's active job is found stalled within two times 5 s. */
const TAKE_OVER_MS = 25_000;

/** Looks at the world just before or after one step of the doomed pod; true: it dies here. */
type Window = Partial<{
  beforeQuery(text: string): Promise<boolean>;
  afterQuery(text: string): Promise<boolean>;
  beforeAppend(stream: string): Promise<boolean>;
  afterAppend(stream: string): Promise<boolean>;
}>;

const never = async () => false;

describe.concurrent('a pod that dies', () => {
  test('after the claim, before its commit: the jobs are there, the rows are fresh', async () => {
    const stage = await setStage([anEvent(), anEvent()]);
    await stage.publishQueue.pause(); // nobody publishes before the pod is dead
    await stage.diesIn({
      beforeQuery: async (text) => text === 'COMMIT' && (await stage.jobsOf(stage.events[0])) > 0,
    });
    expect(await stage.states()).toEqual(['fresh', 'fresh', 'fresh', 'fresh']);
    await stage.publishQueue.resume();
    await stage.anotherPodGoesOn();
    expect(await stage.states()).toEqual(['published', 'published', 'published', 'published']);
  });

  test('after the commit of the claim, before anything ran', async () => {
    const stage = await setStage([anEvent(), anEvent()]);
    await stage.publishQueue.pause();
    await stage.diesIn({ afterQuery: async (text) => text === 'COMMIT' && (await stage.isLeased(0)) });
    expect(await stage.states()).toEqual(['leased', 'parked', 'parked', 'leased']);
    await stage.publishQueue.resume();
    await stage.anotherPodGoesOn();
    expect(await stage.states()).toEqual(['published', 'published', 'published', 'published']);
  });

  test('after the commit of the claim, before anything ran, and Redis loses the jobs as well', async () => {
    const stage = await setStage([anEvent(), anEvent()]);
    await stage.publishQueue.pause();
    await stage.diesIn({ afterQuery: async (text) => text === 'COMMIT' && (await stage.isLeased(0)) });
    for (const event of stage.events) await stage.publishQueue.remove(event.eventId);
    await stage.publishQueue.resume();
    await stage.anotherPodGoesOn();
    expect(await stage.states()).toEqual(['published', 'published', 'published', 'published']);
  });

  test('after the append, before the acknowledgement', async () => {
    const stage = await setStage([anEvent()]);
    const { topic } = stage.events[0] as SampleEvent;
    await stage.diesIn({ afterAppend: async (stream) => stream === topic });
    expect(await readStream(stage.redis, topic as string)).toHaveLength(1);
    expect(await stage.states()).toEqual(['leased', 'parked', 'parked']);
    await stage.anotherPodGoesOn();
    expect(await stage.states()).toEqual(['published', 'published', 'published']);
  });

  test('after the acknowledgement, before its commit: the successor has its job, the row is not published', async () => {
    const stage = await setStage([anEvent()]);
    await stage.diesIn({
      beforeQuery: async (text) => text === 'COMMIT' && (await stage.jobsOf(stage.events[1])) > 0,
    });
    expect(await stage.states()).toEqual(['leased', 'parked', 'parked']);
    await stage.anotherPodGoesOn();
    expect(await stage.states()).toEqual(['published', 'published', 'published']);
  });

  test('after the acknowledgement, before the job completes', async () => {
    const stage = await setStage([anEvent()]);
    await stage.diesIn({ afterQuery: async (text) => text === 'COMMIT' && (await stage.isPublished(0)) });
    expect(await stage.states()).toEqual(['published', 'leased', 'parked']);
    expect(await stage.jobsOf(stage.events[0])).toBe(1);
    await stage.anotherPodGoesOn();
    expect(await stage.states()).toEqual(['published', 'published', 'published']);
  });

  test('after the job failed, before the dead-letter entry', async () => {
    const stage = await setStage([anEvent()], { topic: BROKEN_TOPIC });
    await stage.diesIn({ beforeAppend: async (stream) => stream === stage.config.dlqStreamName });
    expect(await stage.publishQueue.getJobState((stage.events[0] as SampleEvent).eventId)).toBe('failed');
    expect(await stage.deadLetters()).toEqual([]);
    await stage.anotherPodGoesOn();
    expect(await stage.states()).toEqual(['dead', 'published', 'published']);
    await stage.expectOneDeadLetter();
  });

  test('after the dead-letter entry, before the row is dead', async () => {
    const stage = await setStage([anEvent()], { topic: BROKEN_TOPIC });
    await stage.diesIn({ afterAppend: async (stream) => stream === stage.config.dlqStreamName });
    expect(await stage.deadLetters()).toHaveLength(1);
    expect(await stage.states()).toEqual(['leased', 'parked', 'parked']);
    await stage.anotherPodGoesOn();
    expect(await stage.states()).toEqual(['dead', 'published', 'published']);
    await stage.expectOneDeadLetter();
  });

  test('after the row is dead, before its commit: the successor has its job', async () => {
    const stage = await setStage([anEvent()], { topic: BROKEN_TOPIC });
    await stage.diesIn({
      beforeQuery: async (text) => text === 'COMMIT' && (await stage.jobsOf(stage.events[1])) > 0,
    });
    expect(await stage.deadLetters()).toHaveLength(1);
    expect(await stage.states()).toEqual(['leased', 'parked', 'parked']);
    await stage.anotherPodGoesOn();
    expect(await stage.states()).toEqual(['dead', 'published', 'published']);
    await stage.expectOneDeadLetter();
  });
});

describe.concurrent('a pod that lives, but', () => {
  test('never hears that its acknowledgement was committed', async () => {
    const stage = await setStage([anEvent()]);
    let lost = 0;
    const relay = createRelay(stage.config, {
      pool: watchedPool(openPool(stage.databaseUrl), {
        after: async (text) => {
          if (text !== 'COMMIT' || !(await stage.isPublished(0)) || lost > 0) return;
          lost++;
          throw new Error('connection lost after COMMIT');
        },
      }),
      redis: openRedis(stage.redisUrl),
      logger: silent,
      http: false,
    });
    await relay.start();
    await stage.comesToRest();
    await relay.stop();
    expect(lost).toBe(1);
    expect(await stage.states()).toEqual(['published', 'published', 'published']);
  });

  test('never hears that its claim was committed', async () => {
    const stage = await setStage([anEvent()]);
    let lost = 0;
    const relay = createRelay(stage.config, {
      pool: watchedPool(openPool(stage.databaseUrl), {
        after: async (text) => {
          if (text !== 'COMMIT' || (await stage.states())[0] === 'fresh' || lost > 0) return;
          lost++;
          throw new Error('connection lost after COMMIT');
        },
      }),
      redis: openRedis(stage.redisUrl),
      logger: silent,
      http: false,
    });
    await relay.start();
    await stage.comesToRest();
    await relay.stop();
    expect(lost).toBe(1);
    expect(await stage.states()).toEqual(['published', 'published', 'published']);
  });
});

/**
 * Servers of the test's own, with three events of one aggregate (`first`: what is special about the first of them),
 * then one of each other aggregate in `firsts`.
 */
async function setStage([head = anEvent(), ...others]: SampleEvent[], first: Partial<SampleEvent> = {}) {
  const [database, server] = await Promise.all([createDatabase(), createRedis()]);
  const config = loadConfig({
    RELAY_DATABASE_URL: database.url,
    RELAY_REDIS_URL: server.url,
    RELAY_POLL_INTERVAL: '0.2',
    RELAY_CLAIM_LEASE: '2',
    RELAY_PUBLISH_TIMEOUT: '1.5',
    RELAY_MAX_RETRY_ATTEMPTS: '0',
    RELAY_SHUTDOWN_TIMEOUT: '2',
    RELAY_LOG_LEVEL: 'fatal',
  });
  const pool = openPool(database.url);
  const redis = openRedis(server.url);
  const publishQueue = new Queue(publishQueueName(config.queueName), {
    connection: redis,
    prefix: config.queuePrefix,
  });
  await redis.set(BROKEN_TOPIC, 'a string');
  const { aggregateId } = head;
  const events = [{ ...head, ...first }, anEvent({ aggregateId }), anEvent({ aggregateId }), ...others];
  await insertEvents(pool, events);

  const stateOf = async (index: number) => (await readStates(pool))[index];
  return {
    ...{ config, databaseUrl: database.url, redisUrl: server.url, redis, publishQueue, events },
    states: () => readStates(pool),
    isLeased: async (index: number) => (await stateOf(index)) === 'leased',
    isPublished: async (index: number) => (await stateOf(index)) === 'published',
    jobsOf: (event: SampleEvent | undefined) => redis.exists(publishQueue.toKey(event?.eventId ?? '')),
    deadLetters: () => readStream(redis, config.dlqStreamName),

    async expectOneDeadLetter() {
      const [head] = await readRows(pool);
      const [entry, ...more] = await readStream(redis, config.dlqStreamName);
      expect(more).toEqual([]);
      expect(entry).toMatchObject({
        original_event_id: events[0]?.eventId,
        topic: BROKEN_TOPIC,
        attempts: '1',
        error_message: expect.stringMatching(/^WRONGTYPE/),
      });
      expect(head).toMatchObject({ attempts: 1, errorMessage: entry?.error_message });
    },

    /** Runs a pod until it is in the window, where it is gone at once, as by kill -9. */
    async diesIn(window: Window) {
      const died = deferred();
      const pod = await startDoomedPod(config, pool, window, died.resolve);
      await withDeadline(WINDOW_DEADLINE_MS, died.promise);
      // Nothing of it reaches a server any more; this ends its timers.
      const stopped = pod.stop();
      atEndOfFile(() => stopped);
      await waitFor(async () => (await sessionsOf(pool, DOOMED)) === 0, { what: 'its sessions to be gone' });
    },

    async anotherPodGoesOn() {
      const pod = createRelay(config, { logger: silent, http: false });
      await pod.start();
      try {
        await this.comesToRest();
      } finally {
        await pod.stop();
      }
    },

    /** Waits until no event is on its way any more, then looks whether every promise was kept. */
    async comesToRest() {
      await waitFor(
        async () => (await readStates(pool)).every((state) => state === 'published' || state === 'dead'),
        { what: 'every row to be published or dead', timeoutMs: TAKE_OVER_MS },
      );
      await waitFor(
        async () => (await publishQueue.getJobCountByTypes('waiting', 'active', 'delayed')) === 0,
        {
          what: 'no publish job to be left',
          timeoutMs: TAKE_OVER_MS,
        },
      );
      const { dlqStreamName: dlqStream, streamName: defaultStream } = config;
      await expectPromisesHeld({ pool, redis, defaultStream, dlqStream });
    },
  };
}

const DOOMED = 'doomed pod';

async function sessionsOf(pool: pg.Pool, name: string): Promise<number> {
  const { rows } = await pool.query(
    'SELECT count(*)::int AS n FROM pg_stat_activity WHERE application_name = $1 AND datname = current_database()',
    [name],
  );
  return rows[0].n;
}

/** A relay whose every connection ends for good when one of its steps is in the window. */
async function startDoomedPod(config: RelayConfig, admin: pg.Pool, window: Window, onDeath: () => void) {
  const { beforeQuery = never, afterQuery = never, beforeAppend = never, afterAppend = never } = window;
  let dead = false;
  let death: Promise<void> | undefined;
  const connections: Redis[] = [];

  async function die(): Promise<void> {
    dead = true;
    for (const redis of connections) redis.disconnect();
    await admin.query(
      `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE application_name = $1 AND datname = current_database()`,
      [DOOMED],
    );
    onDeath();
  }
  /** Goes through only when the pod lives on. */
  async function pass(isWindow: Promise<boolean>): Promise<void> {
    if (!dead && (await isWindow)) death ??= die();
    if (dead) {
      await death;
      throw new Error('the pod is dead');
    }
  }

  function mortal(redis: Redis, appends = false): Redis {
    connections.push(redis);
    const duplicate = redis.duplicate.bind(redis);
    redis.duplicate = (options?: Partial<RedisOptions>) =>
      mortal(duplicate(options), options?.connectionName === 'relay-append');
    const connect = redis.connect.bind(redis);
    redis.connect = () => (dead ? Promise.reject(new Error('Connection is closed.')) : connect());
    if (appends) {
      const define = redis.defineCommand.bind(redis);
      redis.defineCommand = (name, definition) => {
        define(name, definition);
        type Command = (this: unknown, ...args: string[]) => Promise<unknown>;
        const commands = redis as unknown as Record<string, Command>;
        const run = commands[name] as Command;
        commands[name] = async function (...args) {
          // ioredis puts the command into its pipelines as well.
          if (this !== redis) return run.apply(this, args);
          await pass(beforeAppend(args[0] ?? ''));
          const reply = await run.apply(this, args);
          await pass(afterAppend(args[0] ?? ''));
          return reply;
        };
      };
    }
    return redis;
  }

  const pool = openPool(config.databaseUrl, { application_name: DOOMED });
  const options = { ...config, shutdownTimeoutMs: 100 };
  const pod = createRelay(options, {
    pool: watchedPool(pool, {
      before: (text) => pass(beforeQuery(text)),
      after: (text) => pass(afterQuery(text)),
    }),
    redis: mortal(openRedis(config.redisUrl)),
    logger: silent,
    http: false,
  });
  await pod.start().catch((error: unknown) => {
    if (!dead) throw error;
  });
  return pod;
}

/** The pool, with somebody looking on before and after each statement; who throws there makes the statement fail. */
function watchedPool(
  pool: pg.Pool,
  watch: { before?: (text: string) => Promise<void>; after?: (text: string) => Promise<void> },
): Pick<pg.Pool, 'connect' | 'query'> {
  const { before = async () => {}, after = async () => {} } = watch;
  type Ask = (...args: unknown[]) => Promise<pg.QueryResult>;
  const watched =
    (ask: Ask): Ask =>
    async (...args) => {
      const [query] = args;
      const text = typeof query === 'string' ? query : (query as { text: string }).text;
      await before(text);
      const result = await ask(...args);
      await after(text);
      return result;
    };
  return {
    query: watched(pool.query.bind(pool) as unknown as Ask) as unknown as pg.Pool['query'],
    connect: (async () => {
      await before('connect');
      const client = await pool.connect();
      client.on('error', () => {});
      const query = watched(pg.Client.prototype.query.bind(client) as unknown as Ask);
      client.query = query as unknown as pg.PoolClient['query'];
      return client;
    }) as pg.Pool['connect'],
  };
}
