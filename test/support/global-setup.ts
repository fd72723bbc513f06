/**
 * Once for a whole run: a fresh build (tests start pods from dist), one PostgreSQL server, and in it the template
 * database that every test file copies.
 */
import { execFile } from 'node:child_process';
import { readdir, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { Client } from 'pg';
import type { TestProject } from 'vitest/node';
import { cleanEnvironment } from '../demo/pod.ts';
import { startPrivatePostgres } from '../demo/servers.ts';
import { temporaryFolder } from '../demo/watchdog.ts';
import { databaseUrl, TEMPLATE } from './database-url.ts';
import { grantLeast } from './least-privilege.ts';

declare module 'vitest' {
  interface ProvidedContext {
    /** Superuser URL of the run's PostgreSQL, database `postgres`. */
    adminUrl: string;
    /** The project's root folder. */
    root: string;
  }
}

const run = promisify(execFile);
const BUILD_DEADLINE_MS = 120_000;
const MIGRATE_DEADLINE_MS = 60_000;

export default async function setup(project: TestProject): Promise<() => Promise<void>> {
  const root = project.config.root;
  await buildWhenStale(root);
  const folder = await temporaryFolder('relay-test-');
  const postgres = await startPrivatePostgres({ directory: join(folder.path, 'postgres') });
  const teardown = async (): Promise<void> => {
    await postgres.stop();
    await folder.remove();
  };
  try {
    await makeTemplate(root, postgres.url);
  } catch (error) {
    await teardown();
    throw error;
  }
  project.provide('adminUrl', postgres.url);
  project.provide('root', root);
  return teardown;
}

async function makeTemplate(root: string, adminUrl: string): Promise<void> {
  const admin = new Client({ connectionString: adminUrl });
  await admin.connect();
  try {
    await admin.query(`CREATE DATABASE ${TEMPLATE}`);
  } finally {
    await admin.end();
  }
  const cli = join(root, 'dist/cli.js');
  try {
    await run(process.execPath, [cli, 'migrate'], {
      env: { ...cleanEnvironment(), RELAY_DATABASE_URL: databaseUrl(adminUrl, TEMPLATE) },
      timeout: MIGRATE_DEADLINE_MS,
    });
  } catch (error) {
    const { stdout, message } = error as Error & { stdout?: string };
    throw new Error(`The template database could not be migrated: ${message}\n${stdout ?? ''}`, {
      cause: error,
    });
  }
  // Copied with the database.
  await grantLeast(databaseUrl(adminUrl, TEMPLATE));
}

async function buildWhenStale(root: string): Promise<void> {
  const built = await stat(join(root, 'dist/cli.js')).then(
    ({ mtimeMs }) => mtimeMs,
    () => 0,
  );
  const settings = ['tsconfig.json', '.bundle.mjs'].map(async (it) => (await stat(join(root, it))).mtimeMs);
  const newest = Math.max(await newestFile(join(root, 'src')), ...(await Promise.all(settings)));
  if (built > newest) return;
  const options = { cwd: root, timeout: BUILD_DEADLINE_MS };
  // What `npm run build` does.
  const [tsc, bundle] = ['node_modules/typescript/bin/tsc', '.bundle.mjs'];
  try {
    await run(process.execPath, [tsc, '-p', 'tsconfig.json'], options);
  } catch (error) {
    // It emits all the same, and `npm run check` fails on types by itself: tests say more than "does not compile".
    const { stdout, message } = error as Error & { stdout?: string };
    console.error(`tsc reports problems; the tests run on what it made of them:\n${stdout ?? message}`);
  }
  await run(process.execPath, [bundle], options);
}

async function newestFile(folder: string): Promise<number> {
  const entries = await readdir(folder, { recursive: true, withFileTypes: true });
  const times = entries.map(async (entry) => (await stat(join(entry.parentPath, entry.name))).mtimeMs);
  return Math.max(0, ...(await Promise.all(times)));
}
