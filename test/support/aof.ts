import { open, readdir, stat, truncate } from 'node:fs/promises';
import { join } from 'node:path';
import type { PrivateRedis } from '../../src/demo/servers.ts';

/** The file that Redis appends its commands to. */
async function appendFile(server: PrivateRedis): Promise<string> {
  const folder = join(server.logFile, '../appendonlydir');
  const files = (await readdir(folder)).filter((name) => name.endsWith('.incr.aof'));
  const newest = files.toSorted((a, b) => sequence(a) - sequence(b)).at(-1);
  if (newest === undefined) throw new Error('Redis has no append-only file');
  return join(folder, newest);
}

const sequence = (name: string): number => Number(/\.(\d+)\.incr\.aof$/.exec(name)?.[1]);

/** How much Redis has written so far: what `powerCut` may go back to. */
export async function written(server: PrivateRedis): Promise<number> {
  return (await stat(await appendFile(server))).size;
}

/**
 * A power cut, as `appendfsync everysec` may suffer it: the server is gone and what it wrote after `kept` bytes with
 * it. Killing it alone loses nothing, since the page cache survives. It starts again.
 */
export async function powerCut(server: PrivateRedis, kept: number): Promise<void> {
  await server.kill('SIGKILL');
  const path = await appendFile(server);
  await truncate(path, await commandBoundary(path, kept));
  await server.restart();
}

/** The end of the last whole command that begins before `limit`. */
async function commandBoundary(path: string, limit: number): Promise<number> {
  const file = await open(path);
  try {
    const text = (await file.readFile()).toString('latin1');
    let at = 0;
    while (at < limit && text[at] === '*') {
      const head = text.indexOf('\r\n', at);
      let next = head + 2;
      for (let left = Number(text.slice(at + 1, head)); left > 0; left--) {
        const length = text.indexOf('\r\n', next);
        next = length + 2 + Number(text.slice(next + 1, length)) + 2;
      }
      if (next > limit) break;
      at = next;
    }
    return at;
  } finally {
    await file.close();
  }
}
