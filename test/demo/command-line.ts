import { InvalidArgumentError } from 'commander';

/** What programs that start servers of their own share: numbers among their options, and an orderly end on Ctrl-C. */

export const EXIT_INTERRUPTED = 130;
/** npm passes on a Ctrl-C which the terminal has sent us already: that is still the first one. */
const SAME_SIGNAL_MS = 500;

/** Option parser. */
export const wholeNumber =
  (min: number, max: number) =>
  (text: string): number => {
    const value = Number(text);
    if (Number.isInteger(value) && value >= min && value <= max) return value;
    throw new InvalidArgumentError(`Expected a whole number from ${min} to ${max}.`);
  };

/**
 * The first SIGINT or SIGTERM aborts the signal that is returned, once `onFirst` has told so; the second ends the
 * process, whose servers and folder the watchdog (watchdog.ts) then sees to.
 */
export function interruption(onFirst: () => void): AbortSignal {
  const stop = new AbortController();
  let firstAt: number | undefined;
  const onSignal = (): void => {
    if (firstAt === undefined) {
      firstAt = performance.now();
      onFirst();
      stop.abort();
    } else if (performance.now() - firstAt > SAME_SIGNAL_MS) {
      process.exit(EXIT_INTERRUPTED);
    }
  };
  process.on('SIGINT', onSignal);
  process.on('SIGTERM', onSignal);
  return stop.signal;
}
