/** How the harness itself lives through what it does to the servers. */
import { setTimeout as delay } from 'node:timers/promises';
import type pg from 'pg';

const PATIENCE_MS = 45_000;
const RETRY_MS = 200;

/** Servers go away on purpose: a query that suffers from it fails by itself. */
export function survive(pool: pg.Pool): void {
  pool.on('error', () => {});
  pool.on('connect', (client) => client.on('error', () => {}));
}

/** Tries again until it works or patience is at its end. */
export async function persistently<T>(work: () => Promise<T>): Promise<T> {
  const deadline = Date.now() + PATIENCE_MS;
  for (;;) {
    try {
      return await work();
    } catch (error) {
      if (Date.now() > deadline) throw error;
      await delay(RETRY_MS);
    }
  }
}

/** Waits until `condition` gives true; false if that takes longer than `timeoutMs`, or `signal` is aborted before. */
export async function comesTrue(
  condition: () => Promise<boolean>,
  timeoutMs: number,
  signal?: AbortSignal,
): Promise<boolean> {
  const deadline = Date.now() + timeoutMs;
  while (Date.now() < deadline && signal?.aborted !== true) {
    if (await condition()) return true;
    await delay(RETRY_MS);
  }
  return false;
}

/** Sleeps, but not longer than until `signal` is aborted. */
export async function pause(ms: number, signal?: AbortSignal): Promise<void> {
  await delay(ms, undefined, signal && { signal }).catch(() => {});
}
