import { expect, test, vi } from 'vitest';
import {
  createFleetReader,
  createHeartbeat,
  type Fleet,
  type PodFacts,
  PROTOCOL,
  waitForOtherProtocols,
} from '../../src/operations/heartbeat.ts';
import { createRedis } from '../support/servers.ts';
import { openRedis, silent } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const FACTS: Omit<PodFacts, 'pod' | 'protocol'> = {
  ...{
    version: '1.2.3',
    phase: 'running',
    upSeconds: 5,
    inProgress: 1,
    concurrency: 200,
    tickSecondsAgo: null,
  },
};
const PREFIX = 'bull:relay';

test('pods are heard of while they run, and gone when they have stopped', async () => {
  const redis = openRedis((await createRedis()).url);
  const fleet = createFleetReader(redis, PREFIX);
  const pods = [1, 2].map(() => createHeartbeat({ redis, prefix: PREFIX, logger: silent }));
  for (const pod of pods) pod.start(() => FACTS);
  const both = await waitFor(
    async () => {
      const found = (await fleet()).pods;
      return found.length === 2 ? found : null;
    },
    { what: 'both pods to be heard of' },
  );
  expect(new Set(both.map(({ pod }) => pod)).size).toBe(2);
  for (const pod of both) {
    expect(pod).toMatchObject({ ...FACTS, protocol: PROTOCOL });
    expect(pod.heardSecondsAgo).toBeLessThan(60);
  }
  await pods[0]?.stop();
  expect((await fleet()).pods).toHaveLength(1);
  await pods[1]?.stop();
  expect((await fleet()).pods).toEqual([]);
});

test('pods of the same name, as process 1 of two containers with one host name, are two', async () => {
  const redis = openRedis((await createRedis()).url);
  const fleet = createFleetReader(redis, PREFIX);
  const pods = [];
  for (const _ of [1, 2]) {
    vi.resetModules();
    const another = await import('../../src/operations/heartbeat.ts');
    pods.push(another.createHeartbeat({ redis, prefix: PREFIX, logger: silent }));
  }
  for (const pod of pods) pod.start(() => FACTS);
  const both = await waitFor(
    async () => {
      const found = (await fleet()).pods;
      return found.length === 2 ? found : null;
    },
    { what: 'both pods to be heard of', timeoutMs: 10_000 },
  );
  expect(new Set(both.map(({ pod }) => pod)).size).toBe(1);
  await pods[0]?.stop();
  expect((await fleet()).pods).toHaveLength(1);
  await pods[1]?.stop();
});

test('a pod that was killed is silent, and forgotten after ten minutes', async () => {
  const redis = openRedis((await createRedis()).url);
  const fleet = createFleetReader(redis, PREFIX);
  const heard = (secondsAgo: number) =>
    `${Date.now() - secondsAgo * 1_000} ${JSON.stringify({ pod: `of ${secondsAgo}`, ...FACTS })}`;
  await redis.hset(`${PREFIX}:pods`, { recent: heard(300), old: heard(700) });
  const [old, recent] = (await fleet()).pods.toSorted((a, b) => b.heardSecondsAgo - a.heardSecondsAgo);
  expect(old?.heardSecondsAgo).toBeGreaterThanOrEqual(700);
  expect(recent?.heardSecondsAgo).toBeLessThan(400);
  const pod = createHeartbeat({ redis, prefix: PREFIX, logger: silent });
  pod.start(() => FACTS);
  await pod.stop();
  expect((await fleet()).pods.map((it) => it.pod)).toEqual(['of 300']);
});

test('the streams that were appended to last are remembered, fifty of them', async () => {
  const redis = openRedis((await createRedis()).url);
  await redis.zadd(`${PREFIX}:streams`, ...Array.from({ length: 50 }, (_, i) => [i, `old-${i}`]).flat());
  const pod = createHeartbeat({ redis, prefix: PREFIX, logger: silent });
  pod.appendedTo('new-1');
  pod.appendedTo('new-2');
  pod.appendedTo('new-1');
  pod.start(() => FACTS);
  await pod.stop();
  const { streams } = await createFleetReader(redis, PREFIX)();
  expect(streams).toHaveLength(50);
  expect(streams.slice(0, 3).toSorted()).toEqual(['new-1', 'new-2', 'old-49']);
  expect(await redis.pttl(`${PREFIX}:streams`)).toBeGreaterThan(0);
});

const fleetOf = (...pods: (Partial<PodFacts> & { heardSecondsAgo?: number })[]): Fleet => ({
  pods: pods.map((it, i) => ({ ...FACTS, pod: `pod ${i}`, heardSecondsAgo: 0, ...it })),
  ...{ streams: [], redisTime: 0 },
});

/** Waits while `fleets` are what is heard, one look after the other. Answers the reasons and warnings in between. */
async function waitThrough(fleets: readonly (Fleet | Error)[], stopped = () => false) {
  const reasons: (string | undefined)[] = [];
  const warnings: unknown[] = [];
  let looks = 0;
  await waitForOtherProtocols({
    async fleet() {
      const fleet = fleets[looks++] as Fleet | Error;
      if (fleet instanceof Error) throw fleet;
      return fleet;
    },
    onWaiting: (reason) => reasons.push(reason),
    stopped,
    logger: { ...silent, warn: (about: unknown) => warnings.push(about) } as typeof silent,
  });
  return { reasons, warnings, looks };
}

test('beside pods of its own protocol, and silent ones, a pod does not wait', async () => {
  const silentOne = { pod: 'old', heardSecondsAgo: 15 };
  expect(await waitThrough([fleetOf({ protocol: PROTOCOL }, silentOne)])).toEqual({
    ...{ reasons: [undefined], warnings: [], looks: 1 },
  });
});

test('a pod waits for others as long as one is heard of, tells why each time, and logs it once', async () => {
  const old = { pod: 'old', version: '0.9.0', heardSecondsAgo: 14.9 };
  const next = { pod: 'next', version: '9.0.0', protocol: PROTOCOL + 1 };
  const { reasons, warnings } = await waitThrough([
    ...[fleetOf(old, { protocol: PROTOCOL }), new Error('Redis is away')],
    ...[fleetOf(old, next), fleetOf({ protocol: PROTOCOL })],
  ]);
  expect(reasons).toEqual([
    expect.stringMatching(/old \(version 0\.9\.0\)$/),
    expect.stringMatching(/old \(version 0\.9\.0\), next \(version 9\.0\.0\)$/),
    undefined,
  ]);
  expect(warnings).toEqual([{ pods: ['old'] }]);
});

test('a pod that is to stop waits for nobody', async () => {
  const { looks } = await waitThrough([fleetOf({ pod: 'old' })], () => true);
  expect(looks).toBe(0);
});
