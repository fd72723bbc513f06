/** Streams as a pod has them, with the jobs of their events on the same Redis or on another one. */
import { randomBytes } from 'node:crypto';
import type { Redis } from 'ioredis';
import { FAILS_FAST } from '../../src/connections/servers.ts';
import type { AppendOutcome, OutboxEvent } from '../../src/event.ts';
import { createQueues, publishJobKey } from '../../src/queue/queues.ts';
import { createStreams, memoryKeyOf, type StreamOptions, type Streams } from '../../src/streams/append.ts';
import { type Epoch, epochId } from '../../src/streams/epoch.ts';
import { keysOf } from '../../src/streams/epoch-script.ts';
import type { Gate } from '../../src/streams/gate-script.ts';
import { atEndOfFile } from './cleanup.ts';
import { asRelay, redisRules } from './least-privilege.ts';
import { createRedis, type TestRedis } from './servers.ts';
import { type AdminRedis, aClaimedEvent, openAdminRedis, openRedis, silent } from './stages.ts';
import { waitFor } from './wait.ts';

export const TOPIC = 'identity.user.v1';
export const DLQ = 'identity.user.v1.dlq';
export const EPOCH_KEY = 'bull:relay:epoch';
export const NOTES_KEY = keysOf(EPOCH_KEY).lastEntries;
export const ENTRY_ID = /^\d+-\d+$/;
/** When jobs were made, unless a test says otherwise. */
export const MADE_AT = 1_700_000_000_000;

export const QUEUES = {
  queuePrefix: 'bull',
  queueName: 'relay',
  maxRetryAttempts: 5,
  retryBaseDelayMs: 60_000,
};
/** So that each server's user has its own rights; the address does not matter to them. */
const TWO = { RELAY_STREAM_REDIS_URL: 'redis://streams' };

export const jobKey = (eventId: string): string => publishJobKey(QUEUES, eventId);

export const STREAM_OPTIONS: StreamOptions = {
  ...{ dlqStreamName: DLQ, streamMaxLen: 0, dlqMaxLen: 0, topicProblem: () => null },
  ...{ jobKey, memoryPrefix: 'bull:relay', epochKey: EPOCH_KEY },
};

export const SIDES = ['one server', 'two servers'] as const;
export type Side = (typeof SIDES)[number];

/** What a pod's streams are made of, besides their connection. */
export type PodOptions = Partial<StreamOptions> &
  Readonly<{ url?: string; onFirstEntry?: (stream: string) => void }>;

export type StreamStage = Awaited<ReturnType<typeof openStreams>>;

/** As the relay connects, with time enough only for a healthy server. */
export async function appendConnection(url: string): Promise<Redis> {
  const redis = openRedis(url, { ...FAILS_FAST, commandTimeout: 1_000, retryStrategy: () => 50 });
  await waitFor(() => redis.status === 'ready', { what: 'the append connection' });
  return redis;
}

/** One Redis for jobs and streams, or one for each, and one pod that appends. Stopped after the test file. */
export async function openStreams(side: Side) {
  const hasTwoServers = side === 'two servers';
  const server = await createRedis(hasTwoServers ? { env: TWO, on: 'streams' } : {});
  const queueServer: TestRedis = hasTwoServers ? await createRedis({ env: TWO, on: 'queues' }) : server;
  const redis = openAdminRedis(server.adminUrl);
  const jobs: AdminRedis = hasTwoServers ? openAdminRedis(queueServer.adminUrl) : redis;

  /** The epoch as the pod knows it, and what streams have said of it. */
  const epoch = {
    name: undefined as string | undefined,
    doubts: 0,
    ended: [] as string[],
  };
  const epochs: Epoch = {
    start() {},
    stop: async () => {},
    confirm: async () => {},
    reason: () => '',
    current: () => epoch.name,
    known: async () => epoch.name,
    invalidate: () => void epoch.doubts++,
    endFor: (of) => void epoch.ended.push(of),
  };

  async function jobFactsOf(url: string) {
    const connection = openRedis(url, FAILS_FAST);
    await waitFor(() => connection.status === 'ready', { what: 'the connection to the queues' });
    const queues = createQueues(connection, QUEUES, silent);
    atEndOfFile(queues.close);
    return queues.jobFacts;
  }

  /** Another pod. */
  async function pod({ url = server.url, onFirstEntry, ...options }: PodOptions = {}): Promise<Streams> {
    return createStreams({
      ...{ redis: await appendConnection(url), epoch: epochs, options: { ...STREAM_OPTIONS, ...options } },
      ...(hasTwoServers && { jobFacts: await jobFactsOf(queueServer.url) }),
      ...(onFirstEntry && { onFirstEntry }),
    });
  }
  const streams = await pod();

  /** Nothing was lost since: as `relay` names it after a comparison. */
  async function beginEpoch(): Promise<string> {
    epoch.name = `server/history:${randomBytes(9).toString('base64url')}`;
    await redis.set(EPOCH_KEY, epoch.name);
    await redis.del(NOTES_KEY);
    return epoch.name;
  }

  /** Writes the job's hash, as far as the relay knows it. */
  async function addJob(event: OutboxEvent, madeAt = MADE_AT): Promise<OutboxEvent> {
    await jobs.hset(jobKey(event.eventId), { name: event.eventType, data: '{}', timestamp: String(madeAt) });
    return event;
  }

  /** URL of a user that may touch no stream but TOPIC and the dead letters. */
  async function limitedUrl(): Promise<string> {
    const env = { RELAY_ALLOWED_TOPICS: TOPIC, ...(hasTwoServers && TWO) };
    await redis.call('ACL', 'SETUSER', 'limited', ...redisRules(env, 'limited', 'streams'));
    return asRelay(server.url, 'limited');
  }

  const memoryKey = (eventId: string): string =>
    hasTwoServers ? memoryKeyOf(STREAM_OPTIONS)(eventId) : jobKey(eventId);

  return {
    ...{
      hasTwoServers,
      server,
      queueServer,
      redis,
      jobs,
      streams,
      epoch,
      epochs,
      pod,
      beginEpoch,
      addJob,
      limitedUrl,
    },

    /** Empties both servers and begins an epoch. */
    async clear(): Promise<void> {
      await Promise.all([redis.flushall(), jobs.flushall()]);
      Object.assign(epoch, { doubts: 0, ended: [] });
      await beginEpoch();
    },

    /** An event with a job that was not run yet. */
    anEvent: (overrides: Partial<OutboxEvent> = {}): Promise<OutboxEvent> => addJob(aClaimedEvent(overrides)),

    /** Events of one aggregate, each behind the one before. */
    async aggregate(count: number, overrides: Partial<OutboxEvent> = {}): Promise<OutboxEvent[]> {
      const { aggregateId } = aClaimedEvent();
      const events: OutboxEvent[] = [];
      for (let i = 0; i < count; i++) {
        const after = events[i - 1]?.eventId ?? null;
        events.push(aClaimedEvent({ id: String(i + 1), aggregateId, after, ...overrides }));
      }
      await Promise.all(events.map((event) => addJob(event)));
      return events;
    },

    /** One run of the event's job; `gate` as for one without an event before it. */
    publish(
      event: OutboxEvent,
      gate: Gate = 'open',
      { through = streams, madeAt = MADE_AT, of = epoch.name as string } = {},
    ): Promise<AppendOutcome> {
      return through.publish(event, { epoch: of, gate, madeAt });
    },

    /** An attempt of the event's job has failed; there will be another one. */
    fail: (event: OutboxEvent) => jobs.hset(jobKey(event.eventId), 'atm', '1'),
    /** The event's job has failed for good. */
    giveUp: (event: OutboxEvent) =>
      jobs.hset(jobKey(event.eventId), { atm: '6', finishedOn: String(MADE_AT + 1) }),
    /** An operator's Retry. */
    retry: (event: OutboxEvent) => jobs.hdel(jobKey(event.eventId), 'finishedOn'),
    removeJob: (event: OutboxEvent) => jobs.del(jobKey(event.eventId)),

    /** What is remembered of the event's entry: `<epoch> <entry id>`. */
    memoryOf: (event: OutboxEvent): Promise<string | null> =>
      hasTwoServers
        ? redis.get(memoryKey(event.eventId))
        : redis.hget(memoryKey(event.eventId), 'relay:entry'),
    remember: (event: OutboxEvent, memory: string) =>
      hasTwoServers
        ? redis.set(memoryKey(event.eventId), memory, 'EX', 100)
        : redis.hset(memoryKey(event.eventId), 'relay:entry', memory),
    memoryKey,
    /** The current one, as it is remembered with entries. */
    epochId: () => epochId(epoch.name as string),

    /** Event ids of the stream's entries, in their order. */
    async idsIn(stream = TOPIC): Promise<string[]> {
      return (await redis.xrange(stream, '-', '+')).map(([, fields]) => fields[1] as string);
    },
  };
}
