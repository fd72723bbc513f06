/** An idle relay: from the commit of one event to its entry. */
import { openRelay } from '../contenders/relay.ts';
import { type Latencies, measureLatency } from '../latency.ts';
import { ONCE_IN_ORDER, type Scenario } from '../scenario.ts';

/** Far apart: each event finds the relay asleep. */
const EVENTS_PER_SECOND = 20;

export const IDLE: Scenario = {
  name: 'idle',
  describe: 'latency of single events, 20 a second',
  minutes: 1.5,
  async run({ options, open, undo, progress }) {
    const seconds = options.quick ? 5 : 20;
    progress.now('starting servers and a pod');
    const servers = await open();
    const relay = await openRelay(servers, { name: 'relay' }, undo);
    const load = { rate: EVENTS_PER_SECOND, batch: 1, jitterMs: 10 };
    progress.now('warming up');
    await measureLatency(relay, { ...load, seconds: 5 });
    const runs: Latencies[] = [];
    for (let run = 1; run <= options.runs; run++) {
      progress.now(`run ${run} of ${options.runs}`);
      const it = await measureLatency(relay, { ...load, seconds });
      progress.note(
        `run ${run}: p50 ${it.p50.toFixed(1)} ms, p99 ${it.p99.toFixed(1)} ms, max ${it.max.toFixed(1)} ms`,
      );
      runs.push(it);
    }
    await relay.audit();
    return {
      about: `${EVENTS_PER_SECOND} events/s, one in a transaction, ${seconds} s; from the answer to COMMIT to a consumer that waits in XREAD`,
      figures: (['p50', 'p95', 'p99', 'max'] as const).map((name) => ({
        ...{ name, unit: 'ms' },
        values: runs.map((it) => it[name]),
      })),
      verified: ONCE_IN_ORDER,
      notes: [],
    };
  },
};
