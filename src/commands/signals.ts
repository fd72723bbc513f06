import { constants } from 'node:os';

/**
 * SIGTERM and SIGINT. Loaded before all else: a process that is number 1 of its container does not even notice a signal
 * that nobody listens for, and each is listened for once and for all, since one that comes while listeners change is lost.
 */

type Signal = 'SIGTERM' | 'SIGINT';

/** Until a command has a way of its own to stop, nothing has begun: the process ends at once. */
let onSignal = (signal: Signal): void =>
  process.exit(process.argv[2] === 'start' ? 0 : 128 + constants.signals[signal]);

/** Ctrl-C reaches every process of the terminal, and npm sends it on: within this time it is the same one again. */
const SAME_MS = 1_000;

for (const signal of ['SIGTERM', 'SIGINT'] as const) process.on(signal, () => onSignal(signal));

/** The first of them; from now on it does not end the process by itself. */
export const signalled = (): Promise<Signal> =>
  new Promise((resolve) => {
    onSignal = (signal) => {
      const at = performance.now();
      // A second signal means: now. Nothing is lost by it, other pods take over what was left.
      onSignal = () => {
        if (performance.now() - at > SAME_MS) process.exit(1);
      };
      resolve(signal);
    };
  });
