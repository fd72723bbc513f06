import { execFile } from 'node:child_process';
import { readdirSync, readFileSync } from 'node:fs';
import { mkdir, readFile, stat, symlink, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { expect, inject, test } from 'vitest';
import { VARIABLES } from '../src/config/config.ts';
import { blocks, blocksUnder, codeSpans, README, tableRows } from './support/readme.ts';
import { folderOfFile } from './support/servers.ts';

const root = inject('root');
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
  const mentioned = [...README.matchAll(/RELAY_[A-Z_]+/g)].map(([name]) => name);
  expect(mentioned.filter((name) => !known.has(name))).toEqual([]);
});

test('a default that is mentioned beside a variable is its default', () => {
  const values = new Map<string, string>(
    VARIABLES.map(({ name, default: value, unit }) => [
      name,
      unit === undefined ? value : `${value} ${unit}`,
    ]),
  );
  const said = [...README.matchAll(/`(RELAY_[A-Z_]+)` \((\d[^)]*)\)/g)];
  expect(said.length).toBeGreaterThan(0);
  for (const [, name, value] of said) expect(value, name).toBe(values.get(name as string));
});

test('the file map names every file of src, each in its folder, and no other', () => {
  const named = tableRows('Folder', 'Files').flatMap(([folder = '', files = '']) => {
    const [path = ''] = codeSpans(folder);
    return codeSpans(files)
      .filter((file) => file.endsWith('.ts'))
      .map((file) => path + file);
  });
  expect(named.toSorted()).toEqual(sourceFiles());
});

test('every npm script and every command of the relay that is mentioned exists', async () => {
  const known = [...Object.keys(scripts()), 'ci'];
  const npm = [...README.matchAll(/\bnpm (?:run )?([a-z:]+)/g)].map(([, name]) => name as string);
  expect(npm.length).toBeGreaterThan(5);
  expect(npm.filter((name) => !known.includes(name))).toEqual([]);

  const commands = codeSpans(README).flatMap((code) => {
    const [, name, options] = /^relay ([a-z][a-z-]*)(.*)$/.exec(code) ?? [];
    return name === undefined ? [] : [{ name, options: options?.split(' ').filter(Boolean) ?? [] }];
  });
  const names = new Set(commands.map(({ name }) => name));
  expect(names.size).toBeGreaterThan(2);
  for (const name of names) {
    const cli = [join(root, 'dist/cli.js'), name, '--help'];
    const { stdout } = await promisify(execFile)(process.execPath, cli);
    expect(stdout).toContain(`Usage: relay ${name}`);
    for (const command of commands.filter((it) => it.name === name)) {
      for (const option of command.options) expect(stdout).toContain(option);
    }
  }
}, 60_000);

test('the commands to begin with are what CI runs', async () => {
  const ci = await readFile(join(root, '.ci/run'), 'utf8');
  // A script of package.json is what it runs, too.
  const ran = ci.split('\n').map((line) => line.trim().replace(/^(?:run|step .*?) -- /, ''));
  for (let i = 0; i < ran.length; i++) {
    const name = /^npm (?:run )?([a-z:]+)/.exec(ran[i] as string)?.[1] ?? '';
    ran.push(...(scripts()[name]?.split(' && ') ?? []));
  }
  const [block = ''] = blocksUnder('Try it', 'sh');
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

test('every link within the README and every path that is mentioned leads somewhere', async () => {
  const headings = [...README.matchAll(/^#+ (.+)$/gm)].map(([, title]) => anchorOf(title as string));
  expect(new Set(headings).size).toBe(headings.length);
  const targets = [...README.matchAll(/\]\(([^)]+)\)/g)].map(([, target]) => target as string);
  const anchors = targets.filter((target) => target.startsWith('#')).map((target) => target.slice(1));
  expect(anchors.filter((anchor) => !headings.includes(anchor))).toEqual([]);
  const paths = targets.filter((target) => !/^(?:#|https?:)/.test(target));
  const files = codeSpans(README).filter((code) => /^(?:src|test|\.ci|\.env)[/.][\w./-]*\w$/.test(code));
  expect(files.length).toBeGreaterThan(3);
  for (const path of [...paths, ...files]) await stat(join(root, path));
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
    const levels = [...source.slice(0, at).matchAll(/logger\.(\w+)\(/g)];
    expect(levels.at(-1)?.[1], message).toBe(level);
  }
  // In running text a message stands in backticks of its own, and has a semicolon.
  const sentences = codeSpans(README).filter((code) => /^[a-z ,]+; [a-z ,]+$/.test(code));
  expect(sentences.length).toBeGreaterThan(1);
  for (const sentence of sentences) expect(source, sentence).toContain(`'${sentence}'`);
});

test('the code samples compile, each as a file of a project that has installed the relay', async () => {
  const folder = join(await folderOfFile(), 'samples');
  await mkdir(join(folder, 'node_modules'), { recursive: true });
  for (const name of readdirSync(join(root, 'node_modules'))) {
    if (!name.startsWith('.'))
      await symlink(join(root, 'node_modules', name), join(folder, 'node_modules', name));
  }
  await symlink(root, join(folder, 'node_modules/relay-service'));
  const samples = blocks().filter(({ language }) => language === 'ts');
  expect(samples.length).toBeGreaterThan(3);
  for (const [i, { text }] of samples.entries()) await writeFile(join(folder, `sample-${i}.ts`), text);
  await writeFile(join(folder, 'package.json'), '{ "type": "module" }');
  const compilerOptions = {
    ...{ target: 'ES2023', lib: ['ES2023'], module: 'NodeNext', types: ['node'], strict: true, noEmit: true },
    ...{ skipLibCheck: true, preserveSymlinks: true, noUnusedLocals: true },
  };
  await writeFile(join(folder, 'tsconfig.json'), JSON.stringify({ compilerOptions, include: ['*.ts'] }));
  const tsc = join(root, 'node_modules/typescript/bin/tsc');
  const { problems } = await promisify(execFile)(process.execPath, [tsc, '-p', folder]).then(
    () => ({ problems: '' }),
    ({ stdout }: { stdout: string }) => ({ problems: stdout }),
  );
  expect(problems).toBe('');
}, 60_000);

/** The anchor that GitHub makes of a heading. */
function anchorOf(title: string): string {
  return title
    .toLowerCase()
    .replaceAll(/[^\p{L}\p{N} _-]/gu, '')
    .replaceAll(' ', '-');
}
