/** Runs a server as a child process: on a free port, until it is really ready, restartable, gone with us. */
import { spawn } from 'node:child_process';
import { randomInt } from 'node:crypto';
import { closeSync, openSync } from 'node:fs';
import { readFile, stat } from 'node:fs/promises';
import { createServer } from 'node:net';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { guardProcess } from './watchdog.ts';

const READY_DEADLINE_MS = 30_000;
const EXIT_DEADLINE_MS = 15_000;
const READY_POLL_MS = 10;
const PORT_ATTEMPTS = 20;

export type PrivateServer = Readonly<{
  url: string;
  port: number;
  /** Of the running server; a restart changes it. */
  readonly pid: number;
  /** What the server wrote, over all its starts. */
  logFile: string;
  /** Stops in an orderly way, if it still runs. Its folder stays: that is the caller's. */
  stop(): Promise<void>;
  /** Sends a signal that ends the server (default SIGKILL) and waits until it is gone. */
  kill(signal?: NodeJS.Signals): Promise<void>;
  /** Starts again, on the same port and data; stops first, if it still runs. */
  restart(): Promise<void>;
}>;

/** Empty: ourselves. */
export type Identity = { uid?: number; gid?: number };

export type Service = Readonly<{
  name: string;
  url(port: number): string;
  directory: string;
  command: string;
  args(port: number): string[];
  identity: Identity;
  environment: NodeJS.ProcessEnv;
  stopSignal: NodeJS.Signals;
  watchdogSignal: 'QUIT' | 'KILL';
  isReady(pid: number, port: number): Promise<boolean>;
  /** In what the server wrote: it could not listen, another port may do. */
  portIsTaken: RegExp;
  /** In what the server wrote: a reason not to start again that goes away by itself. */
  isPassing: RegExp;
}>;

type Run = { pid: number; exited: Promise<void>; hasExited(): boolean };

class StartError extends Error {
  /** What the server wrote in this start. */
  readonly written: string;

  constructor(message: string, written: string) {
    super(
      written.trim() === '' ? message : `${message}\n${written.trim().split('\n').slice(-15).join('\n')}`,
    );
    this.written = written;
  }
}

export async function supervise(service: Service): Promise<PrivateServer> {
  const logFile = join(service.directory, 'server.log');
  let { port, current } = await startOnFreePort();

  async function startOnFreePort(): Promise<{ port: number; current: Run }> {
    for (let attempt = 1; ; attempt++) {
      const candidate = await freePort();
      try {
        return { port: candidate, current: await start(candidate) };
      } catch (error) {
        // Somebody took the port between our look and the server's bind.
        const retry = error instanceof StartError && service.portIsTaken.test(error.written);
        if (!retry || attempt === PORT_ATTEMPTS) throw error;
      }
    }
  }

  async function start(onPort: number): Promise<Run> {
    const writtenBefore = await stat(logFile).then(
      ({ size }) => size,
      () => 0,
    );
    const written = async (): Promise<string> => (await readFile(logFile)).subarray(writtenBefore).toString();
    // To a file: a pipe would block the server whenever we are too busy to read it.
    const log = openSync(logFile, 'a', 0o644);
    const child = spawn(service.command, service.args(onPort), {
      ...service.identity,
      cwd: service.directory,
      env: service.environment,
      // Its own process group: Ctrl-C in a terminal must reach us alone, or nobody is left to drain into.
      detached: true,
      stdio: ['ignore', log, log],
    });
    closeSync(log);
    let gone: string | undefined;
    let release = (): void => {};
    const exited = new Promise<void>((done) => {
      const end = (how: string): void => {
        gone ??= how;
        release();
        done();
      };
      child.once('error', (error) => end(error.message));
      child.once('exit', (code, signal) => end(signal === null ? `exit code ${code}` : `signal ${signal}`));
    });
    const { pid } = child;
    if (pid !== undefined) release = guardProcess(pid, service.watchdogSignal);

    const deadline = Date.now() + READY_DEADLINE_MS;
    while (pid !== undefined && gone === undefined && Date.now() < deadline) {
      if (await service.isReady(pid, onPort)) return { pid, exited, hasExited: () => gone !== undefined };
      await Promise.race([exited, delay(READY_POLL_MS)]);
    }
    if (pid === undefined) await exited;
    const what =
      gone === undefined ? `was not ready within ${READY_DEADLINE_MS} ms` : `did not start: ${gone}`;
    if (gone === undefined) {
      child.kill('SIGKILL');
      await exited;
    }
    throw new StartError(`${service.name} (${service.command}, port ${onPort}) ${what}`, await written());
  }

  async function kill(signal: NodeJS.Signals = 'SIGKILL'): Promise<void> {
    if (current.hasExited()) return;
    const run = current;
    sendToGroup(run, signal);
    // A paused server hears nothing else before it goes on.
    if (signal !== 'SIGKILL') sendToGroup(run, 'SIGCONT');
    if (await exitsInTime(run)) return;
    sendToGroup(run, 'SIGKILL');
    await exitsInTime(run);
    throw new Error(
      `${service.name} (pid ${run.pid}) did not end within ${EXIT_DEADLINE_MS} ms of ${signal}: killed`,
    );
  }

  async function restart(): Promise<void> {
    await kill(service.stopSignal);
    const deadline = Date.now() + EXIT_DEADLINE_MS;
    for (;;) {
      try {
        current = await start(port);
        return;
      } catch (error) {
        const retry = error instanceof StartError && service.isPassing.test(error.written);
        if (!retry || Date.now() > deadline) throw error;
        await delay(READY_POLL_MS * 5);
      }
    }
  }

  return {
    url: service.url(port),
    port,
    get pid() {
      return current.pid;
    },
    logFile,
    stop: () => kill(service.stopSignal),
    kill,
    restart,
  };
}

/** The whole group: a Redis that rewrites its AOF has a child. */
function sendToGroup(run: Run, signal: NodeJS.Signals): void {
  try {
    process.kill(-run.pid, signal);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
  }
}

async function exitsInTime(run: Run): Promise<boolean> {
  const waiting = new AbortController();
  const inTime = await Promise.race([
    run.exited.then(() => true),
    delay(EXIT_DEADLINE_MS, false, { signal: waiting.signal }).catch(() => false),
  ]);
  waiting.abort();
  return inTime;
}

/**
 * A port nobody listens on. Below the range from which the system takes the ports of outgoing connections (from
 * 32768 on Linux, 49152 on macOS): while a server there is down, a client's connection could take its port, even a
 * client that tries to reach it and so connects to itself. Random, so that parallel tests seldom want the same one.
 */
export async function freePort(): Promise<number> {
  for (let attempt = 1; attempt <= PORT_ATTEMPTS; attempt++) {
    const port = randomInt(15_000, 32_000);
    const free = await new Promise<boolean>((answer) => {
      const probe = createServer();
      probe.once('error', () => answer(false));
      probe.listen({ host: '0.0.0.0', port, exclusive: true }, () => probe.close(() => answer(true)));
    });
    if (free) return port;
  }
  throw new Error(`Found no free port in ${PORT_ATTEMPTS} attempts`);
}
