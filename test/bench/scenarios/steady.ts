/** Events at fixed rates, up to the rate at which the backlog grows. */
import { openRelay } from '../contenders/relay.ts';
import { type CpuMicros, coresSoFar, cpuBetween, cpuSoFar } from '../cpu.ts';
import { type Latencies, measureLatency } from '../latency.ts';
import { type Figure, median, ONCE_IN_ORDER, rates, type Scenario } from '../scenario.ts';

/** Of the rate at which the same pod drains a backlog. */
const SHARES = [0.25, 0.5, 0.75, 0.9, 1];
/** A producer's transactions in a second. */
const TRANSACTIONS_PER_SECOND = 100;
/** A backlog of so many seconds at the end is one that grows. */
const GROWS_SECONDS = 0.5;

export const STEADY: Scenario = {
  name: 'steady',
  describe: 'latency at fixed rates, up to the one at which the backlog grows',
  minutes: 3,
  async run({ options, open, undo, progress }) {
    const { events = options.quick ? 3_000 : 20_000 } = options;
    const seconds = options.quick ? 4 : 15;
    progress.now('starting servers and a pod');
    const servers = await open();
    const relay = await openRelay(servers, { name: 'relay' }, undo);
    progress.now('finding the rate at which it drains');
    const pids = relay.pods.map((pod) => pod.pid);
    const drains = [];
    for (let i = 0; i <= options.runs; i++) drains.push(await relay.drain({ events, aggregates: events }));
    const drainRate = median(rates(drains.slice(1)));
    progress.note(`it drains ${Math.round(drainRate)} events/s`);
    const figures: Figure[] = [{ name: 'drain rate', unit: 'events/s', values: rates(drains.slice(1)) }];
    const notes: string[] = [];
    for (const share of SHARES) {
      const rate = drainRate * share;
      const percent = `${Math.round(share * 100)} % of the drain rate`;
      const runs: Latencies[] = [];
      const busy: number[] = [];
      const cpu: CpuMicros[] = [];
      for (let run = 1; run <= options.runs; run++) {
        progress.now(`${percent}, run ${run} of ${options.runs}`);
        await relay.clear();
        const batch = Math.max(1, Math.round(rate / TRANSACTIONS_PER_SECOND));
        const [before, cores] = [await cpuSoFar(servers, pids), coresSoFar()];
        const it = await measureLatency(relay, { rate, batch, seconds });
        const [after, coresAfter] = [await cpuSoFar(servers, pids), coresSoFar()];
        await relay.audit();
        runs.push(it);
        cpu.push(cpuBetween(before, after));
        busy.push((100 * (coresAfter.busyMs - cores.busyMs)) / (coresAfter.allMs - cores.allMs));
        progress.note(
          `${percent}: ${Math.round(it.rate)} events/s, p50 ${it.p50.toFixed(1)} ms, p99 ${it.p99.toFixed(1)} ms, ` +
            `max ${it.max.toFixed(0)} ms, ${it.behind} behind at the end, cores ${busy.at(-1)?.toFixed(0)} % busy`,
        );
      }
      for (const name of ['p50', 'p95', 'p99', 'max'] as const) {
        figures.push({ name: `${percent}, ${name}`, unit: 'ms', values: runs.map((it) => it[name]) });
      }
      figures.push({ name: `${percent}, all cores busy`, unit: '%', values: busy });
      for (const part of ['contender', 'redis', 'postgres'] as const) {
        const of = part === 'contender' ? 'the pod' : part;
        const values = cpu.map((it, i) => it[part] / (runs[i] as Latencies).events);
        figures.push({ name: `${percent}, CPU of ${of} per event`, unit: 'µs', values });
      }
      const grows = median(runs.map((it) => it.behind)) > rate * GROWS_SECONDS;
      if (grows || share === SHARES.at(-1)) {
        notes.push(
          grows
            ? `the backlog grows at ${percent} (${Math.round(rate)} events/s)`
            : `the backlog does not grow up to ${percent}`,
        );
        break;
      }
    }
    return {
      about: `${TRANSACTIONS_PER_SECOND} transactions/s for ${seconds} s at each rate; from the answer to COMMIT to a consumer that waits in XREAD`,
      ...{ figures, notes, verified: ONCE_IN_ORDER },
    };
  },
};
