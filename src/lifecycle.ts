/** Starts parts in order, stops them in reverse; deadlines, pauses and loops. */
import { setTimeout as delay } from 'node:timers/promises';

export type Part = Readonly<{
  name: string;
  start?: () => void | Promise<void>;
  /** `remainingMs`: what is left of the time for the whole stop. */
  stop?: (remainingMs: number) => void | Promise<void>;
}>;

export type Lifecycle = Readonly<{
  start(): Promise<void>;
  /** Stops what was started, last first; a part that fails or overruns does not keep the others from stopping. */
  stop(timeoutMs: number): Promise<{ overran: string[]; failed: { name: string; error: Error }[] }>;
}>;

/** A part that is stopped after the deadline still gets this long to close its connections. */
const GRACE_MS = 200;

export function createLifecycle(parts: readonly Part[]): Lifecycle {
  const started: Part[] = [];
  let stopping: ReturnType<Lifecycle['stop']> | undefined;

  async function stopAll(timeoutMs: number) {
    const endsAt = performance.now() + timeoutMs;
    const overran: string[] = [];
    const failed: { name: string; error: Error }[] = [];
    for (const part of started.splice(0).reverse()) {
      const remainingMs = Math.max(endsAt - performance.now(), GRACE_MS);
      try {
        await withDeadline(remainingMs + GRACE_MS, Promise.resolve(part.stop?.(remainingMs)));
      } catch (error) {
        if (error instanceof DeadlineError) overran.push(part.name);
        else failed.push({ name: part.name, error: error as Error });
      }
    }
    return { overran, failed };
  }

  return {
    async start() {
      for (const part of parts) {
        // Added before its start, so that a part that fails half-way is stopped too.
        started.push(part);
        await part.start?.();
        if (stopping !== undefined) return;
      }
    },
    stop(timeoutMs) {
      stopping ??= stopAll(timeoutMs);
      return stopping;
    },
  };
}

export type Task = Readonly<{ begin(): void; stop(): Promise<void> }>;

/**
 * Work that goes on beside the job that began it, one run at a time: `begin` does nothing while a run goes on. `run` ends
 * soon after `goesOn()` answers false, and handles its errors.
 */
export function createTask(run: (goesOn: () => boolean) => Promise<void>): Task {
  let running: Promise<void> | undefined;
  let stopped = false;
  return {
    begin() {
      if (stopped || running !== undefined) return;
      running = run(() => !stopped).finally(() => {
        running = undefined;
      });
    },
    async stop() {
      stopped = true;
      await running;
    },
  };
}

/** Ends early when `signal` is aborted, and at once where it is already. */
export const pause = (ms: number, signal?: AbortSignal): Promise<void> =>
  delay(ms, undefined, signal && { signal }).catch(() => {});

/** A part cannot start; the message tells an operator why and what to do. */
export class NotReadyError extends Error {
  override readonly name = 'NotReadyError';
}

/**
 * @returns what `work` resolves to
 * @throws DeadlineError when it has not ended within `ms`. It goes on, and its result is dropped
 */
export function withDeadline<T>(ms: number, work: Promise<T>): Promise<T> {
  let timer: NodeJS.Timeout | undefined;
  const deadline = new Promise<never>((_resolve, reject) => {
    timer = setTimeout(() => reject(new DeadlineError(ms)), ms);
  });
  return Promise.race([work, deadline]).finally(() => clearTimeout(timer));
}

export class DeadlineError extends Error {
  constructor(ms: number) {
    super(`no answer within ${ms} ms`);
  }
}

/** Whether `work` succeeded within `ms`. */
export const succeedsWithin = (ms: number, work: Promise<unknown>): Promise<boolean> =>
  withDeadline(ms, work).then(
    () => true,
    () => false,
  );

/**
 * Runs `work`, which must not throw, at once, and again `intervalMs` after each end. `stop` waits for a run in progress.
 */
export function loop(work: () => Promise<unknown>, intervalMs: number) {
  let stopped = true;
  let timer: NodeJS.Timeout | undefined;
  let running: Promise<void> = Promise.resolve();

  function again(): void {
    running = work().then(() => {
      if (!stopped) timer = setTimeout(again, intervalMs);
    });
  }

  return {
    start(): void {
      if (!stopped) return;
      stopped = false;
      again();
    },
    async stop(): Promise<void> {
      stopped = true;
      clearTimeout(timer);
      await running;
    },
  };
}
