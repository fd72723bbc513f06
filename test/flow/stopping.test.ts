import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { describe, expect, inject, onTestFinished, test } from 'vitest';
import { cleanEnvironment } from '../demo/pod.ts';
import { modulesIn } from '../support/bundle.ts';
import { insertEvents, someEvents } from '../support/events.ts';
import { STREAM, setStage } from '../support/flow.ts';
import { startLoad } from '../support/load.ts';
import { catchMidAppend } from '../support/mid-append.ts';
import { folderOfFile } from '../support/servers.ts';
import { waitFor } from '../support/wait.ts';

const status = async (url: string): Promise<number | string> =>
  fetch(url, { signal: AbortSignal.timeout(2_000) }).then(
    (response) => response.status,
    () => 'no answer',
  );

test('on SIGTERM readiness turns 503 first, what is in progress is finished and marked, and the exit code is 0', async () => {
  const stage = await setStage();
  const { pod, release } = await catchMidAppend(stage);
  expect(await status(`${pod.url}/readyz`)).toBe(200);
  const exited = pod.kill('SIGTERM');
  await waitFor(async () => (await status(`${pod.url}/readyz`)) === 503, { what: 'readiness to turn 503' });
  expect(await status(`${pod.url}/livez`)).toBe(200);
  await release();
  expect(await exited).toEqual({ code: 0, signal: null });
  // Nothing is left for others to find out: no job looks as if somebody worked on it, every entry's row is marked.
  expect(await stage.queue('publish').getActiveCount()).toBe(0);
  const entries = await stage.entries();
  expect(entries).toHaveLength(60);
  for (const { fields, entryId } of entries) {
    expect(await stage.row(fields.event_id ?? '')).toMatchObject({
      published: true,
      stream_entry_id: entryId,
    });
  }
  await stage.pod();
  await stage.rested();
  await stage.expectPromisesHeld();
});

test('SIGTERM under load exits 0 within RELAY_SHUTDOWN_TIMEOUT, and the other pod carries on', async () => {
  const stage = await setStage({ env: { RELAY_SHUTDOWN_TIMEOUT: '10' } });
  const [first] = await Promise.all([stage.pod(), stage.pod()]);
  await insertEvents(stage.pool, someEvents(1_000, 50));
  const load = startLoad(stage.pool);
  await waitFor(async () => (await stage.redis.xlen(STREAM)) > 300, { what: 'the load to flow' });
  const signalledAt = Date.now();
  expect(await first.kill('SIGTERM')).toEqual({ code: 0, signal: null });
  expect(Date.now() - signalledAt).toBeLessThan(10_000);
  const sofar = await stage.redis.xlen(STREAM);
  await waitFor(async () => (await stage.redis.xlen(STREAM)) > sofar + 200, {
    what: 'the other pod to go on',
  });
  await load.stop();
  await stage.rested();
  await stage.expectPromisesHeld();
});

test('SIGTERM exits 0 within RELAY_SHUTDOWN_TIMEOUT although what is in progress cannot be finished', async () => {
  const stage = await setStage({ env: { RELAY_SHUTDOWN_TIMEOUT: '2', RELAY_CLAIM_LEASE: '5' } });
  const { pod, release } = await catchMidAppend(stage);
  const signalledAt = Date.now();
  expect(await pod.kill('SIGTERM')).toEqual({ code: 0, signal: null });
  expect(Date.now() - signalledAt).toBeLessThan(2_000 + 5_000);
  await release();
  await stage.pod();
  await stage.rested();
  await stage.expectPromisesHeld();
});

test('a second SIGTERM exits at once, and nothing is lost or doubled by it', async () => {
  const stage = await setStage({ env: { RELAY_SHUTDOWN_TIMEOUT: '60', RELAY_CLAIM_LEASE: '5' } });
  const { pod, release } = await catchMidAppend(stage);
  const exited = pod.kill('SIGTERM');
  await waitFor(async () => (await status(`${pod.url}/readyz`)) === 503, { what: 'readiness to turn 503' });
  const signalledAt = Date.now();
  let hasEnded = false;
  void exited.then(() => {
    hasEnded = true;
  });
  // Within a second it is the first one again.
  const again = async () => {
    if (!hasEnded) process.kill(pod.pid, 'SIGTERM');
    return hasEnded;
  };
  await waitFor(again, { what: 'the pod to end' });
  expect((await exited).code).toBe(1);
  expect(Date.now() - signalledAt).toBeLessThan(20_000);
  await release();
  await stage.pod();
  await stage.rested();
  await stage.expectPromisesHeld();
});

test('one Ctrl-C that arrives twice, from the terminal and from npm, ends the pod in order', async () => {
  const stage = await setStage();
  const { pod, release } = await catchMidAppend(stage);
  const exited = pod.kill('SIGINT');
  process.kill(pod.pid, 'SIGTERM');
  await waitFor(async () => (await status(`${pod.url}/readyz`)) === 503, { what: 'readiness to turn 503' });
  await release();
  expect(await exited).toEqual({ code: 0, signal: null });
});

test('SIGTERM ends a pod that is still waiting for its servers', async () => {
  const stage = await setStage();
  await stage.server.kill();
  const pod = await stage.spawn(['start']);
  await waitFor(() => pod.logs().some((line) => line.level === 'warn'), {
    what: 'the pod to miss its Redis',
  });
  expect(await pod.kill('SIGTERM')).toEqual({ code: 0, signal: null });
});

describe('while it starts, a pod ends at once when it is told to', () => {
  const unreachable = { RELAY_DATABASE_URL: 'postgres://relay@127.0.0.1:1/none' };

  test('since it listens before it loads anything', async () => {
    const folder = await folderOfFile();
    const [preloaded, hooks] = [join(folder, 'preloaded.mjs'), join(folder, 'hooks.mjs')];
    await writeFile(hooks, TELLS_WHAT_IS_LOADED);
    await writeFile(preloaded, `import { register } from 'node:module'; register('file://${hooks}');`);
    const pod = await startListening({ ...unreachable }, [], [preloaded]);
    process.kill(pod.pid, 'SIGTERM');
    expect(await pod.exited, pod.output()).toEqual([0, null]);
    const [before = ''] = pod.output().split(LISTENS);
    const files = [...before.matchAll(/^loads (file:.*)$/gm)].map(([, url = '']) => fileURLToPath(url));
    const loaded = (await Promise.all(files.map(modulesIn))).flat();
    expect(loaded).toEqual(['src/cli.ts', 'src/commands/signals.ts']);
  });

  test.each([
    ['SIGTERM', 'as any process', []],
    ['SIGINT', 'as any process', []],
    ['SIGTERM', 'as process 1 of its container', ['unshare', '--map-root-user', '--pid', '--fork']],
    ['SIGINT', 'as process 1 of its container', ['unshare', '--map-root-user', '--pid', '--fork']],
  ] as const)('%s %s', async (signal, _, container) => {
    const { env } = await setStage({ env: { RELAY_STARTUP_TIMEOUT: '120' } });
    // From the first moment at which a process can hear of a signal, to waiting for a server that is not there.
    for (const afterMs of [5, 50, 100, 200, 400, 800, 2_000]) {
      const { pid, exited, output } = await startListening({ ...env, ...unreachable }, container);
      await delay(afterMs);
      const signalledAt = performance.now();
      process.kill(pid, signal);
      expect(await exited, `${signal} after ${afterMs} ms\n${output()}`).toEqual([0, null]);
      expect(performance.now() - signalledAt).toBeLessThan(15_000);
    }
  });
});

/** Starts a pod that waits for a database, and resolves as soon as it listens to signals. */
async function startListening(
  env: Readonly<Record<string, string>>,
  container: readonly string[],
  preloaded: readonly string[] = [],
) {
  const [command = '', ...args] = [
    ...container,
    process.execPath,
    join(inject('root'), 'dist/cli.js'),
    'start',
  ];
  const imports = [...preloaded, SAYS_SO].map((it) => `--import=${it}`);
  const child = spawn(command, args, {
    env: { ...cleanEnvironment(), ...env, NODE_OPTIONS: imports.join(' ') },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  onTestFinished(() => void child.kill('SIGKILL'));
  let output = '';
  for (const stream of [child.stdout, child.stderr])
    stream.on('data', (chunk) => {
      output += chunk;
    });
  const exited = once(child, 'exit');
  const outer = child.pid as number;
  await waitFor(() => output.includes(LISTENS), { what: 'the process to listen' });
  const inner = await readFile(`/proc/${outer}/task/${outer}/children`, 'utf8');
  return { pid: container.length === 0 ? outer : Number(inner.trim()), exited, output: () => output };
}

const LISTENS = 'listens to SIGTERM';
/** Preloaded: says so. */
const SAYS_SO = `data:text/javascript,process.on('newListener',(it)=>it==='SIGTERM'%26%26process.stderr.write('${encodeURIComponent(LISTENS)}'))`;
/** Hooks of Node.js: each module, before it runs. */
const TELLS_WHAT_IS_LOADED = `
  import { writeSync } from 'node:fs';
  export function load(url, context, next) {
    writeSync(2, 'loads ' + url + '\\n');
    return next(url, context);
  }`;
