import { execFile } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { expect, inject, test } from 'vitest';
import { parse } from 'yaml';
import { insertEvents, someEvents } from '../support/events.ts';
import { DLQ, STREAM, setStage } from '../support/flow.ts';
import { type Families, familiesOf, selectorsOf, seriesOf, valueIn } from '../support/promql.ts';
import { anchorsOf, tableRows } from '../support/readme.ts';
import { waitFor } from '../support/wait.ts';

const root = inject('root');
const observability = (path: string) => readFileSync(join(root, 'observability', path), 'utf8');

type Rule = { alert: string; expr: string; annotations: Record<string, string> };
const rules: Rule[] = parse(observability('alerts.yml')).groups.flatMap((it: { rules: Rule[] }) => it.rules);

type Panel = { title: string; targets: { expr: string; legendFormat: string }[] };
const panels: Panel[] = JSON.parse(observability('grafana/dashboards/relay.json')).panels;

/** Prometheus' own checker. Of its input nothing comes back but complaints. */
async function promtool(args: readonly string[], input?: string): Promise<{ code: number; output: string }> {
  const running = promisify(execFile)('promtool', args, { cwd: join(root, 'observability') });
  running.child.stdin?.on('error', () => {});
  running.child.stdin?.end(input);
  return running.then(
    ({ stdout, stderr }) => ({ code: 0, output: stdout + stderr }),
    (error: Error & { code: number | string; stdout: string; stderr: string }) => {
      if (error.code === 'ENOENT') {
        throw new Error(
          'promtool is not installed: it is in the Debian package "prometheus"; .ci/run installs it',
        );
      }
      return { code: Number(error.code), output: error.stdout + error.stderr };
    },
  );
}

let text: string;
let metrics: Families;

/** What the other tests look at: events of two topics, retries, dead letters, a group that lags. */
test('/metrics of a pod that has seen everything can be read', async () => {
  const stage = await setStage({
    env: {
      ...{ RELAY_RETRY_BASE_DELAY: '0.1', RELAY_MAX_RETRY_ATTEMPTS: '1', RELAY_POLL_INTERVAL: '0.2' },
      RELAY_STREAM_MAXLEN: '100',
    },
  });
  await stage.redis.set('identity.broken.v1', 'a string');
  await stage.redis.xgroup('CREATE', STREAM, 'mailer', '$', 'MKSTREAM');
  const pod = await stage.pod();
  await insertEvents(stage.pool, [
    ...someEvents(95, 95, { eventType: 'UserUpdated' }),
    ...someEvents(3, 3, { topic: 'identity.broken.v1' }),
  ]);
  await stage.rested();
  await stage.redis.xreadgroup('GROUP', 'mailer', 'one', 'COUNT', 5, 'STREAMS', STREAM, '>');
  const read = async () => {
    const response = await fetch(`${pod.url}/metrics`);
    expect(response.headers.get('content-type')).toMatch(/^text\/plain; version=0\.0\.4/);
    text = await response.text();
    metrics = familiesOf(text);
  };
  // The figures that the pods share may be older than the traffic.
  await stage.redis.del('bull:relay:figures', 'bull:relay:figures:reading');
  await waitFor(
    async () => {
      await read();
      return metrics.get('relay_stream_entries')?.samples.length === 2;
    },
    { what: 'the streams to be known' },
  );

  // A Redis that hangs keeps nobody from knowing that it does.
  stage.server.pause();
  try {
    await waitFor(
      async () => {
        const askedAt = Date.now();
        const hanging = familiesOf(await (await fetch(`${pod.url}/metrics`)).text());
        expect(Date.now() - askedAt).toBeLessThan(10_000);
        return (
          valueIn(hanging, 'relay_ready') === 0 &&
          valueIn(hanging, 'relay_server_healthy', { server: 'redis' }) === 0 &&
          hanging.get('relay_backlog_events')?.samples.length === 0
        );
      },
      // An answer is shared for a second.
      { what: 'metrics that say so' },
    );
  } finally {
    stage.server.resume();
  }
});

test('what has happened is counted, by topic and type', () => {
  const about = { topic: STREAM, event_type: 'UserUpdated' };
  const broken = { topic: 'identity.broken.v1', event_type: 'UserCreated' };
  expect(valueIn(metrics, 'events_processed_total', about)).toBe(95);
  expect(valueIn(metrics, 'relay_commit_to_stream_seconds_count', about)).toBe(95);
  expect(valueIn(metrics, 'processing_duration_seconds_count', about)).toBe(95);
  expect(valueIn(metrics, 'events_processed_total', broken)).toBe(0);
  expect(valueIn(metrics, 'events_failed_total', broken)).toBe(6);
  expect(valueIn(metrics, 'events_dlq_total', broken)).toBe(3);
  expect(valueIn(metrics, 'relay_retries_total', { kind: 'failed', reason: 'wrongtype' })).toBe(6);
  expect(valueIn(metrics, 'batch_size_histogram_sum')).toBe(98);
});

test('what the pod is, and what the relay as a whole is, is told', () => {
  for (const name of ['relay_ready', 'relay_epoch_known', 'relay_build_info'])
    expect(valueIn(metrics, name)).toBe(1);
  for (const server of ['database', 'redis'])
    expect(valueIn(metrics, 'relay_server_healthy', { server })).toBe(1);
  expect(valueIn(metrics, 'relay_tick_age_seconds')).toBeLessThan(10);
  expect(valueIn(metrics, 'relay_backlog_events', { state: 'dead' })).toBe(3);
  expect(valueIn(metrics, 'relay_backlog_events', { state: 'fresh' })).toBe(0);
  expect(valueIn(metrics, 'relay_oldest_waiting_seconds')).toBe(0);
  expect(valueIn(metrics, 'relay_oldest_dead_seconds')).toBeGreaterThan(0);
  expect(valueIn(metrics, 'relay_queue_jobs', { queue: 'publish', state: 'failed' })).toBe(3);
  expect(valueIn(metrics, 'relay_jobs_in_flight')).toBe(0);
  expect(valueIn(metrics, 'relay_jobs_in_flight_limit')).toBe(2_000);
  expect(valueIn(metrics, 'relay_stream_entries', { stream: STREAM })).toBe(95);
  expect(valueIn(metrics, 'relay_stream_entries', { stream: DLQ })).toBe(3);
  const group = { stream: STREAM, group: 'mailer' };
  expect(valueIn(metrics, 'relay_group_lag_entries', group)).toBe(90);
  expect(valueIn(metrics, 'relay_group_pending_entries', group)).toBe(5);
  expect(valueIn(metrics, 'relay_group_at_risk_entries', group)).toBe(5);
});

test('every query of the dashboard and of the rules asks for metrics and labels that there are', () => {
  const series = seriesOf(metrics);
  // Prometheus adds these when it scrapes; and makes `up` and `ALERTS` by itself.
  const byPrometheus = ['instance', 'job'];
  series.set('up', new Set());
  const queries = [
    ...panels.flatMap(({ title, targets }) => targets.map(({ expr }) => [title, expr] as const)),
    ...rules.map(({ alert, expr }) => [alert, expr] as const),
  ];
  expect(queries.length).toBeGreaterThan(50);
  for (const [where, query] of queries) {
    const { selectors, grouping } = selectorsOf(query);
    expect(selectors.length, where).toBeGreaterThan(0);
    const there = new Set(byPrometheus);
    for (const { metric, labels } of selectors) {
      const found = [...series].filter(([name]) => metric.test(name));
      expect(found.length, `${where}: ${metric}`).toBeGreaterThan(0);
      for (const [, known] of found) {
        for (const label of known) there.add(label);
        for (const label of labels)
          expect([...known, ...byPrometheus], `${where}: ${query}`).toContain(label);
      }
    }
    for (const label of grouping) expect([...there], `${where}: ${query}`).toContain(label);
  }
});

/** Prometheus and those who configure it give these to every series that they scrape, or to every alert. */
const THEIRS =
  /^(?:job|instance|exported_.*|__.*|alertname|alertstate|severity|pod|namespace|container|service|endpoint|node|cluster|prometheus)$/;

test('no label is one that Prometheus gives by itself: it would rename ours, and no rule would find it', () => {
  const labels = new Set([...metrics.values()].flatMap((family) => [...family.labels]));
  expect(labels.size).toBeGreaterThan(10);
  expect([...labels].filter((label) => THEIRS.test(label))).toEqual([]);
});

test('le and quantile are those of histograms and summaries, and a histogram counts up to +Inf', () => {
  for (const [name, { type, samples }] of metrics) {
    for (const { name: sample, labels } of samples) {
      expect('le' in labels, sample).toBe(type === 'histogram' && sample === `${name}_bucket`);
      expect('quantile' in labels, sample).toBe(type === 'summary' && sample === name);
    }
    const counts = samples.filter((it) => type === 'histogram' && it.name === `${name}_count`);
    for (const { labels, value } of counts) {
      expect(valueIn(metrics, `${name}_bucket`, { ...labels, le: '+Inf' }), name).toBe(value);
    }
  }
});

test('each text of a rule or a legend uses labels that its query leaves', () => {
  const used = (text: string) =>
    [...text.matchAll(/\{\{ ?(?:\$labels\.)?(\w+)/g)].map(([, label]) => label as string);
  for (const { alert, expr, annotations } of rules) {
    const { grouping } = selectorsOf(expr);
    for (const label of used(Object.values(annotations).join(' ')))
      expect([...grouping, 'instance'], alert).toContain(label);
    expect(annotations.summary, alert).toMatch(/\.$/);
    expect(annotations.action, alert).toMatch(/\.$|\?$/);
  }
  for (const { title, targets } of panels) {
    for (const { expr, legendFormat } of targets) {
      for (const label of used(legendFormat))
        expect([...selectorsOf(expr).grouping, 'instance', 'server'], title).toContain(label);
    }
  }
});

test('every rule leads to a heading of a page', () => {
  for (const { alert, annotations } of rules) {
    const [, page = '', anchor] = /^(docs\/[a-z-]+\.md)#(.+)$/.exec(annotations.runbook ?? '') ?? [];
    expect(anchorsOf(page), alert).toContain(anchor);
  }
});

test('the documentation describes every metric of ours, with its type and its labels, and no other', () => {
  const ofNode = /^(?:process|nodejs)_/;
  const described = tableRows('Metric', 'Type', 'Labels', 'Meaning').map(
    ([names = '', type, labels = '']) => [names.replaceAll('`', ''), type, labels.replaceAll('`', '')],
  );
  const there = [...metrics]
    .filter(([name]) => !ofNode.test(name))
    .map(([name, { type, labels }]) => [
      name,
      type,
      [...labels].filter((label) => label !== 'le').join(', ') || '–',
    ]);
  expect(described.toSorted()).toEqual(there.toSorted());
  expect([...metrics.keys()].filter((name) => ofNode.test(name)).length).toBeGreaterThan(10);
});

test('Prometheus’ own checker accepts the rules, their tests, the configuration and /metrics', async () => {
  const [config, rulesChecked, tested, lint] = await Promise.all([
    promtool(['check', 'config', 'prometheus.yml']),
    promtool(['check', 'rules', 'alerts.yml']),
    promtool(['test', 'rules', 'alerts.test.yml']),
    promtool(['check', 'metrics'], text),
  ]);
  for (const { code, output } of [config, rulesChecked, tested]) expect(code, output).toBe(0);
  // The one name was given to us.
  const complaints = lint.output
    .split('\n')
    .filter((line) => line !== '' && !line.startsWith('batch_size_histogram '));
  expect(complaints).toEqual([]);
  expect((await promtool(['check', 'metrics'], 'no metric\n')).code).not.toBe(0);
});

test('the observability profile of docker-compose.yml is closed to the network, pinned, and finds its files', () => {
  const { services } = parse(readFileSync(join(root, 'docker-compose.yml'), 'utf8'));
  for (const name of ['prometheus', 'grafana']) {
    const { profiles, image, ports, volumes } = services[name];
    expect(profiles).toEqual(['observability']);
    expect(image).toMatch(/:v?\d+\.\d+\.\d+$/);
    for (const port of ports) expect(port).toMatch(/^127\.0\.0\.1:/);
    for (const volume of volumes.filter((it: string) => it.startsWith('./'))) {
      const [path] = volume.split(':');
      expect(existsSync(join(root, path)), path).toBe(true);
    }
  }
  expect(services.grafana.environment.GF_SECURITY_ADMIN_PASSWORD).toMatch(/^\$\{GRAFANA_PASSWORD/);
  const [source] = parse(observability('grafana/provisioning/datasources/prometheus.yml')).datasources;
  const uids = JSON.stringify(panels).match(/"uid":"[^"]+"/g);
  expect(new Set(uids)).toEqual(new Set([`"uid":"${source.uid}"`]));
});
