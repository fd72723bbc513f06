/**
 * Memory with a long backlog: what Redis holds beyond the stream, and what the pod holds, watched while it drains.
 * The bounds are those of the README: RELAY_MAX_IN_FLIGHT explains Redis' share, and a pod stays under 200 MiB.
 */
import { readFile } from 'node:fs/promises';
import { type BenchStage, STREAM } from './stage.ts';

const MAX_IN_FLIGHT = 1_000;
const AGGREGATES_PER_EVENT = 1 / 5;
const SAMPLE_MS = 250;
/** A job's own, beside its payload, which is in Redis once more while the append is on its way. */
const JOB_BYTES = 1_600;
/** Connections, their buffers, scripts, the claim queue. */
const CONSTANT_BYTES = 8 * 2 ** 20;
const MOST_POD_BYTES = 200 * 2 ** 20;

export const BACKLOG_ENV = {
  RELAY_MAX_IN_FLIGHT: String(MAX_IN_FLIGHT),
  // The stream must not be what is measured.
  RELAY_STREAM_MAXLEN: '1000',
};

/** @returns whether both stayed under their bounds */
export async function benchBacklog(
  stage: BenchStage,
  options: Readonly<{ events: number; seconds: number }>,
): Promise<boolean> {
  const { pool, redis, pod } = stage;
  const idleRedis = await redisBeyondStream();
  const idlePod = await podMemory();
  // In one transaction: the relay sees nothing of it before all of it is there.
  await stage.insert(options.events, Math.ceil(options.events * AGGREGATES_PER_EVENT));
  const { rows } = await pool.query(
    'SELECT avg(octet_length(payload::text))::float8 AS bytes FROM (SELECT payload FROM identity.outbox LIMIT 1000) x',
  );
  const allowed = idleRedis + MAX_IN_FLIGHT * (JOB_BYTES + 2 * rows[0].bytes) + CONSTANT_BYTES;
  const endsAt = Date.now() + options.seconds * 1_000;
  let mostRedis = 0;
  let mostJobs = 0;
  let pods = await podMemory();
  while (Date.now() < endsAt) {
    await new Promise((resolve) => setTimeout(resolve, SAMPLE_MS));
    mostRedis = Math.max(mostRedis, await redisBeyondStream());
    mostJobs = Math.max(mostJobs, await redis.dbsize());
    pods = await podMemory();
  }
  const left = await pool.query(
    'SELECT count(*)::int AS n FROM identity.outbox WHERE NOT published AND dead_lettered_at IS NULL',
  );
  const mib = (bytes: number) => `${(bytes / 2 ** 20).toFixed(1)} MiB`;
  const redisKept = mostRedis <= allowed;
  const podKept = pods.peak <= MOST_POD_BYTES;
  console.log(
    `backlog of ${options.events} rows, ${options.seconds} s, ${options.events - left.rows[0].n} published (${Math.round((options.events - left.rows[0].n) / options.seconds)}/s):\n` +
      `  Redis beyond the stream: ${mib(idleRedis)} idle, ${mib(mostRedis)} at most, allowed ${mib(allowed)}, at most ${mostJobs} keys: ${redisKept ? 'kept' : 'NOT kept'}\n` +
      `  the pod, resident: ${mib(idlePod.now)} idle, ${mib(pods.now)} in the end, ${mib(pods.peak)} at most, allowed ${mib(MOST_POD_BYTES)}: ${podKept ? 'kept' : 'NOT kept'}`,
  );
  return redisKept && podKept;

  async function redisBeyondStream(): Promise<number> {
    const [memory, stream] = await Promise.all([
      redis.info('memory'),
      redis.memory('USAGE', STREAM, 'SAMPLES', 0),
    ]);
    return Number(/^used_memory:(\d+)/m.exec(memory)?.[1]) - (stream ?? 0);
  }

  /** Bytes, from /proc: Linux only. */
  async function podMemory(): Promise<{ now: number; peak: number }> {
    const status = await readFile(`/proc/${pod.pid}/status`, 'utf8');
    const bytes = (field: string) =>
      Number(new RegExp(`^${field}:\\s*(\\d+) kB`, 'm').exec(status)?.[1]) * 1024;
    return { now: bytes('VmRSS'), peak: bytes('VmHWM') };
  }
}
