/**
 * Collects items, and runs `run`, which must not throw, with at most `max` of them: those that came in one iteration of the
 * event loop, then those that came while it ran.
 */
export function inBatches<T>(max: number, run: (batch: T[]) => Promise<void>) {
  const waiting: T[] = [];
  let running: Promise<void> | undefined;

  async function runAll(): Promise<void> {
    await new Promise(setImmediate);
    while (waiting.length > 0) await run(waiting.splice(0, max));
    // Nothing is awaited since the last look: what comes from now on begins a run of its own.
    running = undefined;
  }

  return {
    add(item: T): void {
      waiting.push(item);
      running ??= runAll();
    },
    /** Resolves when nothing is left. */
    drain: async (): Promise<void> => running,
  };
}
