/** Results as text for a terminal, and as the JSON that charts and comparisons are made from. */
import { execFile } from 'node:child_process';
import { readFile } from 'node:fs/promises';
import { arch, cpus, platform, release, totalmem } from 'node:os';
import { promisify } from 'node:util';
import Table from 'cli-table3';
import { median, type ScenarioOptions, type ScenarioResult } from './scenario.ts';
import type { Servers } from './servers.ts';
import type { RequirementResult } from './targets.ts';

export type Setting = Readonly<{
  at: string;
  machine: Readonly<{ cpu: string; cores: number; memoryGiB: number; system: string }>;
  versions: Readonly<Record<string, string>>;
  settings: Readonly<Record<string, string | number | boolean>>;
}>;

export type Bench = Setting &
  Readonly<{
    results: readonly ScenarioResult[];
    targets: readonly RequirementResult[];
    tookSeconds: number;
  }>;

/** Machine, versions and settings: what a figure is worth nothing without. */
export async function describeSetting(servers: Servers, options: ScenarioOptions): Promise<Setting> {
  const { postgres, redis } = servers;
  const pgVersion = await import('pg').then(async ({ default: pg }) => {
    const client = new pg.Client(postgres.url);
    await client.connect();
    const { rows } = await client.query(
      `SELECT current_setting('server_version') AS version, current_setting('fsync') AS fsync,
              current_setting('full_page_writes') AS full_page_writes, current_setting('synchronous_commit') AS synchronous_commit,
              current_setting('shared_buffers') AS shared_buffers`,
    );
    await client.end();
    return rows[0] as Record<string, string> & { version: string };
  });
  const { version: postgresVersion, ...settings } = pgVersion;
  const redisVersion = /^redis_version:(\S+)/m.exec(await redis.info('server'))?.[1] ?? '?';
  const manifest = async (path: string): Promise<{ version: string }> =>
    JSON.parse(await readFile(new URL(`../../${path}`, import.meta.url), 'utf8'));
  const [own, bullmq, ioredis, pgTransactionalOutbox, graphileWorker] = await Promise.all([
    manifest('package.json'),
    manifest('node_modules/bullmq/package.json'),
    manifest('node_modules/ioredis/package.json'),
    manifest('node_modules/pg-transactional-outbox/package.json'),
    manifest('node_modules/graphile-worker/package.json'),
  ]);
  const commit = await promisify(execFile)('git', ['rev-parse', '--short', 'HEAD'], {
    cwd: import.meta.dirname,
  }).then(
    ({ stdout }) => stdout.trim(),
    () => 'unknown',
  );
  return {
    at: new Date().toISOString(),
    machine: {
      ...{ cpu: cpus()[0]?.model.trim() ?? 'unknown', cores: cpus().length },
      ...{ memoryGiB: Math.round(totalmem() / 2 ** 30), system: `${platform()} ${release()} ${arch()}` },
    },
    versions: {
      ...{
        relay: `${own.version} (${commit})`,
        node: process.version,
        postgres: postgresVersion,
        redis: redisVersion,
      },
      ...{ bullmq: bullmq.version, ioredis: ioredis.version },
      'graphile-worker': graphileWorker.version,
      'pg-transactional-outbox': pgTransactionalOutbox.version,
    },
    settings: {
      ...settings,
      ...{ appendonly: 'yes', appendfsync: 'everysec', runs: options.runs, quick: options.quick },
    },
  };
}

export function settingText({ machine, versions, settings }: Setting): string {
  const pairs = (of: Readonly<Record<string, unknown>>) =>
    Object.entries(of)
      .map(([name, value]) => `${name} ${value}`)
      .join(', ');
  return (
    `${machine.cpu}, ${machine.cores} cores, ${machine.memoryGiB} GiB, ${machine.system}\n` +
    `${pairs(versions)}\n${pairs(settings)}`
  );
}

export function resultText(result: ScenarioResult): string {
  const table = plainTable(['', 'median', 'least', 'most', '']);
  for (const { name, unit, values } of result.figures) {
    const sorted = [...values].sort((a, b) => a - b);
    const spread = values.length > 1 ? [rounded(sorted[0]), rounded(sorted.at(-1))] : ['', ''];
    table.push([name, rounded(median(values)), ...spread, unit]);
  }
  return [
    `\n${result.scenario}: ${result.about}`,
    table.toString(),
    ...result.notes.map((note) => `  ${note}`),
    `  verified: ${result.verified}`,
    ...(result.kept === false ? ['  NOT KEPT'] : []),
  ].join('\n');
}

export function targetsText(results: readonly RequirementResult[]): string {
  const table = plainTable(['target', '', 'measured', 'of', 'result']);
  for (const it of results) {
    table.push([
      ...[it.what, it.target, it.value === undefined ? '' : rounded(it.value)],
      ...[it.values.map(rounded).join(' '), it.result],
    ]);
  }
  return `\n${table.toString()}`;
}

/** Three digits that count; whole numbers from 100 on. */
export function rounded(value: number | undefined): string {
  if (value === undefined || Number.isNaN(value)) return '–';
  if (Number.isInteger(value)) return value.toLocaleString('en');
  if (Math.abs(value) >= 100) return Math.round(value).toLocaleString('en');
  return value.toPrecision(3);
}

function plainTable(head: string[]): Table.Table {
  return new Table({
    head,
    style: { head: [], border: [], compact: true },
    colAligns: head.map((_, i) => (i >= 1 && i <= 3 ? 'right' : 'left')),
  });
}
