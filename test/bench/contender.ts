/** Somebody who is measured, in a process of its own. */
import { spawn } from 'node:child_process';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { guardProcess } from '../demo/watchdog.ts';
import type { CpuMicros } from './cpu.ts';
import type { Undo } from './servers.ts';
import type { Workload } from './workload.ts';

export type Drained = Readonly<{
  events: number;
  seconds: number;
  /** Spent meanwhile, where it was looked at. */
  cpu?: CpuMicros;
}>;

export type Contender = Readonly<{
  name: string;
  /** What it is, in a few words. */
  describe: string;
  /** So slow that a round to warm it up would only take time, and a large backlog would never end. */
  isSlow?: true;
  /** How many share the work; 1 if left out. Each of them has to be warmed up. */
  processes?: number;
  /**
   * Puts the work in place, waits until it is done, and checks what came of it.
   * @throws unless every event that counts as done is in its stream once, in the order that the contender promises
   */
  drain(workload: Workload): Promise<Drained>;
}>;

export type Child = Readonly<{
  pid: number;
  /** Sends a request and waits for its answer. One at a time. */
  ask<T>(request: unknown): Promise<T>;
}>;

/** Starts a script of this folder; it is ready when this resolves. */
export async function startChild(script: string, config: unknown, undo: Undo): Promise<Child> {
  const path = fileURLToPath(new URL(`./contenders/${script}`, import.meta.url));
  const child = spawn(process.execPath, ['--import', 'tsx', path, JSON.stringify(config)], {
    // Ctrl-C in a terminal reaches us alone: children end in our order.
    detached: true,
    stdio: ['pipe', 'pipe', 'inherit'],
  });
  const { pid } = child;
  if (pid === undefined) throw new Error(`${script} cannot be started`);
  const release = guardProcess(pid, 'KILL');
  const exited = new Promise<void>((resolve) => child.once('exit', () => resolve()));
  undo.push(async () => {
    // At once, also from the middle of what it was asked for: it has nothing to lose.
    child.kill('SIGKILL');
    await exited;
    release();
  });
  const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
  const answer = async () => {
    const { value, done } = await lines.next();
    if (done) throw new Error(`${script} ended unexpectedly`);
    return JSON.parse(value);
  };
  await answer();
  return {
    pid,
    ask(request) {
      child.stdin.write(`${JSON.stringify(request)}\n`);
      return answer();
    },
  };
}

/** The child's side: what it was started with. */
export const childConfig = <T>(): T => JSON.parse(process.argv[2] as string);

/** The child's side: answers requests until its parent has no more. */
export async function answerParent<T>(answer: (request: T) => Promise<unknown>): Promise<void> {
  console.log('"ready"');
  for await (const line of createInterface({ input: process.stdin })) {
    console.log(JSON.stringify((await answer(JSON.parse(line))) ?? null));
  }
  process.exit(0);
}
