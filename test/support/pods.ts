import { join } from 'node:path';
import { inject } from 'vitest';
import { type Pod, startPod as startDemoPod } from '../demo/pod.ts';
import { atEndOfFile } from './cleanup.ts';

/** A relay in its own process (`node dist/cli.js start`), killed after the test file if it still runs. */
export async function startPod(
  env: Readonly<Record<string, string>>,
  args?: readonly string[],
  node?: string,
): Promise<Pod> {
  const cli = join(inject('root'), 'dist/cli.js');
  const pod = await startDemoPod({ cli, env, ...(args && { args }), ...(node && { node }) });
  atEndOfFile(() => pod.kill('SIGKILL'));
  return pod;
}
