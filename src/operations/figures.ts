import { randomUUID } from 'node:crypto';
import type { Redis } from 'ioredis';
import { pause, withDeadline } from '../lifecycle.ts';
import type { Backlog } from '../outbox/backlog.ts';
import type { QueueFigures } from '../queue/queues.ts';
import type { StreamFigures } from '../streams/inspect.ts';
import { errorText } from '../telemetry/logger.ts';
import type { Fleet } from './heartbeat.ts';

/**
 * What is true of the relay as a whole, whichever pod says it: backlog, queues, streams, pods. `relay status` reads it
 * each time; for /metrics one pod reads it for all.
 */
export type Figures = Readonly<{
  // A part is left out when its server does not answer.
  backlog?: Backlog;
  queues?: Readonly<Record<'claim' | 'publish', QueueFigures>>;
  fleet?: Fleet;
  streams?: readonly StreamFigures[];
  /** Clock of the database minus that of Redis. Half a round trip wrong at most. */
  clockDifferenceMs?: number;
  /** Share of the database's NOTIFY queue that waits to be read, of 1. */
  notifyQueueUsage?: number;
  /** Why parts are left out. */
  problems: readonly string[];
}>;

export function createFigures(deps: {
  backlog: () => Promise<Backlog>;
  /** ms since the epoch */
  databaseTime: () => Promise<number>;
  notifyQueueUsage: () => Promise<number>;
  queues: () => Promise<Record<'claim' | 'publish', QueueFigures>>;
  fleet: () => Promise<Fleet>;
  inspectStreams: (streams: readonly string[]) => Promise<StreamFigures[]>;
  /** Read, if they are there, besides those that the fleet knows. */
  streams: readonly string[];
  /** Longest time for each part. */
  deadlineMs: number;
}): () => Promise<Figures> {
  return async () => {
    const problems = new Set<string>();
    const part = <T>(server: string, work: Promise<T>): Promise<T | undefined> =>
      withDeadline(deps.deadlineMs, work).catch((error) => {
        problems.add(`${server}: ${errorText(error)}`);
        return undefined;
      });
    // Against the same clock of this process, whatever that says.
    const offset = async (time: Promise<number>) => {
      const askedAt = Date.now();
      return (await time) - (askedAt + Date.now()) / 2;
    };
    const heard = deps.fleet();
    const known = async () => {
      const { streams } = await heard;
      return deps.inspectStreams([...new Set([...deps.streams, ...streams])]);
    };
    const [backlog, database, notifyQueueUsage, redis, queues, fleet, streams] = await Promise.all([
      part('database', deps.backlog()),
      part('database', offset(deps.databaseTime())),
      part('database', deps.notifyQueueUsage()),
      part('Redis', offset(heard.then(({ redisTime }) => redisTime))),
      part('Redis', deps.queues()),
      part('Redis', heard),
      part('Redis', known()),
    ]);
    return {
      ...(backlog && { backlog }),
      ...(notifyQueueUsage !== undefined && { notifyQueueUsage }),
      ...(queues && { queues }),
      ...(fleet && { fleet }),
      ...(streams && { streams }),
      ...(database !== undefined && redis !== undefined && { clockDifferenceMs: database - redis }),
      problems: [...problems],
    };
  };
}

/** Entries that were not acknowledged by a group, and go when another tenth of the stream's length is appended. */
export function entriesAtRisk(unacknowledged: number, maxLength: number): number {
  return maxLength === 0 ? 0 : Math.max(0, unacknowledged - Math.floor(maxLength * 0.9));
}

export type SharedFigures = Readonly<{ figures: Figures; ageSeconds: number }>;

/** Prometheus' usual interval: with it, each scrape of any pod finds figures that are no older than the last one. */
const KEPT_MS = 15_000;
/** Who reads for all is not waited for longer: it is gone, and another one reads. */
const READING_MS = 6_000;
/** Interval at which the other pods look for the result, and how long they do. */
const LOOK_MS = 50;
const LOOKS = 20;

/**
 * Figures that pods share: the first that finds none in Redis reads for all, and puts them there for 15 s. So the
 * database is asked once in that time, by any number of pods and scrapes. Undefined while Redis is away (then every
 * pod would ask), or when who reads takes longer than a second: the next scrape has the result.
 */
export function shareFigures(deps: {
  redis: Redis;
  /** Of the result. */
  key: string;
  read: () => Promise<Figures>;
}): () => Promise<SharedFigures | undefined> {
  const { redis, key } = deps;
  const lockKey = `${key}:reading`;

  async function shared(): Promise<SharedFigures | undefined> {
    const [text, remainingMs] = await Promise.all([redis.get(key), redis.pttl(key)]);
    if (text === null || remainingMs < 0) return undefined;
    return { figures: JSON.parse(text), ageSeconds: (KEPT_MS - remainingMs) / 1_000 };
  }

  async function readForAll(token: string): Promise<SharedFigures> {
    try {
      // Between the read and the lock another one may have put them there.
      const found = await shared();
      if (found !== undefined) return found;
      const figures = await deps.read();
      await redis.set(key, JSON.stringify(figures), 'PX', KEPT_MS);
      return { figures, ageSeconds: 0 };
    } finally {
      if ((await redis.get(lockKey).catch(() => null)) === token) await redis.del(lockKey).catch(() => 0);
    }
  }

  async function get(): Promise<SharedFigures | undefined> {
    const token = randomUUID();
    for (let look = 0; look < LOOKS; look++) {
      const found = await shared();
      if (found !== undefined) return found;
      if (await redis.set(lockKey, token, 'PX', READING_MS, 'NX')) return readForAll(token);
      await pause(LOOK_MS);
    }
    return undefined;
  }

  let getting: Promise<SharedFigures | undefined> | undefined;
  return () => {
    getting ??= get()
      .catch(() => undefined)
      .finally(() => {
        getting = undefined;
      });
    return getting;
  };
}
