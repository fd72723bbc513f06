/**
 * A relay that kills itself (SIGKILL: nothing is cleaned up, nothing answered) when it comes for the n-th time to the
 * moment that CHAOS_WINDOW names (faults-pods.ts). The steps are told by what goes over its connections.
 */
import { writeSync } from 'node:fs';
import type { Redis, RedisOptions } from 'ioredis';
import type pg from 'pg';
import { createPool } from '../../src/connections/pool.ts';
import { openRedis } from '../../src/connections/servers.ts';
import { createRelay, loadConfig } from '../../src/index.ts';
import type { Window } from './faults-pods.ts';

const window = process.env.CHAOS_WINDOW as Window;
const config = loadConfig(process.env);
let left = Number(process.env.CHAOS_OCCURRENCE ?? 1);

/** The pod is at this moment. */
function at(moment: Window): void {
  if (moment !== window || --left > 0) return;
  writeSync(1, `dies: ${moment}\n`);
  process.kill(process.pid, 'SIGKILL');
  // The signal needs an instant; in the meantime nothing more must go out.
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0);
}

/** Notes what each transaction did, so that its commit can be told from others. */
function watched(pool: pg.Pool): pg.Pool {
  pool.on('connect', (client) => {
    const query = client.query.bind(client) as (...args: unknown[]) => Promise<pg.QueryResult>;
    let claimed = false;
    let acknowledged = false;
    client.query = (async (...args: unknown[]) => {
      const [first] = args as [string | { name?: string; text: string }];
      const { name = '', text } = typeof first === 'string' ? { text: first } : first;
      const commits = text === 'COMMIT';
      if (commits && claimed) at('claim-before-commit');
      const result = await query(...args);
      if (commits && claimed) at('claim-after-commit');
      if (commits && acknowledged) at('acknowledge-before-completion');
      if (commits || text === 'ROLLBACK') claimed = acknowledged = false;
      if (name.startsWith('relay-claim-')) claimed = result.rows.some((row) => !row.parked);
      if (name === 'relay-publish') acknowledged = true;
      return result;
    }) as unknown as typeof client.query;
  });
  return pool;
}

type Command = (this: unknown, ...args: unknown[]) => Promise<string | (string | string[])[]>;

/** Tells the appends of the connection that makes them; the relay makes its own connections from this one. */
function watchedRedis(redis: Redis): Redis {
  const duplicate = redis.duplicate.bind(redis);
  redis.duplicate = (options?: Partial<RedisOptions>) => watchedRedis(duplicate(options));
  const define = redis.defineCommand.bind(redis);
  redis.defineCommand = (name, definition) => {
    define(name, definition);
    if (name !== 'appendInOrder' && name !== 'appendLetter') return;
    const isLetter = name === 'appendLetter';
    const commands = redis as unknown as Record<string, Command>;
    const append = commands[name] as Command;
    commands[name] = async function (...args) {
      // ioredis puts the command into its pipelines as well.
      if (this !== redis) return append.call(this, ...args);
      if (isLetter) at('failure-before-dead-letter');
      const answer = await append.call(this, ...args);
      for (const it of [answer].flat(2))
        if (it.startsWith('+')) at(isLetter ? 'dead-letter-before-row' : 'append-before-acknowledge');
      return answer;
    };
  };
  return redis;
}

const redis = watchedRedis(openRedis(config, { lazyConnect: true }));
redis.on('error', () => {});
// As relay.ts makes it.
const pool = watched(
  createPool(config.databaseUrl, {
    ...{ max: 10, connectionTimeoutMillis: 5_000, query_timeout: config.publishTimeoutMs },
    ...{ keepAlive: true, pipeline: true, application_name: 'relay-service' },
  }),
);
pool.on('error', () => {});

await createRelay(config, { pool, redis }).start();
