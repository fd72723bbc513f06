/** The image without its base: every RUN and COPY of the Dockerfile, in folders. */
import { execFile } from 'node:child_process';
import { mkdir, readdir, readFile, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { expect, inject, test } from 'vitest';
import { freePort } from '../demo/supervise.ts';
import { startCollector } from '../support/collector.ts';
import { insertEvents, someEvents } from '../support/events.ts';
import { setStage } from '../support/flow.ts';
import { asRelay, OPERATOR_ROLE } from '../support/least-privilege.ts';
import { startProgram } from '../support/program.ts';
import { folderOfFile } from '../support/servers.ts';
import { waitFor } from '../support/wait.ts';

const run = promisify(execFile);
const ROOT = inject('root');

/** Answers the root folder of the image. */
async function build(): Promise<string> {
  const scratch = join(await folderOfFile(), 'image');
  const dockerfile = await readFile(join(ROOT, 'Dockerfile'), 'utf8');
  const context = (await readFile(join(ROOT, '.dockerignore'), 'utf8')).match(/(?<=^!).+/gm) ?? [];
  let root = '';
  for (const line of dockerfile.replace(/\\\n/g, '').split('\n')) {
    const [instruction, ...words] = line.split(/\s+/);
    if (instruction === 'FROM') {
      const [from = '', , name = 'last'] = words;
      root = join(scratch, name);
      await mkdir(join(root, 'usr/local/bin'), { recursive: true });
      await mkdir(join(root, 'app'));
      if (!from.startsWith('node:')) await run('cp', ['-r', `${join(scratch, from)}/.`, root]);
    } else if (instruction === 'COPY') {
      const [, from] = /^--from=(.+)$/.exec(words[0] ?? '') ?? [];
      const sources = words.slice(from === undefined ? 0 : 1, -1);
      if (from === undefined) expect(context).toEqual(expect.arrayContaining(sources));
      const paths = sources.map((it) => (from === undefined ? join(ROOT, it) : join(scratch, from, it)));
      await run('cp', ['-r', ...paths, `${root}/app/${words.at(-1)}`]);
    } else if (instruction === 'RUN') {
      const command = words.join(' ').replace(/(?<= )\/(?=app\/|usr\/)/g, `${root}/`);
      const env = { ...process.env, npm_config_prefer_offline: 'true' };
      await run('sh', ['-c', command], { cwd: join(root, 'app'), env, maxBuffer: 2 ** 24 });
    }
  }
  return root;
}

test('the image has what a pod needs and nothing of the compiler, and its `relay` relays, with dashboard and traces', async () => {
  const image = await build();
  const app = join(image, 'app');
  expect((await readdir(app)).toSorted()).toEqual(['dist', 'drizzle', 'node_modules', 'package.json']);
  const files = await readdir(app, { recursive: true });
  expect(files.filter((it) => /\.(map|[cm]?ts)$|(^|\/)(typescript|tsc)(\/|$)/.test(it))).toEqual([]);

  const deployment = await readFile(join(ROOT, 'docs/deployment.md'), 'utf8');
  const [, megabytes] = /`\/app` takes about (\d+) MB/.exec(deployment) ?? [];
  const { stdout } = await run('du', ['-sk', app]);
  expect(Math.abs(Number.parseInt(stdout, 10) / 1024 - Number(megabytes))).toBeLessThan(10);

  const relay = join(image, 'usr/local/bin/relay');
  const stage = await setStage();
  const collector = await startCollector();
  const env = { ...stage.env, ...collector.env };
  const migration = { ...process.env, ...env, RELAY_DATABASE_URL: stage.databaseUrl };
  await run(relay, ['migrate'], { env: migration });
  const httpPort = String(await freePort());
  const start = () =>
    startProgram(relay, ['start'], {
      ...{ ...env, RELAY_DATABASE_URL: asRelay(stage.databaseUrl, OPERATOR_ROLE), RELAY_BOARD: 'true' },
      ...{ RELAY_HTTP_HOST: '127.0.0.1', RELAY_HTTP_PORT: httpPort },
    });
  const publishes = async (by: ReturnType<typeof start>) => {
    await insertEvents(stage.pool, someEvents(20));
    await stage
      .rested()
      .catch((error) => Promise.reject(new Error(by.lines.slice(-20).join('\n'), { cause: error })));
  };
  const pod = start();
  await publishes(pod);
  const board = await fetch(`http://127.0.0.1:${httpPort}/board`);
  expect({ status: board.status, page: await board.text() }).toMatchObject({
    ...{ status: 200, page: expect.stringContaining('<title>') },
  });
  await waitFor(() => collector.spans.length > 0, { what: 'spans' });
  const status = await run(relay, ['status'], { env: { ...process.env, ...env } });
  expect(status.stdout).toContain('relay-publish');
  await pod.kill('SIGTERM');

  // OpenTelemetry's SDK is optional.
  await rm(join(app, 'node_modules/@opentelemetry/sdk-node'), { recursive: true });
  const without = start();
  await publishes(without);
  expect(without.lines.join('\n')).toMatch(
    /"hint":"install @opentelemetry\/sdk-node.*"msg":"traces cannot be switched on/,
  );
  expect(await without.kill('SIGTERM')).toMatchObject({ code: 0 });
});
