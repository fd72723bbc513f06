import type { Redis } from 'ioredis';
import { pause, withDeadline } from '../lifecycle.ts';
import type { Backlog } from '../outbox/backlog.ts';
import type { QueueFigures } from '../queue/queues.ts';
import type { StreamFigures } from '../streams/inspect.ts';
import { errorText } from '../telemetry/logger.ts';
import type { Fleet } from './heartbeat.ts';

/**
 * Figures of the fleet, the same on every pod: backlog, queues, streams, pods. `relay status` reads them each time. For
 * /metrics, one pod reads them for all.
 */
export type Figures = Readonly<{
  // A part is undefined if its server does not answer.
  backlog?: Backlog | undefined;
  queues?: Readonly<Record<'claim' | 'publish', QueueFigures>> | undefined;
  fleet?: Fleet | undefined;
  streams?: readonly StreamFigures[] | undefined;
  /** Clock of the database minus that of Redis. The error is at most half a round trip to each. */
  clockDifferenceMs?: number | undefined;
  /** Used share of the database's NOTIFY queue, from 0 to 1. */
  notifyQueueUsage?: number | undefined;
  /** Why parts are left out. */
  problems: readonly string[];
}>;

export function createFigures(deps: {
  backlog: () => Promise<Backlog>;
  /** Unix time in ms. */
  databaseTime: () => Promise<number>;
  notifyQueueUsage: () => Promise<number | undefined>;
  queues: () => Promise<Record<'claim' | 'publish', QueueFigures>>;
  fleet: () => Promise<Fleet>;
  inspectStreams: (streams: readonly string[]) => Promise<StreamFigures[]>;
  /** Read besides those in the heartbeats, if they exist. */
  streams: readonly string[];
  /** Where the streams are. Default: the Redis of the queue. */
  streamServer?: Server;
  /** Timeout of each part. */
  deadlineMs: number;
}): () => Promise<Figures> {
  return async () => {
    const problems = new Set<string>();
    const part = <T>(server: Server, work: Promise<T>): Promise<T | undefined> =>
      withDeadline(deps.deadlineMs, work).catch((error) => {
        problems.add(problemOf(server, error, deps.deadlineMs));
        return undefined;
      });
    // Both clocks are compared with that of this process, which cancels out.
    const offset = async (time: Promise<number>) => {
      const askedAt = Date.now();
      return (await time) - (askedAt + Date.now()) / 2;
    };
    const heard = deps.fleet();
    const known = async () => {
      const fleet = await heard.catch(() => undefined); // it is a problem of its own
      return fleet && deps.inspectStreams([...new Set([...deps.streams, ...fleet.streams])]);
    };
    const [backlog, database, notifyQueueUsage, redis, queues, fleet, streams] = await Promise.all([
      part('database', deps.backlog()),
      part('database', offset(deps.databaseTime())),
      part('database', deps.notifyQueueUsage()),
      part('Redis', offset(heard.then(({ redisTime }) => redisTime))),
      part('Redis', deps.queues()),
      part('Redis', heard),
      part(deps.streamServer ?? 'Redis', known()),
    ]);
    const clockDifferenceMs = database === undefined || redis === undefined ? undefined : database - redis;
    const parts = { backlog, notifyQueueUsage, queues, fleet, streams, clockDifferenceMs };
    return { ...parts, problems: [...problems] };
  };
}

/** The timeouts of the deadline, the pool, the session and ioredis: a server that is mute may end each part by another. */
const TIMEOUT = /no answer within|timed? ?out/i;

const VARIABLES = {
  database: 'RELAY_DATABASE_URL',
  Redis: 'RELAY_REDIS_URL',
  'stream Redis': 'RELAY_STREAM_REDIS_URL',
};
type Server = keyof typeof VARIABLES;

/** Why a part is left out: the same text for every part that one outage concerns. */
export function problemOf(server: Server, error: unknown, deadlineMs: number): string {
  const reason = errorText(error);
  return `${server}: ${TIMEOUT.test(reason) ? `timed out after ${deadlineMs / 1_000} s` : reason} (see ${VARIABLES[server]})`;
}

/** Entries that a group has not acknowledged, and that are trimmed when another tenth of the limit is appended. */
export function entriesAtRisk(unacknowledged: number, maxLength: number): number {
  return maxLength === 0 ? 0 : Math.max(0, unacknowledged - Math.floor(maxLength * 0.9));
}

export type SharedFigures = Readonly<{ figures: Figures; ageSeconds: number }>;

/** Prometheus' usual scrape interval: figures are never older than the previous scrape. */
const KEPT_MS = 15_000;
/**
 * Lifetime of the lock of the pod that reads. It ends by itself: later than the pod has written its figures, and before
 * these are gone. If the pod dies, another one reads after this time.
 */
const READING_MS = 6_000;
/** Interval at which the other pods ask for the result, and how often. */
const LOOK_MS = 50;
const LOOKS = 20;

/**
 * Figures that pods share through Redis. The first pod that finds none there reads them for all and writes them for 15 s,
 * so the database is asked once in that time, for any number of pods and scrapes. Returns undefined while Redis is away
 * (otherwise every pod would ask the database), and when the reading pod takes longer than a second: the next scrape finds
 * the result.
 */
export function shareFigures(deps: {
  redis: Redis;
  /** Key of the result. */
  key: string;
  read: () => Promise<Figures>;
}): () => Promise<SharedFigures | undefined> {
  const { redis, key } = deps;

  async function get(): Promise<SharedFigures | undefined> {
    for (let look = 0; look < LOOKS; look++) {
      const [text, remainingMs] = await Promise.all([redis.get(key), redis.pttl(key)]);
      if (text !== null && remainingMs >= 0)
        return { figures: JSON.parse(text), ageSeconds: (KEPT_MS - remainingMs) / 1_000 };
      if (await redis.set(`${key}:reading`, '', 'PX', READING_MS, 'NX')) {
        const figures = await deps.read();
        await redis.set(key, JSON.stringify(figures), 'PX', KEPT_MS);
        return { figures, ageSeconds: 0 };
      }
      await pause(LOOK_MS);
    }
    return undefined;
  }

  return () => get().catch(() => undefined);
}
