import type { Telemetry } from 'bullmq';
import type { AppendOutcome, Attempt, OutboxEvent } from '../event.ts';

/**
 * Wraps each step of an event in a span. `work` gets the event with the context of that span, so that the next step (job,
 * attempt, stream entry) is in the same trace.
 */
export type Tracing = Readonly<{
  /** Adding the jobs of claimed events: a span for each event. */
  claim(
    events: readonly OutboxEvent[],
    add: (traced: readonly OutboxEvent[]) => Promise<void>,
  ): Promise<void>;
  /** One attempt to publish, from its job to its acknowledgement; `attempt` counts from 1. */
  publish(
    event: OutboxEvent,
    attempt: number,
    work: (traced: OutboxEvent) => Promise<Attempt>,
  ): Promise<Attempt>;
  append(event: OutboxEvent, work: (traced: OutboxEvent) => Promise<AppendOutcome>): Promise<AppendOutcome>;
  deadLetter<T extends Readonly<{ status: string }>>(
    event: OutboxEvent,
    failure: Readonly<{ reason: string; attempts: number }>,
    work: (traced: OutboxEvent) => Promise<T>,
  ): Promise<T>;
  /** BullMQ's own spans of the publish jobs. */
  jobs?: Telemetry;
}>;

/** No spans. A trace context in the row still reaches the entry, unchanged. */
export const untraced: Tracing = {
  claim: (events, add) => add(events),
  publish: (event, _attempt, work) => work(event),
  append: (event, work) => work(event),
  deadLetter: (event, _failure, work) => work(event),
};

/** Whether the standard variables switch traces on, by an exporter or an endpoint. */
export function tracesWanted(env: Readonly<Record<string, string | undefined>>): boolean {
  const value = (name: string) => env[name]?.trim() ?? '';
  if (value('OTEL_SDK_DISABLED').toLowerCase() === 'true') return false;
  const exporter = value('OTEL_TRACES_EXPORTER');
  if (exporter !== '') return exporter !== 'none';
  return value('OTEL_EXPORTER_OTLP_ENDPOINT') !== '' || value('OTEL_EXPORTER_OTLP_TRACES_ENDPOINT') !== '';
}

/**
 * Whether a program has registered a tracer. OpenTelemetry itself is not loaded for the question: its API keeps what is
 * registered under this symbol, so that several copies of it share one.
 */
export function isTracerRegistered(): boolean {
  const registered = (globalThis as Record<symbol, unknown>)[Symbol.for('opentelemetry.js.api.1')];
  return (registered as { trace?: unknown } | undefined)?.trace !== undefined;
}
