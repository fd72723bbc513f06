/** A Redis Cluster of a test file's own: three masters with a replica each, and what operators do to one. */
import { Cluster } from 'ioredis';
import type { PrivateRedis } from '../demo/servers.ts';
import { atEndOfFile } from './cleanup.ts';
import { createRedis } from './servers.ts';
import { type AdminRedis, openAdminRedis } from './stages.ts';
import { waitFor } from './wait.ts';

const MASTERS = 3;
const SLOTS = 16_384;
/** Of a silence, after which a node is taken for dead. */
const NODE_TIMEOUT_MS = 1_000;
const KEYS_IN_STEP = 10;
/** One that is killed or stopped must not keep its observers waiting. */
const ANSWER_TIMEOUT_MS = 10_000;
/** A failover that is asked for is given up by the replica after that. */
const FAILOVER_TIMEOUT_MS = 5_000;

export type ClusterNode = Readonly<{ server: PrivateRedis; client: AdminRedis; id: string }>;

export type TestCluster = Readonly<{
  nodes: readonly ClusterNode[];
  /** What pods need to find it. */
  env: Readonly<Record<string, string> & { RELAY_REDIS_URL: string }>;
  /** Follows every slot and failover. */
  client: AdminRedis;
  masterOf(slot: number): Promise<ClusterNode>;
  replicaOf(master: ClusterNode): Promise<ClusterNode>;
  /** Another master. */
  otherThan(master: ClusterNode): Promise<ClusterNode>;
  /** Has the replica take over from its master, which lives on. */
  failOver(replica: ClusterNode, slot: number): Promise<void>;
  /** Moves a slot as `redis-cli --cluster reshard` does, key by key. `between` is called when half of it is there. */
  moveSlot(slot: number, from: ClusterNode, to: ClusterNode, between?: () => Promise<void>): Promise<void>;
}>;

export async function createCluster(
  args: readonly string[] = [],
  aclEnv: Readonly<Record<string, string>> = {},
): Promise<TestCluster> {
  const nodes = await Promise.all(Array.from({ length: 2 * MASTERS }, () => startNode(args, aclEnv)));
  const [first, ...others] = nodes as [ClusterNode, ...ClusterNode[]];
  for (const { server } of others) await first.client.cluster('MEET', '127.0.0.1', server.port);
  const share = Math.ceil(SLOTS / MASTERS);
  for (const [i, { client }] of nodes.slice(0, MASTERS).entries()) {
    const [from, to] = [i * share, Math.min((i + 1) * share, SLOTS) - 1];
    await client.call('CLUSTER', 'ADDSLOTSRANGE', from, to);
  }
  const isKnown = async ({ client }: ClusterNode) => {
    const info = String(await client.cluster('INFO'));
    return info.includes('cluster_state:ok') && info.includes(`cluster_known_nodes:${nodes.length}`);
  };
  const everyone = (is: (node: ClusterNode) => Promise<boolean>) => async () =>
    (await Promise.all(nodes.map(is))).every(Boolean);
  await waitFor(everyone(isKnown), { what: 'the nodes to know each other' });
  for (const [i, { client }] of nodes.slice(MASTERS).entries()) {
    await client.cluster('REPLICATE', (nodes[i] as ClusterNode).id);
  }
  await waitFor(
    async () => (await linesOf(first)).filter((it) => it.includes('slave')).length === nodes.length - MASTERS,
    { what: 'the replicas' },
  );
  for (const { client } of nodes.slice(MASTERS)) {
    await waitFor(async () => (await client.info('replication')).includes('master_link_status:up'), {
      what: 'a replica to be in step',
    });
  }

  const client = new Cluster(
    nodes.map(({ server }) => ({ host: '127.0.0.1', port: server.port })),
    { slotsRefreshInterval: 500, redisOptions: { maxRetriesPerRequest: null } },
  );
  client.on('error', () => {});
  atEndOfFile(async () => client.disconnect());

  /** Of the nodes that answer, as they say in `CLUSTER NODES`. */
  async function seen(): Promise<{ node: ClusterNode; flags: string; masterId: string; line: string }[]> {
    const running = nodes.filter(({ client: it }) => it.status === 'ready');
    const views = await Promise.all(running.map((node) => linesOf(node).catch(() => [])));
    return running.flatMap((node, i) => {
      const line = views[i]?.find((it) => it.includes('myself'));
      if (line === undefined) return [];
      const [, , flags = '', masterId = ''] = line.split(' ');
      return [{ node, flags, masterId, line }];
    });
  }

  async function masterOf(slot: number): Promise<ClusterNode> {
    return waitFor(
      async () =>
        (await seen()).find(({ flags, line }) => flags.includes('master') && covers(line, slot))?.node,
      { what: `a master of slot ${slot}` },
    );
  }

  return {
    nodes,
    client: client as unknown as AdminRedis,
    env: {
      RELAY_REDIS_URL: nodes[0]?.server.url ?? '',
      RELAY_REDIS_CLUSTER: nodes
        .slice(1, 3)
        .map(({ server }) => `127.0.0.1:${server.port}`)
        .join(','),
    },
    masterOf,
    replicaOf: (master) =>
      waitFor(async () => (await seen()).find(({ masterId }) => masterId === master.id)?.node, {
        what: 'a replica',
      }),
    otherThan: (master) =>
      waitFor(
        async () =>
          (await seen()).find(({ node, flags }) => flags.includes('master') && node !== master)?.node,
        { what: 'another master' },
      ),
    async failOver(replica, slot) {
      let askedAt = 0;
      await waitFor(
        async () => {
          if ((await masterOf(slot)) === replica) return true;
          if (Date.now() - askedAt > FAILOVER_TIMEOUT_MS) {
            askedAt = Date.now();
            // Refused by one that has just become a replica, or is none any more.
            await replica.client.cluster('FAILOVER').catch(() => {});
          }
          return false;
        },
        { what: 'the failover', timeoutMs: 6 * FAILOVER_TIMEOUT_MS },
      );
    },
    async moveSlot(slot, from, to, between = async () => {}) {
      await to.client.cluster('SETSLOT', slot, 'IMPORTING', from.id);
      await from.client.cluster('SETSLOT', slot, 'MIGRATING', to.id);
      const all = Number(await from.client.cluster('COUNTKEYSINSLOT', slot));
      for (let moved = 0, half = false; ; ) {
        const keys = (await from.client.cluster('GETKEYSINSLOT', slot, KEYS_IN_STEP)) as string[];
        if (keys.length === 0) break;
        const [host, port] = ['127.0.0.1', to.server.port];
        await from.client.call('MIGRATE', host, port, '', '0', '10000', 'KEYS', ...keys);
        moved += keys.length;
        if (!half && moved >= all / 2) {
          half = true;
          await between();
        }
      }
      for (const node of [to, from, ...nodes.filter((it) => it !== to && it !== from)]) {
        await node.client.cluster('SETSLOT', slot, 'NODE', to.id).catch(() => {});
      }
    },
  };
}

async function startNode(
  args: readonly string[],
  env: Readonly<Record<string, string>>,
): Promise<ClusterNode> {
  const server = await createRedis({
    env: { ...env, RELAY_REDIS_CLUSTER: 'true' },
    args: [
      ...['--cluster-enabled', 'yes', '--cluster-node-timeout', String(NODE_TIMEOUT_MS)],
      ...['--repl-diskless-sync-delay', '0', ...args],
    ],
  });
  const client = openAdminRedis(server.adminUrl, { commandTimeout: ANSWER_TIMEOUT_MS });
  return { server, client, id: String(await client.cluster('MYID')) };
}

const linesOf = async ({ client }: ClusterNode): Promise<string[]> =>
  String(await client.cluster('NODES'))
    .trim()
    .split('\n');

/** Whether the slot is among the ranges at the end of a line of `CLUSTER NODES`. */
function covers(line: string, slot: number): boolean {
  return line
    .split(' ')
    .slice(8)
    .some((range) => {
      const [, from, to = from] = /^(\d+)(?:-(\d+))?$/.exec(range) ?? [];
      return from !== undefined && Number(from) <= slot && slot <= Number(to);
    });
}
