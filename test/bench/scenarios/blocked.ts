/**
 * Blocked aggregates cost nothing: the throughput of 20,000 aggregates beside one that is poisonous and has 100,000
 * rows parked, and one whose 100,000 rows flow one by one; and, in turns, without the two.
 */
import { Queue } from 'bullmq';
import { NOTHING_FRESH, openRelay } from '../contenders/relay.ts';
import { median, type Scenario, type ScenarioContext } from '../scenario.ts';
import { pause } from '../servers.ts';
import { PLATFORM_INDEXES } from '../workload.ts';

const BLOCKED_ROWS = 100_000;
/** No stream: its events are refused, and retried after a minute and more. */
const POISONOUS_TOPIC = 'bench:no-stream';
const MOST_COST = 0.2;

export const BLOCKED: Scenario = {
  name: 'blocked',
  describe:
    'others beside a poisonous aggregate with 100,000 rows parked, and a hot one with 100,000 flowing',
  minutes: 4,
  run: benchBlocked,
};

async function benchBlocked({ options, open, undo, progress }: ScenarioContext) {
  const { runs, events = options.quick ? 3_000 : 20_000 } = options;
  const blockedRows = options.quick ? 5_000 : BLOCKED_ROWS;
  progress.now('starting servers and a pod');
  const servers = await open();
  const stage = await openRelay(servers, { name: 'relay' }, undo);
  const { pool, redis } = stage;
  const publishQueue = new Queue(`${stage.queueName}-publish`, {
    connection: { url: servers.redisServer.url },
  });
  await redis.set(POISONOUS_TOPIC, 'a string');
  await pool.query(PLATFORM_INDEXES);
  progress.now('warming up');
  await drainOthers(new Set());
  const besides: number[] = [];
  const withouts: number[] = [];
  const hots: number[] = [];
  let without = await alone();
  for (let run = 1; run <= runs; run++) {
    progress.now(`run ${run} of ${runs}: beside the two`);
    const beside = await besideBlocked();
    progress.now(`run ${run} of ${runs}: without`);
    const after = await alone();
    besides.push(beside.rate);
    withouts.push((without + after) / 2);
    hots.push(beside.hotRate);
    progress.note(
      `run ${run}: ${Math.round(beside.rate)} events/s beside the two, ${Math.round(without)} and ${Math.round(after)} without; ` +
        `${beside.parked} rows were parked`,
    );
    without = after;
  }
  await publishQueue.close();
  const ratios = besides.map((rate, i) => rate / (withouts[i] as number));
  return {
    about: `${events} events of as many aggregates, beside ${blockedRows} rows that are parked behind a poisonous event and ${blockedRows} of one aggregate that flow`,
    figures: [
      { name: 'beside', unit: 'events/s', values: besides },
      { name: 'without', unit: 'events/s', values: withouts },
      { name: 'the hot aggregate', unit: 'events/s', values: hots },
      { name: 'beside / without', unit: 'ratio', values: ratios },
    ],
    verified: 'every event of the others once, in the order of its aggregate, in every run',
    notes: [`to be kept: a ratio of ${1 - MOST_COST} or more`],
    kept: median(ratios) >= 1 - MOST_COST,
  };

  async function alone(): Promise<number> {
    await clear();
    return drainOthers(new Set());
  }

  async function besideBlocked(): Promise<{ rate: number; hotRate: number; parked: number }> {
    await clear();
    await stage.insert({ events: blockedRows, aggregates: 1, of: 'poisonous' });
    await pool.query('UPDATE identity.outbox SET topic = $1', [POISONOUS_TOPIC]);
    await stage.insert({ events: blockedRows, aggregates: 1, of: 'hot' });
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
    await stage.insert({ events, aggregates: events });
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
    await pool.query('DELETE FROM identity.outbox');
    await pool.query('VACUUM identity.outbox');
    while ((await publishQueue.getActiveCount()) + (await publishQueue.getWaitingCount()) > 0) {
      await pause(100);
    }
    await redis.xtrim(stage.stream, 'MAXLEN', 0);
    for (const job of await publishQueue.getDelayed()) await job.remove();
  }
}
