import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { onTestFinished } from 'vitest';
import type { Pod } from '../../src/demo/pod.ts';
import type { Stage } from './flow.ts';
import { folderOfFile } from './servers.ts';

/** In the payload of a poisonous event. */
export const POISON = 'arsenic-7f3a';

/**
 * Environment of a pod that dies each time it sends the append of a poisonous event, as by a native crash: no handler
 * runs, no connection is closed in order.
 *
 * @param stream where a poisonous event goes; its dead letter kills nobody
 */
export async function poisonable(stream: string): Promise<Record<string, string>> {
  const file = join(await folderOfFile(), 'poison.mjs');
  await writeFile(
    file,
    `import { createRequire } from 'node:module';
const require = createRequire(process.argv[1]);
const { Redis } = require('ioredis');
const { unpack } = require('msgpackr');
const send = Redis.prototype.sendCommand;
Redis.prototype.sendCommand = function (command, stream) {
  const [, keys, , ...rest] = command.args;
  const entries = rest.at(-1);
  if (/^eval/.test(command.name) && Buffer.isBuffer(entries) && rest.includes(${JSON.stringify(stream)})) {
    // Stream and job of each entry, the epoch, the entries (see append.ts).
    unpack(entries).forEach((entry, i) => {
      if (rest[2 * i] === ${JSON.stringify(stream)} && entry.some((it) => String(it).includes('${POISON}')))
        process.kill(process.pid, 'SIGKILL');
    });
  }
  return send.call(this, command, stream);
};
`,
  );
  return { NODE_OPTIONS: `--import=${file}` };
}

/** Starts a pod, and another one each time it ends, until the test does. */
export async function superviseAPod(
  stage: Stage,
  env: Readonly<Record<string, string>>,
): Promise<{ deaths: () => number; current: () => Pod }> {
  let finished = false;
  let deaths = 0;
  let pod = await stage.spawn(['start'], env);
  const loop = (async () => {
    for (;;) {
      await pod.exited;
      if (finished) return;
      deaths++;
      pod = await stage.spawn(['start'], env);
    }
  })();
  onTestFinished(async () => {
    finished = true;
    await pod.kill('SIGKILL');
    await loop;
  });
  return { deaths: () => deaths, current: () => pod };
}
