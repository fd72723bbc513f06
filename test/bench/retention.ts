/**
 * What the deletion of a million old rows costs the events that flow meanwhile: commit-to-stream latency under a
 * steady load before, during and after it.
 */
import { randomUUID } from 'node:crypto';
import { loadavg } from 'node:os';
import { Queue } from 'bullmq';
import { type BenchStage, STREAM } from './stage.ts';

const EVENTS_PER_SECOND = 300;
/** Events in one transaction. */
const BATCH = 3;
const QUIET_SECONDS = 20;
const MOST_RATIO = 2;
const DEADLINE_SECONDS = 200;

export const RETENTION_ENV = { RELAY_PUBLISHED_RETENTION: '3600', RELAY_STREAM_MAXLEN: '0' };

const OLD = `published_at < now() - interval '90 minutes'`;

/** @returns whether the 99th percentile stayed below twice what it was */
export async function benchRetention(
  stage: BenchStage,
  options: Readonly<{ rows: number }>,
): Promise<boolean> {
  const { pool, redis } = stage;
  const queue = new Queue('relay-claim', { connection: { url: stage.redisServer.url } });
  await pool.query(
    `INSERT INTO identity.outbox (event_type, aggregate_id, payload, created_at, published, published_at, stream_entry_id)
     SELECT 'UserCreated', gen_random_uuid(), jsonb_build_object(
       'user_id', gen_random_uuid(), 'tenant_id', gen_random_uuid(), 'email', 'user' || i || '@example.com',
       'display_name', 'User ' || i, 'status', 'active', 'created_at', '2026-01-01T00:00:00Z'),
       now() - interval '2 hours', true, now() - interval '2 hours', i || '-0'
     FROM generate_series(1, $1::int) i`,
    [options.rows],
  );
  await pool.query('VACUUM ANALYZE identity.outbox');
  // What the million rows have left to be written must not be in what is measured.
  await pool.query('CHECKPOINT');
  await load(async () => pause(5_000)); // warm
  const before = await load(() => pause(QUIET_SECONDS * 1_000));
  const startedAt = Date.now();
  let seconds = 0;
  const during = await load(async () => {
    await queue.add('prune', {});
    const isOver = async () =>
      (
        await pool.query(`SELECT EXISTS (SELECT FROM identity.outbox WHERE ${OLD}
      AND stream_entry_id IS NOT NULL ORDER BY coalesce(dead_lettered_at, published_at), id LIMIT 1) AS left`)
      ).rows[0].left === false;
    while (!(await isOver())) {
      if (Date.now() - startedAt > DEADLINE_SECONDS * 1_000)
        throw new Error('the rows were not deleted in time');
      await pause(500);
    }
    seconds = (Date.now() - startedAt) / 1_000;
  });
  const after = await load(() => pause(QUIET_SECONDS * 1_000));
  await queue.close();
  await stage.audit();
  for (const [when, it] of Object.entries({ before, during, after })) {
    console.log(
      `  ${when.padEnd(6)} p50 ${it.p50} ms, p99 ${it.p99} ms, at most ${it.max} ms (${it.events} events; ` +
        `${it.checkpoints} checkpoints, ${Math.round(it.wal / 2 ** 20)} MiB of WAL, load ${it.machine.toFixed(1)})`,
    );
  }
  const ratio = during.p99 / ((before.p99 + after.p99) / 2);
  const kept = ratio <= MOST_RATIO;
  console.log(
    `${options.rows} rows deleted in ${seconds.toFixed(0)} s, beside ${EVENTS_PER_SECOND} events/s: p99 ${during.p99} ms, ` +
      `${before.p99} and ${after.p99} ms without, ratio ${ratio.toFixed(2)}: ${kept ? 'kept' : `NOT kept: above ${MOST_RATIO}`}`,
  );
  return kept;

  /** Writes at a steady rate until `work` is done; latencies from the start of each transaction to its entries. */
  async function load(work: () => Promise<void>) {
    const written = await costs();
    const sentAt = new Map<string, number>();
    const begins = Date.now();
    const from = `${begins}-0`;
    let done = false;
    const worked = work().finally(() => {
      done = true;
    });
    const writes: Promise<unknown>[] = [];
    for (let sent = 0; !done; sent += BATCH) {
      await pause(begins + (sent / EVENTS_PER_SECOND) * 1_000 - Date.now());
      const ids = Array.from({ length: BATCH }, () => randomUUID());
      for (const id of ids) sentAt.set(id, Date.now());
      writes.push(
        pool.query(
          `INSERT INTO identity.outbox (event_id, event_type, aggregate_id, payload)
           SELECT id, 'UserCreated', gen_random_uuid(), jsonb_build_object('tenant_id', gen_random_uuid(), 'n', 1)
           FROM unnest($1::uuid[]) id`,
          [ids],
        ),
      );
    }
    await worked;
    await Promise.all(writes);
    await stage.until(`NOT EXISTS (SELECT FROM identity.outbox WHERE NOT published AND next_attempt_at IS NULL)
      AND NOT EXISTS (SELECT FROM identity.outbox WHERE NOT published AND next_attempt_at < 'infinity' ORDER BY next_attempt_at)`);
    const latencies: number[] = [];
    for (const [entryId, fields] of await redis.xrange(STREAM, from, '+')) {
      const sent = sentAt.get(fields[fields.indexOf('event_id') + 1] as string);
      if (sent !== undefined) latencies.push(Number(entryId.split('-')[0]) - sent);
    }
    if (latencies.length !== sentAt.size) throw new Error('an event has no entry');
    latencies.sort((a, b) => a - b);
    const at = (share: number) => latencies[Math.floor(share * (latencies.length - 1))] as number;
    const now = await costs();
    return {
      ...{
        p50: at(0.5),
        p99: at(0.99),
        max: at(1),
        events: latencies.length,
        machine: loadavg()[0] as number,
      },
      ...{ checkpoints: now.checkpoints - written.checkpoints, wal: now.wal - written.wal },
    };
  }

  async function costs(): Promise<{ checkpoints: number; wal: number }> {
    const { rows } = await pool.query(
      `SELECT (SELECT num_done FROM pg_stat_checkpointer)::int AS checkpoints,
              pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::float8 AS wal`,
    );
    return rows[0];
  }
}

const pause = (ms: number) => new Promise<void>((resolve) => setTimeout(resolve, Math.max(0, ms)));
