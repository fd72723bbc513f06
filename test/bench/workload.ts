/** The events that are drained: who they belong to, and how large they are. */
import type pg from 'pg';

export type Workload = Readonly<{
  events: number;
  /** Which the events are dealt out to, in turn. */
  aggregates: number;
  /** Size of a payload as JSON text, about; default 250. */
  payloadBytes?: number;
  /** Makes aggregates of the same number different ones. */
  of?: string;
}>;

/** Of a payload without a display name. */
const BARE_BYTES = 215;

/** $1 events, $2 aggregates, $3 what their ids are made of, $4 bytes of the display name: hardly to be compressed. */
const PAYLOAD = `jsonb_build_object(
  'user_id', md5($3::text || i % $2::int)::uuid, 'tenant_id', '11111111-1111-1111-1111-111111111111',
  'email', 'user' || i || '@example.com', 'status', 'active', 'created_at', '2026-01-01T00:00:00Z',
  'display_name', left((SELECT string_agg(md5(i::text || '.' || k), '') FROM generate_series(0, $4::int / 32) k), $4))`;

const values = (workload: Workload) => {
  const { events, aggregates, payloadBytes = 250, of = '' } = workload;
  return [events, aggregates, of, Math.max(0, payloadBytes - BARE_BYTES)];
};

/** Into `identity.outbox`, in one transaction: nobody sees anything of it before all of it is there. */
export async function fillOutbox(pool: pg.Pool, workload: Workload, topic: string): Promise<void> {
  await pool.query(
    `INSERT INTO identity.outbox (event_type, aggregate_id, payload, topic)
     SELECT 'UserCreated', md5($3::text || i % $2::int)::uuid, ${PAYLOAD}, $5 FROM generate_series(1, $1::int) i`,
    [...values(workload), topic],
  );
}

/** Into the outbox of pg-transactional-outbox; a segment is what it keeps in order. */
export async function fillSegments(pool: pg.Pool, workload: Workload): Promise<void> {
  await pool.query(
    `INSERT INTO outbox (id, aggregate_type, aggregate_id, message_type, segment, payload, created_at)
     SELECT gen_random_uuid(), 'user', md5($3::text || i % $2::int)::uuid, 'UserCreated', md5($3::text || i % $2::int),
            ${PAYLOAD}, now() + i * interval '1 microsecond' FROM generate_series(1, $1::int) i`,
    values(workload),
  );
}

/** The payload of an event's job in graphile-worker. */
export type EventJob = Readonly<{
  eventId: string;
  eventType: string;
  aggregateType: string;
  aggregateId: string;
  occurredAt: string;
  payload: Readonly<{ tenant_id: string }>;
}>;

export type AddedJob = Readonly<{ jobId: string; eventId: string; aggregate: string }>;

/**
 * Into graphile-worker, by its own function, each `run_at` a microsecond after the one before.
 * It keeps a named queue in order; an aggregate's is named by the first `queueDigits` of its id, 0: it has none.
 *
 * @returns what was added, in the order of `run_at`
 */
export async function fillJobs(pool: pg.Pool, workload: Workload, queueDigits: number): Promise<AddedJob[]> {
  const aggregate = 'md5($3::text || i % $2::int)';
  const { rows } = await pool.query<AddedJob>(
    `SELECT job.id::text AS "jobId", job.payload->>'eventId' AS "eventId", job.payload->>'aggregateId' AS aggregate
       FROM (SELECT array_agg(ROW (
                      'publish',
                      json_build_object(
                        'eventId', gen_random_uuid(), 'eventType', 'UserCreated', 'aggregateType', 'user',
                        'aggregateId', ${aggregate}::uuid, 'occurredAt', now(), 'payload', ${PAYLOAD}),
                      ${queueDigits > 0 ? `left(${aggregate}, ${queueDigits})` : 'NULL'}, now() - ($1::int - i) * interval '1 microsecond',
                      NULL, NULL, NULL, NULL)::graphile_worker.job_spec) AS specs
               FROM generate_series(1, $1::int) i) AS backlog, graphile_worker.add_jobs(specs) AS job
      ORDER BY job.run_at`,
    values(workload),
  );
  return rows;
}

/** Of the table that the relay takes over. Each update of a row writes most of them; a planner may prefer one, to its cost. */
export const PLATFORM_INDEXES = `
  CREATE INDEX ix_outbox_published ON identity.outbox (published);
  CREATE INDEX ix_outbox_event_type ON identity.outbox (event_type);
  CREATE INDEX ix_outbox_aggregate_id ON identity.outbox (aggregate_id);
  CREATE INDEX ix_outbox_next_attempt_at ON identity.outbox (next_attempt_at) WHERE NOT published;
  CREATE INDEX ix_outbox_created_at ON identity.outbox (created_at);
  CREATE INDEX ix_outbox_topic ON identity.outbox (topic);`;
