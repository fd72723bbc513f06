import { readFile } from 'node:fs/promises';
import { join, relative } from 'node:path';
import { inject } from 'vitest';

/** The modules in a file of the bundled program: of a library, its name. None for any other file. */
export async function modulesIn(file: string): Promise<string[]> {
  const root = inject('root');
  const sources = JSON.parse(await readFile(join(root, 'dist/cli/sources.json'), 'utf8'));
  const modules: string[] = sources[relative(root, file)] ?? [];
  return modules.map((it) => /.*node_modules\/((?:@[^/]+\/)?[^/]+)/.exec(it)?.[1] ?? it);
}
