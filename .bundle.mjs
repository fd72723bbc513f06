/**
 * Part of `npm run build`: bundles the command-line program with its libraries into dist/cli.js and the parts in dist/cli,
 * which it loads on demand. A pod is ready in two thirds of the time that reading a thousand modules takes, and a command
 * needs half the CPU time. Programs that embed the relay use dist/index.js, which is not bundled.
 */
import { chmod, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { build } from 'esbuild';

const PARTS = 'dist/cli';

/** BullMQ's modules do nothing but define, which it does not say: what is for PostgreSQL and Valkey GLIDE stays out. */
const bullmqOnlyDefines = {
  name: 'bullmq only defines',
  setup({ onResolve, resolve }) {
    onResolve({ filter: /^bullmq$|^\./ }, async ({ path, pluginData, importer, kind, resolveDir }) => {
      const isOfBullmq = path === 'bullmq' || importer.includes('/node_modules/bullmq/');
      if (!isOfBullmq || pluginData === bullmqOnlyDefines) return undefined;
      const found = await resolve(path, { importer, kind, resolveDir, pluginData: bullmqOnlyDefines });
      return { ...found, sideEffects: false };
    });
  },
};

const { metafile } = await build({
  entryPoints: { cli: 'src/cli.ts' },
  outdir: 'dist',
  chunkNames: 'cli/[name]-[hash]',
  ...{ bundle: true, splitting: true, format: 'esm', platform: 'node', target: 'node20', metafile: true },
  // Of libraries that have both, the ES modules: what nobody imports is left out.
  ...{ mainFields: ['module', 'main'], plugins: [bullmqOnlyDefines] },
  // What is optional or no pod needs, finds its own files by their place, or has to be the same for every library that uses it.
  external: [
    '@bull-board/*',
    '@fastify/*-compiler',
    'light-my-request',
    '@opentelemetry/sdk-node',
    'bullmq-otel',
    'pg-native',
  ],
  // pg looks whether it runs on Cloudflare. Without this constant, which newer Node.js has, it loads fetch for that: 20 ms.
  define: { navigator: '{"userAgent":"Node.js"}' },
  // Libraries in CommonJS call `require` for the modules of Node.js.
  banner: {
    js: "import { createRequire as createRequireOfBundle } from 'node:module'; const require = createRequireOfBundle(import.meta.url);",
  },
  legalComments: 'none',
  // With less to read and parse a pod is ready in 0.88 of the time and takes 6 MiB less. Names stay, and lines short, for
  // stack traces.
  ...{ minifyWhitespace: true, minifySyntax: true, lineLimit: 120 },
  logLevel: 'warning',
});
await chmod('dist/cli.js', 0o755);
// Of an earlier build. A pod that runs may still load what has not changed.
for (const part of await readdir(PARTS))
  if (!(`${PARTS}/${part}` in metafile.outputs)) await rm(`${PARTS}/${part}`);
/** What each file is made of: minified, they have no comments that tell tests. */
const sources = Object.entries(metafile.outputs).map(([file, { inputs }]) => [
  file,
  Object.keys(inputs).filter((it) => inputs[it].bytesInOutput > 0 && !it.startsWith('<')),
]);
await writeFile(`${PARTS}/sources.json`, JSON.stringify(Object.fromEntries(sources), null, 2));

/** Their licences ask for their texts wherever the code goes. */
const libraries = await Promise.all(
  [
    ...new Set(
      Object.keys(metafile.inputs).flatMap((path) => /^.*node_modules\/(?:@[^/]+\/)?[^/]+/.exec(path) ?? []),
    ),
  ]
    .toSorted()
    .map(async (folder) => {
      const about = JSON.parse(await readFile(`${folder}/package.json`, 'utf8'));
      const file = (await readdir(folder)).find((it) => /^(licen[cs]e|copying)/i.test(it));
      return { ...about, text: file && (await readFile(`${folder}/${file}`, 'utf8')).trim() };
    }),
);
/** Some packages name their licence and leave out its text: it is that of another one, under the name of their authors. */
function textOf({ name, license, author, contributors = [], text }) {
  if (text) return text;
  const same = libraries.find((it) => it.license === license && it.text)?.text;
  if (same === undefined)
    throw new Error(`${name} is bundled, and there is no text of its licence, ${license}`);
  const by = [author, ...contributors].map((it) => it?.name ?? it).filter(Boolean);
  return `Copyright (c) ${by.join(', ') || `the authors of ${name}`}\n\n${same.replaceAll(/^.*Copyright \(c\).*\n/gim, '')}`;
}
const texts = libraries.map((it) => `${it.name} ${it.version} (${it.license})\n\n${textOf(it)}\n`);
await writeFile(`${PARTS}/LICENSES.txt`, texts.join(`\n${'-'.repeat(80)}\n\n`));
