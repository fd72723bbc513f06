import { userInfo } from 'node:os';
import { createInterface, type Interface } from 'node:readline/promises';
import { Presets, SingleBar } from 'cli-progress';
import { signalled } from './signals.ts';
import { duration, print, printError, type Text, text } from './terminal.ts';

/** What commands that change something share: who runs them, a question before, progress, and an orderly end. */

/**
 * The user of this process. Beside it the user that sudo names, which is only a claim: the user who runs the process may set its
 * environment.
 */
export function operator(): string {
  const claim = process.env.SUDO_USER?.slice(0, 64);
  return claim ? `${systemUser()} (SUDO_USER: ${claim})` : systemUser();
}

function systemUser(): string {
  try {
    return userInfo().username;
  } catch {
    return `uid ${process.getuid?.() ?? '?'}`; // has no name, as in many containers
  }
}

/**
 * The answer to a question; null where the input ends first (Ctrl-D), for which readline would wait forever. readline also
 * takes Ctrl-C: it has to end the process as it does elsewhere.
 */
export async function answerTo(terminal: Interface, prompt: string): Promise<string | null> {
  const onInterrupt = () => {
    printError(text``); // leaves the line of the question
    process.emit('SIGINT', 'SIGINT');
  };
  terminal.once('SIGINT', onInterrupt);
  try {
    return await Promise.race([
      terminal.question(prompt),
      new Promise<null>((resolve) => terminal.once('close', () => resolve(null))),
    ]);
  } finally {
    terminal.off('SIGINT', onInterrupt);
  }
}

/**
 * Asks in a terminal. Elsewhere nobody could answer: a script has to say `--yes`.
 * @throws where there is neither a terminal nor `--yes`
 */
export async function confirmed(question: Text, yes: boolean): Promise<boolean> {
  if (yes) return true;
  if (!process.stdin.isTTY) throw new Error(`there is no terminal to ask in: say --yes (${question.value})`);
  const terminal = createInterface({ input: process.stdin, output: process.stderr });
  try {
    const answer = await answerTo(terminal, `${question.value} [y/N] `);
    if (/^y(es)?$/i.test(answer?.trim() ?? '')) return true;
    if (answer === null) printError(text``); // leaves the line of the question
    print(text`Nothing was done.`);
    return false;
  } finally {
    terminal.close();
  }
}

/** Runs `work`. After SIGINT or SIGTERM, `stopped` answers true and `work` ends. A second signal ends the process at once. */
export async function untilInterrupted<T>(
  work: (stopped: () => boolean) => Promise<T>,
): Promise<{ result: T; interrupted: boolean }> {
  let interrupted = false;
  void signalled().then(() => {
    interrupted = true;
  });
  return { result: await work(() => interrupted), interrupted };
}

/**
 * Runs `work` with a progress bar on stderr: in place in a terminal, otherwise a line now and then. The bar ends at 100 % if
 * `isDone`.
 * @param format may show numbers only: the bar does not clean texts. With a bar in a terminal, the time left follows
 */
export async function withProgress<T>(
  format: string,
  total: number,
  work: (update: (at: number, numbers?: Readonly<Record<string, number>>) => void) => Promise<T>,
  {
    isDone = () => true,
    numbers = {},
  }: Readonly<{ isDone?: (result: T) => boolean; numbers?: Readonly<Record<string, number>> }> = {},
): Promise<T> {
  const line = format.includes('{bar}') && process.stderr.isTTY ? `${format} | {eta_formatted} left` : format;
  const bar = new SingleBar(
    {
      ...{ stream: process.stderr, format: line, noTTYOutput: true, notTTYSchedule: 5_000 },
      ...{ barsize: 20, hideCursor: true, clearOnComplete: true },
      // It is no number before the first steps.
      formatTime: (seconds: number) => (Number.isFinite(seconds) ? duration(seconds) : '?'),
    },
    Presets.shades_classic,
  );
  const update = (at: number, more = numbers): void => {
    const value = Math.min(at, total);
    if (bar.isActive) bar.update(value, more);
    else bar.start(total, value, more);
  };
  // Elsewhere a line stays, also before the error of a first step that is refused.
  if (process.stderr.isTTY) update(0);
  try {
    const result = await work(update);
    if (bar.isActive && isDone(result)) bar.update(total);
    return result;
  } finally {
    bar.stop();
  }
}
