/** Connections to a slot of a cluster, while the slot moves: what waits is answered, what must not wait fails. */
import { afterAll, beforeAll, expect, test } from 'vitest';
import type { RelayConfig } from '../../src/config/config.ts';
import { loadConfig } from '../../src/config/load-config.ts';
import { slotOf } from '../../src/config/topics.ts';
import { FAILS_FAST, openRedis } from '../../src/connections/servers.ts';
import { WORKER_CONNECTION } from '../../src/queue/workers.ts';
import { outcomeOfError } from '../../src/streams/append-outcome.ts';
import { createCluster, type TestCluster } from '../support/redis-cluster.ts';
import { waitFor } from '../support/wait.ts';

const TAG = '{identity.user.v1}';
const SLOT = slotOf(TAG);

let cluster: TestCluster;
let config: RelayConfig;
const opened: ReturnType<typeof openRedis>[] = [];

beforeAll(async () => {
  cluster = await createCluster();
  config = loadConfig(cluster.env);
});
afterAll(() => {
  for (const redis of opened) redis.disconnect();
});

async function connection(options: Parameters<typeof openRedis>[1]) {
  const redis = openRedis(config, { ...options, retryStrategy: () => 50 });
  opened.push(redis);
  redis.on('error', () => {});
  let closed = 0;
  redis.on('close', () => closed++);
  await waitFor(() => redis.status === 'ready', { what: 'the connection' });
  return { redis, closed: () => closed };
}

const runIdOf = async (info: Promise<string>) => /^run_id:(\w+)/m.exec(await info)?.[1];

/** What an append makes of what it was answered. */
const refusalOf = (answer: Promise<unknown>) =>
  answer.then((value) => ({ status: 'answered', value }), outcomeOfError);
const nobodysFault = (reason: RegExp) => ({ status: 'unavailable', reason: expect.stringMatching(reason) });

test('a connection is to the node that has the slot, and moves with it', async () => {
  const { redis: waiting } = await connection(WORKER_CONNECTION);
  const { redis: append, closed } = await connection(FAILS_FAST);
  const from = await cluster.masterOf(SLOT);
  const to = await cluster.otherThan(from);
  expect(await runIdOf(append.info('server'))).toBe(await runIdOf(from.client.info('server')));
  for (let i = 0; i < 40; i++) await append.set(`${TAG}:${i}`, 'there');

  let added: Promise<unknown> = Promise.resolve();
  await cluster.moveSlot(SLOT, from, to, async () => {
    // What is not there may be on either side: nobody can tell now.
    added = waiting.set(`${TAG}:new`, 'waited');
    expect(await refusalOf(append.set(`${TAG}:other`, 'x'))).toMatchObject(nobodysFault(/^ASK /));
    const both = append.mget(`${TAG}:new`, ...(await from.client.keys(`${TAG}:*`)));
    expect(await refusalOf(both)).toMatchObject(nobodysFault(/^(ASK|TRYAGAIN)\b/));
    // A script that finds one key here, and another one gone.
    const [here = ''] = await from.client.keys(`${TAG}:*`);
    const script = `redis.call('GET', KEYS[1]) return redis.call('GET', ARGV[1])`;
    const inScript = append.eval(script, 1, here, `${TAG}:new`);
    expect(await refusalOf(inScript)).toMatchObject(
      nobodysFault(/Script attempted to access a non local key/),
    );
  });
  expect(await added).toBe('OK');

  // Not followed in mid-connection: another node is another memory.
  expect(closed()).toBe(0);
  expect(await refusalOf(append.get(`${TAG}:new`))).toMatchObject(nobodysFault(/^MOVED /));
  await waitFor(() => closed() === 1 && append.status === 'ready', { what: 'the next connection' });
  expect(await runIdOf(append.info('server'))).toBe(await runIdOf(to.client.info('server')));
  expect(await append.get(`${TAG}:new`)).toBe('waited');

  // One that waits notices nothing of a move that is over.
  await cluster.moveSlot(SLOT, to, from);
  expect(await waiting.get(`${TAG}:0`)).toBe('there');
});

test('a command that waits is answered by the replica that takes over', async () => {
  const { redis } = await connection(WORKER_CONNECTION);
  const master = await cluster.masterOf(SLOT);
  await master.server.kill('SIGKILL');
  expect(await redis.set(`${TAG}:after`, 'the failover')).toBe('OK');
  expect(await cluster.masterOf(SLOT)).not.toBe(master);
});
