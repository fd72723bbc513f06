/**
 * `npm run bench`: how fast one relay pod drains a backlog, beside a BullMQ queue that does nothing, on the same
 * servers, in turns. Seconds of one machine mean little; the ratio of the two is what counts. Every drain is
 * audited from the table and the stream before it counts.
 */
import { spawn } from 'node:child_process';
import { readdir, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { Command, InvalidArgumentError } from 'commander';
import { Redis } from 'ioredis';
import pg from 'pg';
import { gradeLedger } from '../../src/demo/ledger.ts';
import { startPod } from '../../src/demo/pod.ts';
import { startPrivatePostgres, startPrivateRedis } from '../../src/demo/servers.ts';
import { temporaryFolder } from '../../src/demo/watchdog.ts';
import { migrate } from '../../src/outbox/migrate.ts';

const STREAM = 'identity.user.v1';
const DRAIN_DEADLINE_MS = 300_000;
/** Where the no-op queue is fastest: 200 is a fifth slower. */
const NOOP_CONCURRENCY = 100;

const positive = (text: string) => {
  const value = Number(text);
  if (!Number.isInteger(value) || value < 1)
    throw new InvalidArgumentError('expected a whole number above 0');
  return value;
};
const list = (text: string) => text.split(',').map(positive);

const options = new Command('bench')
  .description('Drains a backlog with one relay pod, and runs as many no-op BullMQ jobs, in turns.')
  .option('--events <n>', 'events per run', positive, 20_000)
  .option('--runs <n>', 'runs of each contender', positive, 3)
  .option('--aggregates <list>', 'numbers of aggregates that the events belong to', list, [20_000, 1_000])
  .option('--concurrency <n>', "publish jobs at once (default: the relay's own)", positive)
  .option('--no-fsync', 'run PostgreSQL without fsync')
  .parse()
  .opts<{ events: number; runs: number; aggregates: number[]; concurrency?: number; fsync: boolean }>();

const undo: (() => Promise<unknown>)[] = [];
process.once('SIGINT', () => void cleanUp().then(() => process.exit(130)));
try {
  await bench();
} finally {
  await cleanUp();
}

async function cleanUp(): Promise<void> {
  for (const step of undo.splice(0).reverse()) await step();
}

async function bench(): Promise<void> {
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
  const silent = () => {};
  const logger = {
    trace: silent,
    debug: silent,
    info: silent,
    warn: silent,
    error: silent,
    fatal: silent,
    child: () => logger,
  };
  await migrate(admin, true, logger);
  const redis = new Redis(redisServer.url);
  undo.push(async () => redis.disconnect());
  const pool = new pg.Pool({ connectionString: postgres.url, max: 2 });
  undo.push(() => pool.end());

  const noop = await startNoop(redisServer.url);
  const pod = await startPod({
    cli: fileURLToPath(new URL('../../dist/cli.js', import.meta.url)),
    env: {
      RELAY_DATABASE_URL: postgres.url,
      RELAY_REDIS_URL: redisServer.url,
      RELAY_STREAM_MAXLEN: '0',
      RELAY_LOG_LEVEL: 'warn',
      ...(options.concurrency && { RELAY_CONCURRENCY: String(options.concurrency) }),
    },
  });
  undo.push(() => pod.kill());
  await pod.waitReady();

  console.log(
    `node ${process.version}, ${options.events} events per run, ${options.runs} runs, fsync ${options.fsync ? 'on' : 'off'}`,
  );
  await noop(options.events); // both warm
  await drain(options.events);
  for (const aggregates of options.aggregates) {
    const rates: { noop: number; relay: number; ratio: number; cpu: number }[] = [];
    for (let run = 1; run <= options.runs; run++) {
      const before = await noop(options.events);
      const relay = await drain(aggregates);
      const after = await noop(options.events);
      const engine = (before + after) / 2;
      rates.push({ noop: engine, relay: relay.rate, ratio: relay.rate / engine, cpu: relay.podCpuMicros });
      console.log(
        `  run ${run}: relay ${Math.round(relay.rate)}/s, no-op queue ${Math.round(engine)}/s, ` +
          `ratio ${(relay.rate / engine).toFixed(2)}; per event: CPU ${relay.podCpuMicros.toFixed(0)} µs pod, ` +
          `${relay.redisCpuMicros.toFixed(0)} µs Redis, ${relay.postgresCpuMicros.toFixed(0)} µs PostgreSQL; ` +
          `${relay.statements.toFixed(3)} transactions`,
      );
    }
    const median = (of: (it: (typeof rates)[number]) => number) =>
      rates.map(of).sort((a, b) => a - b)[Math.floor(rates.length / 2)] as number;
    console.log(
      `${aggregates} aggregates: relay ${Math.round(median((it) => it.relay))}/s, no-op queue ${Math.round(median((it) => it.noop))}/s, ` +
        `ratio ${median((it) => it.ratio).toFixed(2)} (median; ${rates.map((it) => it.ratio.toFixed(2)).join(', ')})`,
    );
  }
  console.log('every event once, in the order of its aggregate, in every run');

  async function drain(aggregates: number) {
    await pool.query('TRUNCATE identity.outbox');
    await redis.del(STREAM);
    await pool.query(
      `INSERT INTO identity.outbox (event_type, aggregate_id, payload)
       SELECT 'UserCreated', md5((i % $2)::text)::uuid, jsonb_build_object(
         'user_id', md5((i % $2)::text)::uuid, 'tenant_id', '11111111-1111-1111-1111-111111111111',
         'email', 'user' || i || '@example.com', 'display_name', 'User ' || i, 'status', 'active',
         'created_at', '2026-01-01T00:00:00Z')
       FROM generate_series(1, $1::int) i`,
      [options.events, aggregates],
    );
    const before = await costs();
    const startedAt = (await pool.query('SELECT clock_timestamp()::text AS now')).rows[0].now;
    const deadline = Date.now() + DRAIN_DEADLINE_MS;
    for (;;) {
      // Both questions are answered by the relay's own partial indexes: looking must not cost what is measured.
      const { rows } = await pool.query(
        `SELECT EXISTS (SELECT FROM identity.outbox WHERE NOT published AND next_attempt_at IS NULL)
             OR EXISTS (SELECT FROM identity.outbox WHERE NOT published AND dead_lettered_at IS NULL
                        ORDER BY aggregate_type, aggregate_id, id) AS left`,
      );
      if (!rows[0].left) break;
      if (Date.now() > deadline) throw new Error(`not drained within ${DRAIN_DEADLINE_MS / 1000} s`);
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
    const { rows } = await pool.query(
      `SELECT extract(epoch FROM max(published_at) - $1::timestamptz)::float8 AS seconds FROM identity.outbox`,
      [startedAt],
    );
    const after = await costs();
    const grade = await gradeLedger({ pool, redis, defaultStream: STREAM, dlqStream: `${STREAM}.dlq` });
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
    return {
      rate: options.events / rows[0].seconds,
      podCpuMicros: (after.pod - before.pod) / options.events,
      postgresCpuMicros: (after.postgres - before.postgres) / options.events,
      redisCpuMicros: (after.redis - before.redis) / options.events,
      statements: (after.transactions - before.transactions) / options.events,
    };
  }

  /** CPU so far in microseconds, and transactions. */
  async function costs() {
    const info = await redis.info('cpu');
    const times = await processTimes();
    const micros = (which: (it: ProcessTimes) => boolean) =>
      times.filter(which).reduce((sum, it) => sum + it.micros, 0);
    const seconds = (name: string) => Number(new RegExp(`^${name}:(.*)`, 'm').exec(info)?.[1]);
    const { rows } = await pool.query('SELECT sum(xact_commit)::int AS n FROM pg_stat_database');
    return {
      pod: micros((it) => it.pid === pod.pid),
      postgres: micros((it) => it.pid === postgres.pid || it.parent === postgres.pid),
      redis: (seconds('used_cpu_user') + seconds('used_cpu_sys')) * 1e6,
      transactions: rows[0].n as number,
    };
  }
}

type ProcessTimes = { pid: number; parent: number; micros: number };

/** User and system time of every process, from /proc; empty where there is none. */
async function processTimes(): Promise<ProcessTimes[]> {
  const pids = (await readdir('/proc').catch(() => [])).filter((name) => /^\d+$/.test(name));
  const stats = await Promise.all(pids.map((pid) => readFile(`/proc/${pid}/stat`, 'utf8').catch(() => '')));
  return stats.filter(Boolean).map((stat) => {
    const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
    return {
      pid: Number.parseInt(stat, 10),
      parent: Number(fields[1]),
      // Its own, and that of the children that have ended (backends come and go).
      micros: fields.slice(11, 15).reduce((sum, ticks) => sum + Number(ticks), 0) * 10_000,
    };
  });
}

/** @returns a function that runs so many jobs and answers with jobs per second */
async function startNoop(redisUrl: string): Promise<(jobs: number) => Promise<number>> {
  const script = fileURLToPath(new URL('./noop.ts', import.meta.url));
  const child = spawn(process.execPath, ['--import', 'tsx', script, redisUrl, String(NOOP_CONCURRENCY)], {
    stdio: ['pipe', 'pipe', 'inherit'],
  });
  undo.push(async () => child.stdin.end());
  const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
  const next = async () => {
    const { value, done } = await lines.next();
    if (done) throw new Error('the no-op queue ended unexpectedly');
    return value as string;
  };
  await next();
  return async (jobs) => {
    child.stdin.write(`${jobs}\n`);
    return jobs / (Number(await next()) / 1000);
  };
}
