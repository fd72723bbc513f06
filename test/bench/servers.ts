/** The servers that a benchmark runs on: private ones, as durable as in production, counting what is done to them. */
import { randomBytes } from 'node:crypto';
import { join } from 'node:path';
import { Redis } from 'ioredis';
import pg from 'pg';
import type { Logger } from '../../src/telemetry/logger.ts';
import {
  type PrivatePostgres,
  type PrivateRedis,
  startPrivatePostgres,
  startPrivateRedis,
} from '../demo/servers.ts';
import { temporaryFolder } from '../demo/watchdog.ts';

/** Whoever is measured connects as this role, so that what we do ourselves is not counted. */
export const CONTENDER_ROLE = 'contender';

export type Database = Readonly<{
  name: string;
  /** The contender's. */
  url: string;
  /** Ours, to fill and to look. */
  pool: pg.Pool;
}>;

export type Servers = Readonly<{
  postgres: PrivatePostgres;
  redisServer: PrivateRedis;
  redis: Redis;
  database(name: string): Promise<Database>;
}>;

/** Steps that undo what was done, the latest first. */
export type Undo = (() => Promise<unknown>)[];

export async function openServers(
  options: Readonly<{ fsync: boolean; postgres?: Readonly<Record<string, string | number>> }>,
  undo: Undo,
): Promise<Servers> {
  const folder = await temporaryFolder('relay-bench-');
  undo.push(folder.remove);
  const redisServer = await startPrivateRedis({ directory: join(folder.path, 'redis') });
  undo.push(redisServer.stop);
  const durable = options.fsync ? 'on' : 'off';
  const postgres = await startPrivatePostgres({
    directory: join(folder.path, 'postgres'),
    settings: {
      ...{ fsync: durable, full_page_writes: durable, max_wal_size: '4GB' },
      ...{ shared_preload_libraries: 'pg_stat_statements', 'pg_stat_statements.track_utility': 'on' },
      ...options.postgres,
    },
  });
  undo.push(postgres.stop);
  const redis = new Redis(redisServer.url);
  undo.push(async () => redis.disconnect());
  const password = randomBytes(12).toString('hex');
  await inDatabase(postgres.url, async (admin) => {
    await admin.query(`CREATE ROLE ${CONTENDER_ROLE} SUPERUSER LOGIN PASSWORD '${password}'`);
    await admin.query('CREATE EXTENSION pg_stat_statements');
  });

  return {
    ...{ postgres, redisServer, redis },
    async database(name) {
      await inDatabase(postgres.url, (admin) =>
        admin.query(`CREATE DATABASE "${name}" OWNER ${CONTENDER_ROLE}`),
      );
      const ours = new URL(postgres.url);
      ours.pathname = `/${name}`;
      const theirs = new URL(ours);
      theirs.username = CONTENDER_ROLE;
      theirs.password = password;
      await inDatabase(ours.href, (admin) => admin.query('CREATE EXTENSION pg_stat_statements'));
      const pool = new pg.Pool({ connectionString: ours.href, max: 4 });
      // A session that is still closing when its server stops has a last word, which nobody needs.
      pool.on('error', () => {});
      undo.push(() => pool.end());
      return { name, url: theirs.href, pool };
    },
  };
}

async function inDatabase(url: string, work: (client: pg.Client) => Promise<unknown>): Promise<void> {
  const client = new pg.Client(url);
  await client.connect();
  await work(client).finally(() => client.end());
}

const nothing = () => {};
export const silent: Logger = {
  ...{ trace: nothing, debug: nothing, info: nothing, warn: nothing, error: nothing, fatal: nothing },
};

export const pause = (ms: number): Promise<void> =>
  new Promise((resolve) => setTimeout(resolve, Math.max(0, ms)));
