import { userInfo } from 'node:os';
import { createInterface } from 'node:readline/promises';
import { type Options, type Preset, Presets } from 'cli-progress';
import { print } from './command.ts';

/** What commands share that change something: who, whether, how far, and an end in good order. */

/** Who runs this process; through sudo, who called it. */
export function operator(): string {
  if (process.env.SUDO_USER) return process.env.SUDO_USER;
  try {
    return userInfo().username;
  } catch {
    return `uid ${process.getuid?.() ?? '?'}`; // has no name, as in many containers
  }
}

/**
 * Asks in a terminal. Elsewhere nobody could answer: a script has to say `--yes`.
 * @throws where there is neither a terminal nor `--yes`
 */
export async function confirmed(question: string, yes: boolean): Promise<boolean> {
  if (yes) return true;
  if (!process.stdin.isTTY) throw new Error(`${question} There is no terminal to ask in: say --yes`);
  const terminal = createInterface({ input: process.stdin, output: process.stderr });
  try {
    const answer = await terminal.question(`${question} [y/N] `);
    if (/^y(es)?$/i.test(answer.trim())) return true;
    print('Nothing was done.');
    return false;
  } finally {
    terminal.close();
  }
}

/** Runs `work`, which is told by `stopped` to end after SIGINT or SIGTERM. A second signal ends the process at once. */
export async function untilInterrupted<T>(
  work: (stopped: () => boolean) => Promise<T>,
): Promise<{ result: T; interrupted: boolean }> {
  let interrupted = false;
  const stop = () => {
    interrupted = true;
  };
  for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, stop);
  try {
    return { result: await work(() => interrupted), interrupted };
  } finally {
    for (const signal of ['SIGINT', 'SIGTERM'] as const) process.off(signal, stop);
  }
}

/** On stderr: in place in a terminal, otherwise a line now and then. */
export const barOptions = (format: string): [Options, Preset] => [
  {
    stream: process.stderr,
    format,
    noTTYOutput: true,
    notTTYSchedule: 5_000,
    hideCursor: true,
    clearOnComplete: true,
  },
  Presets.shades_classic,
];

export const counted = (count: number, what: string): string => `${count} ${what}${count === 1 ? '' : 's'}`;
