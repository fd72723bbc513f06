/**
 * The limit of polling: one loop in one process, no queue, no order but that of the table, no retries, no dead letters.
 * The table has what it needs and no more.
 */
import { auditEntries, eventIds, type Written } from '../audit.ts';
import { type Contender, startChild } from '../contender.ts';
import { cpuBetween, cpuSoFar } from '../cpu.ts';
import { pause, type Servers, type Undo } from '../servers.ts';
import { fillOutbox } from '../workload.ts';

export type PollerConfig = Readonly<{
  databaseUrl: string;
  redisUrl: string;
  /** Rows in one transaction. */
  batch: number;
  /** How long it rests when there was nothing. */
  idleMs: number;
}>;

const TABLE = `
  CREATE SCHEMA identity;
  CREATE TABLE identity.outbox (
    id bigserial PRIMARY KEY, event_id uuid NOT NULL UNIQUE DEFAULT gen_random_uuid(), event_type text NOT NULL,
    aggregate_type text NOT NULL DEFAULT 'user', aggregate_id uuid NOT NULL, payload jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(), topic text, published boolean NOT NULL DEFAULT false,
    published_at timestamptz);
  CREATE INDEX ON identity.outbox (id) WHERE NOT published;`;

/** Rows in one transaction: faster than 100, 500 and 1,000. */
const BEST_BATCH = 2_000;

export async function openPoller(
  servers: Servers,
  undo: Undo,
  batch: number = BEST_BATCH,
): Promise<Contender> {
  const { redis, redisServer } = servers;
  const stream = 'bench.poller.v1';
  const { pool, url } = await servers.database('poller');
  await pool.query(TABLE);
  const config: PollerConfig = { databaseUrl: url, redisUrl: redisServer.url, batch, idleMs: 5 };
  const child = await startChild('poller-child.ts', config, undo);
  return {
    name: 'direct poller',
    describe: `SELECT … FOR UPDATE SKIP LOCKED LIMIT ${batch}, pipelined XADD, UPDATE; without queue, retries, dead letters`,
    async drain(workload) {
      await pool.query('TRUNCATE identity.outbox');
      await redis.del(stream);
      await child.ask('start');
      await fillOutbox(pool, workload, stream);
      const startedAt = (await pool.query('SELECT clock_timestamp()::text AS now')).rows[0].now;
      const before = await cpuSoFar(servers, [child.pid]);
      for (let left = true; left; ) {
        await pause(50);
        const { rows } = await pool.query(
          'SELECT EXISTS (SELECT FROM identity.outbox WHERE NOT published) AS left',
        );
        left = rows[0].left;
      }
      const cpu = cpuBetween(before, await cpuSoFar(servers, [child.pid]));
      await child.ask('stop');
      const { rows } = await pool.query(
        'SELECT extract(epoch FROM max(published_at) - $1::timestamptz)::float8 AS seconds FROM identity.outbox',
        [startedAt],
      );
      const written = await pool.query<Written>(
        'SELECT event_id AS "eventId", aggregate_id AS aggregate, published AS done FROM identity.outbox ORDER BY id',
      );
      auditEntries(written.rows, await eventIds(redis, stream));
      return { events: workload.events, seconds: rows[0].seconds, cpu };
    },
  };
}
