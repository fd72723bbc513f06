/**
 * Pods on a real PostgreSQL and a real Redis, and all that can happen to them. Each step is taken alone, and returns when
 * nothing moves any more; `undefined` where it makes no sense now.
 */
import type { Worker } from 'bullmq';
import type { Redis } from 'ioredis';
import type pg from 'pg';
import type { OutboxOptions } from '../../src/outbox/outbox.ts';
import type { Queues } from '../../src/queue/queues.ts';
import type { StreamOptions } from '../../src/streams/append.ts';
import { EpochOverError } from '../../src/streams/epoch.ts';
import { keysOf } from '../../src/streams/epoch-script.ts';
import { anEvent, insertEvents } from '../support/events.ts';
import type { AdminPool, AdminRedis } from '../support/stages.ts';
import { CutOffError, createInterleaving, type Step } from './interleaving.ts';
import { createInvariants, type Known, nameOf, type Trimmed } from './invariants.ts';
import type { EpochWorld } from './model-epoch.ts';
import { createPod, FAR_OFF_MS, type Pod } from './pod.ts';

export const TOPIC = 'identity.user.v1';
/** Most events are of the first. */
const AGGREGATES = [0, 0, 0, 1, 1, 2];
/** Of the prefix and the name in order-model.test.ts. */
const QUEUE_KEYS = 'bull:relay-';
const PODS = 2;
/** Of all pods together. Claims overlap where the claim lock was lost. */
const CLAIMS_MAX = 2;
const RUNS_MAX = 5;
const SNAPSHOTS_KEPT = 3;

export type Settings = Readonly<{
  policy: 'continue' | 'hold';
  /** Bounds the window of an aggregate to a quarter of it. */
  maxInFlight: number;
  /** Redis servers: one for all, or one for the queues and one for the streams. */
  redis: 1 | 2;
}>;

export type Servers = Readonly<{
  admin: AdminPool;
  pool: pg.Pool;
  operators: pg.Pool;
  adminRedis: AdminRedis;
  redis: Redis;
  queues: Queues;
  worker: Worker;
  streamOptions: StreamOptions;
}>;

type Snapshot = Readonly<{
  keys: readonly Readonly<{ key: string; value: Buffer; ttlMs: number }>[];
  trimmed: readonly Trimmed[];
}>;

const uuid = (n: number) => `00000000-0000-4000-8000-${String(n).padStart(12, '0')}`;
const pick = <T>(list: readonly T[], n: number): T | undefined => list[n % Math.max(1, list.length)];

/** What a walk may bring about. */
const isExpected = (error: unknown) => error instanceof CutOffError || error instanceof EpochOverError;

export type World = Awaited<ReturnType<typeof createWorld>>;

export async function createWorld(servers: Servers, settings: Settings) {
  const { admin, adminRedis, queues, worker, streamOptions } = servers;
  const { dlqStreamName, epochKey } = streamOptions;
  const hasTwoServers = settings.redis === 2;
  await admin.query('TRUNCATE identity.outbox RESTART IDENTITY');
  await adminRedis.flushall();

  const events = new Map<string, Known>();
  /** Topics that refuse their one event. */
  const poisoned = new Set<string>();
  let trimmed: readonly Trimmed[] = [];
  let snapshots: Snapshot[] = [];
  let areJobsLost = false;
  let pods: Pod[] = [];
  let podsMade = 0;
  let tokens = 0;
  let claims = 0;
  const unexpected: string[] = [];

  const interleaving = createInterleaving(admin);
  const epochWorld: EpochWorld = {
    ...{ redis: servers.redis, key: epochKey, server: 1 },
    onEnd() {
      const missed = [...events.values()].filter((it) => it.isMissed);
      return () => {
        for (const event of missed) event.isMissed = false;
      };
    },
  };
  const invariants = createInvariants({
    ...{ admin, redis: adminRedis, dlqStreamName, events },
    holds: settings.policy === 'hold',
    trimmed: () => trimmed,
  });
  const outboxOptions: OutboxOptions = {
    ...{ ordering: 'aggregate', deadLetterPolicy: settings.policy, maxInFlight: settings.maxInFlight },
    ...{ claimLeaseMs: FAR_OFF_MS, streamName: TOPIC, maxEventBytes: 1_000_000, statementTimeoutMs: 120_000 },
  };
  const nameOfEvent = (eventId: string) => `e${Number(eventId.slice(-12))}`;

  const aPod = () =>
    createPod(
      {
        ...{ ...servers, interleaving, epochWorld, outboxOptions, hasTwoServers },
        nameOf: nameOfEvent,
        isDoomed: (eventId) => events.get(eventId)?.isDoomed === true,
        onUnexpected(error, what) {
          if (!isExpected(error)) unexpected.push(`${what}: ${(error as Error).stack ?? error}`);
        },
      },
      `pod ${++podsMade}`,
    );
  pods = Array.from({ length: PODS }, aPod);

  const listKey = (list: string) => queues.publish.toKey(list);
  const byName = (a: string, b: string) => Number(a.slice(-12)) - Number(b.slice(-12));
  const jobsIn = async (list: 'wait' | 'active' | 'delayed' | 'failed'): Promise<string[]> => {
    const isList = list === 'wait' || list === 'active';
    const ids = await (isList
      ? adminRedis.lrange(listKey(list), 0, -1)
      : adminRedis.zrange(listKey(list), '0', '-1'));
    return ids.sort(byName);
  };
  const isWorkedOn = (eventId: string) => pods.some((it) => [...it.runs.values()].includes(eventId));

  /** Rows that no transaction has locked. */
  const rowsWhere = async (condition: string): Promise<string[]> => {
    const { rows } = await admin.query<{ eventId: string }>(
      `SELECT event_id AS "eventId" FROM identity.outbox WHERE ${condition} ORDER BY id FOR UPDATE SKIP LOCKED`,
    );
    return rows.map((row) => row.eventId);
  };
  /** Leased, or dead while its letter is written. */
  const LEASED = `NOT published AND next_attempt_at > now() AND next_attempt_at < 'infinity'`;

  /** A lock ends, and the stalled check finds the job. */
  async function stall(eventId: string): Promise<void> {
    await adminRedis.del(`${queues.jobKey(eventId)}:lock`, listKey('stalled-check'));
    await adminRedis.sadd(listKey('stalled'), eventId);
    const { backend } = worker as unknown as { backend: { moveStalledJobsToWait(): Promise<unknown> } };
    await backend.moveStalledJobsToWait();
  }

  /** Redis has lost these entries; pods notice when they append next to one, or look. */
  async function loseStream(stream: string): Promise<void> {
    for (const [, [, eventId = '']] of await adminRedis.xrange(stream, '-', '+')) {
      const event = events.get(eventId);
      if (event) event.isMissed = true;
    }
    await adminRedis.del(stream);
    for (const it of trimmed) {
      const event = it.stream === stream ? events.get(it.eventId) : undefined;
      if (event) event.isMissed = true;
    }
    trimmed = trimmed.filter((it) => it.stream !== stream);
  }

  /** A noted stream that is not there, or is another one. */
  async function lostStream(): Promise<string | undefined> {
    for (const [stream, noted] of Object.entries(await adminRedis.hgetall(keysOf(epochKey).lastEntries))) {
      const info = (await adminRedis.xinfo('STREAM', stream).catch(() => [])) as unknown[];
      const latest = String(info[info.indexOf('last-generated-id') + 1] ?? '0-0');
      if (isBelow(latest, noted) && (await adminRedis.xlen(stream).catch(() => 0)) === 0) return stream;
    }
    return undefined;
  }

  /** What is on one server. */
  type Side = Readonly<{ name: string; hasStreams: boolean; has: (key: string) => boolean }>;
  const isOfQueues = (key: string) => key.startsWith(QUEUE_KEYS);
  function sideOf(n: number): Side {
    if (!hasTwoServers) return { name: 'all', hasStreams: true, has: () => true };
    if (n % 2 === 0) return { name: 'queues', hasStreams: false, has: isOfQueues };
    return { name: 'streams', hasStreams: true, has: (key) => !isOfQueues(key) };
  }

  async function empty({ has, hasStreams }: Side): Promise<void> {
    const keys = (await adminRedis.keys('*')).filter(has);
    if (keys.length > 0) await adminRedis.del(keys);
    if (!hasStreams) areJobsLost = true;
  }

  const heal = async (topic: string): Promise<void> => {
    poisoned.delete(topic);
    if ((await adminRedis.type(topic)) === 'string') await adminRedis.del(topic);
  };

  /** How many calls of the append script there were when the streams were read last. */
  let readAt = 0;

  /** What may have happened anywhere: pods notice later. */
  async function assertAll(): Promise<string> {
    const calls = interleaving.appendCalls();
    const appended = calls === readAt ? [] : await invariants.assertAppendedInOrder();
    readAt = calls;
    const [error] = unexpected.splice(0);
    if (error !== undefined) throw new Error(`unexpected: ${error}`);
    return appended.length === 0 ? '' : ` -> ${appended.map(nameOf).join(' ')}`;
  }

  const stepName = ({ actor, label }: Step) => `${actor.name}, ${label}`;

  const steps = {
    async insert(n: number): Promise<string> {
      const number = events.size + 1;
      const aggregate = pick(AGGREGATES, n) as number;
      const isPoisoned = n % 10 < 3;
      const topic = isPoisoned ? `${TOPIC}.poison${number}` : TOPIC;
      if (isPoisoned) {
        await adminRedis.set(topic, 'no stream');
        poisoned.add(topic);
      }
      const eventId = uuid(number);
      const [id = ''] = await insertEvents(admin, [
        anEvent({ eventId, topic, aggregateId: uuid(1_000 + aggregate) }),
      ]);
      const flags = { isReplayed: false, isMissed: false, isDoomed: false };
      events.set(eventId, { id, eventId, aggregate, topic, ...flags });
      return `insert e${id} of aggregate ${aggregate}${isPoisoned ? ', poisoned' : ''}`;
    },

    async goOn(n: number): Promise<string | undefined> {
      const step = pick(
        interleaving.held().filter((it) => !it.isAsleep),
        n,
      );
      if (step === undefined) return undefined;
      await interleaving.go(step);
      // Some events are refused for a while only.
      const refused = /^end: (e\d+) failed/.exec(step.label)?.[1];
      const topic = [...events.values()].find((it) => nameOf(it) === refused)?.topic;
      if (topic === undefined || n % 5 > 1 || !poisoned.has(topic)) return stepName(step);
      await heal(topic);
      return `${stepName(step)}; ${topic} takes it from now on`;
    },

    async fallAsleep(n: number): Promise<string | undefined> {
      const step = pick(
        interleaving.held().filter((it) => !it.isAsleep),
        n,
      );
      if (step === undefined) return undefined;
      step.isAsleep = true;
      return `${stepName(step)}: takes long`;
    },

    async wakeUp(n: number): Promise<string | undefined> {
      const step = pick(
        interleaving.held().filter((it) => it.isAsleep),
        n,
      );
      if (step === undefined) return undefined;
      step.isAsleep = false;
      await interleaving.go(step);
      return `at last ${stepName(step)}`;
    },

    /** The connection breaks under a claim or a tick; a commit may have arrived all the same. */
    async cutOff(n: number): Promise<string | undefined> {
      const able = interleaving.held().filter(({ label }) => /^(claim|tick):|^queue:/.test(label));
      const step = pick(able, n);
      if (step === undefined) return undefined;
      await interleaving.fail(step, new CutOffError('the connection broke'));
      return `${stepName(step)}: cut off`;
    },

    async claim(n: number): Promise<string | undefined> {
      const pod = pick(pods, n) as Pod;
      const running = pods.flatMap((it) => [...it.tasks]).filter((it) => it.startsWith('claim'));
      if (running.length >= CLAIMS_MAX) return undefined;
      await pod.claim(`claim ${++claims}`);
      return `${pod.name} claims`;
    },

    /** The oldest job that waits, or any. */
    async fetch(n: number): Promise<string | undefined> {
      const pod = pick(pods, n) as Pod;
      if (pod.runs.size >= RUNS_MAX) return undefined;
      const waiting = await jobsIn('wait');
      const any = pick(waiting, n >> 2);
      if (any === undefined) return undefined;
      if (n & 2) {
        await adminRedis.lrem(listKey('wait'), 1, any);
        await adminRedis.rpush(listKey('wait'), any);
      }
      const eventId = await pod.fetch(`token ${++tokens}`);
      return eventId === undefined ? undefined : `${pod.name} fetches ${nameOfEvent(eventId)}`;
    },

    async tick(n: number): Promise<string | undefined> {
      const pod = pick(pods, n) as Pod;
      if (pod.tasks.has('tick')) return undefined;
      await pod.tick();
      return `${pod.name} ticks`;
    },

    async refill(n: number): Promise<string | undefined> {
      const pod = pick(
        pods.filter((it) => it.requested() > 0 && !it.tasks.has('refill')),
        n,
      );
      await pod?.refill();
      return pod && `${pod.name} refills`;
    },

    /** A pod that knows no epoch takes the one that is there, or makes one. */
    async look(n: number): Promise<string | undefined> {
      const pod = pick(
        pods.filter((it) => it.epoch.current() === undefined && !it.epoch.isLooking()),
        n,
      );
      await pod?.look();
      return pod && `${pod.name} looks for the epoch`;
    },

    /** A pod asks whether the epoch and the noted streams are there, as it does every two seconds. */
    async ask(n: number): Promise<string | undefined> {
      for (const pod of [...pods.slice(n % PODS), ...pods.slice(0, n % PODS)]) {
        const epoch = pod.epoch.current();
        if (epoch === undefined) continue;
        if ((await adminRedis.get(epochKey)) !== epoch) {
          pod.epoch.invalidate();
          return `${pod.name} sees that its epoch is over`;
        }
        const stream = await lostStream();
        if (stream === undefined) continue;
        pod.epoch.endFor(epoch);
        return `${pod.name} misses ${stream}`;
      }
      return undefined;
    },

    async wake(n: number): Promise<string | undefined> {
      const eventId = pick(await jobsIn('delayed'), n);
      if (eventId === undefined) return undefined;
      await (await queues.publish.getJob(eventId))?.promote();
      return `the delay of ${nameOfEvent(eventId)} ends`;
    },

    async crash(n: number): Promise<string | undefined> {
      const pod = pick(
        pods.filter((it) => it.hasWork()),
        n,
      );
      if (pod === undefined) return undefined;
      await interleaving.kill(pod.actor);
      if (pod.epoch.isChecker()) await adminRedis.del(`${epochKey}:checker`);
      pods = pods.map((it) => (it === pod ? aPod() : it));
      return `${pod.name} is killed`;
    },

    /** A pod works on the job, and its lock ends all the same. */
    async stall(n: number): Promise<string | undefined> {
      const eventId = pick((await jobsIn('active')).filter(isWorkedOn), n);
      if (eventId === undefined) return undefined;
      await stall(eventId);
      return `${nameOfEvent(eventId)} stalls`;
    },

    /** Nobody works on the job. */
    async takeOver(n: number): Promise<string | undefined> {
      const eventId = pick(
        (await jobsIn('active')).filter((it) => !isWorkedOn(it)),
        n,
      );
      if (eventId === undefined) return undefined;
      await stall(eventId);
      return `${nameOfEvent(eventId)} is taken over`;
    },

    async endLease(n: number): Promise<string | undefined> {
      const eventId = pick(await rowsWhere(LEASED), n);
      if (eventId === undefined) return undefined;
      await admin.query(
        `UPDATE identity.outbox SET next_attempt_at = now() - interval '1 second' WHERE event_id = $1`,
        [eventId],
      );
      return `the lease of ${nameOfEvent(eventId)} ends`;
    },

    async heal(n: number): Promise<string | undefined> {
      const doomed = [...events.values()].find((it) => it.isDoomed);
      if (doomed !== undefined && n % 2 === 0) {
        doomed.isDoomed = false;
        return `${nameOf(doomed)} is valid again`;
      }
      const topic = pick([...poisoned], n);
      if (topic === undefined) return undefined;
      await heal(topic);
      return `${topic} takes its event`;
    },

    /** The next attempts end for good before they ask Redis: a new schema, or a pod that has ended too often. */
    async doom(n: number): Promise<string | undefined> {
      const eventId = pick([...(await jobsIn('wait')), ...(await jobsIn('active'))].sort(byName), n);
      const event = events.get(eventId ?? '');
      if (event === undefined || event.isDoomed) return undefined;
      event.isDoomed = true;
      return `${nameOf(event)} is doomed`;
    },

    async replay(n: number): Promise<string | undefined> {
      const pod = pick(pods, n) as Pod;
      const eventId = pick(await rowsWhere('NOT published AND dead_lettered_at IS NOT NULL'), n >> 1);
      if (eventId === undefined || pod.tasks.has('operator')) return undefined;
      (events.get(eventId) as Known).isReplayed = true;
      await pod.replay(eventId);
      return `${nameOfEvent(eventId)} is replayed`;
    },

    async discard(n: number): Promise<string | undefined> {
      const pod = pick(pods, n) as Pod;
      const eventId = pick(await rowsWhere('NOT published AND dead_lettered_at IS NOT NULL'), n >> 1);
      if (eventId === undefined || pod.tasks.has('operator')) return undefined;
      await pod.discard(eventId);
      return `${nameOfEvent(eventId)} is discarded`;
    },

    /** The button on the dashboard. */
    async retry(n: number): Promise<string | undefined> {
      const eventId = pick(await jobsIn('failed'), n);
      const job = eventId && (await queues.publish.getJob(eventId));
      if (!job) return undefined;
      await job.retry('failed');
      return `Retry of ${nameOfEvent(eventId)}`;
    },

    /** In any state but the failed one: then its dead letter may be there. Also while somebody works on it, as DEL does. */
    async removeJob(n: number): Promise<string | undefined> {
      const jobs = [...(await jobsIn('wait')), ...(await jobsIn('delayed')), ...(await jobsIn('active'))];
      const eventId = pick(jobs.sort(byName), n);
      if (eventId === undefined) return undefined;
      await adminRedis.del(queues.jobKey(eventId), `${queues.jobKey(eventId)}:lock`);
      await Promise.all(['wait', 'active'].map((list) => adminRedis.lrem(listKey(list), 0, eventId)));
      await adminRedis.zrem(listKey('delayed'), eventId);
      return `the job of ${nameOfEvent(eventId)} is deleted`;
    },

    /** Of a published row: streams are far longer than an acknowledgement takes. */
    async trim(): Promise<string | undefined> {
      const [first, second] = await adminRedis.xrange(TOPIC, '-', '+', 'COUNT', 2);
      if (first === undefined || second === undefined) return undefined;
      const [entryId, [, eventId = '']] = first;
      if (!(await rowsWhere('published')).includes(eventId)) return undefined;
      await adminRedis.xtrim(TOPIC, 'MINID', second[0]);
      trimmed = [...trimmed, { stream: TOPIC, entryId, eventId }];
      return `the entry of ${nameOfEvent(eventId)} is trimmed`;
    },

    async snapshot(): Promise<string> {
      const keys = await adminRedis.keys('*');
      const saved = await Promise.all(
        keys.map(async (key) => ({
          key,
          value: await adminRedis.dumpBuffer(key),
          ttlMs: await adminRedis.pttl(key),
        })),
      );
      snapshots = [...snapshots.slice(1 - SNAPSHOTS_KEPT), { keys: saved, trimmed }];
      return 'Redis writes its data down';
    },

    /** A server starts anew with what it has written down: every connection to it is lost. */
    async rollBack(n: number): Promise<string | undefined> {
      const side = sideOf(n);
      const snapshot = pick(snapshots, n >> 2);
      if (snapshot === undefined) return undefined;
      await empty(side);
      for (const { key, value, ttlMs } of snapshot.keys)
        if (side.has(key)) await adminRedis.restore(key, Math.max(0, ttlMs), value);
      snapshots = [];
      if (!side.hasStreams) return `Redis is rolled back: ${side.name}`;
      trimmed = snapshot.trimmed;
      for (const topic of await adminRedis.keys(`${TOPIC}.poison*`))
        if (!poisoned.has(topic)) await heal(topic);
      await adminRedis.del(`${epochKey}:checker`);
      epochWorld.server++;
      for (const pod of pods) pod.epoch.forget();
      return `Redis is rolled back: ${side.name}`;
    },

    /** One pod compares table and streams, as far as it gets, while everything else stands still. */
    async recover(n: number): Promise<string | undefined> {
      const looked = await steps.look(n);
      const pod = pods.find((it) => it.epoch.isChecker());
      if (pod === undefined) return looked;
      const isOfRecovery = ({ actor, label }: Step) =>
        actor === pod.actor && /^(epoch: (end|begin)|recover:|lookup: absent)/.test(label);
      for (;;) {
        const step = interleaving.held().find(isOfRecovery);
        if (step === undefined) break;
        await interleaving.go(step);
      }
      return `${pod.name} compares table and streams, while the others stand still`;
    },

    async flush(n: number): Promise<string> {
      const side = sideOf(n);
      await empty(side);
      snapshots = [];
      if (side.hasStreams) {
        trimmed = [];
        poisoned.clear();
      }
      return `FLUSHALL: ${side.name}`;
    },

    /** A pod sees that the server of the queues was started anew. */
    async missJobs(n: number): Promise<string | undefined> {
      const pod = pick(pods, n) as Pod;
      if (!areJobsLost || pod.tasks.has('jobs lost')) return undefined;
      areJobsLost = false;
      await pod.expireLeases();
      return `${pod.name} asks which jobs are there`;
    },

    async deleteStream(n: number): Promise<string | undefined> {
      if ((await adminRedis.exists(TOPIC)) === 0) return undefined;
      await loseStream(TOPIC);
      snapshots = [];
      if (n % 2 === 0) return `${TOPIC} is deleted`;
      await adminRedis.xgroup('CREATE', TOPIC, 'consumer', '$', 'MKSTREAM');
      return `${TOPIC} is deleted, and a consumer makes an empty one`;
    },

    /** As `relay verify --repair`. */
    async endEpoch(n: number): Promise<string | undefined> {
      const pod = pick(
        pods.filter((it) => !it.epoch.isLooking()),
        n,
      );
      await pod?.endEpoch();
      return pod && `${pod.name} compares table and streams`;
    },
  };

  return {
    ...{ steps, events, assertAll, assertAllArrived: invariants.assertAllArrived },
    podCount: () => pods.length,

    /** What has not come to rest, or ''. */
    async unrest(): Promise<string> {
      const epoch = await adminRedis.get(epochKey);
      const jobs = [...(await jobsIn('wait')), ...(await jobsIn('active')), ...(await jobsIn('delayed'))];
      return [
        ...(await invariants.restless()).map((it) => `row of ${nameOf(it)}`),
        ...jobs.map((it) => `job of ${nameOfEvent(it)}`),
        ...pods.flatMap((it) => [...it.tasks, ...it.runs.values()].map((task) => `${task} of ${it.name}`)),
        ...pods.filter((it) => it.requested() > 0).map((it) => `refill of ${it.name}`),
        ...pods
          .filter((it) => it.epoch.current() !== epoch || epoch === null)
          .map((it) => `epoch of ${it.name}`),
      ].join(', ');
    },

    /** Row states and jobs, for whoever reads a script. */
    async picture(): Promise<string> {
      const { rows } = await admin.query<{ id: string; eventId: string; state: string; attempts: number }>(`
        SELECT id, event_id AS "eventId", attempts,
          CASE WHEN published AND dead_lettered_at IS NOT NULL THEN 'discarded' WHEN published THEN 'published'
               WHEN dead_lettered_at IS NOT NULL THEN 'dead' WHEN next_attempt_at IS NULL THEN 'fresh'
               WHEN next_attempt_at = 'infinity' THEN 'parked' WHEN next_attempt_at <= now() THEN 'expired'
               ELSE 'leased' END AS state
        FROM identity.outbox ORDER BY id`);
      const shown: string[] = [];
      for (const { id, eventId, state, attempts } of rows) {
        const hash = await adminRedis.hgetall(queues.jobKey(eventId));
        const jobState = hash.timestamp ? await queues.publish.getJobState(eventId) : '';
        const memory = Object.entries(hash)
          .filter(([field]) => field.startsWith('relay:') && field !== 'relay:next')
          .map(([field, value]) => `${field.slice(6)}=${value}`);
        const job =
          jobState && ` (${[jobState, hash.atm && `atm=${hash.atm}`, ...memory].filter(Boolean).join(' ')})`;
        shown.push(`e${id} ${state}${attempts > 0 ? ` ${attempts}` : ''}${job}`);
      }
      return `${shown.join(', ')}; epoch ${await adminRedis.get(epochKey)}`;
    },

    /** Nothing of this walk runs any more. */
    async abandon(): Promise<void> {
      for (const pod of pods) await interleaving.kill(pod.actor);
    },
  };
}

function isBelow(a: string, b: string): boolean {
  const [ams = 0, aseq = 0] = a.split('-').map(Number);
  const [bms = 0, bseq = 0] = b.split('-').map(Number);
  return ams !== bms ? ams < bms : aseq < bseq;
}
