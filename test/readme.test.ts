import { execFile } from 'node:child_process';
import { readdirSync, readFileSync } from 'node:fs';
import { readFile, stat, writeFile } from 'node:fs/promises';
import { join, normalize } from 'node:path';
import { promisify } from 'node:util';
import { getTableConfig } from 'drizzle-orm/pg-core';
import { expect, inject, test } from 'vitest';
import { parse } from 'yaml';
import { VARIABLES } from '../src/config/config.ts';
import { outbox } from '../src/outbox/table.ts';
import { anchorsOf, blocks, blocksUnder, codeSpans, DOCUMENTS, PAGES, tableRows } from './support/readme.ts';
import { compile, sampleProject } from './support/samples.ts';

const root = inject('root');
const SHORT: Readonly<Record<string, string>> = { 'timestamp with time zone': 'timestamptz' };
const scripts = (): Record<string, string> =>
  JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')).scripts;

/** Every file under src, by its path from there. */
function sourceFiles(): string[] {
  return readdirSync(join(root, 'src'), { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => join(entry.parentPath, entry.name).slice(join(root, 'src/').length))
    .toSorted();
}

test('the table of variables says what the configuration says', () => {
  expect(tableRows('Variable', 'Default', 'Unit', 'Meaning')).toEqual(
    VARIABLES.map((variable) => [
      `\`${variable.name}\``,
      `\`${variable.default}\``,
      variable.unit ?? '–',
      variable.description,
    ]),
  );
});

test('every variable that is mentioned exists', () => {
  const known = new Set<string>([
    ...VARIABLES.map(({ name }) => name),
    'RELAY_REDIS_SERVER_BIN',
    'RELAY_CHROMIUM_BIN',
  ]);
  const mentioned = [...DOCUMENTS.matchAll(/(?<![A-Z_])RELAY_[A-Z_]+/g)].map(([name]) => name);
  expect(mentioned.filter((name) => !known.has(name))).toEqual([]);
});

test('a default that is mentioned beside a variable is its default', () => {
  const values = new Map<string, string>(
    VARIABLES.map(({ name, default: value, unit }) => [
      name,
      unit === undefined ? value : `${value} ${unit}`,
    ]),
  );
  const said = [...DOCUMENTS.matchAll(/`(RELAY_[A-Z_]+)` \((\d[^)]*)\)/g)];
  expect(said.length).toBeGreaterThan(0);
  for (const [, name, value] of said) expect(value, name).toBe(values.get(name as string));
});

test('the README describes the columns of the table, those of producers with their types', () => {
  const { columns } = getTableConfig(outbox);
  const described = tableRows('Column', 'Type', 'Default', '').map(([name = '', type = '', value = '']) => [
    ...[...codeSpans(name), ...codeSpans(type)],
    value !== '',
  ]);
  const producers = described.map(([name]) => name);
  const types = columns
    .filter(({ name }) => producers.includes(name))
    .map((column) => [column.name, SHORT[column.getSQLType()] ?? column.getSQLType(), column.hasDefault]);
  expect(described.toSorted()).toEqual(types.toSorted());
  const [, others = ''] =
    /The relay writes the others: ([\s\S]*?)\n\n/.exec(PAGES.get('README.md') ?? '') ?? [];
  const all = [...producers, ...codeSpans(others)];
  expect(all.toSorted()).toEqual(columns.map(({ name }) => name).toSorted());
});

test('the services of docker compose that are mentioned exist', async () => {
  const { services } = parse(await readFile(join(root, 'docker-compose.yml'), 'utf8'));
  const lines = blocks().flatMap(({ text }) =>
    text.split('\n').map((line) => line.replace(/ #.*/, '').trim()),
  );
  const asked = lines.flatMap((line) => {
    const [, service] = /^docker compose exec ([a-z]+)/.exec(line) ?? [];
    return service === undefined ? [] : [service];
  });
  expect(asked.length).toBeGreaterThan(2);
  for (const service of asked) expect(Object.keys(services)).toContain(service);
});

test('the file map names every file of src, and no other', () => {
  const named = tableRows('File of `src`', 'What it does').map(([file = '']) => codeSpans(file)[0]);
  expect(named.toSorted()).toEqual(sourceFiles());
});

test('the glossary is short', () => {
  expect(tableRows('Term', 'Meaning').length).toBeLessThanOrEqual(25);
});

test('every npm script and every command of the relay that is mentioned exists', async () => {
  const known = [...Object.keys(scripts()), 'ci', 'init', 'install', 'pack', 'pkg'];
  const npm = [...DOCUMENTS.matchAll(/\bnpm (?:run )?([a-z:]+)/g)].map(([, name]) => name as string);
  expect(npm.length).toBeGreaterThan(5);
  expect(npm.filter((name) => !known.includes(name))).toEqual([]);

  // In a block only options are looked for in the help: other words may be the reader's own, such as ids.
  const lines = blocks()
    .filter(({ language }) => language === 'sh')
    .flatMap(({ text }) => text.split('\n').map((line) => line.replace(/ #.*/, '')));
  const commands = [...codeSpans(DOCUMENTS), ...lines].flatMap((code, i) => {
    const [, name = '', rest = ''] = /^relay (dlq [a-z]+|[a-z][a-z-]*)(.*)$/.exec(code) ?? [];
    const words = rest.split(/[\s=]/).filter(Boolean);
    const inProse = i < codeSpans(DOCUMENTS).length;
    return name === '' ? [] : [{ name, words: inProse ? words : words.filter((it) => it.startsWith('--')) }];
  });
  const names = [...new Set(commands.map(({ name }) => name))];
  expect(names.length).toBeGreaterThan(8);
  await Promise.all(
    names.map(async (name) => {
      const cli = [join(root, 'dist/cli.js'), ...name.split(' '), '--help'];
      const { stdout } = await promisify(execFile)(process.execPath, cli);
      expect(stdout).toContain(`Usage: relay ${name}`);
      for (const command of commands.filter((it) => it.name === name)) {
        for (const word of command.words) expect(stdout, `relay ${name}`).toContain(word);
      }
    }),
  );
});

test('the commands to begin with are what CI runs', async () => {
  const ci = await readFile(join(root, '.ci/run'), 'utf8');
  // A script of package.json is what it runs, too.
  const ran = ci.split('\n').map((line) => line.trim().replace(/^(?:run|step .*?) -- /, ''));
  for (let i = 0; i < ran.length; i++) {
    const name = /^npm (?:run )?([a-z:]+)/.exec(ran[i] as string)?.[1] ?? '';
    ran.push(...(scripts()[name]?.split(' && ') ?? []));
  }
  const [block = ''] = blocksUnder('README.md', 'Try it', 'sh');
  const commands = block.split('\n').flatMap((line) => line.replace(/#.*/, '').split('&&'));
  const wanted = new Set(commands.map((command) => command.trim()).filter((command) => command !== ''));
  expect([...wanted]).toEqual(['npm ci', 'npm run demo', 'npm test']);
  for (const command of wanted) {
    expect(
      ran.some((line) => line === command || line.startsWith(`${command} `)),
      command,
    ).toBe(true);
  }
});

test('every link and every path that is mentioned leads somewhere, on any page', async () => {
  for (const [page, text] of PAGES) {
    expect(new Set(anchorsOf(page)).size, `headings of ${page}`).toBe(anchorsOf(page).length);
    const targets = [...text.matchAll(/\]\(([^)]+)\)/g)].map(([, target]) => target as string);
    for (const target of targets.filter((it) => !/^https?:/.test(it))) {
      const [path = '', anchor] = target.split('#');
      const linked = path === '' ? page : normalize(join(page, '..', path));
      await stat(join(root, linked));
      if (anchor !== undefined) expect(anchorsOf(linked), `${page}: ${target}`).toContain(anchor);
    }
  }
  const files = codeSpans(DOCUMENTS).filter((code) =>
    /^(?:src|test|docs|\.ci|\.env)[/.][\w./-]*\w$/.test(code),
  );
  expect(files.length).toBeGreaterThan(3);
  for (const path of files) await stat(join(root, path));
});

test('the README is a page to begin with, and names every page of docs', () => {
  const readme = PAGES.get('README.md') as string;
  expect(readme.split('\n').length).toBeLessThanOrEqual(250);
  const listed = tableRows('Page', 'What it has').flatMap(([page = '']) => /\((.+)\)/.exec(page)?.[1] ?? []);
  expect(listed.toSorted()).toEqual([...PAGES.keys()].filter((page) => page !== 'README.md'));
});

test('every log message that is quoted is logged, at the level that is said', () => {
  const source = sourceFiles()
    .map((file) => readFileSync(join(root, 'src', file), 'utf8'))
    .join('\n');
  const quoted = tableRows('Level', '`msg`', 'Then').map(([level, message = '']) => ({
    level: level as string,
    message: message.slice(1, -1),
  }));
  expect(quoted.length).toBeGreaterThan(5);
  for (const { level, message } of quoted) {
    const at = source.indexOf(`'${message}'`);
    expect(at, message).toBeGreaterThan(0);
    const levels = [...source.slice(0, at).matchAll(/(?:logger|tally)\.(\w+)\(/g)];
    expect(levels.at(-1)?.[1], message).toBe(level);
  }
  // In running text a message stands in backticks of its own, and has a semicolon.
  const sentences = codeSpans(DOCUMENTS).filter((code) => /^[a-z ,]+; [a-z ,]+$/.test(code));
  expect(sentences.length).toBeGreaterThan(1);
  for (const sentence of sentences) expect(source, sentence).toContain(`'${sentence}'`);
});

test('the code samples compile, each as a file of a project that has installed the relay', async () => {
  const folder = await sampleProject('samples');
  const samples = blocks().filter(({ language }) => language === 'ts');
  expect(samples.length).toBeGreaterThan(3);
  for (const [i, { text }] of samples.entries()) await writeFile(join(folder, `sample-${i}.ts`), text);
  await writeFile(join(folder, 'package.json'), '{ "type": "module" }');
  const compilerOptions = {
    ...{ target: 'ES2023', lib: ['ES2023'], module: 'NodeNext', types: ['node'], strict: true, noEmit: true },
    ...{ skipLibCheck: true, preserveSymlinks: true, noUnusedLocals: true },
  };
  await writeFile(join(folder, 'tsconfig.json'), JSON.stringify({ compilerOptions, include: ['*.ts'] }));
  expect(await compile(folder)).toBe('');
});
