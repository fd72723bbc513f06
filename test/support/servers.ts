import { randomBytes } from 'node:crypto';
import { join } from 'node:path';
import { Client } from 'pg';
import { inject } from 'vitest';
import {
  type PrivatePostgres,
  type PrivateRedis,
  type PrivateRedisOptions,
  startPrivatePostgres,
  startPrivateRedis,
} from '../demo/servers.ts';
import { type TemporaryFolder, temporaryFolder } from '../demo/watchdog.ts';
import { atEndOfFile } from './cleanup.ts';
import { databaseUrl, TEMPLATE } from './database-url.ts';
import { asRelay, grantLeast, redisArgs } from './least-privilege.ts';
import { startPod } from './pods.ts';

/** Any number: PostgreSQL refuses to copy a template that another session copies or connects to. */
const COPY_LOCK = 20_771_001;

/** Code under test is given `url`, which has the relay's rights; what only prepares, breaks or looks takes the other. */
export type TwoUrls = { url: string; adminUrl: string };

export type TestDatabase = TwoUrls & { name: string; drop(): Promise<void> };
export type TestRedis = PrivateRedis & TwoUrls;

/**
 * A database of the run's server: a copy of the migrated template, or an empty one, as it is in an encoding or with an ICU
 * locale of its own. Dropped after the test file.
 */
export async function createDatabase({
  encoding,
  locale,
  template = encoding === undefined && locale === undefined,
}: {
  template?: boolean;
  encoding?: string;
  locale?: string;
} = {}): Promise<TestDatabase> {
  const name = `test_${randomBytes(8).toString('hex')}`;
  await asAdmin(async (admin) => {
    await admin.query('SELECT pg_advisory_lock($1)', [COPY_LOCK]);
    await admin.query(
      `CREATE DATABASE ${name} TEMPLATE ${template ? TEMPLATE : 'template0'} ${encoding ? `ENCODING '${encoding}'` : ''}
       ${locale ? `LOCALE_PROVIDER icu ICU_LOCALE '${locale}'` : ''}`,
    );
  });
  const drop = (): Promise<void> =>
    asAdmin(async (admin) => {
      await admin.query(`DROP DATABASE IF EXISTS ${name} WITH (FORCE)`);
    });
  atEndOfFile(drop);
  return { ...asBoth(databaseUrl(inject('adminUrl'), name)), name, drop };
}

const asBoth = (adminUrl: string): TwoUrls => ({ url: asRelay(adminUrl), adminUrl });

async function asAdmin(work: (admin: Client) => Promise<void>): Promise<void> {
  const admin = new Client({ connectionString: inject('adminUrl') });
  await admin.connect();
  try {
    await work(admin);
  } finally {
    // Ends the session, and with it the lock.
    await admin.end();
  }
}

/** A Redis of this test file's own, stopped after it. It knows the relay's user, configured by `env`. */
export async function createRedis({
  env,
  on,
  ...options
}: Omit<PrivateRedisOptions, 'directory'> & {
  env?: Readonly<Record<string, string>>;
  /** What it is for, where `env` says that there are two. */
  on?: 'queues' | 'streams';
} = {}): Promise<TestRedis> {
  const directory = join(await folderOfFile(), `redis-${randomBytes(4).toString('hex')}`);
  const redis = await startPrivateRedis({
    ...{ directory, ...options },
    args: [...redisArgs(env, on), ...(options.args ?? [])],
  });
  // Nobody needs what it holds, so it need not write it down first.
  atEndOfFile(() => redis.kill('SIGKILL'));
  return Object.assign(redis, asBoth(redis.url));
}

let folder: Promise<TemporaryFolder> | undefined;

/** A temporary folder, removed after the test file. */
export async function folderOfFile(): Promise<string> {
  folder ??= temporaryFolder('relay-test-').then((made) => {
    atEndOfFile(() => {
      folder = undefined;
      return made.remove();
    });
    return made;
  });
  return (await folder).path;
}

export type TestPostgres = PrivatePostgres & TwoUrls & Readonly<{ directory: string }>;

/** Another PostgreSQL with the data that `of` has now; `of` is stopped meanwhile. @param primary see CopiedData */
export async function copyPostgres(of: TestPostgres, primary?: string): Promise<TestPostgres> {
  const directory = join(await folderOfFile(), `postgres-${randomBytes(4).toString('hex')}`);
  await of.stop();
  const copied = { of: of.directory, url: of.adminUrl, ...(primary !== undefined && { primary }) };
  const postgres = await startPrivatePostgres({ directory, copied });
  atEndOfFile(() => postgres.kill('SIGQUIT'));
  await of.restart();
  return Object.assign(postgres, { directory, ...asBoth(postgres.url) });
}

/** A PostgreSQL of this test file's own, to be killed or stopped, with a migrated database. */
export async function createPostgres(): Promise<TestPostgres> {
  const directory = join(await folderOfFile(), `postgres-${randomBytes(4).toString('hex')}`);
  const postgres = await startPrivatePostgres({ directory });
  atEndOfFile(() => postgres.kill('SIGQUIT'));
  const migration = await startPod({ RELAY_DATABASE_URL: postgres.url }, ['migrate']);
  const { code } = await migration.exited;
  if (code !== 0) throw new Error(`The migration failed:\n${migration.lines.join('\n')}`);
  await grantLeast(postgres.url);
  return Object.assign(postgres, { directory, ...asBoth(postgres.url) });
}
