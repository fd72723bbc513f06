import { setTimeout as delay } from 'node:timers/promises';
import { inspect } from 'node:util';

/** No promise is this long: whoever waits so long hangs, also on a machine that gives a pod a tenth of a core. */
export const PATIENCE_MS = 180_000;
/** Between two looks: short at first, then a twentieth of the time waited so far, since looks load the machine. */
const POLL_MS = 15;
const POLL_MOST_MS = 150;

export type WaitOptions = {
  /** What is waited for, as it should read in the error: "the row to be published". */
  what: string;
  /** Where what is waited for has a limit of its own. Default: PATIENCE_MS. */
  timeoutMs?: number;
  /** Between two looks, where the condition is true for a moment only. */
  pollMs?: number;
};

/**
 * Calls `condition` until it gives something truthy, and gives that back. After the deadline it throws an error that
 * tells what was waited for and the last value. A condition that throws ends the wait at once.
 */
export async function waitFor<T>(
  condition: () => T | Promise<T>,
  { what, timeoutMs = PATIENCE_MS, pollMs }: WaitOptions,
): Promise<NonNullable<T>> {
  const startedAt = Date.now();
  const deadline = startedAt + timeoutMs;
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
      const waitedMs = Date.now() - startedAt;
      await delay(pollMs ?? Math.min(POLL_MOST_MS, Math.max(POLL_MS, waitedMs / 20)));
    }
  } finally {
    expired.abort();
  }
  throw new Error(`Waited ${timeoutMs} ms for ${what}; last value: ${inspect(last, { depth: 4 })}`);
}

const EXPIRED = Symbol('expired');
