import { expect, test } from 'vitest';
import { createStatus } from '../../src/operations/fleet-status.ts';
import type { PodSeen } from '../../src/operations/heartbeat.ts';

const pod = (heardSecondsAgo: number, tickSecondsAgo: number | null): PodSeen => ({
  ...{ pod: `${heardSecondsAgo}`, version: '1.2.3', phase: 'running', upSeconds: 5 },
  ...{ inProgress: 0, concurrency: 200, heardSecondsAgo, tickSecondsAgo },
});

test.each([
  ['the latest of the pods that run', [pod(3, 4), pod(1, 2), pod(500, 40)], 3],
  ['not that of a silent pod, which knows no later ones', [pod(500, 40)], null],
  ['nor beside a pod that has not ticked yet', [pod(2, null), pod(16, 0)], null],
  ['nothing without pods', [], null],
])('the last tick of the schedule is %s', async (_, pods, lastTickSecondsAgo) => {
  const status = createStatus({
    figures: async () => ({ fleet: { pods, streams: [], redisTime: 0 }, problems: [] }),
    oldest: async () => [],
    rates: () => new Promise(() => {}),
    jobState: async () => 'unknown',
    assertOurs: async () => {},
    ...{ maxInFlight: 1, deadlineMs: 10 },
  });
  expect(await status()).toMatchObject({ lastTickSecondsAgo });
});
