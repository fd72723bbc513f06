/**
 * What the deletion of a million old rows costs the events that flow meanwhile: commit-to-stream latency under a
 * steady load before, during and after it.
 */
import { randomUUID } from 'node:crypto';
import { loadavg } from 'node:os';
import { Queue } from 'bullmq';
import { openRelay } from '../contenders/relay.ts';
import { ONCE_IN_ORDER, type Scenario, type ScenarioContext } from '../scenario.ts';
import { pause } from '../servers.ts';

const EVENTS_PER_SECOND = 300;
/** Events in one transaction. */
const BATCH = 3;
const QUIET_SECONDS = 20;
const MOST_RATIO = 2;
const DEADLINE_SECONDS = 200;

const OLD = `published_at < now() - interval '90 minutes'`;

export const RETENTION: Scenario = {
  name: 'retention',
  describe: 'latency while a million old rows are deleted',
  minutes: 3,
  run: benchRetention,
};

async function benchRetention({ options, open, undo, progress }: ScenarioContext) {
  const { events: count = options.quick ? 50_000 : 1_000_000 } = options;
  progress.now('starting servers and a pod');
  const servers = await open();
  const env = { RELAY_PUBLISHED_RETENTION: '3600' };
  const stage = await openRelay(servers, { name: 'relay', env }, undo);
  const { pool, redis, stream } = stage;
  const queue = new Queue(`${stage.queueName}-claim`, { connection: { url: servers.redisServer.url } });
  progress.now(`filling in ${count} old rows`);
  await pool.query(
    `INSERT INTO identity.outbox (event_type, aggregate_id, payload, created_at, published, published_at, stream_entry_id)
     SELECT 'UserCreated', gen_random_uuid(), jsonb_build_object(
       'user_id', gen_random_uuid(), 'tenant_id', gen_random_uuid(), 'email', 'user' || i || '@example.com',
       'display_name', 'User ' || i, 'status', 'active', 'created_at', '2026-01-01T00:00:00Z'),
       now() - interval '2 hours', true, now() - interval '2 hours', i || '-0'
     FROM generate_series(1, $1::int) i`,
    [count],
  );
  await pool.query('VACUUM ANALYZE identity.outbox');
  // What the million rows have left to be written must not be in what is measured.
  await pool.query('CHECKPOINT');
  progress.now('warming up');
  await load(() => pause(5_000));
  progress.now('before');
  const before = await load(() => pause(QUIET_SECONDS * 1_000));
  progress.now('during');
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
  progress.now('after');
  const after = await load(() => pause(QUIET_SECONDS * 1_000));
  await queue.close();
  await stage.audit();
  const ratio = during.p99 / ((before.p99 + after.p99) / 2);
  const loads = Object.entries({ before, during, after });
  return {
    about: `${count} rows deleted beside ${EVENTS_PER_SECOND} events/s; from the start of a transaction to its entries`,
    figures: [
      ...loads.flatMap(([when, it]) =>
        (['p50', 'p99', 'max'] as const).map((name) => ({
          ...{ name: `${when}, ${name}`, unit: 'ms', values: [it[name]] },
        })),
      ),
      { name: 'deleting took', unit: 's', values: [seconds] },
      { name: 'p99, during / before and after', unit: 'ratio', values: [ratio] },
    ],
    verified: ONCE_IN_ORDER,
    notes: [
      `to be kept: a ratio of ${MOST_RATIO} or less`,
      ...loads.map(
        ([when, it]) =>
          `${when}: ${it.events} events, ${it.checkpoints} checkpoints, ${Math.round(it.wal / 2 ** 20)} MiB of WAL, load ${it.machine.toFixed(1)}`,
      ),
    ],
    kept: ratio <= MOST_RATIO,
  };

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
          `INSERT INTO identity.outbox (event_id, event_type, aggregate_id, payload, topic)
           SELECT id, 'UserCreated', gen_random_uuid(), jsonb_build_object('tenant_id', gen_random_uuid(), 'n', 1), $2
           FROM unnest($1::uuid[]) id`,
          [ids, stream],
        ),
      );
    }
    await worked;
    await Promise.all(writes);
    await stage.until(`NOT EXISTS (SELECT FROM identity.outbox WHERE NOT published AND next_attempt_at IS NULL)
      AND NOT EXISTS (SELECT FROM identity.outbox WHERE NOT published AND next_attempt_at < 'infinity' ORDER BY next_attempt_at)`);
    const latencies: number[] = [];
    for (const [entryId, fields] of await redis.xrange(stream, from, '+')) {
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
