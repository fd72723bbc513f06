import { readdir, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, inject, test } from 'vitest';
import { PAGES } from '../support/readme.ts';

/** Words of earlier builds, or of no other relay, and what the field says instead. */
const WORDS: readonly (readonly [RegExp, instead: string])[] = [
  [/\breceipts?\b/, 'entry id'],
  [/\bsettle[sd]?\b/, 'publish, finalize, isPublished'],
  [/\bcarr(?:y|ies|ied)\b/, 'publishEvent'],
  [/\bverdicts?\b/, 'outcome, result'],
  [/\blet go\b/, 'release'],
  [/\bturns?\b/, 'claim lock, gate'],
  [/\b(?:intact|doubt|notes?)\b/, 'checkpoint, invalidate'],
  [/\b(?:narrow|widen)(?:s|ed|ing)?\b|(?<!-)\bplaces\b/, 'shrink, grow, slots'],
  [/\btriage\b/, 'publish, recovery'],
  [/\bin hand\b/, 'in progress'],
  [/\b(?:suspects?|absolve[sd]?)\b/, 'poison guard, crashCount'],
  [/\breconcil|\blost jobs\b/, 'lease reaper'],
  [/\borphans?\b/, 'refill'],
  [/\blook(?:s|ed|ing)? at\b/, 'expire leases, compare, read'],
  [/\bdistrusts?\b/, 'pool health'],
  [/\bmarkers?\b/, 'idempotency keys'],
  [/\b(?:upkeep|chores?|kick(?:s|ed)?)\b/, 'maintenance'],
  [/\b(?:gather(?:s|ed)?|repeating)\b/, 'coalesce, loop'],
  [/\b(?:somebody|whoever)\b/, 'the actor: claim, publisher, reaper, operator'],
  [/\b(?:chains?|followers?|hand-?over|bring(?:s|ing) along)\b/, 'claim, gate, refill'],
];

const SOURCE = join(inject('root'), 'src');
const sources = (await readdir(SOURCE, { recursive: true })).filter((it) => it.endsWith('.ts'));
const FILES = await Promise.all(
  sources.map(async (it) => [`src/${it}`, await readFile(join(SOURCE, it), 'utf8')] as const),
);

test('there is source to be read', () => {
  expect(FILES.length).toBeGreaterThan(100);
});

test.each([...PAGES, ...FILES])('%s uses the words of the field', (_, text) => {
  // A file keeps its name.
  const prose = text.replaceAll(/[\w/-]+\.ts/g, '');
  const found = WORDS.flatMap(([word, instead]) => {
    const [said] = new RegExp(word, 'i').exec(prose) ?? [];
    return said === undefined ? [] : [`"${said}": say ${instead}`];
  });
  expect(found).toEqual([]);
});
