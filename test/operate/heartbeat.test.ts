import { expect, test } from 'vitest';
import { createFleetReader, createHeartbeat, type PodFacts } from '../../src/operate/heartbeat.ts';
import { createRedis } from '../support/servers.ts';
import { openRedis, silent } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const FACTS: Omit<PodFacts, 'pod'> = {
  ...{ version: '1.2.3', phase: 'running', upSeconds: 5, inHand: 1, concurrency: 200, tickSecondsAgo: null },
};
const PREFIX = 'bull:relay';

test('pods are heard of while they run, and gone when they have stopped', async () => {
  const redis = openRedis((await createRedis()).url);
  const fleet = createFleetReader(redis, PREFIX);
  const pods = [1, 2].map(() =>
    createHeartbeat({ redis, prefix: PREFIX, facts: () => FACTS, logger: silent }),
  );
  for (const pod of pods) pod.start();
  const both = await waitFor(
    async () => {
      const found = (await fleet()).pods;
      return found.length === 2 ? found : null;
    },
    { what: 'both pods to be heard of' },
  );
  expect(new Set(both.map(({ pod }) => pod)).size).toBe(2);
  for (const pod of both) {
    expect(pod).toMatchObject(FACTS);
    expect(pod.heardSecondsAgo).toBeLessThan(5);
  }
  await pods[0]?.stop();
  expect((await fleet()).pods).toHaveLength(1);
  await pods[1]?.stop();
  expect((await fleet()).pods).toEqual([]);
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
  const pod = createHeartbeat({ redis, prefix: PREFIX, facts: () => FACTS, logger: silent });
  pod.start();
  await pod.stop();
  expect((await fleet()).pods.map((it) => it.pod)).toEqual(['of 300']);
});

test('the streams that were appended to last are remembered, fifty of them', async () => {
  const redis = openRedis((await createRedis()).url);
  await redis.zadd(`${PREFIX}:streams`, ...Array.from({ length: 50 }, (_, i) => [i, `old-${i}`]).flat());
  const pod = createHeartbeat({ redis, prefix: PREFIX, facts: () => FACTS, logger: silent });
  pod.appendedTo('new-1');
  pod.appendedTo('new-2');
  pod.appendedTo('new-1');
  pod.start();
  await pod.stop();
  const { streams } = await createFleetReader(redis, PREFIX)();
  expect(streams).toHaveLength(50);
  expect(streams.slice(0, 3).toSorted()).toEqual(['new-1', 'new-2', 'old-49']);
  expect(await redis.pttl(`${PREFIX}:streams`)).toBeGreaterThan(0);
});
