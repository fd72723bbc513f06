/** An idle relay, and one with little to do: from the commit of one event to its entry. */
import { openRelay } from '../contenders/relay.ts';
import { type Latencies, measureLatency } from '../latency.ts';
import { type Figure, ONCE_IN_ORDER, type Scenario } from '../scenario.ts';

/** One event in a transaction; with a hundred a second the next one often comes while one is on its way. */
const RATES = [20, 100] as const;

export const IDLE: Scenario = {
  name: 'idle',
  describe: 'latency of single events, 20 and 100 a second',
  minutes: 3,
  async run({ options, open, undo, progress }) {
    const seconds = options.quick ? 5 : 20;
    progress.now('starting servers and a pod');
    const servers = await open();
    const relay = await openRelay(servers, { name: 'relay' }, undo);
    const figures: Figure[] = [];
    for (const rate of RATES) {
      const load = { rate, batch: 1, jitterMs: 10 };
      progress.now(`${rate} events/s: warming up`);
      await measureLatency(relay, { ...load, seconds: 5 });
      const runs: Latencies[] = [];
      for (let run = 1; run <= options.runs; run++) {
        progress.now(`${rate} events/s: run ${run} of ${options.runs}`);
        const it = await measureLatency(relay, { ...load, seconds });
        progress.note(
          `${rate} events/s, run ${run}: p50 ${it.p50.toFixed(1)} ms, p99 ${it.p99.toFixed(1)} ms, max ${it.max.toFixed(1)} ms`,
        );
        runs.push(it);
      }
      for (const name of ['p50', 'p95', 'p99', 'max'] as const)
        figures.push({ name: `${rate} events/s, ${name}`, unit: 'ms', values: runs.map((it) => it[name]) });
    }
    await relay.audit();
    return {
      about: `one event in a transaction, ${seconds} s; from the answer to COMMIT to a consumer that waits in XREAD`,
      figures,
      verified: ONCE_IN_ORDER,
      notes: [],
    };
  },
};
