/**
 * Blocked aggregates cost nothing: the throughput of 20,000 aggregates beside one that is poisonous and has 100,000
 * rows parked, and one whose 100,000 rows flow one by one; and, in turns, without the two.
 */
import { Queue } from 'bullmq';
import { type BenchStage, median, NOTHING_FRESH, STREAM } from './stage.ts';

const BLOCKED_ROWS = 100_000;
/** No stream: its events are refused, and retried after a minute and more. */
const POISONOUS_TOPIC = 'bench:no-stream';
const MOST_COST = 0.2;
/** Which a planner may prefer to ours, to its cost. */
const PLATFORM_INDEXES = `
  CREATE INDEX ix_outbox_published ON identity.outbox (published);
  CREATE INDEX ix_outbox_event_type ON identity.outbox (event_type);
  CREATE INDEX ix_outbox_aggregate_id ON identity.outbox (aggregate_id);
  CREATE INDEX ix_outbox_next_attempt_at ON identity.outbox (next_attempt_at) WHERE NOT published;
  CREATE INDEX ix_outbox_created_at ON identity.outbox (created_at);
  CREATE INDEX ix_outbox_topic ON identity.outbox (topic);`;

export const BLOCKED_ENV = { RELAY_STREAM_MAXLEN: '0' };

/** @returns whether the others kept their throughput */
export async function benchBlocked(
  stage: BenchStage,
  options: Readonly<{ events: number; runs: number }>,
): Promise<boolean> {
  const { pool, redis, redisServer } = stage;
  const { events, runs } = options;
  const publishQueue = new Queue('relay-publish', { connection: { url: redisServer.url } });
  await redis.set(POISONOUS_TOPIC, 'a string');
  await pool.query(PLATFORM_INDEXES);
  await drainOthers(new Set()); // warm
  const ratios: number[] = [];
  let without = await alone();
  for (let run = 1; run <= runs; run++) {
    const beside = await besideBlocked();
    const after = await alone();
    const ratio = beside.rate / ((without + after) / 2);
    ratios.push(ratio);
    console.log(
      `  run ${run}: ${Math.round(beside.rate)}/s beside the two, ${Math.round(without)} and ${Math.round(after)}/s without, ` +
        `ratio ${ratio.toFixed(2)}; the hot one flowed at ${Math.round(beside.hotRate)}/s, ${beside.parked} rows were parked`,
    );
    without = after;
  }
  await publishQueue.close();
  const kept = median(ratios) >= 1 - MOST_COST;
  console.log(
    `others beside ${BLOCKED_ROWS} blocked and ${BLOCKED_ROWS} flowing rows: ratio ${median(ratios).toFixed(2)} ` +
      `(median; ${ratios.map((it) => it.toFixed(2)).join(', ')}), ${kept ? 'kept' : `NOT kept: below ${1 - MOST_COST}`}`,
  );
  return kept;

  async function alone(): Promise<number> {
    await clear();
    return drainOthers(new Set());
  }

  async function besideBlocked(): Promise<{ rate: number; hotRate: number; parked: number }> {
    await clear();
    await stage.insert(BLOCKED_ROWS, 1, 'poisonous');
    await pool.query('UPDATE identity.outbox SET topic = $1', [POISONOUS_TOPIC]);
    await stage.insert(BLOCKED_ROWS, 1, 'hot');
    await stage.until(NOTHING_FRESH);
    // A planner that knows the backlog has other ideas than one that does not.
    await pool.query('ANALYZE identity.outbox');
    const blocked = await pool.query<{ event_id: string }>('SELECT event_id FROM identity.outbox');
    let hotRate = 0;
    const flowed = `SELECT count(*)::int AS n FROM identity.outbox WHERE published AND aggregate_id = md5('hot0')::uuid`;
    const before = (await pool.query(flowed)).rows[0].n as number;
    const startedAt = Date.now();
    const rate = await drainOthers(new Set(blocked.rows.map((row) => row.event_id)), async () => {
      const seconds = (Date.now() - startedAt) / 1000;
      hotRate = ((await pool.query(flowed)).rows[0].n - before) / seconds;
    });
    const { rows } = await pool.query(`SELECT count(*)::int AS n FROM identity.outbox
      WHERE NOT published AND dead_lettered_at IS NULL AND next_attempt_at = 'infinity'`);
    return { rate, hotRate, parked: rows[0].n };
  }

  /** @returns events per second of the others */
  async function drainOthers(blocked: ReadonlySet<string>, onDrained = async () => {}): Promise<number> {
    const after = (await pool.query('SELECT coalesce(max(id), 0)::text AS id FROM identity.outbox')).rows[0]
      .id;
    await stage.insert(events, events);
    const startedAt = await stage.now();
    await stage.until(
      `${NOTHING_FRESH} AND NOT EXISTS (SELECT FROM identity.outbox WHERE id > $1 AND NOT published)`,
      [after],
    );
    await onDrained();
    const { rows } = await pool.query(
      `SELECT extract(epoch FROM max(published_at) - $1::timestamptz)::float8 AS seconds FROM identity.outbox WHERE id > $2`,
      [startedAt, after],
    );
    await stage.audit(blocked);
    return events / rows[0].seconds;
  }

  /** An empty table and stream, and no job of theirs left. */
  async function clear(): Promise<void> {
    await pool.query('TRUNCATE identity.outbox');
    while ((await publishQueue.getActiveCount()) + (await publishQueue.getWaitingCount()) > 0) {
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
    await redis.del(STREAM);
    for (const job of await publishQueue.getDelayed()) await job.remove();
  }
}
