import { execFileSync } from 'node:child_process';
import { existsSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { insertEvents, someEvents } from '../support/events.ts';
import { type Stage, setStage } from '../support/flow.ts';
import { startPod } from '../support/pods.ts';
import { folderOfFile } from '../support/servers.ts';
import { waitFor } from '../support/wait.ts';

/** Other releases of Node.js, `<version>/node_modules/node/bin/node`; .ci/run installs them. */
const OTHERS = process.env.TEST_NODES;
const NODES = ['this', '20', '22', '24', '26'] as const;

function binaryOf(version: (typeof NODES)[number]): string | undefined {
  if (version === 'this') return process.execPath;
  if (OTHERS === undefined) return undefined;
  const path = join(OTHERS, version, 'node_modules/node/bin/node');
  return existsSync(path) ? path : undefined;
}

/** Lines that a log collector cannot read as one JSON object. */
function isNoJson(line: string): boolean {
  try {
    const value: unknown = JSON.parse(line);
    return typeof value !== 'object' || value === null || !('msg' in value) || !('level' in value);
  } catch {
    return true;
  }
}

for (const version of NODES) {
  test(`a pod on Node.js ${version} writes nothing but JSON: traffic, retries, outages, a stop`, async ({
    skip,
  }) => {
    const node = binaryOf(version);
    if (node === undefined) return skip(`TEST_NODES has no Node.js ${version}; .ci/run installs it there`);
    if (version !== 'this')
      expect(execFileSync(node, ['--version'], { encoding: 'utf8' })).toMatch(`v${version}.`);
    const stage = await setStage({
      env: {
        ...{ RELAY_RETRY_BASE_DELAY: '0.2', RELAY_MAX_RETRY_ATTEMPTS: '2', RELAY_POLL_INTERVAL: '0.2' },
        ...{ RELAY_LOG_LEVEL: 'debug' },
      },
    });
    await stage.redis.set('identity.broken.v1', 'a string');
    const pod = await startPod(stage.env, ['start'], node);
    await pod.waitReady();
    const some = () => [...someEvents(100, 20), ...someEvents(3, 3, { topic: 'identity.broken.v1' })];
    await insertEvents(stage.pool, some());
    await stage.rested();
    const warned = (pattern: RegExp) =>
      waitFor(() => pod.logs().some(({ msg }) => pattern.test(String(msg))), {
        what: `the pod to log ${pattern}`,
      });

    // Redis hangs, then is away, then is there again; sessions of PostgreSQL end.
    await insertEvents(stage.pool, some());
    await stage.server.kill('SIGKILL');
    await warned(/a worker met an error|Redis/i);
    await stage.server.restart();
    await stage.pool.query(
      'SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()',
    );
    await insertEvents(stage.pool, some());
    await stage.rested();
    await fetch(`${pod.url}/metrics`);
    await fetch(`${pod.url}/nothing/here`);
    const { code } = await pod.kill('SIGTERM');
    expect(code).toBe(0);
    expect(pod.lines.length).toBeGreaterThan(100);
    expect(pod.lines.filter(isNoJson)).toEqual([]);
  });
}

/** Preloaded into a pod: what the libraries of another day may do. */
const PRELOADED = `
  process.on('SIGUSR2', () => {
    console.log('%s printed', 'somebody');
    console.error(Object.assign(new Error('printed'), { command: { args: ['hunter2'] } }));
    process.emitWarning('use another', 'DeprecationWarning');
    process.emitWarning('beware of redis://user:hunter2@cache');
    setTimeout(() => Promise.reject(new Error('nobody caught redis://user:hunter2@cache')), 200);
  });`;

test('what libraries print, warnings and the error that ends a pod are lines of its log, and hold no secret', async () => {
  const stage = await setStage();
  const preloaded = join(await folderOfFile(), 'preloaded.mjs');
  writeFileSync(preloaded, PRELOADED);
  const pod = await stage.pod({ NODE_OPTIONS: `--import=${preloaded}` });
  process.kill(pod.pid, 'SIGUSR2');
  expect((await pod.exited).code).toBe(1);
  expect(pod.lines.filter(isNoJson)).toEqual([]);
  expect(pod.lines.join()).not.toContain('hunter2');
  const last = pod.logs().slice(-5);
  expect(last.map(({ level, msg }) => [level, msg])).toEqual([
    ['info', 'a library printed this'],
    ['error', 'a library printed this'],
    ['warn', 'warning of Node.js'],
    ['warn', 'warning of Node.js'],
    ['fatal', 'the pod ends: nobody caught this error'],
  ]);
  expect(last[0]).toMatchObject({ text: 'somebody printed' });
  expect(last[2]).toMatchObject({ err: { type: 'DeprecationWarning', message: 'use another' } });
  expect(last[4]).toMatchObject({ err: { message: expect.stringContaining('nobody caught') } });
});

test.each<[what: string, code: number, env: (stage: Stage) => Record<string, string>]>([
  ['PostgreSQL is away', 69, () => ({ RELAY_DATABASE_URL: 'postgresql://127.0.0.1:1/x' })],
  ['the port is taken', 69, ({ env }) => ({ RELAY_HTTP_PORT: new URL(env.RELAY_REDIS_URL).port })],
  [
    'Redis refuses the password',
    78,
    ({ env }) => ({ RELAY_REDIS_URL: Object.assign(new URL(env.RELAY_REDIS_URL), { password: 'x' }).href }),
  ],
])(
  'a pod that cannot start says why in the last line of its log, without a stack: %s',
  async (_, code, env) => {
    const stage = await setStage({ env: { RELAY_STARTUP_TIMEOUT: '1' } });
    const pod = await stage.spawn(['start'], env(stage));
    expect((await pod.exited).code).toBe(code);
    expect(pod.lines.filter(isNoJson)).toEqual([]);
    const last = pod.logs().at(-1);
    expect(last).toMatchObject({ level: 'fatal', msg: 'the relay cannot start' });
    expect(last?.err).toMatchObject({ type: expect.stringMatching(/^(NotReady|Requirement)Error$/) });
    expect(last?.err).not.toHaveProperty('stack');
    // Nothing stopped that had not started.
    expect(pod.logs().map(({ msg }) => msg)).not.toContain('stopped');
  },
);
