import { setTimeout as delay } from 'node:timers/promises';
import { inspect } from 'node:util';

const POLL_MS = 15;

export type WaitOptions = {
  /** What is waited for, as it should read in the error: "the row to be published". */
  what: string;
  timeoutMs?: number;
};

/**
 * Calls `condition` until it gives something truthy, and gives that back. After the deadline it throws an error that
 * tells what was waited for and the last value. A condition that throws ends the wait at once.
 */
export async function waitFor<T>(
  condition: () => T | Promise<T>,
  { what, timeoutMs = 15_000 }: WaitOptions,
): Promise<NonNullable<T>> {
  const deadline = Date.now() + timeoutMs;
  const expired = new AbortController();
  const timeout = delay(timeoutMs, undefined, { signal: expired.signal }).then(
    () => EXPIRED,
    () => EXPIRED,
  );
  let last: unknown = 'none: the condition never settled';
  try {
    while (Date.now() < deadline) {
      const value = await Promise.race([Promise.resolve(condition()), timeout]);
      if (value === EXPIRED) break;
      if (value) return value as NonNullable<T>;
      last = value;
      await delay(POLL_MS);
    }
  } finally {
    expired.abort();
  }
  throw new Error(`Waited ${timeoutMs} ms for ${what}; last value: ${inspect(last, { depth: 4 })}`);
}

const EXPIRED = Symbol('expired');
