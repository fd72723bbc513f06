/**
 * What a team builds in an afternoon with BullMQ: a tick that claims rows, a job for each event, a worker that appends.
 * No order, no repair, no dead letters. The table has what it needs and no more.
 */
import { auditEntries, eventIds, type Written } from '../audit.ts';
import { type Contender, startChild } from '../contender.ts';
import { cpuBetween, cpuSoFar } from '../cpu.ts';
import { pause, type Servers, type Undo } from '../servers.ts';
import { fillOutbox } from '../workload.ts';

export type CardConfig = Readonly<{
  databaseUrl: string;
  redisUrl: string;
  /** From one look for rows to the next. */
  tickMs: number;
  /** Rows in one transaction. */
  batch: number;
  /** Jobs at once. */
  concurrency: number;
  /** To PostgreSQL: of the tick and of the worker. */
  connections: number;
}>;

const TABLE = `
  CREATE SCHEMA identity;
  CREATE TABLE identity.outbox (
    id bigserial PRIMARY KEY, event_id uuid NOT NULL UNIQUE DEFAULT gen_random_uuid(), event_type text NOT NULL,
    aggregate_type text NOT NULL DEFAULT 'user', aggregate_id uuid NOT NULL, payload jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(), topic text, published boolean NOT NULL DEFAULT false,
    next_attempt_at timestamptz, published_at timestamptz);
  CREATE INDEX ON identity.outbox (id) WHERE NOT published AND next_attempt_at IS NULL;`;

/** What a job fails for is tried again after a minute: longer than a drain takes. */
const DRAIN_DEADLINE_MS = 600_000;
/** A connection for each job and one for the tick: faster by a tenth or a fifth than the 10 that pg has by default. */
const USUAL = { tickMs: 100, batch: 100, concurrency: 50, connections: 51 };

export async function openCard(
  servers: Servers,
  undo: Undo,
  { indexes = '', ...tuning }: Partial<typeof USUAL> & { indexes?: string } = {},
): Promise<Contender> {
  const { redis, redisServer } = servers;
  const stream = 'bench.card.v1';
  const { pool, url } = await servers.database('card');
  await pool.query(TABLE + indexes);
  const config: CardConfig = { databaseUrl: url, redisUrl: redisServer.url, ...USUAL, ...tuning };
  const child = await startChild('card-child.ts', config, undo);
  return {
    name: 'card',
    describe:
      `every ${config.tickMs} ms SELECT … FOR UPDATE SKIP LOCKED LIMIT ${config.batch} and a BullMQ job for each event, ` +
      `${config.concurrency} at once, one XADD and one UPDATE each; without order, repair, dead letters`,
    async drain(workload) {
      await child.ask('start');
      await fillOutbox(pool, workload, stream);
      const startedAt = (await pool.query('SELECT clock_timestamp()::text AS now')).rows[0].now;
      const before = await cpuSoFar(servers, [child.pid]);
      const deadline = performance.now() + DRAIN_DEADLINE_MS;
      for (let left = true; left; ) {
        if (performance.now() > deadline)
          throw new Error(`card: not done within ${DRAIN_DEADLINE_MS / 1_000} s`);
        await pause(50);
        // No index answers what is left. So the stream is asked first, which costs nothing.
        if ((await redis.xlen(stream)) < workload.events) continue;
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
      auditEntries(written.rows, await eventIds(redis, stream), { ordered: false });
      // At once: autovacuum would come in the turn of another contender.
      await pool.query('TRUNCATE identity.outbox');
      await redis.del(stream);
      return { events: workload.events, seconds: rows[0].seconds, cpu };
    },
  };
}
