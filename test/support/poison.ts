import { onTestFinished } from 'vitest';
import type { Pod } from '../demo/pod.ts';
import type { Stage } from './flow.ts';
import { redisHook } from './redis-hook.ts';

/** In the payload of a poisonous event. */
export const POISON = 'arsenic-7f3a';

/**
 * Environment of a pod that dies each time it sends the append of a poisonous event, as by a native crash: no handler
 * runs, no connection is closed in order. Its dead letter kills nobody.
 */
export async function poisonable(): Promise<Record<string, string>> {
  // The entries of an append are the script's last argument (see append.ts).
  const hook = await redisHook(
    'poison',
    `const entries = command.args.at(-1);
      if (/^eval/.test(command.name) && Buffer.isBuffer(entries) && entries.includes('${POISON}'))
        process.kill(process.pid, 'SIGKILL');
      return send();`,
  );
  return { NODE_OPTIONS: hook };
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
