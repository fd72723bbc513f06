import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

/** The README as its reader sees it: what is said there is tested as it stands. */
export const README = readFileSync(fileURLToPath(new URL('../../README.md', import.meta.url)), 'utf8');

export type Block = Readonly<{
  /** The heading that it stands under. */
  heading: string;
  /** After the opening fence; '' if there is none. */
  language: string;
  text: string;
}>;

/** Every fenced block. */
export function blocks(): Block[] {
  const found: Block[] = [];
  let heading = '';
  for (const [, title, language, text] of README.matchAll(/^#+ (.+)$|^```(\w*)\n([\s\S]*?)^```$/gm)) {
    if (title !== undefined) heading = title;
    else found.push({ heading, language: language ?? '', text: text ?? '' });
  }
  return found;
}

/** The blocks of one language under one heading; there must be some. */
export function blocksUnder(heading: string, language: string): string[] {
  const found = blocks().filter((block) => block.heading === heading && block.language === language);
  if (found.length === 0)
    throw new Error(`the README has no ${language || 'plain'} block under "${heading}"`);
  return found.map((block) => block.text);
}

/** The rows of the table whose header has these cells: the text of each cell, without escapes. */
export function tableRows(...header: string[]): string[][] {
  const lines = README.split('\n');
  const cells = (line: string) =>
    line
      .split('|')
      .slice(1, -1)
      .map((cell) => cell.trim().replaceAll('\\<', '<'));
  const at = lines.findIndex((line) => line.startsWith('|') && String(cells(line)) === String(header));
  if (at < 0) throw new Error(`the README has no table with the columns ${header.join(', ')}`);
  const rest = lines.slice(at + 2);
  const end = rest.findIndex((line) => !line.startsWith('|'));
  return rest.slice(0, end < 0 ? rest.length : end).map(cells);
}

/** What stands between backticks in running text and tables. */
export function codeSpans(text: string): string[] {
  const prose = text.replaceAll(/^```[\s\S]*?^```$/gm, '');
  return [...prose.matchAll(/`([^`\n]+)`/g)].map(([, code]) => code as string);
}
