import type { OutboxEvent } from '../event.ts';

const NO_TENANT = '00000000-0000-0000-0000-000000000000';
const SCHEMA_VERSION = '1';

/** Adds the event's stream entry to `fields`: one flat field per member of the envelope, all strings, as XADD takes them. */
export function pushEnvelope(event: OutboxEvent, fields: unknown[]): void {
  fields.push(
    'event_id',
    event.eventId,
    'event_type',
    event.eventType,
    'topic',
    event.topic,
    'schema_version',
    SCHEMA_VERSION,
    'occurred_at',
    event.occurredAt,
    'tenant_id',
    event.tenantId ?? NO_TENANT,
    'aggregate_id',
    event.aggregateId,
    'aggregate_type',
    event.aggregateType,
    'payload',
    event.payload,
  );
  if (event.correlationId !== null) fields.push('correlation_id', event.correlationId);
  if (event.trace) {
    fields.push('traceparent', event.trace.traceparent);
    if (event.trace.tracestate) fields.push('tracestate', event.trace.tracestate);
  }
}

/** The event's stream entry by itself. */
export function envelopeFields(event: OutboxEvent): string[] {
  const fields: string[] = [];
  pushEnvelope(event, fields);
  return fields;
}

/** The entry of an event that is published once more, marked as such. */
export const replayedFields = (event: OutboxEvent, replayedAt: Date): string[] => [
  ...envelopeFields(event),
  'replayed_at',
  replayedAt.toISOString(),
];

/** The event's entry in the dead-letter stream: its envelope, and why and when it was given up. */
export function deadLetterFields(
  event: OutboxEvent,
  failure: { reason: string; attempts: number; failedAt: Date },
) {
  return [
    ...envelopeFields(event),
    ...(event.withheld ? ['payload_withheld', `the payload is in identity.outbox, id ${event.id}`] : []),
    'original_event_id',
    event.eventId,
    'error_message',
    failure.reason,
    'attempts',
    String(failure.attempts),
    'failed_at',
    failure.failedAt.toISOString(),
    'created_at',
    event.occurredAt,
  ];
}
