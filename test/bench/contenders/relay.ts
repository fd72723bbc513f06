/** The relay: one pod or several, built, with a database, a stream and queues of its own on the shared servers. */
import { execFile } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { Queue } from 'bullmq';
import type { Redis } from 'ioredis';
import type pg from 'pg';
import { gradeLedger, violationsOf } from '../../demo/ledger.ts';
import { cleanEnvironment, type Pod, startPod } from '../../demo/pod.ts';
import { auditEntries, eventIds, type Written } from '../audit.ts';
import type { Contender } from '../contender.ts';
import { cpuBetween, cpuSoFar } from '../cpu.ts';
import { pause, type Servers, type Undo } from '../servers.ts';
import { fillOutbox, type Workload } from '../workload.ts';

/** The build that is measured. */
export const CLI = process.env.BENCH_CLI || fileURLToPath(new URL('../../../dist/cli.js', import.meta.url));
/** Another build, which the scenarios `drain` and `hot` measure beside it. */
export const CLI_BEFORE = process.env.BENCH_CLI_BEFORE || undefined;

const DRAIN_DEADLINE_MS = 1_800_000;
const LOOK_EVERY_MS = 50;

// Answered by the relay's own partial indexes: looking must not cost what is measured.
export const NOTHING_FRESH =
  'NOT EXISTS (SELECT FROM identity.outbox WHERE NOT published AND next_attempt_at IS NULL)';
export const NOTHING_LIVE = `NOT EXISTS (SELECT FROM identity.outbox WHERE NOT published AND dead_lettered_at IS NULL
  ORDER BY aggregate_type, aggregate_id, id)`;

/** A publish job as BullMQ keeps it. */
export type SampleJob = Readonly<{
  name: string;
  data: Record<string, unknown>;
  opts: Record<string, unknown>;
}>;

export type Relay = Contender &
  Readonly<{
    servers: Servers;
    pool: pg.Pool;
    redis: Redis;
    pods: readonly Pod[];
    stream: string;
    queueName: string;
    /** Of its pods. */
    env: Readonly<Record<string, string>>;
    insert(workload: Workload): Promise<void>;
    /** By the database's clock. */
    now(): Promise<string>;
    /** Asks again and again until `question`, a boolean of SQL, is answered with yes. */
    until(question: string, values?: unknown[]): Promise<void>;
    /** @throws unless each event outside `ignore` is in the stream once, and in order, and its row published */
    audit(ignore?: ReadonlySet<string>): Promise<void>;
    /** An empty table and stream. */
    clear(): Promise<void>;
    /** One of its publish jobs, as it is for an event of this workload. */
    sampleJob(workload: Workload): Promise<SampleJob>;
    /** Ends its pods in good order. */
    stop(): Promise<void>;
  }>;

export async function openRelay(
  servers: Servers,
  options: Readonly<{
    /** Of its database, stream and queues, too. */
    name: string;
    describe?: string;
    env?: Readonly<Record<string, string>>;
    pods?: number;
    /** Rows that are published before a drain stay in the table. */
    keepsRows?: boolean;
    /** The `cli.js` of its build, if it is not the one that is measured. */
    cli?: string | undefined;
    /** What is done to the table before its pods start. */
    prepare?: (pool: pg.Pool) => Promise<void>;
  }>,
  undo: Undo,
): Promise<Relay> {
  const { redis, redisServer } = servers;
  const { name, describe = 'one pod', pods: podCount = 1, keepsRows = false, cli = CLI } = options;
  const id = name.replaceAll(/[^a-z0-9]+/gi, '-').toLowerCase();
  const stream = `bench.${id}.v1`;
  const dlqStream = `bench.${id}.dlq`;
  const queueName = `relay-${id}`;
  const { pool, url } = await servers.database(id);
  const env: Record<string, string> = {
    ...{ RELAY_DATABASE_URL: url, RELAY_REDIS_URL: redisServer.url, RELAY_LOG_LEVEL: 'warn' },
    ...{ RELAY_STREAM_NAME: stream, RELAY_DLQ_STREAM_NAME: dlqStream, RELAY_QUEUE_NAME: queueName },
    RELAY_STREAM_MAXLEN: '0',
    ...options.env,
  };
  // By the build itself: its table may be another one than ours.
  await promisify(execFile)(process.execPath, [cli, 'migrate'], { env: { ...cleanEnvironment(), ...env } });
  await options.prepare?.(pool);
  const pods: Pod[] = [];
  undo.push(() => Promise.all(pods.map((pod) => pod.kill('SIGKILL'))));
  for (let i = 0; i < podCount; i++) {
    const pod = await startPod({ cli, env });
    pods.push(pod);
    await pod.waitReady();
  }
  const relay: Relay = {
    ...{ name, describe, servers, pool, redis, pods, stream, queueName, env, processes: podCount },

    insert: (workload) => fillOutbox(pool, workload, stream),

    now: async () => (await pool.query('SELECT clock_timestamp()::text AS now')).rows[0].now,

    async until(question, values = []) {
      const deadline = Date.now() + DRAIN_DEADLINE_MS;
      for (;;) {
        const { rows } = await pool.query(`SELECT ${question} AS yes`, values);
        if (rows[0].yes) return;
        if (Date.now() > deadline)
          throw new Error(`not so within ${DRAIN_DEADLINE_MS / 1000} s: ${question}`);
        await pause(LOOK_EVERY_MS);
      }
    },

    async audit(ignore = new Set()) {
      const grade = await gradeLedger({ pool, redis, defaultStream: stream, dlqStream, ignore });
      const violations = violationsOf(grade).filter(
        (it) => env.RELAY_ORDERING !== 'none' || !it.startsWith('outOfOrder'),
      );
      if (violations.length > 0) throw new Error(`${name}: ${violations.join('; ')}`);
    },

    async clear() {
      // TRUNCATE would be a database that has forgotten: the epoch ends, and table and streams are compared.
      await pool.query('DELETE FROM identity.outbox');
      await pool.query('VACUUM identity.outbox');
      // Not DEL: a stream that is gone is one that was lost, and costs the relay a look at everything.
      await redis.xtrim(stream, 'MAXLEN', 0);
    },

    async drain(workload) {
      if (keepsRows) await redis.xtrim(stream, 'MAXLEN', 0);
      else await relay.clear();
      const last = await pool.query('SELECT coalesce(max(id), 0)::text AS id FROM identity.outbox');
      const firstId: string = last.rows[0].id;
      await relay.insert(workload);
      const startedAt = await relay.now();
      const before = await cpuSoFar(servers, podPids());
      await relay.until(`${NOTHING_FRESH} AND ${NOTHING_LIVE}`);
      const cpu = cpuBetween(before, await cpuSoFar(servers, podPids()));
      const { rows } = await pool.query(
        `SELECT extract(epoch FROM max(published_at) - $1::timestamptz)::float8 AS seconds
           FROM identity.outbox WHERE id > $2`,
        [startedAt, firstId],
      );
      if (keepsRows) await auditSince(firstId);
      else await relay.audit();
      return { events: workload.events, seconds: rows[0].seconds, cpu };
    },

    async sampleJob(workload) {
      const queue = new Queue(`${queueName}-publish`, { connection: { url: redisServer.url } });
      await queue.pause();
      await relay.insert({ ...workload, events: 1, aggregates: 1 });
      const { rows } = await pool.query('SELECT event_id FROM identity.outbox ORDER BY id DESC LIMIT 1');
      const key = queue.toKey(rows[0].event_id);
      const deadline = Date.now() + 10_000;
      for (;;) {
        const { name, data = '', opts = '{}' } = await redis.hgetall(key);
        if (name !== undefined) {
          await queue.resume();
          await relay.until(NOTHING_LIVE);
          await queue.close();
          return { name, data: JSON.parse(data), opts: JSON.parse(opts) };
        }
        if (Date.now() > deadline) throw new Error(`no publish job has the key ${key}`);
        await pause(LOOK_EVERY_MS);
      }
    },

    async stop() {
      await Promise.all(pods.splice(0).map((pod) => pod.kill('SIGTERM')));
    },
  };
  return relay;

  function podPids(): number[] {
    return pods.map((pod) => pod.pid);
  }

  /** Without a look at the rows before: there may be millions. */
  async function auditSince(id: string): Promise<void> {
    const { rows } = await pool.query<Written>(
      `SELECT event_id AS "eventId", aggregate_id AS aggregate, published AS done
         FROM identity.outbox WHERE outbox.id > $1::bigint ORDER BY outbox.id`,
      [id],
    );
    if (rows.some((row) => !row.done)) throw new Error(`${name}: a row was left behind`);
    auditEntries(rows, await eventIds(redis, stream));
  }
}
