import { execFile } from 'node:child_process';
import { readdirSync } from 'node:fs';
import { cp, mkdir, symlink } from 'node:fs/promises';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { inject } from 'vitest';
import { folderOfFile } from './servers.ts';

/** A folder whose node_modules has the project's dependencies, and the relay as a package. */
export async function sampleProject(name: string, copyOf?: string): Promise<string> {
  const root = inject('root');
  const folder = join(await folderOfFile(), name);
  if (copyOf !== undefined) await cp(join(root, copyOf), folder, { recursive: true });
  await mkdir(join(folder, 'node_modules'), { recursive: true });
  for (const module of readdirSync(join(root, 'node_modules'))) {
    if (!module.startsWith('.'))
      await symlink(join(root, 'node_modules', module), join(folder, 'node_modules', module));
  }
  await symlink(root, join(folder, 'node_modules/relay-service'));
  return folder;
}

/** What the compiler says against the project in `folder`; '' where it is content. */
export async function compile(folder: string): Promise<string> {
  const tsc = join(inject('root'), 'node_modules/typescript/bin/tsc');
  return promisify(execFile)(process.execPath, [tsc, '-p', folder]).then(
    () => '',
    ({ stdout, stderr }: { stdout: string; stderr: string }) => stdout + stderr || 'the compiler failed',
  );
}
