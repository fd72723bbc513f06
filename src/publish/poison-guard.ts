import type { Redis, Result } from 'ioredis';
import { succeedsWithin } from '../lifecycle.ts';

/**
 * Guards pods against events that kill them.
 *
 * A pod that ends leaves up to RELAY_CONCURRENCY jobs behind, and one of their events may be the reason. BullMQ counts
 * the stalls of each, but a stall says nothing about the event: its neighbours stalled with it, and so does every job
 * in progress while Redis hangs for longer than a lock lasts. So an event whose job has stalled is published alone: no
 * other event of this pod is between its check and the answer to its append meanwhile. Its start is counted in its
 * job's hash, and the count is taken back when the pod is still there afterwards, whatever the answer was. What stays
 * counted is the death of a pod that had nothing else in progress: the event's crashes.
 */

/** The event has ended as many pods as it may. */
export class CrashLimitError extends Error {
  override readonly name = 'CrashLimitError';
  constructor(crashes: number) {
    super(`the pod ended ${crashes} times while publishing this event; see RELAY_MAX_CRASHES`);
  }
}

/** Field of the job's hash that is ours: starts alone of which nothing was heard. */
const STARTS = 'relay:starts';
/** BullMQ's own: how often the job was found stalled. Without it, it counts from 0 again. */
const STALLED = 'stc';

/**
 * Counts a start, unless that would be one too many. KEYS: job hash. ARGV: field, starts allowed. Answers the starts
 * before this one, or -1 when there is no job: a count must not bring back a hash that Redis lost, since a job of the
 * same id could not be added any more.
 */
const COUNT_START = `
local job = redis.call('HMGET', KEYS[1], 'timestamp', ARGV[1])
if not job[1] then return -1 end
local starts = tonumber(job[2] or '0')
if starts < tonumber(ARGV[2]) then redis.call('HINCRBY', KEYS[1], ARGV[1], 1) end
return starts`;

declare module 'ioredis' {
  interface RedisCommander<Context> {
    countStart(jobHash: string, field: string, limit: number): Result<number, Context>;
  }
}

/** A count that cannot be taken back (Redis is away) is tried again this soon. */
const FORGET_AGAIN_MS = 200;

export type PoisonGuard = Readonly<{
  /** Runs `append` unless an event is being published alone, or waits to be: then after that. */
  together<T>(expiresAt: number, append: () => Promise<T>): Promise<T>;
  /**
   * Runs `append` while no other does.
   * @throws {CrashLimitError} without running it, when the event has ended too many pods
   */
  alone<T>(eventId: string, expiresAt: number, append: () => Promise<T>): Promise<T>;
  /** Takes the event's count back. Throws nothing; resolves when it is done or by `expiresAt`. */
  clear(eventId: string, expiresAt: number): Promise<void>;
  stop(): void;
}>;

/**
 * `expiresAt` (ms since the epoch) is when the attempt is given up: one that was waiting does not begin after that.
 *
 * @param redis a connection that fails fast: without a count nothing is started
 */
export function createPoisonGuard(deps: {
  redis: Redis;
  jobKey: (eventId: string) => string;
  maxCrashes: number;
}): PoisonGuard {
  const { redis, jobKey } = deps;
  redis.defineCommand('countStart', { numberOfKeys: 1, lua: COUNT_START });
  // The first crash is not counted, since several events were in progress. It does not tell which of them it was, so even
  // with a limit of 1 there is one start alone.
  const startsAllowed = Math.max(1, deps.maxCrashes - 1);
  let stopped = false;

  /** Appends of several events together, and who waits until there are none. */
  let running = 0;
  let onNoneRunning = (): void => {};
  /** Events that are published alone or wait to be, one after the other. */
  let alone = 0;
  let lastAlone: Promise<void> = Promise.resolve();

  function assertInTime(expiresAt: number): void {
    if (Date.now() >= expiresAt) throw new Error('it could not begin alone in time');
  }

  async function clear(eventId: string): Promise<void> {
    while (!stopped) {
      try {
        await redis.hdel(jobKey(eventId), STARTS, STALLED);
        return;
      } catch {
        await pause(FORGET_AGAIN_MS);
      }
    }
  }
  async function clearUntil(eventId: string, expiresAt: number): Promise<void> {
    await succeedsWithin(Math.max(1, expiresAt - Date.now()), clear(eventId));
  }

  /** Waits for those that are published alone before, then for all others. */
  async function exclusively<T>(work: () => Promise<T>): Promise<T> {
    alone++;
    const before = lastAlone;
    let leave = (): void => {};
    lastAlone = new Promise((resolve) => {
      leave = resolve;
    });
    try {
      await before;
      if (running > 0) {
        await new Promise<void>((resolve) => {
          onNoneRunning = resolve;
        });
      }
      return await work();
    } finally {
      alone--;
      leave();
    }
  }

  return {
    async together(expiresAt, append) {
      while (alone > 0) await lastAlone;
      assertInTime(expiresAt);
      running++;
      try {
        return await append();
      } finally {
        running--;
        if (running === 0) onNoneRunning();
      }
    },

    async alone(eventId, expiresAt, append) {
      let mayBeCounted = false;
      try {
        return await exclusively(async () => {
          assertInTime(expiresAt);
          mayBeCounted = true;
          const starts = await redis.countStart(jobKey(eventId), STARTS, startsAllowed);
          if (starts >= startsAllowed) {
            mayBeCounted = false;
            throw new CrashLimitError(starts + 1);
          }
          return await append();
        });
      } finally {
        // Before the acknowledgement, which may wait for reasons that are not the event's; and before the job is
        // handed on, so that its next start finds a clean slate.
        if (mayBeCounted) await clearUntil(eventId, expiresAt);
      }
    },

    clear: clearUntil,

    stop() {
      stopped = true;
    },
  };
}

const pause = (ms: number) => new Promise<void>((resolve) => setTimeout(resolve, ms));
