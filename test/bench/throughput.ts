/**
 * `npm run bench`: how fast one relay pod drains a backlog, beside a BullMQ queue that does nothing, on the same
 * servers, in turns. Seconds of one machine mean little; the ratio of the two is what counts. Every drain is
 * audited from the table and the stream before it counts.
 */
import { spawn } from 'node:child_process';
import { readdir, readFile } from 'node:fs/promises';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { Command, Option } from 'commander';
import { wholeNumber } from '../../src/demo/command-line.ts';
import { BACKLOG_ENV, benchBacklog } from './backlog.ts';
import { BLOCKED_ENV, benchBlocked } from './blocked.ts';
import { benchRetention, RETENTION_ENV } from './retention.ts';
import { type BenchStage, median, NOTHING_FRESH, NOTHING_LIVE, openBenchStage, STREAM } from './stage.ts';
import { benchTableSize } from './table-size.ts';

/** Where the no-op queue is fastest: 200 is a fifth slower. */
const NOOP_CONCURRENCY = 100;

const positive = wholeNumber(1, 1_000_000_000);
const list = (text: string) => text.split(',').map(positive);

const options = new Command('bench')
  .description('Drains a backlog with one relay pod, and runs as many no-op BullMQ jobs, in turns.')
  .addOption(
    new Option(
      '--scenario <name>',
      'engine: beside a no-op queue; blocked: beside blocked aggregates; backlog: memory with many rows waiting; ' +
        'retention: latency while old rows are deleted; table-size: after as many events',
    )
      .choices(['engine', 'blocked', 'backlog', 'retention', 'table-size'])
      .default('engine'),
  )
  .option(
    '--events <n>',
    'events per run (default: 20000; backlog, retention, table-size: 1000000)',
    positive,
  )
  .option('--runs <n>', 'runs of each contender', positive, 3)
  .option('--aggregates <list>', 'numbers of aggregates that the events belong to', list, [20_000, 1_000])
  .option('--concurrency <n>', "publish jobs at once (default: the relay's own)", positive)
  .option('--seconds <n>', 'how long memory is watched (backlog)', positive, 60)
  .option('--variant <n>', 'only this variant of the table (table-size)', positive)
  .option('--no-fsync', 'run PostgreSQL without fsync')
  .parse()
  .opts<{
    scenario: 'engine' | 'blocked' | 'backlog' | 'retention' | 'table-size';
    events?: number;
    runs: number;
    aggregates: number[];
    concurrency?: number;
    seconds: number;
    variant?: number;
    fsync: boolean;
  }>();
const isLong = ['backlog', 'retention', 'table-size'].includes(options.scenario);
const events = options.events ?? (isLong ? 1_000_000 : 20_000);

const undo: (() => Promise<unknown>)[] = [];
process.once('SIGINT', () => void cleanUp().then(() => process.exit(130)));
try {
  if (!(await bench())) process.exitCode = 1;
} finally {
  await cleanUp();
}

async function cleanUp(): Promise<void> {
  for (const step of undo.splice(0).reverse()) await step();
}

async function bench(): Promise<boolean> {
  const { scenario, fsync, runs } = options;
  console.log(`node ${process.version}, scenario ${scenario}, fsync ${fsync ? 'on' : 'off'}`);
  if (scenario === 'table-size') {
    await benchTableSize(events, options.variant, undo);
    return true;
  }
  const env = {
    engine: {
      RELAY_STREAM_MAXLEN: '0',
      ...(options.concurrency && { RELAY_CONCURRENCY: String(options.concurrency) }),
    },
    blocked: BLOCKED_ENV,
    backlog: BACKLOG_ENV,
    retention: RETENTION_ENV,
  }[scenario];
  const stage = await openBenchStage({ fsync, env }, undo);
  switch (scenario) {
    case 'engine':
      await benchEngine(stage);
      return true;
    case 'blocked':
      return benchBlocked(stage, { events, runs });
    case 'backlog':
      return benchBacklog(stage, { events, seconds: options.seconds });
    case 'retention':
      return benchRetention(stage, { rows: events });
  }
}

async function benchEngine(stage: BenchStage): Promise<void> {
  const { pool, redis, redisServer, postgres, pod } = stage;
  const noop = await startNoop(redisServer.url);
  console.log(`${events} events per run, ${options.runs} runs`);
  await noop(events); // both warm
  await drain(events);
  for (const aggregates of options.aggregates) {
    const rates: { noop: number; relay: number; ratio: number; cpu: number }[] = [];
    for (let run = 1; run <= options.runs; run++) {
      const before = await noop(events);
      const relay = await drain(aggregates);
      const after = await noop(events);
      const engine = (before + after) / 2;
      rates.push({ noop: engine, relay: relay.rate, ratio: relay.rate / engine, cpu: relay.podCpuMicros });
      console.log(
        `  run ${run}: relay ${Math.round(relay.rate)}/s, no-op queue ${Math.round(engine)}/s, ` +
          `ratio ${(relay.rate / engine).toFixed(2)}; per event: CPU ${relay.podCpuMicros.toFixed(0)} µs pod, ` +
          `${relay.redisCpuMicros.toFixed(0)} µs Redis, ${relay.postgresCpuMicros.toFixed(0)} µs PostgreSQL; ` +
          `${relay.statements.toFixed(3)} transactions`,
      );
    }
    const of = (pick: (it: (typeof rates)[number]) => number) => median(rates.map(pick));
    console.log(
      `${aggregates} aggregates: relay ${Math.round(of((it) => it.relay))}/s, no-op queue ${Math.round(of((it) => it.noop))}/s, ` +
        `ratio ${of((it) => it.ratio).toFixed(2)} (median; ${rates.map((it) => it.ratio.toFixed(2)).join(', ')})`,
    );
  }
  console.log('every event once, in the order of its aggregate, in every run');

  async function drain(aggregates: number) {
    await pool.query('TRUNCATE identity.outbox');
    await redis.del(STREAM);
    await stage.insert(events, aggregates);
    const before = await costs();
    const startedAt = await stage.now();
    await stage.until(`${NOTHING_FRESH} AND ${NOTHING_LIVE}`);
    const { rows } = await pool.query(
      `SELECT extract(epoch FROM max(published_at) - $1::timestamptz)::float8 AS seconds FROM identity.outbox`,
      [startedAt],
    );
    const after = await costs();
    await stage.audit();
    return {
      rate: events / rows[0].seconds,
      podCpuMicros: (after.pod - before.pod) / events,
      postgresCpuMicros: (after.postgres - before.postgres) / events,
      redisCpuMicros: (after.redis - before.redis) / events,
      statements: (after.transactions - before.transactions) / events,
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
