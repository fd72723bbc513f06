import { readdirSync, readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('../..', import.meta.url));

/** README.md and each page under docs, by its path from the root: what they say is tested as their readers see it. */
export const PAGES: ReadonlyMap<string, string> = new Map(
  ['README.md', ...readdirSync(`${root}docs`, { recursive: true }).map((path) => `docs/${path}`)]
    .filter((path) => path.endsWith('.md'))
    .toSorted()
    .map((path) => [path, readFileSync(root + path, 'utf8')]),
);

/** All pages in one text. */
export const DOCUMENTS = [...PAGES.values()].join('\n');

export type Block = Readonly<{
  /** The page that it is on, such as `docs/runbook.md`. */
  page: string;
  /** The heading that it stands under. */
  heading: string;
  /** After the opening fence; '' if there is none. */
  language: string;
  text: string;
}>;

/** Every fenced block of every page. */
export function blocks(): Block[] {
  const found: Block[] = [];
  for (const [page, text] of PAGES) {
    let heading = '';
    for (const [, title, language, block] of text.matchAll(/^#+ (.+)$|^```(\w*)\n([\s\S]*?)^```$/gm)) {
      if (title !== undefined) heading = title;
      else found.push({ page, heading, language: language ?? '', text: block ?? '' });
    }
  }
  return found;
}

/** The blocks of one language under one heading of one page; there must be some. */
export function blocksUnder(page: string, heading: string, language: string): string[] {
  const found = blocks().filter(
    (block) => block.page === page && block.heading === heading && block.language === language,
  );
  if (found.length === 0) throw new Error(`${page} has no ${language || 'plain'} block under "${heading}"`);
  return found.map((block) => block.text);
}

/** The anchors that GitHub makes of a page's headings. */
export function anchorsOf(page: string): string[] {
  const prose = (PAGES.get(page) ?? '').replaceAll(/^```[\s\S]*?^```$/gm, '');
  return [...prose.matchAll(/^#+ (.+)$/gm)].map(([, title]) =>
    (title as string)
      .toLowerCase()
      .replaceAll(/[^\p{L}\p{N} _-]/gu, '')
      .replaceAll(' ', '-'),
  );
}

/** The rows of the one table whose header has these cells: the text of each cell, without escapes. */
export function tableRows(...header: string[]): string[][] {
  const lines = DOCUMENTS.split('\n');
  const cells = (line: string) =>
    line
      .split('|')
      .slice(1, -1)
      .map((cell) => cell.trim().replaceAll('\\<', '<'));
  const at = lines.flatMap((line, i) =>
    line.startsWith('|') && String(cells(line)) === String(header) ? [i] : [],
  );
  if (at.length !== 1)
    throw new Error(`the pages have ${at.length} tables with the columns ${header.join(', ')}`);
  const rest = lines.slice((at[0] as number) + 2);
  const end = rest.findIndex((line) => !line.startsWith('|'));
  return rest.slice(0, end < 0 ? rest.length : end).map(cells);
}

/** What stands between backticks in running text and tables. */
export function codeSpans(text: string): string[] {
  const prose = text.replaceAll(/^```[\s\S]*?^```$/gm, '');
  return [...prose.matchAll(/`([^`\n]+)`/g)].map(([, code]) => code as string);
}
