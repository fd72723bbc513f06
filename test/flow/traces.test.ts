import { context, propagation, trace } from '@opentelemetry/api';
import { tracing } from '@opentelemetry/sdk-node';
import { expect, onTestFinished, test } from 'vitest';
import { createRelay } from '../../src/index.ts';
import { freePort } from '../demo/supervise.ts';
import { type CollectedSpan, startCollector } from '../support/collector.ts';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { DLQ, type Entry, STREAM, setStage } from '../support/flow.ts';
import { silent } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

/** Topics whose keys hold a string: Redis refuses every append. One is mended in time. */
const MENDED = 'identity.mended.v1';
const BROKEN = 'identity.broken.v1';
const TRACE = '4bf92f3577b34da6a3ce929d0e0e4736';
const SPAN = '00f067aa0ba902b7';
/** Batches of spans that a collector refuses. */
const REFUSALS = 20;
const PARENT = `00-${TRACE}-${SPAN}-01`;

const entryOf = (entries: Entry[], eventId: string) =>
  entries.find(({ fields }) => fields.event_id === eventId)?.fields as Record<string, string>;
const contextOf = (span: CollectedSpan) => `00-${span.traceId}-${span.spanId}-01`;

test('an event is one trace: from its producer by way of claim, failed attempt and retry to its entry, or its dead letter', async () => {
  const stage = await setStage({ env: { RELAY_RETRY_BASE_DELAY: '0.5', RELAY_MAX_RETRY_ATTEMPTS: '2' } });
  const collector = await startCollector();
  await stage.pool.query('ALTER TABLE identity.outbox ADD COLUMN headers jsonb');
  await stage.redis.mset(MENDED, 'a string', BROKEN, 'a string');
  // Spans are sent when the pod stops, at the earliest.
  const prometheusPort = String(await freePort());
  const pod = await stage.pod({
    ...{ ...collector.env, OTEL_BSP_SCHEDULE_DELAY: '60000' },
    ...{ OTEL_METRICS_EXPORTER: 'prometheus', OTEL_EXPORTER_PROMETHEUS_PORT: prometheusPort },
  });
  const retried = anEvent({ topic: MENDED });
  const dead = anEvent({ topic: BROKEN });
  const unsampled = anEvent({
    payload: JSON.stringify({ secret: 's3cret', metadata: { traceparent: `00-${TRACE}-${SPAN}-00` } }),
  });
  const client = await stage.pool.connect();
  try {
    await client.query('BEGIN');
    await insertEvents(client, [retried, dead, unsampled]);
    const headers = { traceparent: PARENT, tracestate: 'vendor=1' };
    await client.query('UPDATE identity.outbox SET headers = $2 WHERE event_id = $1', [
      retried.eventId,
      headers,
    ]);
    await client.query('COMMIT');
  } finally {
    client.release();
  }
  await waitFor(async () => (await stage.row(retried.eventId)).attempts > 0, { what: 'a failed attempt' });
  await stage.redis.del(MENDED);
  await stage.rested();
  await waitFor(async () => (await stage.entries(DLQ)).length === 1, { what: 'the dead letter' });
  await expect(fetch(`http://127.0.0.1:${prometheusPort}`)).rejects.toThrow();
  expect(await pod.kill()).toMatchObject({ code: 0 });

  // Of claim and two attempts, each with its append, one span each, in the producer's trace.
  const { spans } = collector;
  const named = (name: string, event: { eventId: string }) =>
    spans.filter((it) => it.name === name && it.attributes['messaging.message.id'] === event.eventId);
  const runsOf = (traceId: string) =>
    spans.filter((it) => it.name === 'process relay-publish' && it.traceId === traceId);
  const one = (found: CollectedSpan[]) => {
    expect(found).toHaveLength(1);
    return found[0] as CollectedSpan;
  };
  const claimed = one(named('claim', retried));
  expect(claimed).toMatchObject({
    ...{ traceId: TRACE, parentSpanId: SPAN, service: 'relay-service', status: 0 },
    attributes: {
      'messaging.system': 'redis',
      'messaging.operation.type': 'create',
      'messaging.destination.name': MENDED,
      'relay.outbox.id': (await stage.row(retried.eventId)).id,
      'relay.event.type': retried.eventType,
    },
  });
  const runs = runsOf(TRACE);
  expect(runs.map((it) => it.parentSpanId)).toEqual([claimed.spanId, claimed.spanId]);
  const attempts = named('publish', retried);
  expect(attempts.map((it) => it.parentSpanId)).toEqual(runs.map((it) => it.spanId));
  expect(
    attempts.map((it) => [it.attributes['relay.attempt'], it.attributes['relay.outcome'], it.status]),
  ).toEqual([
    [1, 'retry', 2],
    [2, 'done', 0],
  ]);
  expect(attempts[0]?.attributes['error.type']).toBe('WRONGTYPE');
  const appends = named('append', retried);
  expect(appends.map((it) => it.parentSpanId)).toEqual(attempts.map((it) => it.spanId));
  expect(appends.map((it) => it.status)).toEqual([2, 0]);
  const mended = await stage.entries(MENDED);
  expect(entryOf(mended, retried.eventId)).toMatchObject({
    traceparent: contextOf(appends[1] as CollectedSpan),
    tracestate: 'vendor=1',
  });
  expect(appends[1]?.attributes['relay.entry.id']).toBe(mended[0]?.entryId);

  // Nobody named a trace for this one: it has the event's own id.
  const traceId = dead.eventId.replaceAll('-', '');
  const deadClaim = one(named('claim', dead));
  expect(deadClaim).toMatchObject({ traceId, parentSpanId: '' });
  expect(named('publish', dead).map((it) => [it.traceId, it.attributes['relay.outcome']])).toEqual(
    Array(3).fill([traceId, 'retry']),
  );
  const buried = one(named('dead letter', dead));
  expect(buried).toMatchObject({ traceId, parentSpanId: deadClaim.spanId, status: 2 });
  expect(buried.attributes).toMatchObject({ 'messaging.destination.name': DLQ, 'relay.attempt': 3 });
  expect(entryOf(await stage.entries(DLQ), dead.eventId).traceparent).toBe(contextOf(buried));

  // Its producer does not want this one to be seen.
  expect(entryOf(await stage.entries(), unsampled.eventId).traceparent).toMatch(
    new RegExp(`^00-${TRACE}-(?!${SPAN})[0-9a-f]{16}-00$`),
  );
  expect(spans.filter((it) => it.attributes['messaging.message.id'] === unsampled.eventId)).toEqual([]);

  // Nothing else: no trace but the two, neither metrics nor logs, no payload.
  expect([...new Set(spans.map((it) => it.traceId))].toSorted()).toEqual([TRACE, traceId].toSorted());
  expect([...collector.paths]).toEqual(['/v1/traces']);
  expect(JSON.stringify(spans)).not.toContain('s3cret');
});

test('without tracing, what a row says of its trace is passed on as it is, in what is restored too, and else nothing', async () => {
  const stage = await setStage();
  await stage.redis.set(BROKEN, 'a string');
  await stage.pod({ RELAY_MAX_RETRY_ATTEMPTS: '0' });
  const metadata = { traceparent: PARENT, tracestate: 'vendor=1' };
  const payload = JSON.stringify({ metadata });
  const [plain, traced, dead] = [anEvent(), anEvent({ payload }), anEvent({ payload, topic: BROKEN })];
  await insertEvents(stage.pool, [plain]);
  await stage.rested();
  await insertEvents(stage.pool, [traced, dead]);
  await stage.rested();
  const entries = await stage.entries();
  expect(Object.keys(entryOf(entries, plain.eventId))).toEqual([
    ...['event_id', 'event_type', 'topic', 'schema_version', 'occurred_at'],
    ...['tenant_id', 'aggregate_id', 'aggregate_type', 'payload'],
  ]);
  expect(entryOf(entries, traced.eventId)).toMatchObject(metadata);
  expect(entryOf(await stage.entries(DLQ), dead.eventId)).toMatchObject(metadata);

  await stage.redis.xdel(STREAM, (await stage.row(traced.eventId)).stream_entry_id as string);
  expect(await stage.command(['verify', '--since', '1h', '--repair'])).toMatchObject({ code: 0 });
  await stage.rested();
  expect(entryOf(await stage.entries(), traced.eventId)).toMatchObject(metadata);
});

test('a collector that refuses, then never answers, costs nothing but the spans: events flow, the log is quiet, the pod stops in time', async () => {
  const stage = await setStage();
  const collector = await startCollector({ refusals: REFUSALS });
  const pod = await stage.pod({
    ...collector.env,
    // Spans do not wait, and each answer is waited for longer than anybody may.
    ...{
      OTEL_BSP_SCHEDULE_DELAY: '10',
      OTEL_BSP_EXPORT_TIMEOUT: '60000',
      OTEL_EXPORTER_OTLP_TIMEOUT: '60000',
    },
    ...{ OTEL_BSP_MAX_QUEUE_SIZE: '64', OTEL_BSP_MAX_EXPORT_BATCH_SIZE: '8' },
  });
  await insertEvents(stage.pool, someEvents(500));
  await stage.rested();
  await stage.expectPromisesHeld();
  await waitFor(() => collector.requests() > REFUSALS, { what: 'all refusals' });
  const stoppedAt = Date.now();
  expect(await pod.kill()).toMatchObject({ code: 0 });
  expect(Date.now() - stoppedAt).toBeLessThan(10_000);
  const warnings = pod.logs().filter(({ level }) => level === 'warn' || level === 'error');
  expect(warnings.map(({ msg }) => msg)).toContain('the last traces could not be sent in time');
  expect(warnings.map(({ msg }) => msg)).toContain(
    'traces are not sent as they should be; the relay goes on without',
  );
  expect(warnings.length).toBeLessThan(REFUSALS / 2);
});

test('an embedded relay makes its spans by the tracer that its host has registered, unless it is told not to', async () => {
  const stage = await setStage();
  const exporter = new tracing.InMemorySpanExporter();
  const provider = new tracing.BasicTracerProvider({
    spanProcessors: [new tracing.SimpleSpanProcessor(exporter)],
  });
  trace.setGlobalTracerProvider(provider);
  onTestFinished(() => {
    trace.disable();
    context.disable();
    propagation.disable();
  });
  const publishOne = async (deps: { tracing?: boolean }) => {
    const relay = createRelay(stage.config(), { logger: silent, http: false, ...deps });
    onTestFinished(() => relay.stop());
    await relay.start();
    const event = anEvent({ payload: JSON.stringify({ metadata: { traceparent: PARENT } }) });
    await insertEvents(stage.pool, [event]);
    await stage.rested();
    await relay.stop();
    return entryOf(await stage.entries(), event.eventId).traceparent;
  };
  expect(await publishOne({ tracing: false })).toBe(PARENT);
  expect(exporter.getFinishedSpans()).toEqual([]);
  const traceparent = await publishOne({});
  const names = exporter.getFinishedSpans().map((it) => it.name);
  expect(names.toSorted()).toEqual(['append', 'claim', 'process relay-publish', 'publish']);
  const append = exporter.getFinishedSpans().find((it) => it.name === 'append');
  expect(traceparent).toBe(`00-${TRACE}-${append?.spanContext().spanId}-01`);
});
