/** What a run takes place in: private servers, pods behind proxies, and direct ways to look at and to break them. */
import { join } from 'node:path';
import { Queue } from 'bullmq';
import { Redis } from 'ioredis';
import pg from 'pg';
import { startPod } from '../demo/pod.ts';
import {
  type PrivatePostgres,
  type PrivateRedis,
  startPrivatePostgres,
  startPrivateRedis,
} from '../demo/servers.ts';
import { temporaryFolder } from '../demo/watchdog.ts';
import { grantLeast, RELAY_PASSWORD, redisArgs } from '../support/least-privilege.ts';
import { CLI, type Fleet, startFleet } from './fleet.ts';
import { persistently, survive } from './patience.ts';
import { REFUSED_TOPICS } from './topics.ts';
import { createWorkload, type Workload } from './workload.ts';

export const STREAM = 'identity.user.v1';
export const DLQ = `${STREAM}.dlq`;
export const REDIS_USER = 'relay';
export const POSTGRES_ROLE = 'relay';
export const PRODUCER_ROLE = 'producer';
const MAX_CONNECTIONS = 90;
const RESERVED_CONNECTIONS = 15;
const CONNECT_DEADLINE_MS = 5_000;
const RETRY_MS = 200;

/**
 * Short retries, so that a poisonous event ends within seconds: 0.5, 1, 2 and 4 s. An event that is refused for
 * less than 3.5 s gets through. Nothing is trimmed, since every entry is audited. All else is as by default.
 */
export const POD_SETTINGS = {
  RELAY_RETRY_BASE_DELAY: '0.5',
  RELAY_MAX_RETRY_ATTEMPTS: '4',
  RELAY_STREAM_MAXLEN: '0',
  RELAY_DLQ_MAXLEN: '0',
} as const;

export type World = Readonly<{
  postgres: PrivatePostgres;
  redis: PrivateRedis;
  /** Folder of the Redis' data. */
  redisFolder: string;
  /** Folder of the PostgreSQL; its data is in `data`. */
  postgresFolder: string;
  fleet: Fleet;
  workload: Workload;
  /** A superuser's pool, not through a proxy, in reserved connections. */
  admin: pg.Pool;
  /** Not through a proxy; commands wait while the server is away. */
  client: Redis;
  /** The relay's queues as an operator's tool opens them. */
  queues: Readonly<{ claim: Queue; publish: Queue }>;
  /** Runs one statement as superuser; tries again while the server is away. */
  sql<R extends pg.QueryResultRow>(text: string, values?: unknown[]): Promise<R[]>;
  /** Violations that streams had shown before a fault erased them. */
  erased: { doubled: string[]; outOfOrder: string[] };
  /** Events whose rows a fault took away, for good: nothing is promised of them. Their entries may be there. */
  forgotten: Set<string>;
  /** URL of a session that counts against max_connections. */
  producerUrl: string;
  stop(): Promise<void>;
}>;

type WorldOptions = Readonly<{
  pods: number;
  seed: number;
  /** Every command that Redis ran stays in its append-only file. */
  keepHistory: boolean;
}>;

export async function buildWorld(options: WorldOptions): Promise<World> {
  const undo: (() => Promise<unknown>)[] = [];
  try {
    return await build(options, undo);
  } catch (error) {
    await tearDown(undo);
    throw error;
  }
}

async function build(
  { pods, seed, keepHistory }: WorldOptions,
  undo: (() => Promise<unknown>)[],
): Promise<World> {
  const folder = await temporaryFolder('relay-chaos-');
  undo.push(folder.remove);
  const redisFolder = join(folder.path, 'redis');
  const postgresFolder = join(folder.path, 'postgres');
  const [redis, postgres] = await Promise.all([
    startPrivateRedis({
      directory: redisFolder,
      args: [
        ...['--aof-use-rdb-preamble', 'yes', ...redisArgs(POD_SETTINGS, undefined, REDIS_USER)],
        // Never rewritten, the file tells afterwards what happened to an event, and when. It delays restarts.
        ...(keepHistory ? ['--aof-timestamp-enabled', 'yes', '--auto-aof-rewrite-percentage', '0'] : []),
      ],
    }),
    startPrivatePostgres({
      directory: postgresFolder,
      settings: { max_connections: MAX_CONNECTIONS, superuser_reserved_connections: RESERVED_CONNECTIONS },
    }),
  ]);
  // Data that nobody needs any more: no orderly stop.
  undo.push(
    () => redis.kill('SIGKILL'),
    () => postgres.kill('SIGQUIT'),
  );

  const admin = new pg.Pool({
    connectionString: postgres.url,
    max: RESERVED_CONNECTIONS - 5,
    connectionTimeoutMillis: CONNECT_DEADLINE_MS,
    application_name: 'chaos',
    // The harness is exempt from what it does to others.
    options: '-c default_transaction_read_only=off -c default_transaction_isolation=read\\ committed',
  });
  survive(admin);
  undo.push(() => admin.end());
  await prepare(admin, postgres.url);
  const producerUrl = as(postgres.url, PRODUCER_ROLE);

  const client = new Redis(redis.url, { maxRetriesPerRequest: null, retryStrategy: () => RETRY_MS });
  client.on('error', () => {});
  undo.push(async () => client.disconnect());
  await client.mset(...REFUSED_TOPICS.flatMap((topic) => [topic, 'not a stream']));
  const [claim, publish] = ['relay-claim', 'relay-publish'].map((name) => {
    const queue = new Queue(name, { connection: client });
    queue.on('error', () => {});
    return queue;
  }) as [Queue, Queue];

  async function sql<R extends pg.QueryResultRow>(text: string, values: unknown[] = []): Promise<R[]> {
    return persistently(async () => (await admin.query<R>(text, values)).rows);
  }

  const workload = createWorkload({ url: producerUrl, client, seed });
  undo.push(workload.close);
  const fleet = await startFleet({
    pods,
    redisPort: redis.port,
    postgresPort: postgres.port,
    env: (redisPort, postgresPort) => ({
      ...POD_SETTINGS,
      RELAY_REDIS_URL: `redis://${REDIS_USER}:${RELAY_PASSWORD}@127.0.0.1:${redisPort}/0`,
      RELAY_DATABASE_URL: as(postgres.url, POSTGRES_ROLE, postgresPort),
    }),
  });
  undo.push(fleet.stop);
  await fleet.waitReady();

  return {
    ...{ postgres, redis, redisFolder, postgresFolder, fleet, workload, admin, client, sql, producerUrl },
    queues: { claim, publish },
    erased: { doubled: [], outOfOrder: [] },
    forgotten: new Set(),
    stop: () => tearDown(undo),
  };
}

async function tearDown(undo: (() => Promise<unknown>)[]): Promise<void> {
  for (const step of undo.splice(0).reverse()) await step();
}

/** The table, and two roles with no more rights than they need. */
async function prepare(admin: pg.Pool, url: string): Promise<void> {
  const migration = await startPod({ cli: CLI, args: ['migrate'], env: { RELAY_DATABASE_URL: url } });
  const { code } = await migration.exited;
  if (code !== 0) throw new Error(`relay migrate failed:\n${migration.lines.join('\n')}`);
  await grantLeast(url, POD_SETTINGS, { role: POSTGRES_ROLE, producer: PRODUCER_ROLE });
  await admin.query(`
    -- The harness' writers look at their own rows, too.
    GRANT SELECT ON identity.outbox TO ${PRODUCER_ROLE}`);
}

export function as(url: string, role: string, port?: number): string {
  const changed = new URL(url);
  changed.username = role;
  changed.password = RELAY_PASSWORD;
  if (port !== undefined) changed.port = String(port);
  return changed.href;
}
