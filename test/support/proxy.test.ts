import { connect, createServer, type Server, type Socket } from 'node:net';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { type NetworkLink, startProxy } from './proxy.ts';
import { waitFor } from './wait.ts';

let echo: Server;
let proxy: NetworkLink;
let accepted: Socket[];
let clients: Client[];

beforeEach(async () => {
  accepted = [];
  clients = [];
  echo = createServer((socket) => {
    accepted.push(socket);
    socket.on('error', () => {});
    socket.pipe(socket);
  });
  await new Promise<void>((done) => echo.listen(0, '127.0.0.1', done));
  proxy = await startProxy((echo.address() as { port: number }).port);
});

afterEach(async () => {
  for (const { socket } of clients) socket.destroy();
  await proxy.close();
  await new Promise((done) => echo.close(done));
});

type Client = { socket: Socket; heard: () => string; error: () => string | undefined; closed: () => boolean };

/** A connection through the proxy, made or refused. */
function call(): Client {
  const socket = connect({ host: '127.0.0.1', port: proxy.port });
  let heard = '';
  let error: string | undefined;
  socket.on('data', (chunk) => {
    heard += chunk.toString();
  });
  socket.on('error', (reason: NodeJS.ErrnoException) => {
    error = reason.code;
  });
  const client = { socket, heard: () => heard, error: () => error, closed: () => socket.closed };
  clients.push(client);
  return client;
}

const hears = (client: Client, text: string) =>
  waitFor(() => client.heard() === text, { what: `the echo ${JSON.stringify(text)}` });

async function connected(): Promise<Client> {
  const client = call();
  client.socket.write('a');
  await hears(client, 'a');
  return client;
}

test('passes on what either side says, and that it has nothing more to say', async () => {
  const client = await connected();
  client.socket.end('b');
  await hears(client, 'ab');
  await waitFor(() => client.closed() && proxy.connections() === 0, { what: 'the connection to be gone' });
  expect(client.error()).toBeUndefined();
});

test('passes on more than fits into any buffer', async () => {
  const client = call();
  const bytes = 20_000_000;
  let received = 0;
  client.socket.removeAllListeners('data').on('data', (chunk) => {
    received += chunk.length;
  });
  client.socket.write(Buffer.alloc(bytes, 'x'));
  await waitFor(() => received === bytes, { what: 'all of it' });
});

test('cut: resets who is connected; who comes next is served', async () => {
  const client = await connected();
  proxy.cut();
  await waitFor(() => client.error() === 'ECONNRESET', { what: 'the reset' });
  await connected();
});

test('refuse: resets who is connected and refuses who comes next, until it is healed', async () => {
  const client = await connected();
  await proxy.refuse();
  await waitFor(() => client.error() === 'ECONNRESET', { what: 'the reset' });
  const refused = call();
  await waitFor(() => refused.error() === 'ECONNREFUSED', { what: 'the refusal' });
  await proxy.heal();
  await connected();
});

test('delay: each way takes so much longer, in order, also when the delay ends meanwhile', async () => {
  const client = await connected();
  proxy.delay(150);
  const sentAt = performance.now();
  client.socket.write('b');
  await hears(client, 'ab');
  expect(performance.now() - sentAt).toBeGreaterThanOrEqual(299);
  client.socket.write('c');
  await waitFor(() => accepted[0]?.bytesRead === 2, { what: 'the last byte to be on its way' });
  await proxy.heal();
  client.socket.write('d');
  await hears(client, 'abcd');
});

test('half-open: who is connected and who comes next hears nothing, and both are reset by healing', async () => {
  const before = await connected();
  proxy.halfOpen();
  const during = call();
  await waitFor(() => during.socket.readyState === 'open', { what: 'the connection to be accepted' });
  before.socket.write('b');
  during.socket.write('b');
  accepted[0]?.write('from the server');
  await waitFor(() => proxy.connections() === 2, { what: 'both to be connected' });
  // A detour that takes longer than an echo: had it been let through, it would be there by now.
  for (let i = 0; i < 20; i++) await new Promise((done) => setImmediate(done));
  expect([before.heard(), during.heard(), before.error(), during.error()]).toEqual([
    'a',
    '',
    undefined,
    undefined,
  ]);
  expect(accepted).toHaveLength(1);
  await proxy.heal();
  for (const client of [before, during]) {
    await waitFor(() => client.error() === 'ECONNRESET', { what: 'the reset' });
  }
  await connected();
});
