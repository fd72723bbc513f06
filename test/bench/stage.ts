/** What a benchmark runs on: private servers, one relay pod, and everything undone in the end. */
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { Redis } from 'ioredis';
import pg from 'pg';
import { gradeLedger } from '../../src/demo/ledger.ts';
import { type Pod, startPod } from '../../src/demo/pod.ts';
import {
  type PrivatePostgres,
  type PrivateRedis,
  startPrivatePostgres,
  startPrivateRedis,
} from '../../src/demo/servers.ts';
import { temporaryFolder } from '../../src/demo/watchdog.ts';
import type { Logger } from '../../src/logger.ts';
import { migrate } from '../../src/outbox/migrate.ts';

export const STREAM = 'identity.user.v1';
export const DLQ_STREAM = `${STREAM}.dlq`;
const DRAIN_DEADLINE_MS = 300_000;

const nothing = () => {};
export const silent: Logger = {
  ...{ trace: nothing, debug: nothing, info: nothing, warn: nothing, error: nothing, fatal: nothing },
  child: () => silent,
};

export type BenchStage = Readonly<{
  postgres: PrivatePostgres;
  redisServer: PrivateRedis;
  pool: pg.Pool;
  redis: Redis;
  pod: Pod;
  /** Writes events of a common size, dealt out in turn to aggregates whose ids are made from `of` and a number. */
  insert(events: number, aggregates: number, of?: string): Promise<void>;
  /** By the database's clock. */
  now(): Promise<string>;
  /** Asks again and again until `question`, a boolean of SQL, is answered with yes. */
  until(question: string, values?: unknown[]): Promise<void>;
  /** @throws unless each event outside `ignore` is in the stream once, and in order, and its row published */
  audit(ignore?: ReadonlySet<string>): Promise<void>;
}>;

export async function openBenchStage(
  options: Readonly<{ fsync: boolean; env: Readonly<Record<string, string>> }>,
  undo: (() => Promise<unknown>)[],
): Promise<BenchStage> {
  const folder = await temporaryFolder('relay-bench-');
  undo.push(folder.remove);
  const redisServer = await startPrivateRedis({ directory: join(folder.path, 'redis') });
  undo.push(redisServer.stop);
  const postgres = await startPrivatePostgres({
    directory: join(folder.path, 'postgres'),
    settings: { fsync: options.fsync ? 'on' : 'off' },
  });
  undo.push(postgres.stop);
  const admin = new pg.Client(postgres.url);
  await admin.connect();
  undo.push(() => admin.end());
  await migrate(admin, true, silent);
  const redis = new Redis(redisServer.url);
  undo.push(async () => redis.disconnect());
  const pool = new pg.Pool({ connectionString: postgres.url, max: 2 });
  undo.push(() => pool.end());
  const pod = await startPod({
    cli: (options as { cli?: string }).cli ?? fileURLToPath(new URL('../../dist/cli.js', import.meta.url)),
    env: {
      RELAY_DATABASE_URL: postgres.url,
      RELAY_REDIS_URL: redisServer.url,
      RELAY_LOG_LEVEL: 'warn',
      ...options.env,
    },
  });
  undo.push(() => pod.kill());
  await pod.waitReady();

  return {
    postgres,
    redisServer,
    pool,
    redis,
    pod,

    async insert(events, aggregates, of = '') {
      await pool.query(
        `INSERT INTO identity.outbox (event_type, aggregate_id, payload)
         SELECT 'UserCreated', md5($3::text || i % $2)::uuid, jsonb_build_object(
           'user_id', md5($3::text || i % $2)::uuid, 'tenant_id', '11111111-1111-1111-1111-111111111111',
           'email', 'user' || i || '@example.com', 'display_name', 'User ' || i, 'status', 'active',
           'created_at', '2026-01-01T00:00:00Z')
         FROM generate_series(1, $1::int) i`,
        [events, aggregates, of],
      );
    },

    now: async () => (await pool.query('SELECT clock_timestamp()::text AS now')).rows[0].now,

    async until(question, values = []) {
      const deadline = Date.now() + DRAIN_DEADLINE_MS;
      for (;;) {
        const { rows } = await pool.query(`SELECT ${question} AS yes`, values);
        if (rows[0].yes) return;
        if (Date.now() > deadline)
          throw new Error(`not so within ${DRAIN_DEADLINE_MS / 1000} s: ${question}`);
        await new Promise((resolve) => setTimeout(resolve, 100));
      }
    },

    async audit(ignore = new Set()) {
      const grade = await gradeLedger({
        ...{ pool, redis, defaultStream: STREAM, dlqStream: DLQ_STREAM, ignore },
      });
      for (const violation of [
        'lost',
        'doubled',
        'outOfOrder',
        'publishedWithoutEntry',
        'leftBehind',
      ] as const) {
        if (grade[violation] > 0)
          throw new Error(`${grade[violation]} x ${violation}: ${grade.samples[violation]}`);
      }
    },
  };
}

// Answered by the relay's own partial indexes: looking must not cost what is measured.
export const NOTHING_FRESH =
  'NOT EXISTS (SELECT FROM identity.outbox WHERE NOT published AND next_attempt_at IS NULL)';
export const NOTHING_LIVE = `NOT EXISTS (SELECT FROM identity.outbox WHERE NOT published AND dead_lettered_at IS NULL
  ORDER BY aggregate_type, aggregate_id, id)`;

export function median(values: readonly number[]): number {
  return [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)] as number;
}
