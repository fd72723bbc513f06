/** The package as it is published, in projects of others: with other versions of what both use, and strict compilers. */
import { execFile } from 'node:child_process';
import { mkdir, readFile, symlink, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { expect, inject, test } from 'vitest';
import { folderOfFile } from '../support/servers.ts';

const run = promisify(execFile);
const ROOT = inject('root');

let packed: Promise<string> | undefined;
/** The tarball's path. */
const tarball = (): Promise<string> => {
  packed ??= (async () => {
    const folder = await folderOfFile();
    const options = ['--silent', '--ignore-scripts', '--pack-destination', folder];
    const { stdout } = await run('npm', ['pack', ...options], { cwd: ROOT });
    return join(folder, stdout.trim());
  })();
  return packed;
};

/** The tarball's content beside what the project brings itself; the package's own dependencies are those of this tree. */
async function projectWith(name: string, packages: readonly string[]): Promise<string> {
  const folder = join(await folderOfFile(), name);
  const installed = join(folder, 'node_modules/relay-service');
  await mkdir(folder, { recursive: true });
  await writeFile(join(folder, 'package.json'), JSON.stringify({ name, private: true, type: 'module' }));
  const npm = ['--no-audit', '--no-fund', '--prefer-offline', '--silent'];
  await run('npm', ['install', ...npm, '--prefix', folder, ...packages], { cwd: folder });
  await mkdir(installed, { recursive: true });
  await run('tar', ['-xzf', await tarball(), '-C', installed, '--strip-components=1']);
  await symlink(join(ROOT, 'node_modules'), join(installed, 'node_modules'));
  return folder;
}

const PROGRAM = `
import { drizzle } from 'drizzle-orm/node-postgres';
import { Redis } from 'ioredis';
import { Client, Pool } from 'pg';
import { createBoardQueues, createRelay, loadConfig, type Relay } from 'relay-service';
import { appendEvent } from 'relay-service/producer';

const pool = new Pool();
const redis = new Redis({ lazyConnect: true });
const event = { eventType: 'UserCreated', aggregateId: '0192f0c1-7a3b-7c55-9d2e-2f8f0a6c1e11', payload: { name: 'Ada' } };

export const relay: Relay = createRelay(loadConfig({}), { pool, redis, http: false });
export const migrate = (): Promise<void> => relay.migrate({ notify: true });
export const board = () => createBoardQueues({ redis });
export async function byPg(): Promise<bigint> {
  const client = await pool.connect();
  return (await appendEvent(client, event)).id;
}
export const byDrizzle = (): Promise<string> =>
  drizzle(pool).transaction(async (tx) => (await appendEvent(tx, event)).eventId);
// @ts-expect-error
export const outside = () => appendEvent(pool, event);
export async function byOneClient(): Promise<void> {
  const client = new Client();
  await appendEvent(client, event);
  await appendEvent(drizzle(client), event);
}
`;

const STRICT = {
  ...{ strict: true, skipLibCheck: false, noEmit: true, exactOptionalPropertyTypes: true },
  ...{ target: 'es2023', lib: ['es2023', 'dom'], types: ['node'] },
};
const MODULES = [
  [['esm.mts', 'commonjs.cts'], { module: 'nodenext' }],
  [['bundled.ts'], { module: 'preserve', moduleResolution: 'bundler' }],
] as const;

/** drizzle's own declarations fail in a strict project, whatever else is in it. */
const isOurs = (line: string) => /error TS/.test(line) && !/node_modules\/drizzle-orm\//.test(line);

test.each([
  ['older', ['ioredis@5', 'drizzle-orm@0.44', 'pg@8.16.3', '@types/pg@8.15.6', '@types/node@22']],
  ['newer', ['ioredis@6', 'drizzle-orm@0.45', 'pg@8', '@types/pg@8', '@types/node@24']],
] as const)(
  'a project with %s clients compiles, however strict, and as ES module, CommonJS or bundle',
  async (name, packages) => {
    const folder = await projectWith(name, packages);
    const failures: string[] = [];
    for (const [files, options] of MODULES) {
      for (const file of files) await writeFile(join(folder, file), PROGRAM);
      const project = join(folder, `tsconfig.${options.module}.json`);
      await writeFile(project, JSON.stringify({ compilerOptions: { ...STRICT, ...options }, files }));
      await run(join(ROOT, 'node_modules/.bin/tsc'), ['-p', project]).catch(({ stdout }) =>
        failures.push(...String(stdout).split('\n').filter(isOurs)),
      );
    }
    expect(failures).toEqual([]);
  },
);

test('it is not installed beside a Bull Board that knows no hooks: anybody could empty the queues there', async () => {
  const folder = join(await folderOfFile(), 'board');
  await mkdir(folder);
  const install = async (version: string) => {
    const packages = [await tarball(), `@bull-board/api@${version}`];
    const options = ['--package-lock-only', '--no-save', '--no-audit', '--prefer-offline'];
    await run('npm', ['install', ...options, '--prefix', folder, ...packages], { cwd: folder });
  };
  await expect(install('9.4.0')).rejects.toThrow('ERESOLVE');
  for (const version of ['9.10.1', '9.10.2']) await install(version);
});

test('who only writes events loads nothing else', async () => {
  const producer = await readFile(join(ROOT, 'dist/outbox/producer.js'), 'utf8');
  expect(producer).toContain('appendEvent');
  expect(producer).not.toMatch(/^import |require\(/m);
});
