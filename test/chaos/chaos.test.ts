import { expect, test } from 'vitest';
import { faultsNamed } from './faults.ts';
import { run } from './run.ts';

/** Of each kind what matters most: short enough to be run with every change. `npm run chaos` has them all. */
const SHORT_MIX = faultsNamed([
  ...['pod-kill', 'pod-term', 'pod-append-before-acknowledge', 'postgres-restart', 'postgres-terminate'],
  ...['redis-restart', 'redis-power-cut', 'redis-flushall', 'redis-jobs-removed'],
  ...['net-redis-half-open', 'board-obliterate', 'row-fresh'],
]);
const DEADLINE_MS = 600_000;

test(
  'nothing is lost, doubled or out of order, whatever fails at the same time',
  async () => {
    const { violations, injections, counts, logs } = await run({
      ...{ seed: 3, events: 3_000, pods: 2, durationMs: 20_000, faults: SHORT_MIX },
      ...{ each: false, keep: false },
    });
    expect(violations, `${violations.join('; ')}; logs of pods and servers: ${logs}`).toEqual([]);
    expect(injections.map(({ fault }) => fault.name).sort()).toEqual(
      SHORT_MIX.map(({ name }) => name).sort(),
    );
    expect(counts.committed).toBeGreaterThanOrEqual(3_000);
  },
  DEADLINE_MS,
);
