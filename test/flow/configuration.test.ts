import { execFile } from 'node:child_process';
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { expect, inject, test } from 'vitest';
import { modulesIn } from '../support/bundle.ts';
import { startPod } from '../support/pods.ts';

const WRONG: Record<string, string> = {
  RELAY_DATABASE_URL: 'mysql://admin:hunter2@db/prod',
  RELAY_REDIS_URL: 'redis://admin:hunter2@cache:99999/0',
  RELAY_BATCH_SIZE: 'many',
  RELAY_POLL_INTERVAL: '-5',
  RELAY_STREAM_MAXLEN: '1e5',
  RELAY_ORDERING: 'random',
  RELAY_NOTIFY: 'maybe',
  RELAY_LOG_LEVEL: 'loud',
  RELAY_HTTP_PORT: '70000',
  RELAY_QUEUE_NAME: 'a:b',
  RELAY_CLAIM_LEASE: '',
};

for (const command of ['start', 'migrate', 'check']) {
  test(`relay ${command} with a wrong configuration names every wrong variable, and nothing secret, and exits 78`, async () => {
    const pod = await startPod(WRONG, [command]);
    expect((await pod.exited).code).toBe(78);
    const text = pod.lines.join('\n');
    for (const name of Object.keys(WRONG)) expect(text).toMatch(new RegExp(`^\\s*${name}: .+`, 'm'));
    expect(text).not.toMatch(/hunter2|admin/);
    expect(text).not.toMatch(/^\s+at /m);
    expect(text).not.toContain('node_modules');
    // One heading, one line for each.
    expect(pod.lines).toHaveLength(1 + Object.keys(WRONG).length);
  });
}

test.each(['start', 'check'])('relay %s names a misspelled variable besides a wrong one', async (command) => {
  const pod = await startPod({ RELAY_LOG_LEVEL: 'loud', RELAY_BATCH_SIZ: '10' }, [command]);
  expect((await pod.exited).code).toBe(78);
  expect(pod.lines).toEqual([
    'relay: the configuration is wrong:',
    expect.stringMatching(/^ {2}RELAY_LOG_LEVEL: /),
    '  RELAY_BATCH_SIZ: is no variable of the relay and has no effect: is RELAY_BATCH_SIZE meant?',
  ]);
});

test('good values that contradict each other are named too', async () => {
  const pod = await startPod(
    { RELAY_CLAIM_LEASE: '5', RELAY_PUBLISH_TIMEOUT: '5', RELAY_BATCH_SIZE: '50', RELAY_MAX_IN_FLIGHT: '10' },
    ['start'],
  );
  expect((await pod.exited).code).toBe(78);
  const text = pod.lines.join('\n');
  expect(text).toMatch(/RELAY_PUBLISH_TIMEOUT: .*RELAY_CLAIM_LEASE/);
  expect(text).toMatch(/RELAY_BATCH_SIZE: .*RELAY_MAX_IN_FLIGHT/);
});

test('help is there for the program and for each command, and tells every variable to whoever starts it', async () => {
  for (const args of [['--help'], ['start', '--help'], ['migrate', '--help'], ['check', '--help']]) {
    const pod = await startPod({}, args);
    expect((await pod.exited).code).toBe(0);
    expect(pod.lines[0]).toMatch(/^Usage: relay/);
    if (args[0] === 'start') expect(pod.lines.join('\n')).toContain('RELAY_MAX_IN_FLIGHT');
  }
});

test('an unknown command or option is refused with a non-zero exit code', async () => {
  for (const args of [['stat'], ['start', '--fast']]) {
    const pod = await startPod({}, args);
    expect((await pod.exited).code, args.join(' ')).not.toBe(0);
    expect(pod.lines.join('\n')).toMatch(/unknown (command|option)/);
  }
});

/** Reports what is loaded on stderr. */
const REPORTER = dataUrl(`
  import { register } from 'node:module';
  register(${JSON.stringify(
    dataUrl(`
      export async function load(url, context, next) {
        process._rawDebug(url);
        return next(url, context);
      }`),
  )});`);

function dataUrl(code: string): string {
  return `data:text/javascript,${encodeURIComponent(code)}`;
}

test('a pod loads neither drizzle nor what other commands need: it would keep that in memory for as long as it lives', async () => {
  const cli = fileURLToPath(new URL('../../dist/cli.js', import.meta.url));
  const loads = async (command: string) => {
    const args = ['--import', REPORTER, cli, command, '--help'];
    const { stderr } = await promisify(execFile)(process.execPath, args, { maxBuffer: 2 ** 24 });
    const urls = stderr.split('\n').filter((line) => line.startsWith('file:'));
    const modules = await Promise.all(urls.map((url) => modulesIn(fileURLToPath(url))));
    return [...urls, ...modules.flat()];
  };
  const ofPod = await loads('start');
  expect(ofPod).toContain('bullmq');
  const dispensable =
    /^(drizzle-orm|cli-progress|cli-table3|ajv|light-my-request)$|node_modules\/(@bull-board|@fastify|@opentelemetry)\//;
  expect(ofPod.filter((it) => dispensable.test(it))).toEqual([]);
  expect((await loads('prune')).filter((it) => dispensable.test(it))).not.toHaveLength(0);
});

test('the HTTP server of a pod loads no compilers of schemas, neither when it starts nor when it answers', async () => {
  // In a process of its own: the dashboard of another test may have loaded them here.
  const code = `
    import { createRequire } from 'node:module';
    import { createWebServer } from ${JSON.stringify(new URL('../../dist/http/server.js', import.meta.url).href)};
    const health = { ready: async () => ({}), detailed: async () => ({}) };
    const about = { host: '127.0.0.1', port: 0, version: '1.2.3', stuck: () => [], phase: () => 'running' };
    const server = createWebServer({ ...about, health });
    await server.start();
    const paths = ['livez', 'readyz', 'health', 'health/detailed', 'board', 'nothing'];
    const ask = async (path) => (await fetch('http://127.0.0.1:' + server.port() + '/' + path)).status;
    const statuses = await Promise.all(paths.map(ask));
    await server.stop();
    console.log(JSON.stringify({ statuses, loaded: Object.keys(createRequire(import.meta.url).cache) }));`;
  const args = ['--input-type=module', '--eval', code];
  const { stdout } = await promisify(execFile)(process.execPath, args, { cwd: inject('root') });
  const { statuses, loaded } = JSON.parse(stdout);
  expect(statuses).toEqual([200, 200, 200, 200, 404, 404]);
  expect(loaded).toContainEqual(expect.stringContaining('/node_modules/fastify/'));
  expect(
    loaded.filter((it: string) => /node_modules\/(ajv|@fastify\/[^/]+-compiler|light-my-request)\//.test(it)),
  ).toEqual([]);
});

test('the image and `npm start` bound the young generation of V8, which takes 128 MiB on Node.js 24', async () => {
  const read = (file: string) => readFile(join(inject('root'), file), 'utf8');
  const bound = /^(?:ENV .*NODE_OPTIONS=| {4}"start": "exec node )--max-semi-space-size=16(?: |$)/m;
  for (const file of ['Dockerfile', 'package.json']) expect(await read(file), file).toMatch(bound);
  // What is measured is a pod as they start it.
  expect(await read('test/demo/pod.ts')).toContain("const NODE_ARGS = ['--max-semi-space-size=16'];");
});
