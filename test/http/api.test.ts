import { type FastifyInstance, fastify } from 'fastify';
import { beforeEach, describe, expect, test } from 'vitest';
import { ReadOnlyError, TooFewSessionsError } from '../../src/connections/pool-health.ts';
import { type ApiDeps, registerApi } from '../../src/http/api.ts';
import { NotReadyError } from '../../src/lifecycle.ts';
import { CursorError } from '../../src/operations/cursor.ts';
import { anEvent } from '../support/events.ts';
import { deferred, silent } from '../support/stages.ts';

const { eventId } = anEvent();
const SINCE = '2026-01-31T12:00:00Z';
const TRACE = { traceparent: '00-1-2-01' };
const PRIVATE = {
  ...{ payload: '{"email":"a@b.c"}', tenantId: 'a@b.c', correlationId: 'a@b.c', trace: TRACE },
  // Whatever an event gets in later versions.
  headers: { email: 'a@b.c' },
};

let app: FastifyInstance;
/** What was asked of the operations, in words. */
let asked: unknown[];
let fail: Error | undefined;
/** What was logged, as level and text. */
let logged: string[];
/** What each question takes. */
let wait: Promise<void> | undefined;
/** As the description writes them, e.g. `get /api/dlq/{eventId}`. */
let served: string[];

beforeEach(() => {
  asked = [];
  fail = undefined;
  logged = [];
  wait = undefined;
  /** Of whatever type the question wants: the API hands on what it does not know. */
  const answer = async (...question: unknown[]): Promise<never> => {
    asked.push(question);
    await wait;
    if (fail) throw fail;
    return { done: 1, refused: 0, refusals: [], next: null, letters: [], more: 'kept' } as never;
  };
  const deps: ApiDeps = {
    deadLetters: {
      list: (...it) => answer('list', ...it),
      groups: async (...it) => [await answer('groups', ...it)],
      show: async (...it) =>
        it[0] === eventId
          ? ({ ...((await answer('show', ...it)) as object), event: { ...PRIVATE, eventType: 'A' } } as never)
          : null,
      replay: (...it) => answer('replay', ...it),
      discard: (...it) => answer('discard', ...it),
    },
    republish: {
      count: async (...it) => {
        await answer('count', ...it);
        return { streams: new Map([['a.b', 3]]), next: 'abc' };
      },
      run: (...it) => answer('run', ...it),
    },
    requires: (role) => async (request, reply) => {
      const has = request.headers['x-role'];
      if (has === undefined) return reply.code(401).send({ error: 'log in' });
      if (role === 'operator' && has !== role) return reply.code(403).send({ error: 'viewers cannot act' });
      Object.assign(request, { operator: { name: 'alice', role: has } });
      return undefined;
    },
    version: '1.2.3',
    logger: {
      ...silent,
      warn: (_, text) => void logged.push(`warn: ${text}`),
      error: (_, text) => void logged.push(`error: ${text}`),
    },
  };
  app = fastify({ exposeHeadRoutes: false });
  served = [];
  app.addHook('onRoute', ({ method, url }) => {
    served.push(`${String(method).toLowerCase()} ${url.replaceAll(/:(\w+)/g, '{$1}')}`);
  });
  registerApi(app, deps);
});

async function call(method: 'GET' | 'POST', url: string, body?: object, role = 'operator') {
  const reply = await app.inject({
    ...{ method, url: `/api${url}`, ...(body && { payload: body }) },
    headers: role === '' ? {} : { 'x-role': role },
  });
  return { status: reply.statusCode, body: reply.json() };
}

test('the list takes filters, a limit and a cursor', async () => {
  const url = `/dlq?eventType=A&topic=b&aggregateType=user&aggregateId=${eventId}&error=no&since=${SINCE}&until=${SINCE}`;
  expect(await call('GET', `${url}&limit=7&after=abc&pruned=true`, undefined, 'viewer')).toMatchObject({
    status: 200,
    body: { letters: [], next: null },
  });
  await call('GET', '/dlq');
  await call('GET', '/dlq/groups?error=no');
  const times = { since: SINCE, until: SINCE };
  expect(asked).toEqual([
    [
      'list',
      { eventType: 'A', topic: 'b', aggregateType: 'user', aggregateId: eventId, error: 'no', ...times },
      { limit: 7, after: 'abc', pruned: true, look: 1_000 },
    ],
    ['list', {}, { limit: 50, pruned: false, look: 1_000 }],
    ['groups', { error: 'no' }, 100, 10_000],
  ]);
});

test('a body of another type is refused, and the answer tells which type to send', async () => {
  for (const type of ['application/x-www-form-urlencoded', 'text/plain', undefined]) {
    const reply = await app.inject({
      ...{ method: 'POST', url: '/api/dlq/replay', payload: '{"all": true}' },
      headers: { 'x-role': 'operator', ...(type && { 'content-type': type }) },
    });
    expect([reply.statusCode, reply.json().error]).toEqual([
      415,
      expect.stringContaining('Content-Type: application/json'),
    ]);
  }
  expect(asked).toEqual([]);
});

test('the same groups are asked for once in a second, whoever asks', async () => {
  const answers = await Promise.all(
    Array.from({ length: 10 }, () => call('GET', '/dlq/groups?limit=7', undefined, 'viewer')),
  );
  await call('GET', '/dlq/groups?limit=7');
  await call('GET', '/dlq/groups?limit=8');
  expect(new Set(answers.map(({ status }) => status))).toEqual(new Set([200]));
  expect(asked).toEqual([
    ['groups', {}, 7, 10_000],
    ['groups', {}, 8, 10_000],
  ]);
});

test('a viewer’s requests are worked on one by one, some wait, the others are told to come back; operators go on', async () => {
  const { promise, resolve } = deferred();
  wait = promise;
  const urls = Array.from({ length: 30 }, (_, i) => `/dlq?limit=${i + 1}`);
  // Not asked before somebody waits for the answer.
  const all = urls.map(
    async (url) => await app.inject({ url: `/api${url}`, headers: { 'x-role': 'viewer' } }),
  );
  const refused = await Promise.all(all.slice(21));
  expect(asked).toHaveLength(1);
  for (const reply of refused) {
    expect([reply.statusCode, reply.headers['retry-after']]).toEqual([503, '1']);
    expect(reply.json().error).toContain('too many requests at once');
  }
  wait = undefined;
  expect((await call('GET', '/dlq')).status).toBe(200);
  resolve();
  expect(new Set((await Promise.all(all.slice(0, 21))).map(({ statusCode }) => statusCode))).toEqual(
    new Set([200]),
  );
});

test('one event is shown, or not found', async () => {
  expect(await call('GET', `/dlq/${eventId}`)).toMatchObject({ status: 200, body: { more: 'kept' } });
  expect(await call('GET', `/dlq/${anEvent().eventId}`)).toMatchObject({ status: 404 });
});

test('who acts is passed on, with what and how much', async () => {
  const wouldReplay = await call('POST', '/dlq/replay', { eventIds: [eventId], dryRun: true });
  expect(wouldReplay.body).toMatchObject({ done: 1, dryRun: true });
  await call('POST', '/dlq/replay', { filter: { error: 'no' }, limit: 5, after: 'abc' });
  await call('POST', '/dlq/replay', { all: true });
  const discard = { filter: { topic: 'x' }, pruned: true, reason: 'obsolete' };
  expect((await call('POST', '/dlq/discard', discard)).body).toMatchObject({ done: 1, dryRun: false });
  await call('POST', '/republish', { since: SINCE, until: SINCE, filter: { topic: 'x' } });
  const dry = await call('POST', '/republish', { since: SINCE, until: SINCE, dryRun: true });
  expect(dry.body).toMatchObject({ appended: 0, streams: { 'a.b': 3 }, next: 'abc' });
  const options = { by: 'alice', dryRun: false, limit: 1_000 };
  const range = { since: SINCE, until: SINCE };
  expect(asked).toEqual([
    ['replay', { eventIds: [eventId] }, { ...options, dryRun: true }],
    ['replay', { filter: { error: 'no' }, pruned: false }, { ...options, limit: 5, after: 'abc' }],
    ['replay', { filter: {}, pruned: false }, options],
    ['discard', { filter: { topic: 'x' }, pruned: true }, 'obsolete', options],
    ['run', { ...range, filter: { topic: 'x' } }, { by: 'alice', limit: 1_000 }],
    ['count', { ...range, filter: {} }, { limit: 1_000 }],
  ]);
});

test('event ids are taken as the table has them', async () => {
  const upper = eventId.toUpperCase();
  expect((await call('GET', `/dlq/${upper}`)).status).toBe(200);
  await call('POST', '/dlq/replay', { eventIds: [upper, eventId] });
  expect(asked).toMatchObject([
    ['show', eventId],
    ['replay', { eventIds: [eventId] }, {}],
  ]);
});

describe('refused with what is wrong, and nothing is done:', () => {
  test.each<[string, string, object, string]>([
    ['nothing said', '/dlq/replay', {}, 'set all to true'],
    ['an empty filter', '/dlq/replay', { filter: {} }, 'set all to true'],
    ['a misspelt filter', '/dlq/replay', { filter: { tpye: 'A' } }, 'body.filter has "tpye"'],
    ['a misspelt member', '/dlq/discard', { all: true, reason: 'x', dry_run: true }, 'body has "dry_run"'],
    ['both', '/dlq/replay', { eventIds: [eventId], filter: { error: 'x' } }, 'one of them'],
    ['no event id', '/dlq/replay', { eventIds: ['x'] }, 'eventIds/0'],
    ['none of them', '/dlq/replay', { eventIds: [] }, 'eventIds'],
    ['a byte that no text may have', '/dlq/replay', { filter: { error: 'a\u0000b' } }, 'filter/error'],
    ['no reason', '/dlq/discard', { all: true }, 'reason'],
    ['too many', '/dlq/replay', { all: true, limit: 1_001 }, 'limit'],
    ['no time', '/republish', { since: 'yesterday', until: SINCE }, 'since'],
    ['a flag that is none', '/dlq/replay', { all: true, dryRun: null }, 'body/dryRun must be boolean'],
    ['words for flags', '/dlq/discard', { all: 'true', reason: 'x' }, 'body/all must be boolean'],
    ['one id for many', '/dlq/replay', { eventIds: eventId }, 'body/eventIds must be array'],
    ['an id as a URN', '/dlq/replay', { eventIds: [`urn:uuid:${eventId}`] }, 'eventIds/0'],
    ['no end', '/republish', { since: SINCE }, 'until'],
    [
      'what belongs into the body',
      '/dlq/discard?dryRun=true',
      { all: true, reason: 'x' },
      'query has "dryRun"; known: none',
    ],
  ])('%s', async (_, url, body, reason) => {
    expect(await call('POST', url, body)).toEqual({
      status: 400,
      body: { error: expect.stringContaining(reason) },
    });
    expect(asked).toEqual([]);
  });

  test('a misspelt query', async () => {
    expect(await call('GET', '/dlq?typ=x')).toMatchObject({
      status: 400,
      body: { error: expect.stringContaining('query has "typ"') },
    });
  });
});

test('a body is not even read of who may not ask', async () => {
  const send = async (role: string) =>
    (
      await app.inject({
        ...{ method: 'POST', url: '/api/dlq/replay', payload: '{"no JSON' },
        headers: { 'content-type': 'application/json', ...(role !== '' && { 'x-role': role }) },
      })
    ).statusCode;
  expect(await send('')).toBe(401);
  expect(await send('viewer')).toBe(403);
  expect(await send('operator')).toBe(400);
});

test('viewers see and cannot act; nobody else sees anything, not even what is wrong', async () => {
  for (const url of ['/dlq', '/dlq/groups', `/dlq/${eventId}`, '/openapi.json']) {
    expect((await call('GET', url, undefined, 'viewer')).status, url).toBe(200);
    expect((await call('GET', url, undefined, '')).status, url).toBe(401);
  }
  asked.length = 0;
  for (const url of ['/dlq/replay', '/dlq/discard', '/republish']) {
    expect((await call('POST', url, { nonsense: 1 }, 'viewer')).status, url).toBe(403);
    expect((await call('POST', url, { nonsense: 1 }, '')).status, url).toBe(401);
  }
  expect(asked).toEqual([]);
});

test('a payload, which may hold personal data, and what tells whose it is, are for operators alone', async () => {
  const event = async (role: string) => (await call('GET', `/dlq/${eventId}`, undefined, role)).body.event;
  expect(await event('operator')).toEqual({ ...PRIVATE, eventType: 'A' });
  expect(await event('viewer')).toEqual({ payload: null, eventType: 'A' });
});

test('a bad cursor is the asker’s fault, a server that is away is not', async () => {
  fail = new CursorError();
  expect((await call('GET', '/dlq?after=x')).status).toBe(400);
  fail = Object.assign(new Error('date/time field value out of range'), { code: '22008' });
  expect((await call('GET', '/dlq?since=0000-01-01T00:00:00Z')).status).toBe(400);
  fail = Object.assign(new Error('time zone displacement out of range'), { code: '22009' });
  expect((await call('GET', '/dlq?since=2026-01-31T12:00:00%2B23:59')).status).toBe(400);
  fail = new NotReadyError('Redis is away');
  expect(await call('POST', '/dlq/replay', { all: true })).toEqual({
    status: 503,
    body: { error: 'Redis is away' },
  });
  fail = Object.assign(new Error('permission denied for table outbox'), { code: '42501' });
  expect(await call('POST', '/dlq/replay', { all: true })).toEqual({
    status: 403,
    body: { error: expect.stringMatching(/^permission denied for table outbox: .*operators’ role/) },
  });
  fail = new Error('postgres://user:secret@host/db refused');
  const { status, body } = await call('GET', '/dlq');
  expect(status).toBe(500);
  expect(body.error).not.toContain('secret');
});

test.each([
  ['Redis', new Error("Stream isn't writeable and enableOfflineQueue options is false")],
  ['Redis', new Error('Connection is closed.')],
  ['Redis', Object.assign(new Error('Reached the max'), { name: 'MaxRetriesPerRequestError' })],
  ['Redis', new Error('Command timed out')],
  [
    'PostgreSQL',
    Object.assign(new Error('connect ECONNREFUSED 10.0.0.7:5432'), {
      ...{ code: 'ECONNREFUSED', syscall: 'connect', address: '10.0.0.7' },
    }),
  ],
  ['PostgreSQL', Object.assign(new AggregateError([], ''), { code: 'ECONNREFUSED' })],
  ['PostgreSQL', Object.assign(new Error('getaddrinfo EAI_AGAIN db.internal'), { code: 'EAI_AGAIN' })],
  ['PostgreSQL', new Error('timeout exceeded when trying to connect')],
  ['PostgreSQL', new Error('Connection terminated unexpectedly')],
  ['PostgreSQL', new Error('Query read timeout')],
  ['PostgreSQL', Object.assign(new Error('starting up'), { code: '57P03', severity: 'FATAL' })],
])(
  'while %s is away (%s) a request is told so and when to try again, nothing of the driver',
  async (server, error) => {
    fail = error;
    const headers = { 'x-role': 'viewer' };
    const replies = [
      await app.inject({ url: '/api/dlq', headers }),
      await app.inject({ url: '/api/dlq', headers }),
    ];
    for (const reply of replies) {
      expect([reply.statusCode, reply.headers['retry-after'], reply.json()]).toEqual([
        ...[503, '5'],
        { error: `${server} cannot be reached; try again` },
      ]);
    }
    expect(logged).toEqual([
      'warn: a server cannot be reached; requests to the dashboard and the HTTP API get a 503',
    ]);
  },
);

test.each([
  ['every session is in use', new Error('no database session became free within 3 s (4 in use)')],
  ['PostgreSQL gives too few', new TooFewSessionsError('PostgreSQL gives this pod 1 of 4 sessions')],
  [
    'PostgreSQL gives none',
    Object.assign(new Error('too many connections for role "relay"'), { code: '53300', severity: 'FATAL' }),
  ],
])('while %s a request is told so, and that it may come again', async (_why, error) => {
  fail = error;
  const reply = await app.inject({ url: '/api/dlq', headers: { 'x-role': 'viewer' } });
  expect([reply.statusCode, reply.headers['retry-after'], reply.json()]).toEqual([
    ...[503, '5'],
    { error: 'all database sessions are in use; try again' },
  ]);
  expect(logged).toEqual([
    'warn: all database sessions are in use; requests to the dashboard and the HTTP API get a 503',
  ]);
});

const readOnly = (message: string) => Object.assign(new Error(message), { code: '25006', severity: 'ERROR' });
const reply = (message: string) => Object.assign(new Error(message), { name: 'ReplyError' });

test.each([
  ['Redis', reply("READONLY You can't write against a read only replica. script: 57, on @user_script:123.")],
  ['Redis', reply("OOM command not allowed when used memory > 'maxmemory'.")],
  ['PostgreSQL', readOnly('cannot execute UPDATE in a read-only transaction')],
  ['PostgreSQL', new ReadOnlyError(true)],
])(
  'while %s takes no changes (%s) a request is told so, and that it may come again',
  async (server, error) => {
    fail = error;
    const headers = { 'x-role': 'operator' };
    const answer = await app.inject({
      ...{ method: 'POST', url: '/api/dlq/replay', payload: { all: true }, headers },
    });
    expect([answer.statusCode, answer.headers['retry-after'], answer.json()]).toEqual([
      ...[503, '5'],
      { error: `${server} refuses changes now; try again` },
    ]);
    expect(logged).toEqual([
      'warn: a server refuses changes; requests to the dashboard and the HTTP API get a 503',
    ]);
  },
);

test('while PostgreSQL takes too long, as where the table is locked, a request is told so, and that it may come again', async () => {
  const message = 'canceling statement due to statement timeout';
  fail = Object.assign(new Error(message), { code: '57014', severity: 'ERROR' });
  const answer = await app.inject({ url: '/api/dlq', headers: { 'x-role': 'viewer' } });
  expect([answer.statusCode, answer.headers['retry-after'], answer.json()]).toEqual([
    ...[503, '5'],
    { error: 'PostgreSQL did not do this in time; try again' },
  ]);
  expect(logged).toEqual([
    'warn: a statement of a request took too long; requests to the dashboard and the HTTP API get a 503',
  ]);
});

test('a request that Redis refuses for itself is no outage', async () => {
  fail = reply('WRONGTYPE Operation against a key holding the wrong kind of value');
  expect((await call('GET', '/dlq')).status).toBe(500);
});

test('an error of our own is no outage', async () => {
  fail = Object.assign(new TypeError('x is not a function'), { code: 'ERR_INVALID_ARG_TYPE' });
  expect((await call('GET', '/dlq')).status).toBe(500);
  expect(logged).toEqual(['error: a request to the HTTP API failed']);
});

test('the description has every route, with what it takes and who may', async () => {
  const { body } = await call('GET', '/openapi.json');
  expect(body).toMatchObject({ openapi: '3.1.0', info: { title: 'relay-service', version: '1.2.3' } });
  const described = Object.entries(body.paths as Record<string, Record<string, object>>).flatMap(
    ([path, methods]) => Object.keys(methods).map((method) => `${method} ${path}`),
  );
  expect(served.length).toBe(7);
  expect(described.toSorted()).toEqual(served.toSorted());
  const { get, post } = {
    get: body.paths['/api/dlq/{eventId}'].get,
    post: body.paths['/api/dlq/discard'].post,
  };
  expect(get.parameters).toEqual([
    {
      name: 'eventId',
      in: 'path',
      required: true,
      schema: { type: 'string', format: 'uuid', maxLength: 36 },
    },
  ]);
  expect(post.description).toContain('operator');
  expect(post.responses.default.description).toContain('503 come with Retry-After');
  expect(post.requestBody.content['application/json'].schema.required).toEqual(['reason']);
  const ids = Object.values(body.paths as Record<string, Record<string, { operationId: string }>>).flatMap(
    (it) => Object.values(it).map(({ operationId }) => operationId),
  );
  expect(new Set(ids).size).toBe(7);
});
