import { inspect } from 'node:util';
import { Queue } from 'bullmq';
import { Redis } from 'ioredis';
import { Pool } from 'pg';
import { onTestFinished } from 'vitest';
import type { RelayConfig } from '../../src/config/config.ts';
import { loadConfig } from '../../src/config/load-config.ts';
import type { LedgerGrade } from '../demo/ledger.ts';
import type { Pod } from '../demo/pod.ts';
import { asRelay, grantLeast, OPERATOR_ROLE } from './least-privilege.ts';
import { expectPromisesHeld } from './ledger.ts';
import { startPod } from './pods.ts';
import { createDatabase, createRedis, type TestRedis } from './servers.ts';
import type { AdminPool, AdminRedis } from './stages.ts';
import { PATIENCE_MS, waitFor } from './wait.ts';
import { keepWhatFailed } from './what-failed.ts';

export const STREAM = 'identity.user.v1';
export const DLQ = 'identity.user.v1.dlq';

export type Entry = Readonly<{ entryId: string; fields: Readonly<Record<string, string>> }>;

/** One row as the next reader of PostgreSQL sees it; what is compared as text is text. */
export type Row = Readonly<{
  id: string;
  event_id: string;
  published: boolean;
  published_at: Date | null;
  attempts: number;
  next_attempt_at: Date | number | null;
  error_message: string | null;
  dead_lettered_at: Date | null;
  stream_entry_id: string | null;
  payload: string;
}>;

export type Stage = Readonly<{
  /** The superuser's. */
  databaseUrl: string;
  pool: AdminPool;
  server: TestRedis;
  redis: AdminRedis;
  /** What every pod of this stage is started with: as a role and a user that have the least rights. */
  env: Readonly<Record<string, string> & { RELAY_DATABASE_URL: string; RELAY_REDIS_URL: string }>;
  /** The same as a library user would hold it. */
  config(env?: Readonly<Record<string, string>>): RelayConfig;
  /** Starts a pod and waits until it is ready. */
  pod(env?: Readonly<Record<string, string>>): Promise<Pod>;
  /** Starts `relay <args>`, and waits for nothing. What needs more rights than the relay runs as superuser. */
  spawn(args: readonly string[], env?: Readonly<Record<string, string>>): Promise<Pod>;
  /** Runs `relay <args>` to its end. */
  command(
    args: readonly string[],
    env?: Readonly<Record<string, string>>,
  ): Promise<{ code: number | null; lines: readonly string[] }>;
  /** Resolves when every row is published, or dead with its dead letter. */
  rested(timeoutMs?: number): Promise<void>;
  /** Every promise held, as table and streams show it. */
  expectPromisesHeld(): Promise<LedgerGrade>;
  entries(stream?: string): Promise<Entry[]>;
  row(eventId: string): Promise<Row>;
  rows(): Promise<Row[]>;
  count(condition: string): Promise<number>;
  /** The BullMQ queue, as an operator's tool would open it. */
  queue(kind: 'claim' | 'publish'): Queue;
}>;

export type StageOptions = Readonly<{
  /** The superuser's. Default: a migrated database of the run's PostgreSQL. */
  databaseUrl?: string;
  /** Arguments of redis-server. */
  redisArgs?: readonly string[];
  env?: Readonly<Record<string, string>>;
}>;

const OPERATORS_COMMANDS = ['dlq', 'prune', 'board'];

/** For one test: a database, a Redis and whatever is needed to look at them. Its pods and its Redis end with the test. */
export async function setStage(options: StageOptions = {}): Promise<Stage> {
  const server = await createRedis({ args: options.redisArgs ?? [] });
  onTestFinished(() => server.kill('SIGKILL'));
  const redis = new Redis(server.adminUrl, { maxRetriesPerRequest: null });
  const env = { RELAY_REDIS_URL: server.url, ...options.env };
  return { ...(await setStageOn({ ...options, redis, env, queuesAt: server.adminUrl })), server };
}

/**
 * The same on a Redis that was started otherwise.
 * @param options.redis reads the streams; disconnected with the test
 * @param options.queuesAt where `queue` finds the queues
 */
export async function setStageOn(
  options: Omit<StageOptions, 'redisArgs' | 'env'> &
    Readonly<{
      redis: AdminRedis;
      env: Readonly<Record<string, string> & { RELAY_REDIS_URL: string }>;
      queuesAt?: string;
    }>,
): Promise<Omit<Stage, 'server'>> {
  const { redis } = options;
  const databaseUrl = options.databaseUrl ?? (await createDatabase()).adminUrl;
  const pool = new Pool({ connectionString: databaseUrl, max: 8, application_name: 'test' });
  // Servers go away in these tests on purpose; a query or command that suffers from it fails by itself.
  pool.on('error', () => {});
  redis.on('error', () => {});
  const pods: Pod[] = [];
  const queues: Queue[] = [];
  const env = { RELAY_DATABASE_URL: asRelay(databaseUrl), ...options.env };
  const dlqStream = loadConfig(env).dlqStreamName;
  onTestFinished(async (context) => {
    const streams = [STREAM, dlqStream];
    if (context.task.result?.state === 'fail')
      await keepWhatFailed(context, { pool, redis, streams, pods }).catch(console.error);
    await Promise.all(pods.map((pod) => pod.kill('SIGKILL')));
    await Promise.allSettled(queues.map((queue) => queue.close()));
    redis.disconnect();
    await pool.end();
  });
  if (options.databaseUrl !== undefined) await grantLeast(databaseUrl);

  const rows = async (condition: string, values: unknown[] = []): Promise<Row[]> => {
    const found = await pool.query<Row>(
      `SELECT id::text, event_id::text, published, published_at, attempts, next_attempt_at, error_message,
              dead_lettered_at, stream_entry_id, payload::text
         FROM identity.outbox WHERE ${condition} ORDER BY outbox.id`,
      values,
    );
    return found.rows;
  };
  const count = async (condition: string): Promise<number> => {
    const { rows } = await pool.query<{ n: number }>(
      `SELECT count(*)::int AS n FROM identity.outbox WHERE ${condition}`,
    );
    return rows[0]?.n ?? 0;
  };

  async function spawn(args: readonly string[], more?: Readonly<Record<string, string>>): Promise<Pod> {
    const [command = ''] = args;
    const isOperators = OPERATORS_COMMANDS.includes(command) || more?.RELAY_BOARD === 'true';
    const as = {
      ...(isOperators && { RELAY_DATABASE_URL: asRelay(databaseUrl, OPERATOR_ROLE) }),
      ...(command === 'migrate' && { RELAY_DATABASE_URL: databaseUrl }),
    };
    const pod = await startPod({ ...env, ...as, ...more }, args);
    pods.push(pod);
    return pod;
  }

  return {
    databaseUrl,
    pool,
    redis,
    env,
    config: (more) => loadConfig({ ...env, ...more }),
    async pod(more) {
      const pod = await spawn(['start'], more);
      await pod.waitReady();
      return pod;
    },
    spawn,
    async command(args, more) {
      const pod = await spawn(args, more);
      const { code } = await pod.exited;
      if (args[0] === 'migrate' && options.databaseUrl !== undefined) await grantLeast(databaseUrl);
      return { code, lines: pod.lines };
    },
    async rested(timeoutMs = PATIENCE_MS) {
      const isLeft = 'NOT published AND (dead_lettered_at IS NULL OR stream_entry_id IS NULL)';
      const noneLeft = async () => (await count(isLeft)) === 0;
      await waitFor(noneLeft, { what: 'every row to be published or dead', timeoutMs }).catch(
        async (error) => {
          const left = await rows(isLeft);
          const some = left.slice(0, 3).map(({ payload: _, ...row }) => inspect(row, { breakLength: 110 }));
          throw new Error(`${left.length} rows are left:\n${some.join('\n')}`, { cause: error });
        },
      );
    },
    expectPromisesHeld: () => expectPromisesHeld({ pool, redis, defaultStream: STREAM, dlqStream }),
    entries: (stream = STREAM) => readEntries(redis, stream),
    async row(eventId) {
      const [row] = await rows('event_id = $1', [eventId]);
      if (row === undefined) throw new Error(`no row has event_id ${eventId}`);
      return row;
    },
    rows: () => rows('true'),
    count,
    queue(kind) {
      const queue = new Queue(`relay-${kind}`, {
        connection: { url: options.queuesAt ?? options.env.RELAY_REDIS_URL, maxRetriesPerRequest: null },
      });
      queue.on('error', () => {});
      queues.push(queue);
      return queue;
    },
  };
}

async function readEntries(redis: Pick<Redis, 'xrange'>, stream: string): Promise<Entry[]> {
  return (await redis.xrange(stream, '-', '+')).map(([entryId, flat]) => {
    const fields: Record<string, string> = {};
    for (let i = 0; i < flat.length; i += 2) fields[flat[i] as string] = flat[i + 1] as string;
    return { entryId, fields };
  });
}

/** `at`: when the row changed; `begun`: when its transaction began, which is its `now()`. */
export type RowChange = Row & Readonly<{ at: Date; begun: Date }>;

/**
 * Keeps every state that a row goes through, with the database's time of the change: whoever polls would miss some.
 * Answers how to read the states of one row.
 */
export async function recordHistory(pool: AdminPool): Promise<(eventId: string) => Promise<RowChange[]>> {
  await pool.query(`
    CREATE TABLE history AS SELECT now() AS at, o.* FROM identity.outbox o LIMIT 0;
    ALTER TABLE history ADD COLUMN place bigserial, ADD COLUMN begun timestamptz DEFAULT now();
    CREATE FUNCTION keep_history() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
    BEGIN
      INSERT INTO history SELECT clock_timestamp(), NEW.*;
      RETURN NULL;
    END $$;
    CREATE TRIGGER keep_history AFTER UPDATE ON identity.outbox FOR EACH ROW EXECUTE FUNCTION keep_history()`);
  return async (eventId) => {
    const { rows } = await pool.query<RowChange>('SELECT * FROM history WHERE event_id = $1 ORDER BY place', [
      eventId,
    ]);
    return rows;
  };
}
