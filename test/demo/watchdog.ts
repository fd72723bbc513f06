import { type ChildProcess, spawn } from 'node:child_process';
import { accessSync, constants, mkdtempSync, statSync } from 'node:fs';
import { chmod, rm } from 'node:fs/promises';
import { Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { dirname, join, resolve } from 'node:path';

/**
 * No child outlives us, and no temporary folder: not after a normal exit, an exception or even `kill -9`.
 *
 * A process that is killed with SIGKILL can clean up nothing, so somebody else has to. One small shell per process
 * holds the reading end of a pipe to us. However we end, the kernel closes that pipe; then the shell ends what is
 * still on its list. It is a shell because it costs 1 MB and 2 ms; a second Node.js would cost 40 MB and 60 ms.
 */
const SCRIPT = `
trap '' INT TERM HUP QUIT PIPE
guarded=
while read -r word value; do
  case $word in
    guard) guarded="$guarded $value" ;;
    release) rest=; for g in $guarded; do [ "\${g#*:}" = "$value" ] || rest="$rest $g"; done; guarded=$rest ;;
    folder) set -- "$@" "$value" ;;
  esac
done
exec 2>/dev/null
for g in $guarded; do kill -CONT "\${g#*:}"; kill -s "\${g%:*}" "\${g#*:}"; done
tries=0
while [ $tries -lt 50 ]; do
  alive=; for g in $guarded; do kill -0 "\${g#*:}" && alive=1; done
  [ -z "$alive" ] && break
  sleep 0.1; tries=$((tries + 1))
done
for g in $guarded; do kill -s KILL "\${g#*:}"; done
tries=0
while [ $# -gt 0 ] && [ $tries -lt 20 ]; do
  rm -rf -- "$@" && break
  sleep 0.2; tries=$((tries + 1))
done
`;

let watchdog: ChildProcess | undefined;

function tell(line: string): void {
  if (watchdog === undefined) {
    // Its own session: Ctrl-C in a terminal goes to the whole foreground group, and must not reach it.
    watchdog = spawn('/bin/sh', ['-c', SCRIPT], {
      cwd: '/',
      detached: true,
      stdio: ['pipe', 'ignore', 'ignore'],
    });
    // Losing the watchdog costs the safety net only; what it guards is still ended in the orderly way.
    watchdog.on('error', () => {});
    watchdog.stdin?.on('error', () => {});
    // It waits for our end, so we must not wait for its end.
    watchdog.unref();
    if (watchdog.stdin instanceof Socket) watchdog.stdin.unref();
  }
  watchdog.stdin?.write(`${line}\n`);
}

/** Sends `signal` to the process when we are gone (SIGKILL five seconds later). Answers how to take that back. */
export function guardProcess(pid: number, signal: 'KILL' | 'QUIT' | 'TERM'): () => void {
  tell(`guard ${signal}:${pid}`);
  return () => tell(`release ${pid}`);
}

export type TemporaryFolder = Readonly<{ path: string; remove(): Promise<void> }>;

/**
 * A new folder which every user may pass through (not list): as root, PostgreSQL runs as another user and has to
 * reach its data in it. It is removed by `remove()`, or by the watchdog when we are gone.
 */
export async function temporaryFolder(prefix: string): Promise<TemporaryFolder> {
  const asRoot = process.getuid?.() === 0;
  const base = [tmpdir(), '/tmp', '/var/tmp'].find(
    (folder) => isWritable(folder) && (!asRoot || isOpen(folder)),
  );
  if (base === undefined) {
    throw new Error(
      `No folder for temporary files: ${tmpdir()}, /tmp and /var/tmp cannot be written, or not be passed`,
    );
  }
  const path = mkdtempSync(join(resolve(base), prefix));
  tell(`folder ${path}`);
  if (asRoot) await chmod(path, 0o711);
  return {
    path,
    // A killed server's children may write for a moment longer, which makes a folder "not empty" while it goes.
    remove: () => rm(path, { recursive: true, force: true, maxRetries: 20, retryDelay: 100 }),
  };
}

function isWritable(folder: string): boolean {
  try {
    accessSync(folder, constants.W_OK | constants.X_OK);
    return true;
  } catch {
    return false;
  }
}

/** The first folder on the way to `path` that other users cannot pass, or undefined. */
export function closedFolder(path: string): string | undefined {
  const folders: string[] = [];
  for (let folder = resolve(path); ; folder = dirname(folder)) {
    folders.unshift(folder);
    if (folder === dirname(folder)) break;
  }
  return folders.find((folder) => (statSync(folder).mode & 0o001) === 0);
}

function isOpen(folder: string): boolean {
  return closedFolder(folder) === undefined;
}
