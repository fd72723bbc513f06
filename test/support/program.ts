import { spawn } from 'node:child_process';
import { createInterface } from 'node:readline';
import { onTestFinished } from 'vitest';
import { cleanEnvironment } from '../demo/pod.ts';
import { guardProcess } from '../demo/watchdog.ts';

export type Program = Readonly<{
  /** What it wrote to stdout and stderr so far. */
  lines: readonly string[];
  /** Sends a signal and resolves when the process is gone. */
  kill(signal: NodeJS.Signals): Promise<{ code: number | null; signal: NodeJS.Signals | null }>;
}>;

/** Runs a program of the documentation. It is killed after the test, if it still runs. */
export function startProgram(
  command: string,
  args: readonly string[],
  env: Readonly<Record<string, string>>,
): Program {
  const child = spawn(command, args, {
    env: { ...cleanEnvironment(), ...env },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  const unguard = child.pid === undefined ? () => {} : guardProcess(child.pid, 'KILL');
  const lines: string[] = [];
  for (const output of [child.stdout, child.stderr])
    createInterface({ input: output }).on('line', (line) => lines.push(line));
  const closed = new Promise<{ code: number | null; signal: NodeJS.Signals | null }>((done, fail) => {
    child.once('error', fail);
    child.once('close', (code, signal) => {
      unguard();
      done({ code, signal });
    });
  });
  closed.catch(() => {});
  const kill = (signal: NodeJS.Signals) => {
    child.kill(signal);
    return closed;
  };
  onTestFinished(async () => {
    await kill('SIGKILL');
  });
  return { lines, kill };
}
