/** What a power cut does to a Redis with `appendfsync everysec`: the end of its append-only file was never written. */
import { readFile, stat, truncate } from 'node:fs/promises';
import { join } from 'node:path';

export type AofPosition = Readonly<{ file: string; bytes: number }>;

/** Where the append-only file of the Redis in `directory` ends at this moment. */
export async function endOfAof(directory: string): Promise<AofPosition> {
  const folder = join(directory, 'appendonlydir');
  const manifest = await readFile(join(folder, 'appendonly.aof.manifest'), 'utf8');
  // "file appendonly.aof.2.incr.aof seq 2 type i": the last increment is the one that is being written.
  const name = [...manifest.matchAll(/^file (\S+) seq \d+ type i$/gm)].at(-1)?.[1];
  if (name === undefined) throw new Error(`no increment in the manifest of ${folder}:\n${manifest}`);
  const file = join(folder, name);
  return { file, bytes: (await stat(file)).size };
}

/**
 * Takes from the append-only file of a dead Redis what was written after `position`. If the file was rewritten since
 * then, the new increment holds nothing that is older, so all of it goes.
 * @returns how many bytes were taken
 */
export async function cutAof(directory: string, position: AofPosition): Promise<number> {
  const end = await endOfAof(directory);
  const limit = end.file === position.file ? position.bytes : 0;
  const boundary = lastBoundary(await readFile(end.file), limit);
  await truncate(end.file, boundary);
  return end.bytes - boundary;
}

const CR = 13;

/**
 * The last place at or before `limit` where a command ends, and no MULTI is open: what Lua scripts wrote stands
 * between MULTI and EXEC, all or nothing.
 */
export function lastBoundary(aof: Buffer, limit: number): number {
  let boundary = 0;
  let inMulti = false;
  let at = 0;

  function line(): string {
    const end = aof.indexOf(CR, at);
    const text = aof.toString('latin1', at, end);
    at = end + 2;
    return text;
  }

  while (at < limit) {
    const head = line();
    // "#TS:1700000000": an annotation.
    if (head.startsWith('#')) continue;
    if (!head.startsWith('*')) throw new Error(`not an append-only file at byte ${at}: ${head.slice(0, 40)}`);
    let name = '';
    for (let part = 0; part < Number(head.slice(1)); part++) {
      const length = Number(line().slice(1));
      if (part === 0) name = aof.toString('latin1', at, at + length).toUpperCase();
      at += length + 2;
    }
    if (name === 'MULTI') inMulti = true;
    if (name === 'EXEC') inMulti = false;
    if (!inMulti && at <= limit) boundary = at;
  }
  return boundary;
}
