import { describe, expect, test, vi } from 'vitest';
import { createClock, redisTime } from '../../src/queue/clock.ts';
import { createRedis } from '../support/servers.ts';
import { openRedis, silent } from '../support/stages.ts';

const { url } = await createRedis();

/** A clock whose machine is as far ahead of Redis as `ahead` says, and adjusts itself unless it is an embedded one. */
function aClock(ahead: { ms: number; roundTripMs?: number }, isEmbedded = false) {
  let adjustedMs = 0;
  const told: [string, unknown][] = [];
  const now = vi.spyOn(Date, 'now');
  let machineMs = 1_000_000;
  now.mockImplementation(() => machineMs - adjustedMs);
  const clock = createClock({
    async redisTime() {
      machineMs += ahead.roundTripMs ?? 0;
      return machineMs - ahead.ms;
    },
    adjust: isEmbedded
      ? undefined
      : (ms) => {
          adjustedMs = ms;
        },
    logger: { ...silent, warn: (fields, text) => void told.push([text, fields.aheadSeconds]) },
  });
  return {
    clock,
    told,
    adjusted: () => adjustedMs,
    /** Compares once. */
    async compare() {
      await clock.compare();
      return clock.aheadMs();
    },
    [Symbol.dispose]: () => now.mockRestore(),
  };
}

describe('the clock of a pod', () => {
  test('is adjusted to that of Redis where it differs, and told once; and again when it agrees', async () => {
    const ahead = { ms: 3_600_000 };
    using it = aClock(ahead);
    expect(await it.compare()).toBe(3_600_000);
    expect(await it.compare()).toBe(3_600_000);
    expect(it.adjusted()).toBe(3_600_000);
    expect(it.told).toEqual([[expect.stringMatching(/by which the relay goes/), 3_600]]);
    ahead.ms = 20;
    expect(await it.compare()).toBe(20);
    expect(it.adjusted()).toBe(20);
    expect(it.told.slice(1)).toEqual([['the clock of this pod agrees with that of Redis again', 0]]);
  });

  test('is left alone where it differs by less than a second, or than the question took', async () => {
    using it = aClock({ ms: -900 });
    expect(await it.compare()).toBe(-900);
    expect(it.adjusted()).toBe(0);
    using slow = aClock({ ms: 2_000, roundTripMs: 6_000 });
    await slow.compare();
    expect(slow.adjusted()).toBe(0);
    expect([...it.told, ...slow.told]).toEqual([]);
  });

  test('of a process that is not the relay’s is only told', async () => {
    using it = aClock({ ms: -86_400_000 }, true);
    expect(await it.compare()).toBe(-86_400_000);
    expect(it.told).toEqual([[expect.stringMatching(/retries come as much too early or too late/), -86_400]]);
  });

  test('starts without an answer of Redis', async () => {
    const clock = createClock({ redisTime: () => Promise.reject(new Error('away')), logger: silent });
    await clock.compare();
    expect(clock.aheadMs()).toBe(0);
  });
});

test('Redis tells its time to the relay’s user', async () => {
  const redis = openRedis(url);
  const before = Date.now();
  const time = await redisTime(redis);
  expect(time).toBeGreaterThan(before - 1_000);
  expect(time).toBeLessThan(Date.now() + 1_000);
});
