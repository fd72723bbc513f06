/**
 * pg-transactional-outbox of npm with its polling listener: its own table, indexes and function, its handler one XADD.
 * An aggregate is a segment, which it keeps in order. It looks at its whole backlog for each batch, so it is given a
 * time and not the whole backlog to finish.
 */
import pgTransactionalOutbox from 'pg-transactional-outbox';
import { auditEntries, eventIds, type Written } from '../audit.ts';
import { type Contender, startChild } from '../contender.ts';
import { cpuBetween, cpuSoFar } from '../cpu.ts';
import { CONTENDER_ROLE, pause, type Servers, type Undo } from '../servers.ts';
import { fillSegments } from '../workload.ts';

export type PgTransactionalOutboxConfig = Readonly<{
  databaseUrl: string;
  redisUrl: string;
  stream: string;
  batch: number;
  connections: number;
}>;

const MOST_SECONDS = 6;

/** As its documentation sets it up, and with what makes it fastest. */
const VARIANTS = {
  'as documented': { batch: 5, connections: 10 },
  tuned: { batch: 100, connections: 20 },
} as const;

export async function openPgTransactionalOutbox(
  servers: Servers,
  variant: keyof typeof VARIANTS,
  undo: Undo,
): Promise<Contender> {
  const { redis, redisServer } = servers;
  const id = `pg-transactional-outbox-${variant.replaceAll(' ', '-')}`;
  const stream = `bench.${id}.v1`;
  const { name, pool, url } = await servers.database(id);
  const { DatabaseSetup } = pgTransactionalOutbox;
  const setup = {
    ...{ outboxOrInbox: 'outbox' as const, database: name, schema: 'public', table: 'outbox' },
    ...{ listenerRole: CONTENDER_ROLE, nextMessagesName: 'next_outbox_messages' },
  };
  await pool.query(DatabaseSetup.dropAndCreateTable(setup));
  await pool.query(DatabaseSetup.createPollingFunction(setup));
  await pool.query(DatabaseSetup.setupPollingIndexes(setup));
  const config: PgTransactionalOutboxConfig = {
    ...{ databaseUrl: url, redisUrl: redisServer.url, stream },
    ...VARIANTS[variant],
  };
  const child = await startChild('pg-transactional-outbox-child.ts', config, undo);
  return {
    name: `pg-transactional-outbox, ${variant}`,
    isSlow: true,
    describe: `polling listener, batches of ${config.batch}, one XADD and one transaction for each message`,
    async drain(workload) {
      await pool.query('TRUNCATE outbox');
      await redis.del(stream);
      await fillSegments(pool, workload);
      await pool.query('ANALYZE outbox');
      await child.ask('start');
      const startedAt = (await pool.query('SELECT clock_timestamp()::text AS now')).rows[0].now;
      const before = await cpuSoFar(servers, [child.pid]);
      const endsAt = performance.now() + MOST_SECONDS * 1_000;
      for (let left = true; left && performance.now() < endsAt; ) {
        await pause(100);
        left = (await pool.query('SELECT EXISTS (SELECT FROM outbox WHERE processed_at IS NULL) AS left'))
          .rows[0].left;
      }
      const cpu = cpuBetween(before, await cpuSoFar(servers, [child.pid]));
      await child.ask('stop');
      const { rows } = await pool.query<{ events: number; seconds: number }>(
        `SELECT count(*)::int AS events, extract(epoch FROM max(processed_at) - $1::timestamptz)::float8 AS seconds
           FROM outbox WHERE processed_at IS NOT NULL`,
        [startedAt],
      );
      const [{ events = 0, seconds = 0 } = {}] = rows;
      if (events === 0) throw new Error(`${id}: nothing was published in ${MOST_SECONDS} s`);
      const written = await pool.query<Written>(
        `SELECT id AS "eventId", aggregate_id AS aggregate, processed_at IS NOT NULL AS done
           FROM outbox ORDER BY created_at`,
      );
      auditEntries(written.rows, await eventIds(redis, stream));
      return { events, seconds, cpu };
    },
  };
}
