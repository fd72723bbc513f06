/** A relay in this process whose steps are watched, and which is gone at the moment that a test names, as by kill -9. */
import type { Redis, RedisOptions } from 'ioredis';
import pg from 'pg';
import { createRelay, type Relay, type RelayConfig } from '../../src/index.ts';
import type { Logger } from '../../src/telemetry/logger.ts';
import { type AdminPool, deferred, openPool, openRedis } from './stages.ts';
import { waitFor } from './wait.ts';

/** What the relay does to table and streams, told by its statements and scripts. */
export type Step =
  | 'claim'
  | 'acknowledge'
  | 'park'
  | 'refill'
  | 'record failure'
  | 'bury'
  | 'unpublish'
  | 'append'
  | 'letter';

export type Moment = `${'before' | 'after'} ${'' | 'commit of '}${Step}`;

export type Detail = Readonly<{
  /** That the statements of the step have returned, or changed. */
  rows: number;
  /** Of the append script: one for each entry, then the list of what it cascaded. */
  answers: readonly (string | readonly string[])[];
}>;

/** Told of each step; what it throws is the failure of the step. */
export type Watch = (moment: Moment, detail: Detail) => Promise<void>;

const NOTHING: Detail = { rows: 0, answers: [] };

const STATEMENTS: readonly (readonly [RegExp, Step])[] = [
  [/^relay-claim-/, 'claim'],
  [/^relay-publish$/, 'acknowledge'],
  [/^relay-refill-/, 'refill'],
  [/^relay-unpublish$/, 'unpublish'],
  [/CASE WHEN locked\.failed/, 'park'],
  [/attempts = \$3, error_message = \$4, next_attempt_at = now\(\)/, 'record failure'],
  [/attempts = \$3, error_message = \$4, stream_entry_id = \$5/, 'bury'],
];

const stepOf = (statement: string): Step | undefined =>
  STATEMENTS.find(([pattern]) => pattern.test(statement))?.[1];

type Ask = (...args: unknown[]) => Promise<pg.QueryResult>;

/** @param onStatement told before each statement, and before a connection is given out */
function watchedPool(
  pool: pg.Pool,
  watch: Watch,
  onStatement: () => Promise<void>,
): Pick<pg.Pool, 'connect' | 'query'> {
  function watched(ask: Ask): Ask {
    let inTransaction = new Map<Step, number>();
    return async (...args) => {
      await onStatement();
      const [query] = args as [string | pg.QueryConfig];
      const { name, text } = typeof query === 'string' ? { name: undefined, text: query } : query;
      if (text === 'COMMIT') {
        const steps = [...inTransaction];
        inTransaction = new Map();
        for (const [step, rows] of steps) await watch(`before commit of ${step}`, { ...NOTHING, rows });
        const result = await ask(...args);
        for (const [step, rows] of steps) await watch(`after commit of ${step}`, { ...NOTHING, rows });
        return result;
      }
      if (text === 'ROLLBACK') inTransaction = new Map();
      const step = stepOf(name ?? text);
      if (step !== undefined) await watch(`before ${step}`, NOTHING);
      const result = await ask(...args);
      if (step !== undefined) {
        const rows = result.rows.length || (result.rowCount ?? 0);
        inTransaction.set(step, (inTransaction.get(step) ?? 0) + rows);
        await watch(`after ${step}`, { ...NOTHING, rows });
      }
      return result;
    };
  }
  return {
    query: watched(pool.query.bind(pool) as unknown as Ask) as unknown as pg.Pool['query'],
    connect: (async () => {
      await onStatement();
      const client = await pool.connect();
      client.query = watched(
        pg.Client.prototype.query.bind(client) as unknown as Ask,
      ) as unknown as pg.PoolClient['query'];
      return client;
    }) as pg.Pool['connect'],
  };
}

const SCRIPTS: Readonly<Record<string, Step>> = { appendInOrder: 'append', appendLetter: 'letter' };

/** Before it begins a pod tries claim and append: these are no steps. It begins when its own connection gets the scripts. */
const STEPS_CONNECTION = 'relay-append';

function fromTheBeginning(watch: Watch): Readonly<{ watch: Watch; begin: () => void }> {
  let hasBegun = false;
  return {
    async watch(moment, detail) {
      if (hasBegun) await watch(moment, detail);
    },
    begin() {
      hasBegun = true;
    },
  };
}

/** The connection, and every one that is made of it. */
function watchedRedis(
  redis: Redis,
  of: ReturnType<typeof fromTheBeginning>,
  onConnection: (redis: Redis) => void,
): Redis {
  const { watch } = of;
  onConnection(redis);
  const duplicate = redis.duplicate.bind(redis);
  redis.duplicate = (options?: Partial<RedisOptions>) => watchedRedis(duplicate(options), of, onConnection);
  const define = redis.defineCommand.bind(redis);
  redis.defineCommand = (name, definition) => {
    define(name, definition);
    const step = SCRIPTS[name];
    if (step === undefined || redis.options.connectionName !== STEPS_CONNECTION) return;
    of.begin();
    type Command = (this: unknown, ...args: unknown[]) => Promise<Detail['answers']>;
    const commands = redis as unknown as Record<string, Command>;
    const run = commands[name] as Command;
    commands[name] = async function (...args) {
      // ioredis puts the command into its pipelines as well.
      if (this !== redis) return run.call(this, ...args);
      await watch(`before ${step}`, NOTHING);
      const answers = await run.call(this, ...args);
      await watch(`after ${step}`, { rows: 0, answers });
      return answers;
    };
  };
  return redis;
}

/** Starts a pod that tells of its steps. */
export async function startWatchedPod(config: RelayConfig, logger: Logger, watch: Watch): Promise<Relay> {
  const steps = fromTheBeginning(watch);
  const pod = createRelay(config, {
    pool: watchedPool(openPool(config.databaseUrl), steps.watch, async () => {}),
    redis: watchedRedis(openRedis(config.redisUrl), steps, () => {}),
    ...{ logger, http: false },
  });
  await pod.start();
  return pod;
}

const MORTAL = 'mortal pod';

/**
 * Starts a pod whose every connection ends for good when `isLast` says so of a moment: nothing of it reaches a server any
 * more. Resolves when it is dead.
 *
 * @param admin ends its sessions
 * @returns what is left of it, which only has timers
 */
export async function dieAt(
  config: RelayConfig,
  logger: Logger,
  admin: AdminPool,
  isLast: (moment: Moment, detail: Detail) => boolean | Promise<boolean>,
  timeoutMs: number,
): Promise<Relay> {
  const connections: Redis[] = [];
  const died = deferred();
  let isDead = false;

  async function sessions(): Promise<number> {
    const { rowCount } = await admin.query(
      'SELECT FROM pg_stat_activity WHERE application_name = $1 AND datname = current_database()',
      [MORTAL],
    );
    return rowCount ?? 0;
  }
  async function die(): Promise<void> {
    isDead = true;
    for (const redis of connections) redis.disconnect();
    await admin.query(
      `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE application_name = $1 AND datname = current_database()`,
      [MORTAL],
    );
    died.resolve();
  }
  async function assertAlive(): Promise<void> {
    if (!isDead) return;
    await died.promise;
    throw new Error('the pod is dead');
  }
  const steps = fromTheBeginning(async (moment, detail) => {
    await assertAlive();
    if ((await isLast(moment, detail)) && !isDead) await die();
    await assertAlive();
  });

  const pool = openPool(config.databaseUrl, { application_name: MORTAL });
  // Ended while it connects, a connection says so before anybody else can listen.
  pool.on('connect', (client) => client.on('error', () => {}));
  const redis = watchedRedis(openRedis(config.redisUrl), steps, (connection) => {
    connections.push(connection);
    const connect = connection.connect.bind(connection);
    connection.connect = () => (isDead ? Promise.reject(new Error('Connection is closed.')) : connect());
  });
  const pod = createRelay(
    { ...config, shutdownTimeoutMs: 100 },
    { pool: watchedPool(pool, steps.watch, assertAlive), redis, logger, http: false },
  );
  await pod.start().catch((error: unknown) => {
    if (!isDead) throw error;
  });
  await waitFor(async () => isDead && (await sessions()) === 0, {
    what: 'the pod to come to its last moment, and its sessions to be gone',
    timeoutMs,
  });
  return pod;
}
