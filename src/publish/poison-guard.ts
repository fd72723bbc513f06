import type { Redis } from 'ioredis';
import pLimit from 'p-limit';
import { script } from '../connections/redis-script.ts';
import { pause, succeedsWithin } from '../lifecycle.ts';

/**
 * Guards pods against events that kill them.
 *
 * A pod that dies leaves up to RELAY_CONCURRENCY jobs behind, and the event of one of them may have killed it. BullMQ
 * counts the stalls of each job, but a stall does not tell which event it was: all jobs of the dead pod stall, and so do
 * all jobs in progress while Redis hangs for longer than a lock lasts.
 *
 * So the guard publishes an event whose job has stalled alone: meanwhile the pod checks and appends no other event. The
 * guard counts the start in the job's hash before, and takes the count back afterwards, whatever the outcome. A count that
 * stays means that the pod died while this event alone was in progress: the event's crashes.
 */

/** The event has ended as many pods as it may. */
export class CrashLimitError extends Error {
  override readonly name = 'CrashLimitError';
  constructor(crashes: number) {
    super(`the pod ended ${crashes} times while publishing this event; see RELAY_MAX_CRASHES`);
  }
}

/** The relay's field in the job's hash: how often the event was started alone and the pod did not live to take it back. */
const STARTS_ALONE = 'relay:starts';
/** BullMQ's field: how often it found the job stalled. Removing it sets the count to 0. */
const STALLED = 'stc';

/**
 * Counts a start, unless the limit is reached. KEYS: job hash. ARGV: field, starts allowed. Answers the starts before this
 * one, or -1 when there is no job. It never writes to a missing hash: with a hash of that key, BullMQ would add no job of
 * that id any more.
 */
const COUNT_START = `
local job = redis.call('HMGET', KEYS[1], 'timestamp', ARGV[1])
if not job[1] then return -1 end
local starts = tonumber(job[2] or '0')
if starts < tonumber(ARGV[2]) then redis.call('HINCRBY', KEYS[1], ARGV[1], 1) end
return starts`;

/** Interval at which the guard tries to take a count back while Redis is away. */
const FORGET_AGAIN_MS = 1_000;

export type PoisonGuard = ReturnType<typeof createPoisonGuard>;

/**
 * `expiresAt` (Unix time in ms) is when the attempt is given up: one that was waiting does not begin after that.
 *
 * @param redis a connection that fails fast: without a count nothing is started
 */
export function createPoisonGuard(deps: {
  redis: Redis;
  jobKey: (eventId: string) => string;
  maxCrashes: number;
}) {
  const { redis, jobKey } = deps;
  const countStart = script<number>(redis, 'countStart', COUNT_START, 1);
  // The first crash is not in the count: several events were in progress, and it does not tell which of them killed the
  // pod. So even with a limit of 1 there is one start alone.
  const startsAllowed = Math.max(1, deps.maxCrashes - 1);
  let stopped = false;

  /** How many appends run together, and the callback of an event that waits until none does. */
  let running = 0;
  let onNoneRunning = (): void => {};
  /** How many events are published alone or wait for that. */
  let alone = 0;
  const oneByOne = pLimit(1);
  /** Events whose counts are being taken back: goes on until Redis has done it. */
  const clearing = new Map<string, Promise<void>>();

  function assertInTime(expiresAt: number): void {
    if (Date.now() >= expiresAt)
      throw new Error('it could not begin in time: events that are published alone went first');
  }

  async function clear(eventId: string): Promise<void> {
    while (!stopped) {
      try {
        await redis.hdel(jobKey(eventId), STARTS_ALONE, STALLED);
        break;
      } catch {
        await pause(FORGET_AGAIN_MS);
      }
    }
    clearing.delete(eventId);
  }
  async function clearUntil(eventId: string, expiresAt: number): Promise<void> {
    // An event that runs again and again while Redis refuses everything is cleared once.
    const cleared = clearing.get(eventId) ?? clear(eventId);
    clearing.set(eventId, cleared);
    await succeedsWithin(Math.max(1, expiresAt - Date.now()), cleared);
  }

  /** Runs `work` after the events that were to be published alone before, and after all appends that run together. */
  async function exclusively<T>(work: () => Promise<T>): Promise<T> {
    alone++;
    try {
      return await oneByOne(async () => {
        if (running > 0) {
          await new Promise<void>((resolve) => {
            onNoneRunning = resolve;
          });
        }
        return work();
      });
    } finally {
      alone--;
    }
  }

  return {
    /** Runs `append` beside others, after every event that is published alone or waits for that. */
    async together<T>(expiresAt: number, append: () => Promise<T>): Promise<T> {
      while (alone > 0) await oneByOne(() => {}); // after those that wait already
      assertInTime(expiresAt);
      running++;
      try {
        return await append();
      } finally {
        running--;
        if (running === 0) onNoneRunning();
      }
    },

    /**
     * Runs `append` while no other does.
     * @throws {CrashLimitError} without running it, when the event has ended too many pods
     */
    async alone<T>(eventId: string, expiresAt: number, append: () => Promise<T>): Promise<T> {
      let mayBeCounted = false;
      try {
        return await exclusively(async () => {
          assertInTime(expiresAt);
          mayBeCounted = true;
          const starts = await countStart(jobKey(eventId), STARTS_ALONE, startsAllowed);
          if (starts >= startsAllowed) {
            mayBeCounted = false;
            throw new CrashLimitError(starts + 1);
          }
          return await append();
        });
      } finally {
        // Before the acknowledgement, which may wait for reasons that have nothing to do with the event. Before the job
        // can be started again, so that its next start counts from 0.
        if (mayBeCounted) await clearUntil(eventId, expiresAt);
      }
    },

    /** Takes the event's count back. Throws nothing; resolves when it is done or by `expiresAt`. */
    clear: clearUntil,

    stop(): void {
      stopped = true;
    },
  };
}
