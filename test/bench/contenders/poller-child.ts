/** One loop: takes rows, appends them in one pipeline, marks them. Runs from the request `start` until `stop`. */
import { setTimeout as delay } from 'node:timers/promises';
import { Redis } from 'ioredis';
import pg from 'pg';
import type { OutboxEvent } from '../../../src/event.ts';
import { envelopeFields } from '../../../src/streams/envelope.ts';
import { answerParent, childConfig } from '../contender.ts';
import type { PollerConfig } from './poller.ts';

const { databaseUrl, redisUrl, batch, idleMs } = childConfig<PollerConfig>();
const redis = new Redis(redisUrl);
const client = new pg.Client(databaseUrl);
await client.connect();

const TAKE = `
  SELECT id::text AS "id", event_id AS "eventId", event_type AS "eventType", aggregate_type AS "aggregateType",
         aggregate_id AS "aggregateId", topic, payload::text AS payload, payload->>'tenant_id' AS "tenantId",
         payload->>'correlation_id' AS "correlationId",
         to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS "occurredAt"
    FROM identity.outbox WHERE NOT published ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED`;
const MARK =
  'UPDATE identity.outbox SET published = true, published_at = clock_timestamp() WHERE id = ANY ($1::bigint[])';

async function pollOnce(): Promise<number> {
  await client.query('BEGIN');
  const { rows } = await client.query<OutboxEvent>({ name: 'take', text: TAKE, values: [batch] });
  if (rows.length > 0) {
    const pipeline = redis.pipeline();
    for (const event of rows) pipeline.xadd(event.topic, '*', ...envelopeFields(event));
    for (const [error, id] of (await pipeline.exec()) ?? []) {
      if (error || typeof id !== 'string') throw error ?? new Error('an append has no id');
    }
    await client.query({ name: 'mark', text: MARK, values: [rows.map((row) => row.id)] });
  }
  await client.query('COMMIT');
  return rows.length;
}

let isOn = false;
let ended = Promise.resolve();

async function poll(): Promise<void> {
  while (isOn) if ((await pollOnce()) === 0) await delay(idleMs);
}

await answerParent(async (request: 'start' | 'stop') => {
  isOn = request === 'start';
  if (isOn) ended = poll();
  else await ended;
});
