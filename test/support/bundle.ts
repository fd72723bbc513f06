import { readFile } from 'node:fs/promises';

/** The modules in a file of the bundled program, as the comments of the bundler name them: of a library, its name. */
export async function modulesIn(file: string): Promise<string[]> {
  const text = await readFile(file, 'utf8');
  return [
    ...text.matchAll(/^\s*\/\/ (?:(?:\S*\/)?node_modules\/((?:@[^/]+\/)?[^/]+)|(src\/\S+\.ts)$)/gm),
  ].map(([, library, own]) => library ?? own ?? '');
}
