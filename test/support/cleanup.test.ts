/** A worker of the quick part runs one file after the other: what one has started is gone when the next begins. */
import { execFile } from 'node:child_process';
import { mkdir, readFile, symlink, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, inject, test } from 'vitest';
import { cleanEnvironment } from '../demo/pod.ts';
import { folderOfFile } from './servers.ts';
import { waitFor } from './wait.ts';

/** The files of a suite: how each of them leaves what it has started. */
const FILES: Readonly<Record<string, string>> = {
  // What was registered before is cleaned up all the same.
  'clean-up-fails': `await createPostgres().then(started);
    vi.useFakeTimers({ now: 0, toFake: ['Date'] });
    atEndOfFile(() => Promise.reject(new Error('the door is jammed')));
    test('runs', () => {});`,
  'clean-up-fails-too': `atEndOfFile(() => Promise.reject(new Error('the door is jammed again')));
    test('runs', () => {});`,
  // In these no hook runs after the one that fails, if any.
  skipped: `test.skip('is skipped', () => {});`,
  broken: `throw new Error('it cannot be loaded');`,
  'hook-fails': `afterAll(() => { throw new Error('the hook is bent'); });
    test('runs', () => {});`,
};

type Begun = Readonly<{ worker: number; alive: number; now: number }>;

test('a test file finds nothing running of those before it in the same worker, however these ended', async () => {
  const root = inject('root');
  const directory = join(await folderOfFile(), 'suite');
  const begun = join(directory, 'begun');
  const pids = join(directory, 'pids');
  await mkdir(join(directory, 'test'), { recursive: true });
  await symlink(join(root, 'node_modules'), join(directory, 'node_modules'));
  for (const path of [begun, pids]) await writeFile(path, '');
  for (const [name, code] of Object.entries(FILES))
    await writeFile(
      join(directory, `test/${name}.test.ts`),
      `import { appendFileSync, readFileSync } from 'node:fs';
      import { afterAll, test, vi } from 'vitest';
      import { atEndOfFile } from '${root}/test/support/cleanup.ts';
      import { createPostgres, createRedis } from '${root}/test/support/servers.ts';
      const isAlive = (pid) => { try { return process.kill(Number(pid), 0); } catch { return false; } };
      const started = ({ pid }) => appendFileSync('${pids}', pid + ' ');
      const alive = readFileSync('${pids}', 'utf8').trim().split(' ').filter((pid) => pid && isAlive(pid)).length;
      appendFileSync('${begun}', JSON.stringify({ worker: process.pid, alive, now: Date.now() }) + '\\n');
      await createRedis().then(started);
      ${code}`,
    );

  const vitest = join(root, 'node_modules/vitest/vitest.mjs');
  const options = ['--config', 'test/vitest.config.ts', '--mode', 'quick', '--dir', directory];
  const said = await new Promise<string>((resolve) => {
    execFile(
      process.execPath,
      [vitest, 'run', ...options, '--maxWorkers', '1'],
      { cwd: root, env: { ...cleanEnvironment(), NO_COLOR: '1' } },
      (_failed, stdout, stderr) => resolve(stdout + stderr),
    );
  });
  const files = (await readFile(begun, 'utf8'))
    .trim()
    .split('\n')
    .map((line): Begun => JSON.parse(line));
  expect(files, said).toHaveLength(Object.keys(FILES).length);
  expect(new Set(files.map(({ worker }) => worker)).size).toBe(1);
  expect(files.map(({ alive }) => alive)).toEqual(files.map(() => 0));
  expect(Math.min(...files.map(({ now }) => now))).toBeGreaterThan(1e12);
  for (const told of [
    'the door is jammed',
    'the door is jammed again',
    'it cannot be loaded',
    'the hook is bent',
  ])
    expect(said).toContain(told);

  const servers = (await readFile(pids, 'utf8')).trim().split(' ').map(Number);
  expect(servers.length).toBe(files.length + 1);
  await waitFor(() => servers.every((pid) => !isRunning(pid)), {
    what: 'the servers of the last file to end',
  });
});

function isRunning(pid: number): boolean {
  try {
    return process.kill(pid, 0);
  } catch {
    return false;
  }
}
