import { createServer, connect as openSocket, type Server, type Socket } from 'node:net';

/** The network between a pod and a server: all that can happen to it. */
export type NetworkLink = Readonly<{
  port: number;
  /** Resets every connection; new ones are made as before. */
  cut(): void;
  /** Resets every connection and refuses new ones. */
  refuse(): Promise<void>;
  /** Each byte arrives so much later, in both directions. */
  delay(ms: number): void;
  /** Connections stay open and new ones are accepted, but nothing gets through any more, in either direction. */
  halfOpen(): void;
  /** The same for the connections of this moment, for ever; new ones work. */
  loseTrack(): void;
  /** New connections lead to that port from now on; those of this moment go on as they are. */
  leadTo(port: number): void;
  /**
   * A Redis that takes no larger command, of which it says nothing before: it closes the connection at such a one, or
   * answers it with an error. For connections to come.
   */
  limit(bytes: number, by: 'close' | 'error'): void;
  /** All is well again. Connections that had become half-open are reset, as by a peer that knows nothing of them. */
  heal(): Promise<void>;
  /** Connections at this moment. */
  connections(): number;
  close(): Promise<void>;
}>;

type Link = { client: Socket; server: Socket | undefined; dead: boolean };

/** Forwards connections to a port of this machine. */
export async function startProxy(firstPort: number): Promise<NetworkLink> {
  let targetPort = firstPort;
  const links = new Set<Link>();
  let delayMs = 0;
  let swallowing = false;
  let limit: { bytes: number; by: 'close' | 'error' } | undefined;
  let listener = await listen(0);
  const { port } = listener.address() as { port: number };

  function listen(onPort: number): Promise<Server> {
    const created = createServer({ noDelay: true, allowHalfOpen: true }, accept);
    return new Promise((done, fail) => {
      created.once('error', fail);
      created.listen({ host: '127.0.0.1', port: onPort }, () => done(created));
    });
  }

  function accept(client: Socket): void {
    const server = swallowing
      ? undefined
      : openSocket({ host: '127.0.0.1', port: targetPort, noDelay: true, allowHalfOpen: true });
    const link: Link = { client, server, dead: swallowing };
    links.add(link);
    for (const socket of [client, server]) {
      socket?.on('error', () => {});
      socket?.once('close', () => reset(link));
    }
    if (server === undefined) {
      client.resume();
      return;
    }
    const limited = limit && limitCommands(limit.bytes, limit.by, () => reset(link));
    forward(link, client, server, limited);
    forward(link, server, client);
  }

  /** In order, each chunk after its delay, no faster than the other side reads. */
  function forward(link: Link, from: Socket, to: Socket, change = (chunk: Buffer) => chunk): void {
    const waiting: { chunk: Buffer; dueAt: number }[] = [];
    let timer: NodeJS.Timeout | undefined;
    const flush = (): void => {
      timer = undefined;
      if (link.dead) return;
      for (let next = waiting[0]; next !== undefined; next = waiting[0]) {
        const inMs = next.dueAt - performance.now();
        if (inMs > 0) {
          timer = setTimeout(flush, inMs);
          return;
        }
        waiting.shift();
        if (!to.write(next.chunk) && !from.isPaused()) {
          from.pause();
          to.once('drain', () => from.resume());
        }
      }
    };
    from.on('data', (chunk) => {
      if (link.dead) return;
      waiting.push({ chunk: change(chunk as Buffer), dueAt: performance.now() + delayMs });
      if (timer === undefined) flush();
    });
    from.once('end', () => {
      if (!link.dead) to.end();
    });
    from.once('close', () => clearTimeout(timer));
  }

  function reset(link: Link): void {
    links.delete(link);
    for (const socket of [link.client, link.server]) if (!socket?.destroyed) socket?.resetAndDestroy();
  }

  function cut(): void {
    for (const link of [...links]) reset(link);
  }

  function loseTrack(): void {
    for (const link of links) {
      link.dead = true;
      link.client.resume();
      link.server?.resume();
    }
  }

  async function stopListening(): Promise<void> {
    if (!listener.listening) return;
    const closed = new Promise((done) => listener.close(done));
    cut();
    await closed;
  }

  return {
    port,
    cut,
    refuse: stopListening,
    delay(ms) {
      delayMs = ms;
    },
    halfOpen() {
      swallowing = true;
      loseTrack();
    },
    loseTrack,
    leadTo(to) {
      targetPort = to;
    },
    limit(bytes, by) {
      limit = { bytes, by };
    },
    async heal() {
      delayMs = 0;
      swallowing = false;
      for (const link of [...links]) if (link.dead) reset(link);
      if (!listener.listening) listener = await listen(port);
    },
    connections: () => links.size,
    close: stopListening,
  };
}

/** What the server answers with an error, in its turn. */
const REFUSED = Buffer.from('*1\r\n$20\r\nREQUEST_IS_TOO_LARGE\r\n');

/** Lets whole commands through. Of one that is larger, `close` is called, or the server gets another one to refuse. */
function limitCommands(bytes: number, by: 'close' | 'error', close: () => void): (chunk: Buffer) => Buffer {
  let rest = Buffer.alloc(0);
  return (chunk) => {
    rest = Buffer.concat([rest, chunk]);
    const passed: Buffer[] = [];
    for (let end = endOfCommand(rest); end !== undefined; end = endOfCommand(rest)) {
      const command = rest.subarray(0, end);
      rest = rest.subarray(end);
      if (command.length <= bytes) passed.push(command);
      else if (by === 'error') passed.push(REFUSED);
      else close();
    }
    if (rest.length > bytes && by === 'close') close();
    return Buffer.concat(passed);
  };
}

/** Where the first command ends: `*<words>`, then of each word `$<bytes>` and these, with line ends. */
function endOfCommand(data: Buffer): number | undefined {
  let at = 0;
  const number = (): number | undefined => {
    const end = data.indexOf('\r\n', at);
    if (end < 0) return undefined;
    const found = Number(data.toString('latin1', at + 1, end));
    at = end + 2;
    return found;
  };
  const words = number();
  if (words === undefined) return undefined;
  for (let word = 0; word < words; word++) {
    const length = number();
    if (length === undefined) return undefined;
    at += length + 2;
    if (at > data.length) return undefined;
  }
  return at;
}

/** `url`, through the proxy. */
export function through(proxy: NetworkLink, url: string): string {
  const changed = new URL(url);
  changed.port = String(proxy.port);
  return changed.href;
}
