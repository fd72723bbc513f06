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
  type AdminPool,
  deferred,
  openAdminPool,
  openAdminRedis,
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
  /** Of a transaction that changed the first row. */
  beforeCommit(): Promise<boolean>;
  afterCommit(): Promise<boolean>;
  beforeAppend(stream: string): Promise<boolean>;
  afterAppend(stream: string): Promise<boolean>;
}>;

const never = async () => false;

describe.concurrent('a pod that dies', () => {
  test('after the claim, before its commit: the jobs are there, the rows are fresh', async () => {
    const stage = await setStage([anEvent(), anEvent()]);
    await stage.publishQueue.pause(); // nobody publishes before the pod is dead
    await stage.diesIn({
      beforeCommit: async () => (await stage.jobsOf(stage.events[0])) > 0,
    });
    expect(await stage.firstState()).toBe('fresh');
    await stage.publishQueue.resume();
    await stage.anotherPodGoesOn();
    await stage.expectAllPublished();
  });

  test('after the commit of the claim, before anything ran', async () => {
    const stage = await setStage([anEvent(), anEvent()]);
    await stage.publishQueue.pause();
    await stage.diesIn({ afterCommit: () => stage.isLeased(0) });
    expect(await stage.firstState()).toBe('leased');
    await stage.publishQueue.resume();
    await stage.anotherPodGoesOn();
    await stage.expectAllPublished();
  });

  test('after the commit of the claim, before anything ran, and Redis loses the jobs as well', async () => {
    const stage = await setStage([anEvent(), anEvent()]);
    await stage.publishQueue.pause();
    await stage.diesIn({ afterCommit: () => stage.isLeased(0) });
    for (const event of stage.events) await stage.publishQueue.remove(event.eventId);
    await stage.publishQueue.resume();
    await stage.anotherPodGoesOn();
    await stage.expectAllPublished();
  });

  test('after the append, before the acknowledgement', async () => {
    const stage = await setStage([anEvent()]);
    const { topic } = stage.events[0] as SampleEvent;
    await stage.diesIn({ afterAppend: async (stream) => stream === topic && (await stage.becomesLeased(0)) });
    expect(await readStream(stage.redis, topic as string)).toHaveLength(1);
    expect(await stage.firstState()).toBe('leased');
    await stage.anotherPodGoesOn();
    await stage.expectAllPublished();
  });

  test('after the acknowledgement, before its commit: the row is not published, the successor has no job', async () => {
    const stage = await setStage([anEvent()]);
    await stage.diesIn({
      beforeCommit: async () =>
        (await stage.isLeased(0)) && (await readStream(stage.redis, stage.config.streamName)).length > 0,
    });
    expect(await stage.states()).toEqual(['leased', 'parked', 'parked']);
    expect(await stage.jobsOf(stage.events[1])).toBe(0);
    await stage.anotherPodGoesOn();
    await stage.expectAllPublished();
  });

  test('after the acknowledgement, before the job completes: the successor is leased and has no job', async () => {
    // Whoever takes the job over looks after it: its lease is far from its end.
    const stage = await setStage([anEvent()], {}, { RELAY_CLAIM_LEASE: '60' });
    await stage.diesIn({ afterCommit: () => stage.isPublished(0) });
    expect(await stage.states()).toEqual(['published', 'leased', 'parked']);
    expect(await Promise.all(stage.events.map(stage.jobsOf))).toEqual([1, 0, 0]);
    await stage.anotherPodGoesOn();
    await stage.expectAllPublished();
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
    await stage.diesIn({
      afterAppend: async (stream) => stream === stage.config.dlqStreamName && (await stage.becomesLeased(0)),
    });
    expect(await stage.deadLetters()).toHaveLength(1);
    expect(await stage.firstState()).toBe('leased');
    await stage.anotherPodGoesOn();
    expect(await stage.states()).toEqual(['dead', 'published', 'published']);
    await stage.expectOneDeadLetter();
  });

  test('after the dead-letter entry, before the row is dead, and its job is removed as well', async () => {
    const stage = await setStage([anEvent()], { topic: BROKEN_TOPIC });
    await stage.diesIn({
      afterAppend: async (stream) => stream === stage.config.dlqStreamName && (await stage.becomesLeased(0)),
    });
    await stage.removeJob(0);
    await stage.anotherPodGoesOn();
    expect(await stage.states()).toEqual(['dead', 'published', 'published']);
    await stage.expectOneDeadLetter();
  });

  test('after appends of a hot aggregate that was read ahead, before the next one has its job', async () => {
    const stage = await setHotStage();
    await stage.diesIn({ afterAppend: () => stage.isAppendedAhead() });
    const states = await stage.states();
    expect(states.filter((it) => it === 'leased')).toHaveLength(1);
    expect(await stage.jobsOf(stage.events[states.indexOf('leased') + 2])).toBe(0);
    await stage.anotherPodGoesOn();
    await stage.expectAllPublished();
  });

  test('after appends of a hot aggregate that was read ahead, and the first of their jobs is removed as well', async () => {
    const stage = await setHotStage();
    await stage.diesIn({ afterAppend: () => stage.isAppendedAhead() });
    await stage.removeJob((await stage.states()).indexOf('leased'));
    await stage.anotherPodGoesOn();
    await stage.expectAllPublished();
  });

  test('after the append, before the acknowledgement, and its job is removed as well', async () => {
    const stage = await setStage([anEvent()]);
    const { topic } = stage.events[0] as SampleEvent;
    await stage.diesIn({ afterAppend: async (stream) => stream === topic && (await stage.becomesLeased(0)) });
    await stage.removeJob(0);
    await stage.anotherPodGoesOn();
    await stage.expectAllPublished();
  });

  test('after the row is dead, before its commit', async () => {
    const stage = await setStage([anEvent()], { topic: BROKEN_TOPIC });
    await stage.diesIn({
      beforeCommit: async () => (await stage.isLeased(0)) && (await stage.deadLetters()).length > 0,
    });
    expect(await stage.deadLetters()).toHaveLength(1);
    expect(await stage.states()).toEqual(['leased', 'parked', 'parked']);
    await stage.anotherPodGoesOn();
    expect(await stage.states()).toEqual(['dead', 'published', 'published']);
    await stage.expectOneDeadLetter();
  });

  test('after the commit of that: the successor is leased and has no job', async () => {
    const stage = await setStage([anEvent()], { topic: BROKEN_TOPIC });
    await stage.diesIn({ afterCommit: async () => (await stage.firstState()) === 'dead' });
    expect(await stage.states()).toEqual(['dead', 'leased', 'parked']);
    expect(await stage.jobsOf(stage.events[1])).toBe(0);
    await stage.anotherPodGoesOn();
    expect(await stage.states()).toEqual(['dead', 'published', 'published']);
    await stage.expectOneDeadLetter();
  });
});

describe.concurrent('a pod that lives, but', () => {
  test('never hears that its acknowledgement was committed', async () => {
    const stage = await setStage([anEvent()]);
    await stage.livesThroughLostReply(() => stage.isPublished(0));
    await stage.expectAllPublished();
  });

  test('never hears that its claim was committed', async () => {
    const stage = await setStage([anEvent()]);
    await stage.publishQueue.pause(); // the first change of the row is the claim
    await stage.livesThroughLostReply(async () => {
      await stage.publishQueue.resume();
      return true;
    });
    await stage.expectAllPublished();
  });
});

/** Thirty events of one aggregate, and leases that outlast the test. */
function setHotStage() {
  const head = anEvent();
  const more = Array.from({ length: 27 }, () => anEvent({ aggregateId: head.aggregateId }));
  return setStage([head, ...more], {}, { RELAY_CLAIM_LEASE: '60' });
}

/**
 * Servers of the test's own, with three events of one aggregate (`first`: what is special about the first of them),
 * then one of each other aggregate in `firsts`.
 */
async function setStage(
  [head = anEvent(), ...others]: SampleEvent[],
  first: Partial<SampleEvent> = {},
  variables: Record<string, string> = {},
) {
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
    ...variables,
  });
  const pool = openAdminPool(database.adminUrl);
  const redis = openAdminRedis(server.adminUrl);
  const publishQueue = new Queue(publishQueueName(config.queueName), {
    connection: openRedis(server.url),
    prefix: config.queuePrefix,
  });
  await redis.set(BROKEN_TOPIC, 'a string');
  const { aggregateId } = head;
  const events = [{ ...head, ...first }, anEvent({ aggregateId }), anEvent({ aggregateId }), ...others];
  await insertEvents(pool, events);

  const stateOf = async (index: number) => (await readStates(pool))[index];
  return {
    ...{ config, redis, publishQueue, events },
    states: () => readStates(pool),
    firstState: () => stateOf(0),
    isLeased: async (index: number) => (await stateOf(index)) === 'leased',
    /** A job may be quicker than the commit of its claim: waits for that. */
    becomesLeased: (index: number) =>
      waitFor(async () => (await stateOf(index)) === 'leased', { what: 'the claim to be committed' }),
    isPublished: async (index: number) => (await stateOf(index)) === 'published',
    /** The last event appended is one whose row still waits for the one before it. */
    async isAppendedAhead() {
      const last = (await readStream(redis, config.streamName)).at(-1);
      return (await stateOf(events.findIndex((it) => it.eventId === last?.event_id))) === 'parked';
    },
    jobsOf: (event: SampleEvent | undefined) => redis.exists(publishQueue.toKey(event?.eventId ?? '')),
    /** As an operator's tool may, even while somebody seems to work on it. */
    async removeJob(index: number) {
      const { eventId } = events[index] as SampleEvent;
      const key = (name: string) => publishQueue.toKey(name);
      const [lists, sets] = [
        ['active', 'wait'],
        ['failed', 'delayed'],
      ];
      await redis.del(key(eventId), key(`${eventId}:lock`));
      for (const list of lists as string[]) await redis.lrem(key(list), 0, eventId);
      for (const set of sets as string[]) await redis.zrem(key(set), eventId);
    },
    deadLetters: () => readStream(redis, config.dlqStreamName),

    async expectAllPublished() {
      expect(new Set(await readStates(pool))).toEqual(new Set(['published']));
      expect(await readStream(redis, config.dlqStreamName)).toEqual([]);
    },

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

    /** Runs a pod to the end that never hears of one commit, of a change of the first row. */
    async livesThroughLostReply(isTheOne: () => Promise<boolean>) {
      let lost = 0;
      const afterCommit = async () => {
        if (lost > 0 || !(await isTheOne()) || lost > 0) return;
        lost++;
        throw new Error('connection lost after COMMIT');
      };
      const pod = createRelay(config, {
        pool: watchedPool(openPool(config.databaseUrl), pool, { afterCommit }),
        ...{ redis: openRedis(config.redisUrl), logger: silent, http: false },
      });
      await pod.start();
      await this.comesToRest();
      await pod.stop();
      expect(lost).toBe(1);
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

async function sessionsOf(pool: AdminPool, name: string): Promise<number> {
  const { rows } = await pool.query(
    'SELECT count(*)::int AS n FROM pg_stat_activity WHERE application_name = $1 AND datname = current_database()',
    [name],
  );
  return rows[0].n;
}

/** A relay whose every connection ends for good when one of its steps is in the window. */
async function startDoomedPod(config: RelayConfig, admin: AdminPool, window: Window, onDeath: () => void) {
  const { beforeCommit = never, afterCommit = never, beforeAppend = never, afterAppend = never } = window;
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
        if (name !== 'appendOnce') return;
        type Command = (this: unknown, keys: number, ...args: (string | Buffer)[]) => Promise<unknown>;
        const commands = redis as unknown as Record<string, Command>;
        const run = commands[name] as Command;
        commands[name] = async function (keys, ...args) {
          // ioredis puts the command into its pipelines as well.
          if (this !== redis) return run.call(this, keys, ...args);
          // After the epoch's key, stream and job of each entry: one call appends many.
          const streams = args.slice(1, keys).filter((_, i) => i % 2 === 0);
          for (const stream of streams) await pass(beforeAppend(String(stream)));
          const reply = await run.call(this, keys, ...args);
          for (const stream of streams) await pass(afterAppend(String(stream)));
          return reply;
        };
      };
    }
    return redis;
  }

  const pool = openPool(config.databaseUrl, { application_name: DOOMED });
  // Ended while it connects, a connection says so before anybody else can listen.
  pool.on('connect', (client) => client.on('error', () => {}));
  const options = { ...config, shutdownTimeoutMs: 100 };
  const pod = createRelay(options, {
    pool: watchedPool(pool, admin, {
      before: () => pass(never()),
      beforeCommit: () => pass(beforeCommit()),
      afterCommit: () => pass(afterCommit()),
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

type Watch = Partial<{
  /** Any statement, or the way to a connection. */
  before(): Promise<void>;
  /** Of a transaction that changed the first row. */
  beforeCommit(): Promise<void>;
  afterCommit(): Promise<void>;
}>;

/** The pool, with somebody looking on; who throws there makes the statement fail. */
function watchedPool(pool: pg.Pool, admin: AdminPool, watch: Watch): Pick<pg.Pool, 'connect' | 'query'> {
  const { before = async () => {}, beforeCommit = async () => {}, afterCommit = async () => {} } = watch;
  type Ask = (...args: unknown[]) => Promise<pg.QueryResult>;

  /** Whether the client's transaction has changed the first row: its version in force is ended by it. */
  async function changesFirstRow(ask: Ask): Promise<boolean> {
    const { rows } = await ask('SELECT pg_current_xact_id_if_assigned()::xid::text AS xid');
    const first = await admin.query('SELECT xmax::text AS xid FROM identity.outbox ORDER BY id LIMIT 1');
    return rows[0].xid !== null && rows[0].xid === first.rows[0].xid;
  }
  const watched =
    (ask: Ask): Ask =>
    async (...args) => {
      await before();
      const [query] = args;
      const text = typeof query === 'string' ? query : (query as { text: string }).text;
      if (text !== 'COMMIT' || !(await changesFirstRow(ask))) return ask(...args);
      await beforeCommit();
      const result = await ask(...args);
      await afterCommit();
      return result;
    };
  return {
    query: watched(pool.query.bind(pool) as unknown as Ask) as unknown as pg.Pool['query'],
    connect: (async () => {
      await before();
      const client = await pool.connect();
      const query = watched(pg.Client.prototype.query.bind(client) as unknown as Ask);
      client.query = query as unknown as pg.PoolClient['query'];
      return client;
    }) as pg.Pool['connect'],
  };
}
