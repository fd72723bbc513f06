import { randomUUID } from 'node:crypto';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import { expect, test } from 'vitest';
import type { OutboxEvent } from '../../src/event.ts';
import { createMetrics, type MetricsSources } from '../../src/telemetry/metrics.ts';
import { familiesOf, valueIn } from '../support/promql.ts';
import { aClaimedEvent } from '../support/stages.ts';

const never = new Promise<never>(() => {});

const SOURCES: MetricsSources = {
  ...{
    inProgress: () => 0,
    tickSecondsAgo: () => 1,
    epochIsKnown: () => true,
    clockAheadMs: () => 0,
    isRunning: () => true,
  },
  ready: async () => ({ database: { status: 'healthy' }, redis: { status: 'degraded' } }),
  servers: ['database', 'redis'],
  figures: async () => undefined,
};

function metricsWith({
  prefixed = false,
  ...sources
}: Partial<MetricsSources> & { prefixed?: boolean } = {}) {
  const metrics = createMetrics({
    ...{ prefixed, version: '1.2.3', concurrency: 200, maxInFlight: 1_000 },
    ...{ streamMaxLen: 100_000, dlqStreamName: 'dlq', dlqMaxLen: 10_000 },
  });
  const all = { ...SOURCES, ...sources };
  return { ...metrics, render: () => metrics.render(all) };
}

const ENTRY = `${Date.parse('2026-01-31T12:00:01.500Z')}-0`;
const event = (overrides: Partial<OutboxEvent> = {}) =>
  aClaimedEvent({ occurredAt: '2026-01-31T12:00:00.000000Z', ...overrides });

function throwAt(metrics: ReturnType<typeof metricsWith>, count: number): void {
  const any = event();
  for (let i = 0; i < count; i++) {
    const some = { ...any, topic: `topic.${randomUUID()}`, eventType: `${randomUUID()}${'x'.repeat(1_000)}` };
    metrics.published(some, ENTRY);
    metrics.attempted(some, { kind: 'retry', reason: `WRONGTYPE ${randomUUID()}` }, 0.001);
    metrics.attempted(some, { kind: 'postpone', reason: randomUUID() }, 0.001);
    metrics.deadLettered(some);
  }
}

test('10,000 topics and types make a hundred series of each metric, and one for the others', async () => {
  const metrics = metricsWith();
  throwAt(metrics, 10_000);
  const families = familiesOf(await metrics.render());
  const others = { topic: 'other', event_type: 'other' };
  for (const name of ['events_processed_total', 'events_failed_total', 'events_dlq_total']) {
    expect(families.get(name)?.samples).toHaveLength(101);
    expect(valueIn(families, name, others)).toBe(9_900);
  }
  for (const name of ['processing_duration_seconds', 'relay_commit_to_stream_seconds']) {
    expect(families.get(name)?.samples.length).toBeLessThan(101 * 20);
  }
  expect(valueIn(families, 'relay_commit_to_stream_seconds_count', others)).toBe(9_900);
  expect(families.get('relay_retries_total')?.samples.length).toBeLessThan(30);
  expect(valueIn(families, 'relay_retries_total', { kind: 'failed', reason: 'wrongtype' })).toBe(10_000);
});

test('more topics and types cost no more memory', () => {
  setFlagsFromString('--expose-gc');
  const collect = runInNewContext('gc') as () => void;
  const metrics = metricsWith();
  throwAt(metrics, 1_000);
  collect();
  const before = process.memoryUsage().heapUsed;
  throwAt(metrics, 20_000);
  collect();
  // Their names alone are 20 MB.
  expect(process.memoryUsage().heapUsed - before).toBeLessThan(4_000_000);
  metrics.deadLettered(event());
});

test('/metrics answers within 2 s although neither the servers nor the figures do, and leaves these out', async () => {
  const metrics = metricsWith({ figures: () => never, ready: () => never });
  const startedAt = Date.now();
  const families = familiesOf(await metrics.render());
  expect(Date.now() - startedAt).toBeLessThan(10_000);
  expect(valueIn(families, 'relay_ready')).toBe(0);
  expect(valueIn(families, 'relay_server_healthy', { server: 'redis' })).toBe(0);
  for (const name of ['relay_oldest_waiting_seconds', 'relay_backlog_events', 'relay_figures_age_seconds'])
    expect(families.get(name)?.samples).toEqual([]);
});

test('each server has its own series: with two, also the Redis of the streams, whether it answers or not', async () => {
  const unhealthy = { status: 'unhealthy' } as const;
  let checks: Record<string, { status: 'healthy' | 'unhealthy' }> = { stream_redis: unhealthy };
  const metrics = metricsWith({
    ready: async () => ({ database: { status: 'healthy' }, redis: { status: 'healthy' }, ...checks }),
    servers: ['database', 'redis', 'stream_redis'],
  });
  const healthOf = async () => {
    const families = familiesOf(await metrics.render());
    return ['database', 'redis', 'stream_redis'].map((server) =>
      valueIn(families, 'relay_server_healthy', { server }),
    );
  };
  expect(await healthOf()).toEqual([1, 1, 0]);
  checks = { stream_redis: { status: 'healthy' } };
  expect(await healthOf()).toEqual([1, 1, 1]);
});

test('figures that were there and are not any more are left out again', async () => {
  let answers = true;
  const backlog = {
    ...{ fresh: 1, leased: 0, retrying: 0, due: 0, parked: 0, dead: 0, limit: 100_000 },
    oldestSeconds: { waiting: 5, retrying: null, parked: null, dead: null },
  };
  const metrics = metricsWith({
    figures: async () => (answers ? { figures: { backlog, problems: [] }, ageSeconds: 2 } : undefined),
  });
  const found = familiesOf(await metrics.render());
  expect(valueIn(found, 'relay_oldest_waiting_seconds')).toBe(5);
  expect(valueIn(found, 'relay_oldest_retrying_seconds')).toBe(0);
  // Redis did not answer: nothing is said of its queues.
  expect(found.get('relay_jobs_in_flight')?.samples).toEqual([]);
  answers = false;
  const then = familiesOf(await metrics.render());
  expect(then.get('relay_oldest_waiting_seconds')?.samples).toEqual([]);
  expect(then.get('relay_backlog_events')?.samples).toEqual([]);
});

test('the latency is from the row’s creation to the entry’s id; rows created at infinity have none', async () => {
  const metrics = metricsWith();
  metrics.published(event(), ENTRY);
  metrics.published(event({ occurredAt: 'infinity' }), ENTRY);
  // A database whose clock is ahead.
  metrics.published(event({ occurredAt: '2026-01-31T12:00:09.000000Z' }), ENTRY);
  const families = familiesOf(await metrics.render());
  expect(valueIn(families, 'relay_commit_to_stream_seconds_sum')).toBe(1.5);
  expect(valueIn(families, 'relay_commit_to_stream_seconds_count')).toBe(2);
  expect(valueIn(families, 'events_processed_total')).toBe(3);
});

test.each([
  ['OOM command not allowed when used memory > maxmemory', 'oom'],
  ['NOPERM this user has no permissions', 'noperm'],
  ['ACL failure in script: no permission', 'noperm'],
  ["READONLY You can't write against a read only replica.", 'readonly'],
  ['no answer within 10000 ms', 'timeout'],
  ['Command timed out', 'timeout'],
  ['it could not begin in time: events that are published alone went first', 'timeout'],
  ['connect ECONNREFUSED 127.0.0.1:6379', 'connection'],
  ["Stream isn't writeable and enableOfflineQueue options is false", 'connection'],
  ['Redis may have lost entries; nothing is appended until table and streams were compared', 'resync'],
  ['appended, but its row could not be marked: Query read timeout', 'acknowledge'],
  ['something else', 'other'],
])('the reason %s is one of few', async (reason, label) => {
  const metrics = metricsWith();
  metrics.attempted(event(), { kind: 'postpone', reason }, 0.01);
  const families = familiesOf(await metrics.render());
  expect(valueIn(families, 'relay_retries_total', { kind: 'postponed', reason: label })).toBe(1);
  expect(valueIn(families, 'events_failed_total')).toBe(0);
});

test('the five metrics of the plan have a prefix if it is wanted', async () => {
  const metrics = metricsWith({ prefixed: true });
  metrics.published(event(), ENTRY);
  const names = [...familiesOf(await metrics.render()).keys()];
  const five = ['events_processed_total', 'events_failed_total', 'events_dlq_total'];
  for (const name of [...five, 'processing_duration_seconds', 'batch_size_histogram']) {
    expect(names).toContain(`relay_${name}`);
    expect(names).not.toContain(name);
  }
});
