/** A Prometheus of a test's own, in a world where time runs faster: it scrapes, evaluates and fires sooner. */
import { randomBytes } from 'node:crypto';
import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { supervise } from '../demo/supervise.ts';
import { atEndOfFile } from './cleanup.ts';
import { folderOfFile } from './servers.ts';

/** What observability/prometheus.yml has. */
const INTERVAL_S = 15;
const SECONDS = { s: 1, m: 60, h: 3_600, d: 86_400 };

/** An alert that fires, with its labels. */
export type Firing = Readonly<Record<string, string> & { alertname: string }>;

export type Prometheus = Readonly<{
  /** Result of an instant query: labels and value of each sample. */
  query(expression: string): Promise<{ labels: Record<string, string>; value: number }[]>;
  firing(): Promise<Firing[]>;
  /** Names of all labels that it has stored. */
  labels(): Promise<string[]>;
}>;

export type Rule = Readonly<{
  alert: string;
  expr: string;
  for?: string;
  annotations: Readonly<Record<string, string>>;
}>;
export type Rules = Readonly<{ groups: readonly Readonly<{ name: string; rules: readonly Rule[] }>[] }>;

/**
 * Rules with each `for`, range and offset that many times shorter. Thresholds stay as they are: they belong to the
 * relay's figures, whose time is the real one.
 */
function shortened({ groups }: Rules, speed: number): Rules {
  const short = (duration: string): string =>
    duration.replaceAll(/(\d+)([smhd])/g, (_, count, unit: keyof typeof SECONDS) => {
      return `${Math.round((Number(count) * SECONDS[unit] * 1_000) / speed)}ms`;
    });
  return {
    groups: groups.map((group) => ({
      ...group,
      rules: group.rules.map((rule) => ({
        ...rule,
        expr: rule.expr.replaceAll(/\[[^\]]+\]|\boffset \w+/g, short),
        ...(rule.for && { for: short(rule.for) }),
      })),
    })),
  };
}

/** The interval of the scrapes is shortened as much, so each range has the samples that it has in production. */
export async function startPrometheus({
  targets,
  rules,
  speed,
}: {
  /** `host:port` of what is scraped as job `relay`. */
  targets: readonly string[];
  rules: Rules;
  speed: number;
}): Promise<Prometheus> {
  const directory = join(await folderOfFile(), `prometheus-${randomBytes(4).toString('hex')}`);
  await mkdir(directory, { recursive: true });
  const interval = `${Math.round((INTERVAL_S * 1_000) / speed)}ms`;
  await writeFile(join(directory, 'rules.yml'), JSON.stringify(shortened(rules, speed)));
  await writeFile(
    join(directory, 'prometheus.yml'),
    JSON.stringify({
      global: { scrape_interval: interval, scrape_timeout: interval, evaluation_interval: interval },
      rule_files: ['rules.yml'],
      scrape_configs: [{ job_name: 'relay', static_configs: [{ targets }] }],
    }),
  );
  const server = await supervise({
    name: 'Prometheus (Debian package "prometheus"; .ci/run installs it)',
    url: (port) => `http://127.0.0.1:${port}`,
    directory,
    command: 'prometheus',
    args: (port) => [
      `--config.file=${join(directory, 'prometheus.yml')}`,
      `--storage.tsdb.path=${join(directory, 'data')}`,
      `--web.listen-address=127.0.0.1:${port}`,
    ],
    identity: {},
    environment: { PATH: process.env.PATH ?? '' },
    stopSignal: 'SIGTERM',
    watchdogSignal: 'KILL',
    isReady: async (_, port) =>
      fetch(`http://127.0.0.1:${port}/-/ready`).then(
        ({ ok }) => ok,
        () => false,
      ),
    portIsTaken: /address already in use/,
    isPassing: /address already in use/,
  });
  atEndOfFile(() => server.kill('SIGKILL'));

  async function ask<T>(path: string): Promise<T> {
    const response = await fetch(`${server.url}/api/v1/${path}`);
    const { data, error } = (await response.json()) as { data: T; error?: string };
    if (error !== undefined) throw new Error(`Prometheus: ${error}`);
    return data;
  }

  async function query(expression: string) {
    type Answer = { result: { metric: Record<string, string>; value: [number, string] }[] };
    const { result } = await ask<Answer>(`query?${new URLSearchParams({ query: expression })}`);
    return result.map(({ metric, value }) => ({ labels: metric, value: Number(value[1]) }));
  }

  return {
    query,
    async firing() {
      type Alert = { state: string; labels: Firing };
      const { alerts } = await ask<{ alerts: Alert[] }>('alerts');
      return alerts.filter(({ state }) => state === 'firing').map(({ labels }) => labels);
    },
    labels: () => ask<string[]>('labels'),
  };
}
