import { spawn } from 'node:child_process';
import { createInterface } from 'node:readline';
import { setTimeout as delay } from 'node:timers/promises';
import { freePort } from './supervise.ts';
import { guardProcess } from './watchdog.ts';

/** Above the start-up timeout of a pod (30 s): then it says itself what it waits for. */
const READY_DEADLINE_MS = 60_000;
const READY_POLL_MS = 50;
/** Above the time that a pod gives its checks (3 s): then it says what does not answer. */
const PROBE_TIMEOUT_MS = 5_000;
/** Of the lines a pod writes, the latest are kept. */
const LINES_KEPT = 20_000;

export type Pod = Readonly<{
  pid: number;
  /** Its HTTP server, e.g. `http://127.0.0.1:15000`. */
  url: string;
  /** What it wrote to stdout and stderr, the latest lines. */
  lines: readonly string[];
  /** Those lines that are JSON, parsed. */
  logs(): Record<string, unknown>[];
  /** Resolves when /readyz answers 200; throws, with its last lines, if it ends before that or takes too long. */
  waitReady(timeoutMs?: number): Promise<void>;
  /** Sends a signal (default SIGTERM) and resolves when the process is gone. */
  kill(signal?: NodeJS.Signals): Promise<{ code: number | null; signal: NodeJS.Signals | null }>;
  exited: Promise<{ code: number | null; signal: NodeJS.Signals | null }>;
}>;

export type PodOptions = {
  /** Path of the compiled cli.js. */
  cli: string;
  /** RELAY_* variables; none is taken over from our own environment. */
  env: Readonly<Record<string, string>>;
  args?: readonly string[];
  /** Path of the Node.js that runs it. Default: ours. */
  node?: string;
};

/** As `npm start` and the image start it. */
const NODE_ARGS = ['--max-semi-space-size=16'];

/** A relay in a process of its own: `node cli.js start`, on a free HTTP port. It ends with us at the latest. */
export async function startPod({
  cli,
  env,
  args = ['start'],
  node = process.execPath,
}: PodOptions): Promise<Pod> {
  const httpPort = env.RELAY_HTTP_PORT ?? String(await freePort());
  const child = spawn(node, [...NODE_ARGS, cli, ...args], {
    env: { ...cleanEnvironment(), RELAY_HTTP_HOST: '127.0.0.1', RELAY_HTTP_PORT: httpPort, ...env },
    // Its own process group: Ctrl-C in a terminal reaches us alone, and we stop the pods in our order.
    detached: true,
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  const release = child.pid === undefined ? () => {} : guardProcess(child.pid, 'KILL');
  const lines: string[] = [];
  for (const output of [child.stdout, child.stderr]) {
    createInterface({ input: output }).on('line', (line) => {
      lines.push(line);
      if (lines.length > LINES_KEPT) lines.splice(0, LINES_KEPT / 10);
    });
  }
  let ended: { code: number | null; signal: NodeJS.Signals | null } | undefined;
  const exited = new Promise<{ code: number | null; signal: NodeJS.Signals | null }>((done, fail) => {
    child.once('error', fail);
    // `close` comes after the last line was read, `exit` may not.
    child.once('close', (code, signal) => {
      release();
      ended = { code, signal };
      done(ended);
    });
  });
  // Somebody may never ask; whoever does still gets the error.
  exited.catch(() => {});
  const { pid } = child;
  if (pid === undefined) await exited;
  const url = `http://127.0.0.1:${httpPort}`;

  return {
    pid: pid ?? -1,
    url,
    lines,
    logs: () => lines.flatMap(parseJson),
    exited,
    async waitReady(timeoutMs = READY_DEADLINE_MS) {
      const startedAt = Date.now();
      const answers: string[] = [];
      let last = '';
      while (ended === undefined && Date.now() < startedAt + timeoutMs) {
        const { isReady, answer } = await probe(`${url}/readyz`);
        if (isReady) return;
        if (answer !== last) answers.push(`after ${Date.now() - startedAt} ms: ${answer}`);
        last = answer;
        await Promise.race([exited, delay(READY_POLL_MS)]);
      }
      const what = ended
        ? `ended before it was ready (${ended.signal ?? `exit code ${ended.code}`})`
        : `was not ready within ${timeoutMs} ms (/readyz ${answers.slice(-5).join('; ')})`;
      throw new Error(`The pod ${what}. Its last lines:\n${lines.slice(-15).join('\n')}`);
    },
    async kill(signal = 'SIGTERM') {
      if (ended === undefined) child.kill(signal);
      return exited;
    },
  };
}

/** Ours, without anything that configures a relay, a PostgreSQL client or a test runner. */
export function cleanEnvironment(): Record<string, string> {
  const foreign = /^(RELAY_|OTEL_|PG|VITEST|NODE_OPTIONS$|NODE_ENV$|DATABASE_URL$|REDIS_URL$)/;
  return Object.fromEntries(
    Object.entries(process.env).filter((entry): entry is [string, string] => {
      return entry[1] !== undefined && !foreign.test(entry[0]);
    }),
  );
}

async function probe(url: string): Promise<{ isReady: boolean; answer: string }> {
  try {
    const response = await fetch(url, { signal: AbortSignal.timeout(PROBE_TIMEOUT_MS) });
    const text = await response.text();
    return { isReady: response.status === 200, answer: `${response.status} ${text}` };
  } catch (error) {
    return {
      isReady: false,
      answer: error instanceof Error ? String(error.cause ?? error.message) : String(error),
    };
  }
}

function parseJson(line: string): Record<string, unknown>[] {
  try {
    const value: unknown = JSON.parse(line);
    return typeof value === 'object' && value !== null ? [value as Record<string, unknown>] : [];
  } catch {
    return [];
  }
}
