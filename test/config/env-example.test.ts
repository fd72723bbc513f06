import { readFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';
import { wrapped } from '../../src/commands/variables.ts';
import { VARIABLES, type Variable } from '../../src/config/config.ts';
import { loadConfig } from '../../src/config/load-config.ts';

const EXAMPLE = fileURLToPath(new URL('../../.env.example', import.meta.url));

const HEADER = `# Every variable of the relay, with its default. Remove the # in front of those that you change.
#
# docker compose reads a file called .env by itself; without Docker: node --env-file=.env dist/cli.js start
`;

function described({ name, default: text, expected, description }: Variable): string {
  const comment = [...wrapped(description, 98), ...wrapped(`Takes ${expected}`, 98)];
  return [...comment.map((line) => `# ${line}`), `#${name}=${text}`, ''].join('\n');
}

test('.env.example tells what config.ts tells', async () => {
  // `vitest --update` writes the file.
  await expect([HEADER, ...VARIABLES.map(described)].join('\n')).toMatchFileSnapshot(EXAMPLE);
});

test('.env.example, with every # removed, is the default configuration', async () => {
  const lines = (await readFile(EXAMPLE, 'utf8')).matchAll(/^#(RELAY_\w+)=(.*)$/gm);
  const env = Object.fromEntries([...lines].map(([, name, text]) => [name, text]));
  expect(Object.keys(env)).toHaveLength(VARIABLES.length);
  expect(loadConfig(env)).toEqual(loadConfig({}));
});
