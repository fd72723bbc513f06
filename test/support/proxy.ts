import { connect, createServer, type Socket } from 'node:net';
import { onTestFinished } from 'vitest';

export type NetworkProxy = Readonly<{
  port: number;
  /** Nothing gets through any more, and nobody is told; connections that are made meanwhile stay dead for ever, too. */
  halfOpen(): void;
  /** What is new gets through again. */
  heal(): void;
  /** Ends every connection at once. */
  cut(): void;
  /** Holds back what comes from the server for `ms`; 0 ends it. */
  delay(ms: number): void;
}>;

/** A network between the relay and a server on `port` of this machine, for one test. */
export async function createProxy(port: number): Promise<NetworkProxy> {
  const sockets = new Set<Socket>();
  let isHalfOpen = false;
  let delayMs = 0;
  const dead = new Set<Socket>();

  const server = createServer({ allowHalfOpen: true, noDelay: true }, (client) => {
    const upstream = connect({ port, host: '127.0.0.1', noDelay: true });
    for (const [from, to] of [
      [client, upstream],
      [upstream, client],
    ] as const) {
      sockets.add(from);
      if (isHalfOpen) dead.add(from);
      from.on('data', (chunk) => {
        if (dead.has(from)) return;
        if (from === upstream && delayMs > 0) setTimeout(() => to.writable && to.write(chunk), delayMs);
        else to.write(chunk);
      });
      from.on('end', () => {
        if (!dead.has(from)) to.end();
      });
      from.on('error', () => {});
      from.on('close', () => {
        sockets.delete(from);
        if (!dead.has(from)) to.destroy();
      });
    }
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  onTestFinished(async () => {
    for (const socket of sockets) socket.destroy();
    server.close();
  });
  const address = server.address();
  if (address === null || typeof address === 'string') throw new Error('no port');
  return {
    port: address.port,
    halfOpen() {
      isHalfOpen = true;
      for (const socket of sockets) dead.add(socket);
    },
    heal() {
      isHalfOpen = false;
    },
    cut() {
      for (const socket of sockets) socket.destroy();
    },
    delay(ms) {
      delayMs = ms;
    },
  };
}

/** `url`, through the proxy. */
export function through(proxy: NetworkProxy, url: string): string {
  const changed = new URL(url);
  changed.port = String(proxy.port);
  return changed.href;
}
