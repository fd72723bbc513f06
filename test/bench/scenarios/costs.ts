/** What an event costs, counted: statements, row writes, WAL, calls to Redis, memory in flight; and in time of the CPU. */
import type { Drained } from '../contender.ts';
import { openRelay } from '../contenders/relay.ts';
import { rowWrites, sessionsEnded, startCounting } from '../counts.ts';
import { cpuFigures, ONCE_IN_ORDER, type Scenario } from '../scenario.ts';
import { CONTENDER_ROLE, pause } from '../servers.ts';

const SAMPLE_MS = 25;
const WARM_EVENTS = 500;

export const COSTS: Scenario = {
  name: 'costs',
  describe: 'statements, row writes, WAL, Redis calls and memory for each event, counted; CPU time',
  minutes: 1,
  async run({ options, open, undo, progress }) {
    const { events = options.quick ? 5_000 : 20_000 } = options;
    const workload = { events, aggregates: events };
    progress.now('starting servers and a pod');
    const servers = await open();
    const relay = await openRelay(servers, { name: 'relay' }, undo);
    const { pool, redis, stream } = relay;
    await relay.drain({ events: WARM_EVENTS, aggregates: WARM_EVENTS });
    await relay.clear();
    await pause(1_000);

    progress.now('counting');
    const counter = await startCounting({
      ...{ pool, redisUrl: servers.redisServer.url, role: CONTENDER_ROLE, ignore: [redis] },
    });
    await relay.drain(workload);
    const counts = await counter.read();

    progress.now('watching memory');
    const idle = await beyondStream();
    let most = idle;
    let done = false;
    const again = relay.drain(workload).finally(() => {
      done = true;
    });
    while (!done) {
      most = Math.max(most, await beyondStream());
      await pause(SAMPLE_MS);
    }
    await again;

    const timed: Drained[] = [];
    for (let run = 1; run <= options.runs; run++) {
      progress.now(`CPU time, run ${run} of ${options.runs}`);
      timed.push(await relay.drain(workload));
    }

    progress.now('ending the pod, whose row writes are counted then');
    await relay.stop();
    await sessionsEnded(pool, CONTENDER_ROLE);
    const rows = await rowWrites(pool);
    const relayed = WARM_EVENTS + (2 + options.runs) * events;
    const per = (name: string, total: number, unit = 'per event') => ({
      name,
      unit,
      values: [total / events],
    });
    const { statements, control, commits, redis: calls } = counts;
    const total = statements.claim + statements.acknowledge + statements.other;
    return {
      about: `${events} events of as many aggregates, one pod`,
      figures: [
        // What was deleted, the benchmark has deleted between the runs.
        { name: 'row writes', unit: 'per event', values: [rows.updated / relayed] },
        per('SQL statements', total),
        per('SQL statements, with BEGIN, SET and COMMIT', total + control + commits),
        per('transactions', commits),
        per('WAL', counts.walBytes, 'bytes/event'),
        per('Redis calls', calls.callsTotal),
        per('Redis round trips', calls.reads),
        per('Redis commands within scripts', calls.withinScripts),
        { name: 'Redis memory in flight, at most', unit: 'KiB', values: [(most - idle) / 1_024] },
        ...cpuFigures('relay', timed),
      ],
      verified: ONCE_IN_ORDER,
      notes: [
        `Redis calls: ${Object.entries(calls.calls)
          .sort(([, a], [, b]) => b - a)
          .slice(0, 8)
          .map(([command, n]) => `${command} ${(n / events).toFixed(3)}`)
          .join(', ')}`,
        `statements: ${statements.claim} claims, ${statements.acknowledge} acknowledgements, ${statements.other} others`,
        ...counts.others.slice(0, 3).map((it) => `others: ${it.calls} x ${it.query.slice(0, 90)}`),
      ],
    };

    async function beyondStream(): Promise<number> {
      const [memory, ofStream] = await Promise.all([
        redis.info('memory'),
        redis.memory('USAGE', stream, 'SAMPLES', 0),
      ]);
      return Number(/^used_memory:(\d+)/m.exec(memory)?.[1]) - (ofStream ?? 0);
    }
  },
};
