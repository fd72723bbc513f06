/** Redis behind sentinels: a master falls under traffic, and the ledger stays clean. */
import { expect, test } from 'vitest';
import { anEvent, insertEvents } from '../support/events.ts';
import { setStageOn } from '../support/flow.ts';
import { createWatchedRedis } from '../support/redis-sentinels.ts';
import { underTraffic } from '../support/traffic.ts';
import { waitFor } from '../support/wait.ts';

test('a master is killed under traffic: the sentinels’ new one is used, and what it lacks is appended again', async () => {
  const redis = await createWatchedRedis();
  const stage = await setStageOn({ redis: redis.client, env: redis.env });
  const check = await stage.command(['check']);
  expect(check.code, check.lines.join('\n')).toBe(0);
  const pods = await Promise.all([stage.pod(), stage.pod()]);
  await underTraffic(stage, async (flows) => {
    const master = await redis.master();
    const replicas = redis.servers.filter((it) => it !== master);
    // The tail that no replica has.
    for (const replica of replicas) replica.pause();
    await redis.client.call('CLIENT', 'KILL', 'TYPE', 'replica');
    await flows(200, 'a tail that is not replicated');
    await master.kill('SIGKILL');
    for (const replica of replicas) replica.resume();
    await waitFor(async () => (await redis.master()) !== master, { what: 'the failover' });
  });
  const restored = pods.flatMap((pod) => pod.logs()).filter((line) => Number(line.lost) > 0);
  expect(restored.length).toBeGreaterThan(0);
  // On a busy machine the sentinels may have taken the new master for dead as well: then pods are still repairing.
  const isClean = async () => (await stage.command(['verify', '--since', '1h'])).code === 0;
  await waitFor(isClean, { what: 'relay verify to find nothing missing' });
  for (const sentinel of redis.sentinels) expect(await sentinel.call('ACL', 'LOG')).toEqual([]);
});

test('a failover that an operator asks for costs nothing', async () => {
  const redis = await createWatchedRedis();
  const stage = await setStageOn({ redis: redis.client, env: redis.env });
  await Promise.all([stage.pod(), stage.pod()]);
  await underTraffic(stage, async () => {
    const master = await redis.master();
    await redis.sentinels[0]?.call('SENTINEL', 'FAILOVER', 'identity');
    await waitFor(async () => (await redis.master()) !== master, { what: 'the failover' });
  });
  await insertEvents(stage.pool, [anEvent()]);
  await stage.rested();
});
