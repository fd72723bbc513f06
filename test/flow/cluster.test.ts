/** A Redis Cluster under the relay: slots move and masters fall under traffic, and the ledger stays clean. */
import { expect, onTestFinished, test } from 'vitest';
import type { RedisClient } from '../../src/clients.ts';
import { slotOf } from '../../src/config/topics.ts';
import { createRelay } from '../../src/relay.ts';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { STREAM, setStageOn } from '../support/flow.ts';
import { createCluster, type TestCluster } from '../support/redis-cluster.ts';
import { silent } from '../support/stages.ts';
import { underTraffic } from '../support/traffic.ts';
import { waitFor } from '../support/wait.ts';

const SLOT = slotOf(STREAM);
const DLQ = `{${STREAM}}.dlq`;
const WORDS = `{${STREAM}}.words`;
const QUICK_DEATH = { RELAY_RETRY_BASE_DELAY: '0.1', RELAY_MAX_RETRY_ATTEMPTS: '1' };

const stageOn = async (cluster: TestCluster) =>
  setStageOn({ redis: cluster.client, env: { ...cluster.env, ...QUICK_DEATH } });

test('events flow in a cluster, each road of them in one slot', async () => {
  const cluster = await createCluster();
  const stage = await stageOn(cluster);
  const check = await stage.command(['check']);
  expect(check.code, check.lines.join('\n')).toBe(0);
  await stage.pod();
  await cluster.client.set(`{${STREAM}}.broken`, 'a string');
  const [broken, elsewhere] = [
    anEvent({ topic: `{${STREAM}}.broken` }),
    anEvent({ topic: 'dictionary.word.v1' }),
  ];
  await insertEvents(stage.pool, [broken, elsewhere, anEvent({ topic: WORDS }), ...someEvents(100, 10)]);
  await stage.rested();
  const grade = await stage.expectPromisesHeld();
  expect(grade).toMatchObject({ entries: 101, deadLetters: 2 });
  expect((await stage.row(elsewhere.eventId)).error_message).toMatch(
    /^topic is in slot \d+ of the cluster, this relay in \d+: put \{identity\.user\.v1\} into its name/,
  );
  expect(await stage.entries(DLQ)).toHaveLength(2);
  // Nothing is anywhere else.
  const sizes = await Promise.all(cluster.nodes.map(({ client }) => client.dbsize()));
  expect(sizes.filter((size) => size > 0)).toHaveLength(2);
  const status = await stage.command(['status', '--json']);
  expect(JSON.parse(status.lines.at(-1) ?? '')).toMatchObject({ problems: [] });
  const verify = await stage.command(['verify', '--since', '1h']);
  expect(verify.code, verify.lines.join('\n')).toBe(0);
});

test('a host’s client for a cluster is refused with what to do instead, and stays usable', async () => {
  const cluster = await createCluster();
  const stage = await stageOn(cluster);
  const redis = cluster.client as unknown as RedisClient;
  const relay = createRelay(stage.config(), { redis, logger: silent, http: false });
  onTestFinished(() => relay.stop());
  await expect(relay.start()).rejects.toMatchObject({
    name: 'RequirementError',
    message: expect.stringMatching(/Redis Cluster.*RELAY_REDIS_URL.*RELAY_REDIS_CLUSTER/),
  });
  expect(await cluster.client.ping()).toBe('PONG');
});

test('the slot moves to another master under traffic, and nothing is lost, doubled or out of order', async () => {
  const cluster = await createCluster();
  const stage = await stageOn(cluster);
  await Promise.all([stage.pod(), stage.pod()]);
  await underTraffic(stage, async () => {
    const master = await cluster.masterOf(SLOT);
    const other = await cluster.otherThan(master);
    let halfway = false;
    await cluster.moveSlot(SLOT, master, other, async () => {
      halfway = true;
    });
    expect(halfway).toBe(true);
    expect(await cluster.masterOf(SLOT)).toBe(other);
  });
  const keys = await Promise.all(cluster.nodes.map(({ client }) => client.cluster('COUNTKEYSINSLOT', SLOT)));
  expect(keys.filter((count) => Number(count) > 0)).toHaveLength(2);
});

test('a master is killed under traffic: its replica takes over, and what it lacks is appended again', async () => {
  const cluster = await createCluster();
  const stage = await stageOn(cluster);
  const pods = await Promise.all([stage.pod(), stage.pod()]);
  await underTraffic(stage, async (flows) => {
    const master = await cluster.masterOf(SLOT);
    const replica = await cluster.replicaOf(master);
    replica.server.pause();
    await master.client.call('CLIENT', 'KILL', 'TYPE', 'replica');
    await flows(200, 'a tail that is not replicated');
    await master.server.kill('SIGKILL');
    replica.server.resume();
    await waitFor(async () => (await cluster.masterOf(SLOT)) === replica, {
      what: 'the failover',
    });
  });
  const restored = pods.flatMap((pod) => pod.logs()).filter((line) => Number(line.lost) > 0);
  expect(restored.length).toBeGreaterThan(0);
});

test('a failover that an operator asks for, to and fro, costs nothing', async () => {
  const cluster = await createCluster();
  const stage = await stageOn(cluster);
  await Promise.all([stage.pod(), stage.pod()]);
  await underTraffic(stage, async (flows) => {
    const master = await cluster.masterOf(SLOT);
    await cluster.failOver(await cluster.replicaOf(master), SLOT);
    await flows(100);
    await waitFor(async () => (await master.client.info('replication')).includes('master_link_status:up'), {
      what: 'the old master to follow',
    });
    await cluster.failOver(master, SLOT);
  });
});
