/**
 * A million rows waiting: whether the last tenth flows as the first does, what Redis holds beyond the stream, and what
 * the pod holds, watched while it drains. RELAY_MAX_IN_FLIGHT explains Redis' share.
 */
import { loadConfig } from '../../../src/config/load-config.ts';
import { NOTHING_FRESH, NOTHING_LIVE, openRelay, type Relay } from '../contenders/relay.ts';
import { residentBytes } from '../cpu.ts';
import { createRecorder } from '../recorder.ts';
import type { Scenario } from '../scenario.ts';
import { pause } from '../servers.ts';

/** By default, as a pod has it that nobody configured. */
const MAX_IN_FLIGHT = loadConfig({}).maxInFlight;
const AGGREGATES_PER_EVENT = 1 / 5;
const SAMPLE_MS = 250;
/** A job's own, beside its payload, which is in Redis once more while the append is on its way. */
const JOB_BYTES = 1_600;
/** Connections, their buffers, scripts, the claim queue. */
const CONSTANT_BYTES = 8 * 2 ** 20;
const MOST_POD_BYTES = 200 * 2 ** 20;
const MIB = 2 ** 20;

export const BACKLOG: Scenario = {
  name: 'backlog',
  describe: 'a million rows waiting: first and last tenth, memory of Redis and of the pod',
  minutes: 6,
  async run({ options, open, undo, progress }) {
    const { events = options.quick ? 20_000 : 1_000_000, seconds = Number.POSITIVE_INFINITY } = options;
    const rowsText = events.toLocaleString('en');
    progress.now('starting servers and a pod');
    const servers = await open();
    // The stream must not be what is measured.
    const env = { RELAY_STREAM_MAXLEN: '100000' };
    const relay = await openRelay(servers, { name: 'relay', env }, undo);
    const { pool, redis, pods, stream } = relay;
    const [{ pid } = { pid: 0 }] = pods;
    const idleRedis = await redisBeyondStream(relay);
    const idlePod = await residentBytes(pid);
    // Reads along: the stream is trimmed long before the end.
    const recorder = createRecorder(redis, stream);
    progress.now(`filling in ${events} rows`);
    await relay.insert({ events, aggregates: Math.ceil(events * AGGREGATES_PER_EVENT) });
    const { rows } = await pool.query(
      'SELECT avg(octet_length(payload::text))::float8 AS bytes FROM (SELECT payload FROM identity.outbox LIMIT 1000) x',
    );
    const allowed = idleRedis + MAX_IN_FLIGHT * (JOB_BYTES + 2 * rows[0].bytes) + CONSTANT_BYTES;
    const beganAt = Date.now();
    let mostRedis = 0;
    let mostKeys = 0;
    for (let done = false; !done && Date.now() - beganAt < seconds * 1_000; ) {
      progress.now(`${recorder.count()} of ${events} events are in the stream`);
      await pause(SAMPLE_MS);
      mostRedis = Math.max(mostRedis, await redisBeyondStream(relay));
      mostKeys = Math.max(mostKeys, await redis.dbsize());
      done = (await pool.query(`SELECT ${NOTHING_FRESH} AND ${NOTHING_LIVE} AS yes`)).rows[0].yes;
    }
    const took = (Date.now() - beganAt) / 1_000;
    const pod = await residentBytes(pid);
    progress.now('auditing');
    const isAll = seconds === Number.POSITIVE_INFINITY;
    if (isAll) await recorder.audit(pool, events);
    else recorder.stop();
    const tenths = isAll ? await tenthRates(relay, events) : [];
    const [first, last] = [tenths[0], tenths.at(-1)];
    const redisKept = mostRedis <= allowed;
    const podKept = pod.peak <= MOST_POD_BYTES;
    return {
      about: `${events} rows of ${Math.ceil(events * AGGREGATES_PER_EVENT)} aggregates, one pod`,
      figures: [
        { name: 'drain rate', unit: 'events/s', values: [recorder.count() / took] },
        ...(first && last
          ? [
              { name: 'first tenth', unit: 'events/s', values: [first] },
              { name: 'last tenth', unit: 'events/s', values: [last] },
              { name: `last tenth / first tenth of ${rowsText}`, unit: 'ratio', values: [last / first] },
            ]
          : []),
        { name: 'Redis beyond the stream, idle', unit: 'MiB', values: [idleRedis / MIB] },
        { name: 'Redis beyond the stream, at most', unit: 'MiB', values: [mostRedis / MIB] },
        { name: 'pod, resident, idle', unit: 'MiB', values: [idlePod.now / MIB] },
        { name: `pod, resident, at most, ${rowsText} rows`, unit: 'MiB', values: [pod.peak / MIB] },
      ],
      verified: isAll
        ? 'every event once, in the order of its aggregate, by a consumer that read along'
        : 'not verified: it was not waited for the end',
      notes: [
        `to be kept: Redis beyond the stream ${(allowed / MIB).toFixed(1)} MiB (${redisKept ? 'kept' : 'NOT kept'}), ` +
          `pod ${MOST_POD_BYTES / MIB} MiB (${podKept ? 'kept' : 'NOT kept'})`,
        `at most ${mostKeys} keys in Redis`,
      ],
      kept: redisKept && podKept,
    };
  },
};

async function redisBeyondStream({ redis, stream }: Relay): Promise<number> {
  const [memory, ofStream] = await Promise.all([
    redis.info('memory'),
    redis.memory('USAGE', stream, 'SAMPLES', 0),
  ]);
  return Number(/^used_memory:(\d+)/m.exec(memory)?.[1]) - (ofStream ?? 0);
}

/** Events per second while each tenth of the events was published. */
async function tenthRates({ pool }: Relay, events: number): Promise<number[]> {
  const { rows } = await pool.query<{ seconds: number }>(
    `SELECT extract(epoch FROM max(published_at) - min(published_at))::float8 AS seconds
       FROM (SELECT published_at, ntile(10) OVER (ORDER BY published_at, id) AS tenth FROM identity.outbox) x
      GROUP BY tenth ORDER BY tenth`,
  );
  return rows.map(({ seconds }) => events / 10 / seconds);
}
