/**
 * A private PostgreSQL and a private Redis for the demo and the tests: on free ports of the loopback interface, with
 * throw-away data in a given folder, gone with the process that started them.
 */
import { randomBytes } from 'node:crypto';
import { accessSync, constants } from 'node:fs';
import { appendFile, chmod, chown, cp, mkdir, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { connect } from 'node:net';
import { delimiter, dirname, join, resolve } from 'node:path';
import { openTheWayTo, postgresUser, run, runnableBinaries } from './postgres-binaries.ts';
import { type Identity, type PrivateServer, supervise } from './supervise.ts';

const INITDB_DEADLINE_MS = 300_000;

export type PrivatePostgres = PrivateServer;

export type PrivateRedis = PrivateServer &
  Readonly<{
    /** Freezes the server (SIGSTOP): connections stay open and nothing is answered. */
    pause(): void;
    resume(): void;
  }>;

/** A folder with the data of another server that was started here, e.g. a copy of it. */
export type CopiedData = Readonly<{
  /** `directory` of that server; it must not run while its data is copied. */
  of: string;
  url: string;
  /** How to reach the primary, to be a standby of it (`primary_conninfo`). Default: a server of its own. */
  primary?: string;
}>;

export type PrivatePostgresOptions = {
  /** The data to start with. Default: new. */
  copied?: CopiedData;
  /** Folder of this server alone; made when missing. */
  directory: string;
  /** Server settings over our fast ones, e.g. `{ max_connections: 20 }`. */
  settings?: Readonly<Record<string, string | number>>;
  /** Told what a user should know: as whom it runs, that binaries are copied. */
  onLog?: (line: string) => void;
};

export type PrivateRedisOptions = {
  /** Folder of this server alone; made when missing. */
  directory: string;
  /** Further arguments of redis-server, e.g. `['--maxmemory', '50mb']`. The last one wins. */
  args?: readonly string[];
  appendOnly?: boolean;
};

/** Throw-away data: nothing has to survive a power cut. Everything that a client can see stays as in production. */
const FAST_SETTINGS = {
  fsync: 'off',
  full_page_writes: 'off',
  synchronous_commit: 'on',
  max_connections: 200,
  listen_addresses: '127.0.0.1',
  unix_socket_directories: '',
  // In the data folder instead of /dev/shm: a killed server leaves nothing outside its folder.
  dynamic_shared_memory_type: 'mmap',
};

export async function startPrivatePostgres(options: PrivatePostgresOptions): Promise<PrivatePostgres> {
  const { settings = {}, onLog = () => {} } = options;
  const directory = resolve(options.directory);
  const data = join(directory, 'data');
  await mkdir(directory, { recursive: true });

  const user = await postgresUser();
  const identity: Identity = user === undefined ? {} : { uid: user.uid, gid: user.gid };
  if (user !== undefined) {
    onLog(`PostgreSQL refuses to run as root: it runs as user ${user.name}`);
    await chown(directory, user.uid, user.gid);
    await openTheWayTo(dirname(directory), user.name);
  }
  const binaries = await runnableBinaries(directory, identity, onLog);

  const environment = { PATH: process.env.PATH ?? '/usr/bin:/bin', LC_ALL: 'C' };
  if (options.copied !== undefined) return start(await copyData(options.copied, data, user));

  // A password, because a superuser without one is open to every local user, and may run programs as us.
  const password = randomBytes(12).toString('hex');
  const passwordFile = join(directory, 'password');
  await writeFile(passwordFile, `${password}\n`, { mode: 0o600 });
  if (user !== undefined) await chown(passwordFile, user.uid, user.gid);
  const initdb = await run(
    join(binaries, 'initdb'),
    [
      `--pgdata=${data}`,
      '--username=postgres',
      '--auth=password',
      `--pwfile=${passwordFile}`,
      '--encoding=UTF8',
      '--locale=C',
      '--no-sync',
      '--no-instructions',
    ],
    { ...identity, cwd: directory, env: environment, timeout: INITDB_DEADLINE_MS },
  );
  if (initdb.failure !== undefined) {
    throw new Error(`PostgreSQL's initdb failed: ${initdb.failure}\n${initdb.output}`);
  }
  await rm(passwordFile);
  return start(password);

  function start(withPassword: string): Promise<PrivatePostgres> {
    return supervise({
      name: 'PostgreSQL',
      url: (port) => `postgresql://postgres:${withPassword}@127.0.0.1:${port}/postgres`,
      directory,
      command: join(binaries, 'postgres'),
      args: (port) => [
        '-D',
        data,
        ...Object.entries({ ...FAST_SETTINGS, ...settings, port }).flatMap(([key, value]) => [
          '-c',
          `${key}=${value}`,
        ]),
      ],
      identity,
      environment,
      // SIGINT ends open sessions and stops; SIGTERM would wait for every client to leave.
      stopSignal: 'SIGINT',
      // SIGQUIT ends at once, and still frees the shared memory, which SIGKILL cannot.
      watchdogSignal: 'QUIT',
      isReady: (pid) => postmasterIsReady(data, pid),
      portIsTaken: /could not bind|could not create any TCP\/IP sockets/,
      // Sessions of a killed server need a moment to notice that it is gone.
      isPassing: /pre-existing shared memory block|lock file "postmaster.pid" already exists/,
    });
  }
}

/** @returns the superuser's password */
async function copyData(
  { of, url, primary }: CopiedData,
  data: string,
  user: { name: string; uid: number; gid: number } | undefined,
): Promise<string> {
  await cp(join(of, 'data'), data, { recursive: true });
  if (primary !== undefined) {
    await appendFile(join(data, 'postgresql.auto.conf'), `primary_conninfo = '${primary}'\n`);
    await writeFile(join(data, 'standby.signal'), '');
  }
  if (user !== undefined)
    for (const path of ['', ...(await readdir(data, { recursive: true }))])
      await chown(join(data, path), user.uid, user.gid);
  await chmod(data, 0o700);
  return new URL(url).password;
}

/** Its own pid file says so (as pg_ctl reads it): another server on the same port cannot be mistaken for it. */
async function postmasterIsReady(data: string, pid: number): Promise<boolean> {
  const lines = (await readFile(join(data, 'postmaster.pid'), 'utf8').catch(() => '')).split('\n');
  return lines[0]?.trim() === String(pid) && /^(ready|standby)$/.test(lines[7]?.trim() ?? '');
}

// ------------------------------------------------------------------------------------------------ Redis

export async function startPrivateRedis(options: PrivateRedisOptions): Promise<PrivateRedis> {
  const { args = [], appendOnly = true } = options;
  const directory = resolve(options.directory);
  const command = redisBinary();
  await mkdir(directory, { recursive: true });
  const server = await supervise({
    name: 'Redis',
    url: (port) => `redis://127.0.0.1:${port}`,
    directory,
    command,
    args: (port) => [
      ...[
        '--port',
        String(port),
        '--bind',
        '127.0.0.1',
        '--dir',
        directory,
        '--daemonize',
        'no',
        '--logfile',
        '',
      ],
      ...['--save', '', '--appendonly', appendOnly ? 'yes' : 'no', '--appendfsync', 'everysec'],
      ...['--maxmemory-policy', 'noeviction'],
      ...args,
    ],
    identity: {},
    environment: process.env,
    stopSignal: 'SIGTERM',
    watchdogSignal: 'KILL',
    isReady: redisIsReady,
    portIsTaken: /Address already in use|Failed listening on port/,
    isPassing: /Address already in use|Failed listening on port/,
  });
  return Object.assign(server, {
    pause: () => void process.kill(server.pid, 'SIGSTOP'),
    resume: () => void process.kill(server.pid, 'SIGCONT'),
  });
}

/** @throws when there is none */
export function redisBinary(): string {
  const given = process.env.RELAY_REDIS_SERVER_BIN;
  const names = ['redis-server', 'valkey-server'];
  const onPath = (process.env.PATH ?? '').split(delimiter).filter((folder) => folder !== '');
  const candidates = given
    ? [resolve(given)]
    : names.flatMap((name) => onPath.map((folder) => join(folder, name)));
  const found = candidates.find(isExecutable);
  if (found !== undefined) return found;
  throw new Error(
    given
      ? `RELAY_REDIS_SERVER_BIN is ${given}, which is not an executable file: set it to a redis-server or valkey-server`
      : 'No redis-server or valkey-server on PATH: install one (apt-get install redis-server, or brew install redis), ' +
          'or set RELAY_REDIS_SERVER_BIN',
  );
}

function isExecutable(path: string): boolean {
  try {
    accessSync(path, constants.X_OK);
    return true;
  } catch {
    return false;
  }
}

/** Asks for the server's pid and whether its data is loaded: another server on the port is not mistaken for it. */
export async function redisIsReady(pid: number, port: number): Promise<boolean> {
  const info = await new Promise<string>((answer) => {
    const socket = connect({ host: '127.0.0.1', port });
    let text = '';
    socket.setTimeout(1_000, () => socket.destroy());
    socket.on('error', () => socket.destroy());
    socket.on('connect', () => socket.write('INFO\r\nQUIT\r\n'));
    socket.on('data', (chunk) => {
      text += chunk.toString();
    });
    socket.on('close', () => answer(text));
  });
  return (
    new RegExp(`^process_id:${pid}\\r?$`, 'm').test(info) &&
    /^(loading:0|redis_mode:sentinel)\r?$/m.test(info)
  );
}
