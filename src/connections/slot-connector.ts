import { connect as connectTcp, type Socket } from 'node:net';
import { connect as connectTls, type TLSSocket } from 'node:tls';
import { AbstractConnector, Redis, type RedisOptions } from 'ioredis';
import type { RedisNode } from '../config/redis-urls.ts';
import { pause } from '../lifecycle.ts';
import { lastErrorOf } from './preflight.ts';

/**
 * Connects to the node of a Redis Cluster that has one slot. All keys of a relay are in one slot, so it only has to find
 * out which node has it. Each connection is an ordinary one to that node. It ends when the slot moves; the next one
 * asks the nodes again.
 *
 * ioredis' own cluster client follows a redirection within the same "connection" and sends pending commands again. For the
 * streams that is wrong: the other node may have lost entries, and before anything is appended there, the epoch has to
 * be checked (see streams/epoch-watch.ts).
 */

/** A node that does not answer within this time is skipped. */
const NODE_TIMEOUT_MS = 1_000;
/** Pause after all nodes were asked. */
const RETRY_MS = 200;

/** Errors of a node that does not have the slot. The command was not executed. */
const MOVED = /^MOVED /;
/** Errors while the slot is being moved, or the cluster is down. The command was not executed. */
const IN_BETWEEN = /^(ASK|TRYAGAIN|CLUSTERDOWN)\b/;

/** What `reconnectOnError` of ioredis may return. */
const PASS_ON = false;
const RECONNECT = 1;
const RECONNECT_AND_RESEND = 2;

/**
 * @param nodes of the cluster, some or all
 * @param waits whether commands wait until the node can execute them; otherwise they fail at once
 */
export function inCluster(nodes: readonly RedisNode[], slot: number, waits: boolean): RedisOptions {
  return {
    Connector: connectorTo(nodes, slot),
    reconnectOnError({ message }) {
      if (MOVED.test(message)) return waits ? RECONNECT_AND_RESEND : RECONNECT;
      // Reconnecting also serves as a pause while the slot is being moved.
      if (IN_BETWEEN.test(message)) return waits ? RECONNECT_AND_RESEND : PASS_ON;
      return PASS_ON;
    },
  };
}

type Options = RedisOptions & Readonly<{ disconnectTimeout: number }>;

function connectorTo(seeds: readonly RedisNode[], slot: number) {
  return class SlotConnector extends AbstractConnector {
    readonly #options: Options;
    /** All known nodes. Each is asked, one after another: a node that is cut off from the others has an old view. */
    #nodes: readonly RedisNode[] = seeds;
    #next = 0;

    constructor(options: unknown) {
      super((options as Options).disconnectTimeout);
      this.#options = options as Options;
    }

    /** Refuses replicas: a node that was demoted may still claim the slot. */
    override check(info: { role?: string }): boolean {
      return info.role === undefined || info.role === 'master';
    }

    /** Rejects only after `disconnect`: on a rejection ioredis would give up for good. */
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
        emit('error', new Error(`no node of the cluster says which node has slot ${slot}: ${reason}`));
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
      const reason = lastErrorOf(redis);
      try {
        await redis.connect().catch((error) => {
          throw reason() ?? error;
        });
        const ranges = rangesOf(await redis.cluster('SLOTS'), node);
        const nodes = [...ranges.flatMap((range) => range.nodes), ...seeds];
        this.#nodes = [...new Map(nodes.map((it) => [`${it.host} ${it.port}`, it])).values()];
        const [owner] = ranges.find(({ from, to }) => from <= slot && slot <= to)?.nodes ?? [];
        if (owner === undefined) throw new Error('no node has it');
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

/** The reply of CLUSTER SLOTS: `[from, to, [host, port, …], …]` for each range, master first. A node may not know its own host. */
function rangesOf(reply: unknown, asked: RedisNode): Range[] {
  const ranges = reply as [from: number, to: number, ...nodes: [host: string | null, port: number][]][];
  return ranges.map(([from, to, ...nodes]) => ({
    from: Number(from),
    to: Number(to),
    nodes: nodes.map(([host, port]) => ({ host: host || asked.host, port: Number(port) })),
  }));
}
