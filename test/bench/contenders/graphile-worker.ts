/**
 * graphile-worker of npm: the producer's transaction adds a job for each event, whose task is one XADD. Its jobs are the
 * outbox. It runs the jobs of a named queue one at a time, by `run_at`; a job that fails is overtaken by the next.
 */
import { readFileSync } from 'node:fs';
import { runMigrations } from 'graphile-worker';
import { auditEntries, eventIds } from '../audit.ts';
import { type Contender, startChild } from '../contender.ts';
import { cpuBetween, cpuSoFar } from '../cpu.ts';
import { pause, type Servers, type Undo } from '../servers.ts';
import { fillJobs } from '../workload.ts';

export type GraphileWorkerConfig = Readonly<{
  databaseUrl: string;
  redisUrl: string;
  stream: string;
  /** Jobs at once. */
  concurrency: number;
  /** Jobs that one statement fetches; -1: each is fetched by itself. */
  localQueue: number;
}>;

/**
 * Whether its local queue keeps the jobs of a named queue in order. That of 0.17 runs them at once (graphile/worker#621), and
 * completing them deadlocks. 0.18 needs Node 22.18: `npm install --no-save graphile-worker@0.18.0` measures it.
 */
const keepsOrderLocally = !/^0\.1[0-7]\./.test(
  JSON.parse(
    readFileSync(new URL('../../../node_modules/graphile-worker/package.json', import.meta.url), 'utf8'),
  ).version,
);

/**
 * The best settings that were found. Without the local queue each job is fetched by itself, and aggregates that share 16
 * queues drain several times as fast as with a queue each, which the documentation warns of; more or fewer jobs at
 * once, and polls every 10 or 50 ms instead of 2 s, made it no faster.
 */
const VARIANTS = {
  'in order': keepsOrderLocally
    ? { queueDigits: 32, mostSeconds: 60, isSlow: false, concurrency: 100, localQueue: 2_000 }
    : { queueDigits: 1, mostSeconds: 6, isSlow: true, concurrency: 16, localQueue: -1 },
  'no order': { queueDigits: 0, mostSeconds: 60, isSlow: false, concurrency: 100, localQueue: 500 },
} as const;

export async function openGraphileWorker(
  servers: Servers,
  variant: keyof typeof VARIANTS,
  undo: Undo,
): Promise<Contender> {
  const { redis, redisServer } = servers;
  const id = `graphile-worker-${variant.replaceAll(' ', '-')}`;
  const stream = `bench.${id}.v1`;
  const { pool, url } = await servers.database(id);
  await runMigrations({ connectionString: url });
  const { queueDigits, mostSeconds, isSlow, ...tuning } = VARIANTS[variant];
  const isOrdered = queueDigits > 0;
  const config: GraphileWorkerConfig = { databaseUrl: url, redisUrl: redisServer.url, stream, ...tuning };
  const child = await startChild('graphile-worker-child.ts', config, undo);
  return {
    name: `graphile-worker, ${variant}`,
    ...(isSlow ? { isSlow } : {}),
    describe:
      `a job for each event, ${isOrdered ? `in ${queueDigits === 1 ? '16 named queues' : 'a queue for each aggregate'}` : 'in no queue'}, ` +
      `${config.concurrency} at once, one XADD each, fetched ` +
      `${config.localQueue === -1 ? 'one by one' : `${config.localQueue} at a time`}; without dead letters` +
      `${isOrdered ? '' : ', order'}`,
    async drain(workload) {
      const added = await fillJobs(pool, workload, queueDigits);
      await child.ask('start');
      const startedAt = performance.now();
      const secondsSoFar = () => (performance.now() - startedAt) / 1_000;
      const before = await cpuSoFar(servers, [child.pid]);
      for (let left = true; left && secondsSoFar() < mostSeconds; ) {
        await pause(20);
        // Its table answers this only by a scan, the stream at once.
        if ((await redis.xlen(stream)) < workload.events) continue;
        left = (await pool.query('SELECT EXISTS (SELECT FROM graphile_worker.jobs) AS left')).rows[0].left;
      }
      const finishedSeconds = secondsSoFar();
      const cpu = cpuBetween(before, await cpuSoFar(servers, [child.pid]));
      await child.ask('stop');
      const stoppedSeconds = secondsSoFar();
      const { rows } = await pool.query<{ id: string }>('SELECT id::text FROM graphile_worker.jobs');
      const left = new Set(rows.map((row) => row.id));
      const events = added.length - left.size;
      if (events === 0) throw new Error(`${id}: nothing was published in ${mostSeconds} s`);
      const written = added.map((job) => ({ ...job, done: !left.has(job.jobId) }));
      auditEntries(written, await eventIds(redis, stream), { ordered: isOrdered });
      // At once: autovacuum would come in the turn of another contender.
      await pool.query('TRUNCATE graphile_worker._private_jobs, graphile_worker._private_job_queues');
      await redis.del(stream);
      // Jobs that were running when the time was up have been finished.
      return { events, seconds: left.size === 0 ? finishedSeconds : stoppedSeconds, cpu };
    },
  };
}
