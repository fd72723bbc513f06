import type { Telemetry } from 'bullmq';
import type { AppendOutcome, Attempt, OutboxEvent } from '../event.ts';

/**
 * What the steps of an event's way tell to its trace. Each hands on the event with the context of its own span, so
 * that whatever comes next (a job, an attempt, an entry of a stream) is in the same trace.
 */
export type Tracing = Readonly<{
  /** Events that were claimed get their jobs: one span each. */
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

/** Every event as it is: what its row says of a trace goes into its entry unchanged. */
export const untraced: Tracing = {
  claim: (events, add) => add(events),
  publish: (event, _attempt, work) => work(event),
  append: (event, work) => work(event),
  deadLetter: (event, _failure, work) => work(event),
};

/** Whether the standard variables ask for traces: an exporter is named, or where to send them. */
export function tracesWanted(env: Readonly<Record<string, string | undefined>>): boolean {
  const value = (name: string) => env[name]?.trim() ?? '';
  if (value('OTEL_SDK_DISABLED').toLowerCase() === 'true') return false;
  const exporter = value('OTEL_TRACES_EXPORTER');
  if (exporter !== '') return exporter !== 'none';
  return value('OTEL_EXPORTER_OTLP_ENDPOINT') !== '' || value('OTEL_EXPORTER_OTLP_TRACES_ENDPOINT') !== '';
}
