/**
 * A BullMQ tick that adds a job for each row, and a worker that appends and marks one event at a time. Works from the
 * request `start` until `stop`. It shares no code with the relay: it is what somebody writes who has BullMQ, and rows.
 */
import { Queue, Worker } from 'bullmq';
import { Redis } from 'ioredis';
import pg from 'pg';
import { answerParent, childConfig } from '../contender.ts';
import type { CardConfig } from './card.ts';

type Row = Readonly<{
  id: string;
  event_id: string;
  event_type: string;
  aggregate_type: string;
  aggregate_id: string;
  topic: string;
  payload: Readonly<{ tenant_id: string; correlation_id?: string }>;
  created_at: string;
}>;

const { databaseUrl, redisUrl, tickMs, batch, concurrency, connections } = childConfig<CardConfig>();
const connect = () => new Redis(redisUrl, { maxRetriesPerRequest: null });
const redis = connect();
const pool = new pg.Pool({ connectionString: databaseUrl, max: connections });

const ticks = new Queue('card-tick', { connection: connect() });
const publishing = new Queue<Row>('card-publish', {
  connection: connect(),
  defaultJobOptions: {
    attempts: 6,
    backoff: { type: 'exponential', delay: 60_000 },
    removeOnComplete: true,
  },
});
const idle = { connection: connect(), autorun: false };
const ticker = new Worker('card-tick', claimAll, idle);
const publisher = new Worker<Row>('card-publish', async ({ data }) => publish(data), {
  ...{ ...idle, connection: connect(), concurrency },
});

/** Keeps claiming while there is work: a backlog does not wait for a tick for every batch. */
async function claimAll(): Promise<void> {
  for (let claimed = batch; claimed === batch; ) claimed = await claimOnce();
}

/** Jobs are added before COMMIT. A crash between the two makes duplicates, the other way round it would lose events. */
async function claimOnce(): Promise<number> {
  const client = await pool.connect();
  try {
    await client.query('BEGIN');
    const { rows } = await client.query<Row>(
      `SELECT id, event_id, event_type, aggregate_type, aggregate_id, topic, payload, created_at
         FROM identity.outbox WHERE NOT published AND next_attempt_at IS NULL
        ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED`,
      [batch],
    );
    if (rows.length > 0) {
      await publishing.addBulk(
        rows.map((row) => ({ name: 'publish', data: row, opts: { jobId: row.event_id } })),
      );
      await client.query(
        `UPDATE identity.outbox SET next_attempt_at = now() + interval '5 minutes' WHERE id = ANY ($1::bigint[])`,
        [rows.map((row) => row.id)],
      );
    }
    await client.query('COMMIT');
    return rows.length;
  } catch (error) {
    await client.query('ROLLBACK');
    throw error;
  } finally {
    client.release();
  }
}

async function publish(row: Row): Promise<void> {
  await redis.xadd(row.topic, '*', ...envelopeOf(row));
  await pool.query('UPDATE identity.outbox SET published = true, published_at = now() WHERE id = $1', [
    row.id,
  ]);
}

/** The fields of the relay's own entries. */
function envelopeOf(row: Row): string[] {
  const { tenant_id, correlation_id } = row.payload;
  return [
    ...['event_id', row.event_id, 'event_type', row.event_type, 'topic', row.topic, 'schema_version', '1'],
    ...['occurred_at', row.created_at, 'tenant_id', tenant_id, 'aggregate_id', row.aggregate_id],
    ...['aggregate_type', row.aggregate_type, 'payload', JSON.stringify(row.payload)],
    ...(correlation_id === undefined ? [] : ['correlation_id', correlation_id]),
  ];
}

await answerParent(async (request: 'start' | 'stop') => {
  if (request === 'start') {
    await publisher.resume();
    await ticker.resume();
    await ticks.upsertJobScheduler('tick', { every: tickMs }, { opts: { removeOnComplete: true } });
  } else {
    // A worker that is paused has finished its jobs. The last event is marked a moment before its job has ended.
    await ticker.pause();
    await ticks.removeJobScheduler('tick');
    await publisher.pause();
  }
});
