import type { Queryable } from '../../src/connections/database.ts';
import { type SampleEvent, sampleEvent, type UserEventType } from '../demo/sample.ts';

const USER_EVENT_TYPES: readonly string[] = [
  'UserCreated',
  'UserUpdated',
  'UserDisabled',
] satisfies UserEventType[];

/** An event with a payload that is valid for its type; of another type than the three, with that of UserCreated. */
export function anEvent(overrides: Partial<SampleEvent> = {}): SampleEvent {
  const { eventType = 'UserCreated', aggregateId } = overrides;
  const type = USER_EVENT_TYPES.includes(eventType) ? (eventType as UserEventType) : 'UserCreated';
  return { ...sampleEvent(type, aggregateId), ...overrides };
}

/** `count` events, dealt out in turn to `aggregates` aggregates. */
export function someEvents(
  count: number,
  aggregates = count,
  overrides: Partial<SampleEvent> = {},
): SampleEvent[] {
  const users = Array.from({ length: aggregates }, () => anEvent().aggregateId);
  const events: SampleEvent[] = [];
  while (events.length < count) {
    for (const aggregateId of users.slice(0, count - events.length))
      events.push(anEvent({ aggregateId, ...overrides }));
  }
  return events;
}

/** Writes rows as a producer does, in one statement and in the given order; gives their ids back in that order. */
export async function insertEvents(db: Queryable, events: readonly SampleEvent[]): Promise<string[]> {
  const { rows } = await db.query<{ id: string }>(
    `INSERT INTO identity.outbox
            (event_id, event_type, aggregate_type, aggregate_id, payload, topic, created_at)
     SELECT event_id, event_type, aggregate_type, aggregate_id, payload::jsonb, topic, created_at
       FROM unnest($1::uuid[], $2::text[], $3::text[], $4::uuid[], $5::text[], $6::text[], $7::timestamptz[])
            WITH ORDINALITY AS e(event_id, event_type, aggregate_type, aggregate_id, payload, topic, created_at, place)
      ORDER BY place
     RETURNING id::text`,
    [
      events.map((event) => event.eventId),
      events.map((event) => event.eventType),
      events.map((event) => event.aggregateType),
      events.map((event) => event.aggregateId),
      events.map(({ payload }) => (typeof payload === 'string' ? payload : JSON.stringify(payload))),
      events.map((event) => event.topic),
      events.map((event) => event.createdAt.toISOString()),
    ],
  );
  return rows.map((row) => row.id);
}

/** The table as the existing platform's own migrations make it, before the relay adds to it. */
export async function createOldTable(db: Queryable): Promise<void> {
  await db.query(`
    CREATE SCHEMA IF NOT EXISTS identity;
    CREATE TABLE identity.outbox (
      id bigserial PRIMARY KEY,
      event_id uuid NOT NULL UNIQUE DEFAULT gen_random_uuid(),
      event_type text NOT NULL,
      aggregate_type text NOT NULL DEFAULT 'user',
      aggregate_id uuid NOT NULL,
      payload jsonb NOT NULL,
      created_at timestamptz NOT NULL DEFAULT now(),
      published boolean NOT NULL DEFAULT false,
      attempts int NOT NULL DEFAULT 0,
      next_attempt_at timestamptz,
      published_at timestamptz,
      error_message text,
      topic text DEFAULT 'identity.user.v1'
    );
    CREATE INDEX ix_outbox_published ON identity.outbox (published);
    CREATE INDEX ix_outbox_event_type ON identity.outbox (event_type);
    CREATE INDEX ix_outbox_aggregate_id ON identity.outbox (aggregate_id);
    CREATE INDEX ix_outbox_next_attempt_at ON identity.outbox (next_attempt_at) WHERE NOT published;
    CREATE INDEX ix_outbox_created_at ON identity.outbox (created_at);
    CREATE INDEX ix_outbox_topic ON identity.outbox (topic);
  `);
}
