/**
 * What a stranger, a viewer and a page of another site try at the HTTP server, and what comes of it: nothing. Each case
 * was tried by hand first; what they found and what was mended has its tests beside the code.
 */
import { once } from 'node:events';
import { connect } from 'node:net';
import { beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { openDashboard } from '../../src/http/dashboard-options.ts';
import { createHealth } from '../../src/http/health.ts';
import { createWebServer } from '../../src/http/server.ts';
import { basicOf, boardUsers, PASSWORD, routesOfBullBoard } from '../support/board.ts';
import { atEndOfFile } from '../support/cleanup.ts';
import { openContext, type TestContext } from '../support/context.ts';
import { insertEvents, someEvents } from '../support/events.ts';
import { RELAY_PASSWORD } from '../support/least-privilege.ts';
import { silent } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const PERSONAL = 'ada@example.org';
const [EVENTS, SEED] = [20, 1];

let it: TestContext;
let port: number;
let users: string;
let eventId: string;
/** Everything that was answered, to whomever. */
const answered: string[] = [];

beforeAll(async () => {
  users = await boardUsers();
  it = await openContext({ RELAY_BOARD: 'true', RELAY_BOARD_USERS: users });
  await it.currentEpoch();
  const { config, context } = it;
  const { servers, backlog } = context;
  const server = createWebServer({
    ...{ host: '127.0.0.1', port: 0, version: '1.2.3', stuck: () => [], phase: () => 'running' },
    health: createHealth({
      database: async () => ({}),
      redis: async () => ({ aofEnabled: true, maxmemoryPolicy: 'noeviction' }),
      backlog: backlog.count,
    }),
    dashboard: () =>
      openDashboard(config, servers, { backlog: backlog.count, version: '1.2.3', logger: silent }),
  });
  await server.start();
  atEndOfFile(server.stop);
  port = server.port();

  const events = someEvents(EVENTS, SEED).map((event) => ({ ...event, payload: { email: PERSONAL } }));
  eventId = events[0]?.eventId ?? '';
  await insertEvents(it.pool, events);
  await it.claim();
  await it.pool.query(
    `UPDATE identity.outbox SET dead_lettered_at = now(), next_attempt_at = 'infinity', attempts = 6,
            error_message = 'WRONGTYPE ' || id`,
  );
});

/** The table and the keys of the queues, as they were before. */
let before: unknown;
const state = async () => [
  (await it.pool.query('SELECT * FROM identity.outbox ORDER BY id')).rows,
  (await it.redis.keys('bull:*'))
    .filter((key) => !/:(stalled-check|probe|board-secret)$/.test(key))
    .toSorted(),
  await it.redis.hgetall('bull:relay-publish:meta'),
];
beforeEach(async () => {
  before = await state();
});

type Request = Readonly<{ method?: string; headers?: Record<string, string>; body?: string }>;

async function ask(path: string, request: Request = {}): Promise<{ status: number; text: string }> {
  const response = await fetch(`http://127.0.0.1:${port}${path}`, { redirect: 'manual', ...request });
  const text = await response.text();
  answered.push(text, JSON.stringify([...response.headers]));
  return { status: response.status, text };
}

const as = (name: string) => ({ authorization: basicOf(name) });
const JSON_BODY = { 'content-type': 'application/json' };

/** Sends bytes as they are; resolves with all that is answered until the server closes, or is silent after an answer. */
async function raw(...parts: string[]): Promise<string> {
  const socket = connect(port, '127.0.0.1');
  await once(socket, 'connect');
  let text = '';
  socket.on('data', (chunk) => {
    text += String(chunk);
  });
  socket.on('error', () => {});
  for (const part of parts) socket.write(part);
  const closed = once(socket, 'close');
  // What the server has understood of it is answered before this one, which closes the connection.
  socket.write('GET /livez HTTP/1.1\r\nHost: last\r\nConnection: close\r\n\r\n');
  await closed;
  answered.push(text);
  return text;
}

describe('without a log-in', () => {
  const BOARD = routesOfBullBoard().map((route) => route.replace(' /', ' /board/'));
  const API = [
    ...['get /api/dlq', 'get /api/dlq/groups', 'get /api/dlq/:eventId', 'get /api/openapi.json'],
    ...['post /api/dlq/replay', 'post /api/dlq/discard', 'post /api/republish', 'get /api/nothing'],
  ];
  const PAGES = [
    'get /board',
    'get /board/',
    'get /board/queue/relay-publish',
    'get /board/static/js/main.js',
  ];
  const TRICKS = [
    ...['get //board', 'get /./board', 'get /x/../board', 'get /%62oard', 'get /board%2fapi%2fqueues'],
    ...[
      'get /board/..;/api/queues',
      'get /BOARD',
      'get /login/../board',
      'get /board/static/..%2f..%2fpackage.json',
    ],
    ...[
      'get /board/api/queues?authorization=x',
      'get /api/dlq?role=operator',
      'head /api/dlq',
      'options /api/dlq',
    ],
    ...[
      'get /logout',
      'trace /board',
      'get /board;x=1',
      'get /api//dlq',
      'delete /board/api/queues/relay-publish',
    ],
  ];
  const paths = [...BOARD, ...API, ...PAGES, ...TRICKS];

  test(`${paths.length} paths show nothing and do nothing`, async () => {
    expect(paths.length).toBeGreaterThanOrEqual(61);
    for (const entry of paths) {
      const [method = '', path = ''] = entry.split(' ');
      const url = path
        .replace(':queueName', 'relay-publish')
        .replace(':jobId', eventId)
        .replace(':eventId', eventId)
        .replace(':queueStatus', 'failed');
      const line = `${method.toUpperCase()} ${url} HTTP/1.1\r\nHost: 127.0.0.1\r\n`;
      const answer = await raw(`${line}Cookie: relay_session=${Date.now() + 1e6}.olga\r\n\r\n`);
      expect(answer, entry).toMatch(/^HTTP\/1\.1 (303|400|401|403|404|405|501) /);
      expect(answer, entry).not.toMatch(/relay-publish"|bull-board|UserCreated|WRONGTYPE/);
    }
    expect(await state()).toEqual(before);
  });

  test.each([
    ['no name', 'Basic Og=='],
    ['no colon', `Basic ${Buffer.from('olga').toString('base64')}`],
    ['another scheme', 'Bearer olga'],
    ['a hash for a password', basicOf('olga', 'scrypt.10.8.1')],
    ['a name of every object', basicOf('constructor')],
    ['a name in capitals', basicOf('OLGA')],
    ['no text', 'Basic \u00ff\u00fe'],
  ])('credentials that are none let nobody in: %s', async (_, authorization) => {
    expect((await ask('/api/dlq', { headers: { authorization } })).status).toBe(401);
  });
});

describe('as a viewer', () => {
  const actions = routesOfBullBoard().filter((route) => !route.startsWith('get '));

  test(`${actions.length} actions of the board, and those of the API, are refused`, async () => {
    expect(actions.length).toBeGreaterThanOrEqual(23);
    for (const action of actions) {
      const [method = '', route = ''] = action.split(' ');
      for (const kind of ['relay-publish', 'relay-claim']) {
        const path = route
          .replace(':queueName', kind)
          .replace(':jobId', eventId)
          .replace(':queueStatus', 'failed')
          .replace(':schedulerId', 'tick');
        const request = {
          method: method.toUpperCase(),
          headers: { ...as('vera'), ...JSON_BODY },
          body: '{}',
        };
        expect((await ask(`/board${path}`, request)).status, action).toBe(403);
      }
    }
    for (const path of ['dlq/replay', 'dlq/discard', 'republish']) {
      const body = JSON.stringify({ all: true, reason: 'x' });
      const request = { method: 'POST', headers: { ...as('vera'), ...JSON_BODY }, body };
      expect((await ask(`/api/${path}`, request)).status, path).toBe(403);
    }
    expect(await state()).toEqual(before);
  });

  test('nothing of a payload is in any answer', async () => {
    for (const path of [
      ...[`/api/dlq/${eventId}`, '/api/dlq', '/api/dlq/groups', `/board/api/queues/relay-publish/${eventId}`],
      '/board/api/queues?activeQueue=relay-publish&status=latest',
    ]) {
      const { status, text } = await ask(path, { headers: as('vera') });
      expect([path, status]).toEqual([path, 200]);
      expect(text, path).not.toContain(PERSONAL);
      expect(text.length, path).toBeGreaterThan(50);
    }
  });
});

test('a page of another site acts for nobody, with cookie or password', async () => {
  const logIn = await fetch(`http://127.0.0.1:${port}/login`, {
    ...{
      method: 'POST',
      redirect: 'manual',
      body: new URLSearchParams({ name: 'olga', password: PASSWORD }),
    },
  });
  const cookie = String(logIn.headers.get('set-cookie')).match(/relay_session=[^;]+/)?.[0] ?? '';
  expect((await ask('/api/dlq', { headers: { cookie } })).status).toBe(200);
  const evil: Record<string, string>[] = [
    { origin: 'http://evil.test' },
    { origin: 'null' },
    { origin: `http://127.0.0.1:${port + 1}` },
    { origin: `http://127.0.0.1:${port}.evil.test` },
    { 'sec-fetch-site': 'cross-site' },
    { 'sec-fetch-site': 'same-site', origin: `http://127.0.0.1:${port}` },
  ];
  for (const headers of evil)
    for (const credentials of [{ cookie }, as('olga')])
      for (const type of ['application/json', 'text/plain', 'application/x-www-form-urlencoded']) {
        const request = {
          ...{ method: 'POST', headers: { ...credentials, ...headers, 'content-type': type } },
          body: '{"all":true,"reason":"x"}',
        };
        // Not by fetch, which writes these headers itself.
        const lines = Object.entries(request.headers).map(([name, value]) => `${name}: ${value}\r\n`);
        const answer = await raw(
          `POST /api/dlq/discard HTTP/1.1\r\nHost: 127.0.0.1:${port}\r\n${lines.join('')}Content-Length: ${request.body.length}\r\n\r\n${request.body}`,
        );
        expect(answer, JSON.stringify(headers)).toMatch(/^HTTP\/1\.1 403 /);
      }
  expect(await state()).toEqual(before);
});

/** Of every kind that has broken something somewhere. */
const HOSTILE = [
  ...[
    "'",
    "' OR 1=1 --",
    "'; DROP TABLE identity.outbox; --",
    '1) UNION SELECT payload::text FROM x --',
    '\\',
    '%',
  ],
  ...[
    '$1',
    '$$',
    'pg_sleep(10)',
    '{{7*7}}',
    '#{7*7}',
    '<script>alert(1)</script>',
    '"><img src=x onerror=y>',
  ],
  ...['../../../etc/passwd', '..%2f..%2f', '\r\nset-cookie: a=b', '\u0000', '\u202e', '\ud83d\ude00', 'ÿ'],
  ...['__proto__', 'constructor', '[object Object]', 'null', 'NaN', '-1', '1e999', '99999999999999999999'],
  ...['EVAL "return 1" 0', '*3\r\n$3\r\nSET\r\n', 'FLUSHALL', '[[', '(', '(a+)+$', `${'a'.repeat(900)}!`],
  ...[
    `${'('.repeat(500)}`,
    `${' '.repeat(900)}x`,
    `${'a@'.repeat(400)}`,
    `${'0-'.repeat(400)}`,
    `${'%25'.repeat(300)}`,
  ],
];
const FILTERS = [
  'eventType',
  'topic',
  'aggregateType',
  'aggregateId',
  'error',
  'since',
  'until',
  'after',
  'limit',
  'pruned',
];

test(`${HOSTILE.length * FILTERS.length + 100} hostile questions are answered or refused, never with 5xx, and change nothing`, async () => {
  const questions = FILTERS.flatMap((name) =>
    HOSTILE.map((value) => `/api/dlq?${name}=${encodeURIComponent(value)}`),
  );
  const cursor = (place: object) =>
    encodeURIComponent(Buffer.from(JSON.stringify(place)).toString('base64url'));
  const more = [
    ...['+99:99:99', '+15:59:59', '+16:00', '-00:00:60', 'Z', '+24'].flatMap((zone) => [
      `/api/dlq?after=${cursor({ at: `2026-01-31T12:00:00${zone}`, id: '1' })}`,
      `/api/dlq?since=${encodeURIComponent(`2026-01-31T12:00:00${zone}`)}`,
    ]),
    ...[
      '0000-01-01T00:00:00Z',
      '9999-12-31T23:59:59Z',
      '2026-02-30T00:00:00Z',
      '2026-01-31T25:00:00Z',
    ].flatMap((at) => [
      `/api/dlq?after=${cursor({ at, id: '1' })}`,
      `/api/dlq?until=${at}`,
      `/api/dlq/groups?until=${at}`,
    ]),
    ...['1'.repeat(19), '-1', 'x', '1e3'].map(
      (id) => `/api/dlq?after=${cursor({ at: '2026-01-31T12:00:00Z', id })}`,
    ),
    ...[
      'topic=a&topic=b',
      'filter[topic]=a',
      'topic[]=a',
      '__proto__[all]=1',
      'constructor.prototype.all=1',
    ].map((query) => `/api/dlq?${query}`),
    ...HOSTILE.slice(0, 30).map((value) => `/api/dlq/${encodeURIComponent(value)}`),
    ...HOSTILE.slice(0, 20).map((value) => `/board/api/queues/relay-publish/${encodeURIComponent(value)}`),
    ...['meta', 'failed', 'events', 'id', 'wait', 'delayed', 'marker', 'repeat:tick'].map(
      (key) => `/board/api/queues/relay-publish/${key}`,
    ),
    ...['page=-1', 'page=1e9', 'jobsPerPage=-1', 'jobsPerPage=1e9', 'status=x', 'activeQueue=%25'].map(
      (query) => `/board/api/queues?activeQueue=relay-publish&${query}`,
    ),
  ];
  for (const path of [...questions, ...more]) {
    const { status, text } = await ask(path, { headers: as('vera') });
    expect(status, `${path}: ${text.slice(0, 300)}`).toBeLessThan(500);
    expect(text, path).not.toMatch(/syntax error|relation "|node_modules|at async/);
  }
  expect(await state()).toEqual(before);
});

test('members of every object are no members of a request, and pollute nothing', async () => {
  for (const body of [
    '{"__proto__":{"all":true}}',
    '{"constructor":{"prototype":{"all":true}}}',
    '{"all":false,"__proto__":{"all":true,"polluted":1}}',
    '{"filter":{"__proto__":{"topic":"x"}},"reason":"x"}',
    '{"eventIds":{"__proto__":[]},"reason":"x"}',
    '[{"all":true}]',
    '"all"',
    'null',
    `${'['.repeat(50_000)}`,
    `{"filter":${'{"filter":'.repeat(5_000)}1${'}'.repeat(5_000)}}`,
  ]) {
    for (const path of ['/api/dlq/replay', '/api/dlq/discard', '/api/republish']) {
      const request = { method: 'POST', headers: { ...as('olga'), ...JSON_BODY }, body };
      expect((await ask(path, request)).status, body.slice(0, 60)).toBe(400);
    }
  }
  const form = { method: 'POST', headers: { 'content-type': 'application/x-www-form-urlencoded' } };
  const body = '__proto__[name]=olga&constructor[prototype][polluted]=1&name[]=olga&password=x';
  expect((await ask('/login', { ...form, body })).status).toBe(401);
  expect((Object.prototype as Record<string, unknown>).polluted).toBeUndefined();
  expect(await state()).toEqual(before);
});

const SMUGGLED = 'GET /board/api/queues HTTP/1.1\r\nHost: x\r\n\r\n';
test.each([
  ['both lengths', 'Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n'],
  ['two lengths', `Content-Length: 0\r\nContent-Length: ${SMUGGLED.length}\r\n\r\n`],
  ['a list of lengths', `Content-Length: 0, ${SMUGGLED.length}\r\n\r\n`],
  ['a length with a sign', `Content-Length: +${SMUGGLED.length}\r\n\r\n`],
  ['a space before the colon', 'Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n'],
  ['an encoding that is none', 'Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n'],
  ['two encodings', 'Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n'],
  ['a folded header', 'Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n'],
  ['a length in hex', 'Transfer-Encoding: chunked\r\n\r\n0x0\r\n\r\n'],
  ['a bare line feed', 'X: y\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n'],
  ['a zero byte', 'X: \u0000\r\n\r\n'],
])(
  'a request that two servers would read in two ways is refused, and what hides in it not heard: %s',
  async (_, end) => {
    const answer = await raw(`POST /login HTTP/1.1\r\nHost: x\r\n${end}`, SMUGGLED);
    expect(answer).toMatch(/^HTTP\/1\.1 400 /);
    // One answer, and the connection is closed.
    expect(answer.match(/HTTP\/1\.1 /g)).toHaveLength(1);
  },
);

test('clients that are slow or send too much are not waited for, and keep nobody else waiting', async () => {
  const slow = Array.from({ length: 50 }, () => connect(port, '127.0.0.1'));
  let closed = 0;
  for (const socket of slow) {
    socket
      .resume()
      .on('error', () => {})
      .on('close', () => closed++);
    socket.write('GET /livez HTTP/1.1\r\nHost: x\r\nX-A: ');
  }
  expect((await ask('/readyz')).status).toBe(200);
  expect(await raw(`GET /livez HTTP/1.1\r\nHost: x\r\nX: ${'a'.repeat(100_000)}\r\n\r\n`)).toMatch(
    /^HTTP\/1\.1 431 /,
  );
  const long = { method: 'POST', headers: { ...as('olga'), ...JSON_BODY }, body: `"${'a'.repeat(2 << 20)}"` };
  expect((await ask('/api/dlq/replay', long).catch(() => ({ status: 413 }))).status).toBe(413);
  const form = { method: 'POST', headers: { 'content-type': 'application/x-www-form-urlencoded' } };
  expect((await ask('/login', { ...form, body: `name=${'a'.repeat(20_000)}` })).status).toBe(413);
  await waitFor(() => closed === slow.length, { what: 'the slow ones to be closed' });
});

test('no answer to anybody had a secret in it', async () => {
  expect(answered.length).toBeGreaterThan(500);
  const secret = String(await it.redis.get('bull:relay:board-secret'));
  expect(secret).toHaveLength(43);
  const all = answered.join('\n');
  for (const hidden of [
    PASSWORD,
    RELAY_PASSWORD,
    secret,
    PERSONAL,
    ...users.split(/[: ]/).filter((it) => it.length > 20),
  ])
    expect(all.includes(hidden), hidden.slice(0, 8)).toBe(false);
});
