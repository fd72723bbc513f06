import { connect as connectTcp, type Socket } from 'node:net';
import { connect as connectTls, type TLSSocket } from 'node:tls';
import { AbstractConnector, Redis, type RedisOptions } from 'ioredis';
import type { RedisNode } from '../config/redis-urls.ts';
import { pause } from '../lifecycle.ts';

/**
 * A Redis Cluster, seen from one slot of it. Everything of one relay is in one slot, so all that it needs of a cluster
 * is to be told which node has that slot now. Its connections are ordinary ones to that node: each belongs to one
 * server, ends when the slot moves, and asks the nodes anew where to go.
 *
 * ioredis' own client for clusters follows a redirection within the same "connection", and sends again what was
 * under way. For the streams that would be wrong: another node has another memory, and before anything is appended
 * there it has to be asked whether it lost something (see stream/epoch.ts).
 */

/** A node that does not answer within this is passed over. */
const NODE_TIMEOUT_MS = 1_000;
/** Between two rounds through all nodes. */
const RETRY_MS = 200;

/** Replies of a node that is not, or not in full, where the slot is: nothing was done. */
const MOVED = /^MOVED /;
const IN_BETWEEN = /^(ASK|TRYAGAIN|CLUSTERDOWN)\b/;

/** ioredis' words for what is done about a reply. */
const PASS_ON = false;
const RECONNECT = 1;
const RECONNECT_AND_RESEND = 2;

/**
 * @param nodes of the cluster, some or all
 * @param waits whether commands of this connection wait until they can be answered; else they fail at once
 */
export function inCluster(nodes: readonly RedisNode[], slot: number, waits: boolean): RedisOptions {
  return {
    Connector: connectorTo(nodes, slot),
    reconnectOnError({ message }) {
      if (MOVED.test(message)) return waits ? RECONNECT_AND_RESEND : RECONNECT;
      // While the slot is on its way, a reconnection is a pause as well.
      if (IN_BETWEEN.test(message)) return waits ? RECONNECT_AND_RESEND : PASS_ON;
      return PASS_ON;
    },
  };
}

type Options = RedisOptions & Readonly<{ disconnectTimeout: number }>;

function connectorTo(seeds: readonly RedisNode[], slot: number) {
  return class SlotConnector extends AbstractConnector {
    readonly #options: Options;
    /** All nodes that were heard of. One after the other is asked: one that was cut off knows an old truth. */
    #nodes: readonly RedisNode[] = seeds;
    #next = 0;

    constructor(options: unknown) {
      super((options as Options).disconnectTimeout);
      this.#options = options as Options;
    }

    /** A node that lost the slot may not know it yet. */
    override check(info: { role?: string }): boolean {
      return info.role === undefined || info.role === 'master';
    }

    /** Never rejects but after `disconnect`: ioredis would give the connection up for good. */
    override async connect(emit: (type: string, error: Error) => void): Promise<Socket | TLSSocket> {
      this.connecting = true;
      for (;;) {
        let reason = 'no node of the cluster answers';
        for (let tries = this.#nodes.length; tries > 0; tries--) {
          const node = this.#nodes[this.#next++ % this.#nodes.length] as RedisNode;
          try {
            const owner = await this.#ownerSays(node);
            if (!this.connecting) throw new Error('Connection is closed.');
            return this.#open(owner);
          } catch (error) {
            if (!this.connecting) throw error;
            reason = (error as Error).message;
          }
        }
        emit('error', new Error(`no node of the cluster tells who has slot ${slot}: ${reason}`));
        await pause(RETRY_MS);
        if (!this.connecting) throw new Error('Connection is closed.');
      }
    }

    async #ownerSays(node: RedisNode): Promise<RedisNode> {
      const { username, password, tls, family } = this.#options;
      const redis = new Redis({
        ...{ ...node, username, password, tls, family },
        ...{ lazyConnect: true, retryStrategy: () => null, maxRetriesPerRequest: 0, enableReadyCheck: false },
        ...{ connectTimeout: NODE_TIMEOUT_MS, commandTimeout: NODE_TIMEOUT_MS, disableClientInfo: true },
      } as RedisOptions & { replyMapping?: 'legacy' });
      let reason: Error | undefined;
      redis.on('error', (error) => {
        reason = error;
      });
      try {
        await redis.connect().catch((error) => {
          throw reason ?? error;
        });
        const ranges = rangesOf(await redis.cluster('SLOTS'), node);
        const nodes = [...ranges.flatMap((range) => range.nodes), ...seeds];
        this.#nodes = [...new Map(nodes.map((it) => [`${it.host} ${it.port}`, it])).values()];
        const [owner] = ranges.find(({ from, to }) => from <= slot && slot <= to)?.nodes ?? [];
        if (owner === undefined) throw new Error('nobody has it');
        return owner;
      } finally {
        redis.disconnect();
      }
    }

    #open({ host, port }: RedisNode): Socket | TLSSocket {
      const { tls, family } = this.#options;
      const address = { host, port, ...(family !== undefined && { family }) };
      this.stream = tls ? connectTls({ ...address, ...tls }) : connectTcp(address);
      this.stream.once('error', (error: Error) => {
        this.firstError = error;
      });
      return this.stream;
    }
  };
}

type Range = Readonly<{ from: number; to: number; nodes: RedisNode[] }>;

/** CLUSTER SLOTS: `[from, to, [host, port, …], …]` of each range, its master first. A node may not know its own host. */
function rangesOf(reply: unknown, asked: RedisNode): Range[] {
  const ranges = reply as [from: number, to: number, ...nodes: [host: string | null, port: number][]][];
  return ranges.map(([from, to, ...nodes]) => ({
    from: Number(from),
    to: Number(to),
    nodes: nodes.map(([host, port]) => ({ host: host || asked.host, port: Number(port) })),
  }));
}
