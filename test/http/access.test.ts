import { type FastifyInstance, fastify, type InjectOptions } from 'fastify';
import { afterEach, beforeAll, expect, onTestFinished, test, vi } from 'vitest';
import type { BoardUser } from '../../src/config/board-users.ts';
import { createAccess } from '../../src/http/access.ts';
import { createSeals } from '../../src/http/seals.ts';
import { addressOf } from '../../src/http/tries.ts';
import { basicOf, cheapHash, PASSWORD } from '../support/board.ts';
import { silent } from '../support/stages.ts';

const HOUR_MS = 3_600_000;
const SECRET = 'the secret of this deployment';
let users: BoardUser[];
let basic: string;

beforeAll(async () => {
  const hash = await cheapHash(PASSWORD);
  users = [
    { name: 'vera', role: 'viewer', hash },
    { name: 'olga', role: 'operator', hash },
  ];
  basic = basicOf('olga');
});
afterEach(() => {
  vi.useRealTimers();
});

type Site = Readonly<{ app: FastifyInstance; lines: Record<string, unknown>[] }>;

/** A server as a pod has it: a page for viewers, an action for operators. */
async function site({ who = users, basePath = '', secret = SECRET } = {}): Promise<Site> {
  const lines: Record<string, unknown>[] = [];
  const log = (fields: Record<string, unknown>, msg: string) => void lines.push({ ...fields, msg });
  const app = fastify({ trustProxy: ['10.0.0.1'] });
  const logger = { ...silent, info: log, warn: log };
  const access = createAccess({ users: who, secret: async () => secret, basePath, logger });
  await app.register(async (scope) => {
    await access.register(scope);
    scope.get('/board', { onRequest: access.requires('viewer') }, async ({ operator }) => ({ operator }));
    scope.post('/act', { onRequest: access.requires('operator') }, async ({ operator }) => ({ operator }));
  });
  return { app, lines };
}

const logIn = (app: FastifyInstance, name: string, password = PASSWORD, more: InjectOptions = {}) =>
  app.inject({
    method: 'POST',
    url: '/login',
    payload: new URLSearchParams({ name, password, next: '/board?x=1' }).toString(),
    ...more,
    headers: { 'content-type': 'application/x-www-form-urlencoded', host: 'relay.test', ...more.headers },
  });

/** The session's cookie as the browser would send it. */
async function session(app: FastifyInstance, name: string): Promise<string> {
  const answer = await logIn(app, name);
  expect(answer.statusCode).toBe(303);
  return String(answer.headers['set-cookie']).split(';')[0] as string;
}

test('who is not logged in gets the log-in page, and a script a 401', async () => {
  const { app } = await site();
  const page = await app.inject({ url: '/board?page=2', headers: { accept: 'text/html' } });
  expect([page.statusCode, page.headers.location]).toEqual([303, '/login?next=%2Fboard%3Fpage%3D2']);
  const script = await app.inject({ url: '/board' });
  expect([script.statusCode, script.json()]).toEqual([401, { error: 'log in first' }]);
  // A browser would open a window of its own.
  expect(script.headers['www-authenticate']).toBeUndefined();
  const form = await app.inject({ url: '/login?next=%2Fboard%3Fpage%3D2' });
  expect(form.body).toContain('value="/board?page=2"');
});

test('a log-in leads to where one was going, with a cookie that scripts and other sites do not get', async () => {
  const { app, lines } = await site();
  const answer = await logIn(app, 'olga');
  expect([answer.statusCode, answer.headers.location]).toEqual([303, '/board?x=1']);
  const [set] = answer.headers['set-cookie'] as unknown as string[];
  expect(set).toMatch(/^relay_session=\S+; Max-Age=28800; Path=\/; HttpOnly; SameSite=Strict$/);
  const cookie = String(set).split(';')[0] as string;
  const board = await app.inject({ url: '/board', headers: { cookie } });
  expect(board.json()).toEqual({ operator: { name: 'olga', role: 'operator' } });
  expect(lines).toEqual([{ user: 'olga', role: 'operator', address: '127.0.0.1', msg: 'logged in' }]);
});

test('by https, told by a trusted proxy alone, the cookie is for https only', async () => {
  const { app } = await site();
  const headers = { 'x-forwarded-proto': 'https', 'x-forwarded-for': '192.0.2.7' };
  const trusted = await logIn(app, 'olga', PASSWORD, { headers, remoteAddress: '10.0.0.1' });
  expect(String(trusted.headers['set-cookie'])).toContain('; Secure');
  const other = await logIn(app, 'olga', PASSWORD, { headers, remoteAddress: '10.0.0.2' });
  expect(String(other.headers['set-cookie'])).not.toContain('Secure');
});

test('every pod knows the session; a changed password or role, a forged or an old cookie ends it', async () => {
  const [{ app }, other] = [await site(), await site()];
  const cookie = await session(app, 'vera');
  const status = async ({ app: at }: Site, sent: string) =>
    (await at.inject({ url: '/board', headers: { cookie: sent } })).statusCode;
  expect(await status(other, cookie)).toBe(200);

  const [vera, olga] = users as [BoardUser, BoardUser];
  expect(await status(await site({ who: [{ ...vera, role: 'operator' }, olga] }), cookie)).toBe(401);
  const hash = await cheapHash('another password');
  expect(await status(await site({ who: [vera, { ...olga, hash }] }), cookie)).toBe(401);
  expect(await status(other, cookie.replace('vera', 'olga'))).toBe(401);
  expect(await status(other, `relay_session=${Date.now() + HOUR_MS}.olga`)).toBe(401);
  expect(await status(await site({ secret: 'of another deployment' }), cookie)).toBe(401);

  vi.useFakeTimers({ now: Date.now() + 8 * HOUR_MS - 1_000, toFake: ['Date'] });
  expect(await status(other, cookie)).toBe(200);
  vi.setSystemTime(Date.now() + 2_000);
  expect(await status(other, cookie)).toBe(401);
});

test('no session is longer than eight hours, whatever the cookie says, and nothing else that was sealed is one', async () => {
  const it = await site();
  const seals = createSeals(async () => SECRET, users);
  const status = async (kind: string, lifetimeMs: number) => {
    const cookie = `relay_session=${await seals.seal(kind, 'olga', lifetimeMs)}`;
    return (await it.app.inject({ url: '/board', headers: { cookie } })).statusCode;
  };
  expect(await status('session', 8 * HOUR_MS)).toBe(200);
  expect(await status('session', 9 * HOUR_MS)).toBe(401);
  expect(await status('session', 1e15 - Date.now() - 1)).toBe(401);
  expect(await status('known', HOUR_MS)).toBe(401);
});

test('a viewer may look and not act, and is told so', async () => {
  const { app } = await site();
  const cookie = await session(app, 'vera');
  const headers = { cookie, 'sec-fetch-site': 'same-origin' };
  expect((await app.inject({ url: '/board', headers })).statusCode).toBe(200);
  const act = await app.inject({ method: 'POST', url: '/act', headers });
  expect([act.statusCode, act.json()]).toEqual([
    403,
    { error: 'vera is a viewer; acting needs the role operator' },
  ]);
});

test('a wrong password costs a second, for a name that nobody has as well, and soon nothing is even tried', async () => {
  const { app, lines } = await site();
  const timed = async (name: string) => {
    const startedAt = performance.now();
    const { statusCode, body } = await logIn(app, name, 'wrong password');
    return { statusCode, body, ms: performance.now() - startedAt };
  };
  const [known, unknown] = await Promise.all([timed('olga'), timed('my password')]);
  for (const { statusCode, body, ms } of [known, unknown]) {
    expect(statusCode).toBe(401);
    expect(body).toContain('Wrong name or password.');
    expect(ms).toBeGreaterThan(990);
  }
  // What was typed as a name may be a password.
  expect(lines.map(({ user }) => user)).toEqual(expect.arrayContaining(['olga', null]));
  expect(JSON.stringify(lines)).not.toContain('my password');

  await Promise.all(Array.from({ length: 8 }, (_, i) => logIn(app, 'olga', `wrong password ${i}`)));
  const right = await logIn(app, 'olga');
  expect(right.statusCode).toBe(429);
  const wait = Number(right.headers['retry-after']);
  expect(wait).toBeGreaterThan(0);
  expect(right.body).toContain(`Too many tries. Wait ${wait} second`);
  expect(right.body).not.toContain(PASSWORD);
  // Others are not to suffer: another address, and a session that is there.
  expect((await logIn(app, 'olga', PASSWORD, { remoteAddress: '192.0.2.1' })).statusCode).toBe(303);
});

test('guesses that are refused without a check do not fill the log: a line in 10 s says how many there were', async () => {
  const { app, lines } = await site();
  await Promise.all(Array.from({ length: 10 }, (_, i) => logIn(app, 'olga', `wrong password ${i}`)));
  const guess = () => app.inject({ url: '/board', headers: { authorization: basicOf('olga', 'wrong') } });
  const told = () => lines.filter(({ msg }) => msg === 'too many wrong passwords; refused without a check');
  for (let i = 0; i < 50; i++) {
    const reply = await guess();
    const wait = Number(reply.headers['retry-after']);
    expect([reply.statusCode, reply.json().error]).toEqual([
      429,
      `Too many tries. Wait ${wait} ${wait === 1 ? 'second' : 'seconds'}.`,
    ]);
  }
  const msg = 'too many wrong passwords; refused without a check';
  expect(told()).toEqual([{ address: '127.0.0.1', user: 'olga', msg }]);
  const later = performance.now() + 10_000;
  const clock = vi.spyOn(performance, 'now').mockImplementation(() => later);
  onTestFinished(() => clock.mockRestore());
  await guess();
  expect(told().slice(1)).toEqual([{ address: '127.0.0.1', user: 'olga', sinceTheLast: 49, msg }]);
});

/** Wrong passwords for olga: ten from each of so many addresses. */
async function guess({ app }: Site, addresses: number): Promise<Set<number>> {
  const codes = new Set<number>();
  for (let address = 1; address <= addresses; address++) {
    const tries = Array.from({ length: 10 }, (_, i) =>
      logIn(app, 'olga', `wrong password ${i}`, { remoteAddress: `192.0.2.${address}` }),
    );
    for (const { statusCode } of await Promise.all(tries)) codes.add(statusCode);
  }
  return codes;
}

test('three addresses do not lock a name out; ten do, but not in a browser that its owner has used before', async () => {
  const it = await site();
  const before = await logIn(it.app, 'olga', PASSWORD, { remoteAddress: '198.51.100.1' });
  const [known] = String(before.headers['set-cookie']).match(/relay_known=[^;]+/) ?? [];
  expect(await guess(it, 3)).toEqual(new Set([401]));
  const from = (remoteAddress: string, cookie = '') =>
    logIn(it.app, 'olga', PASSWORD, { remoteAddress, headers: { cookie } });
  expect((await from('198.51.100.2')).statusCode).toBe(303);
  await guess(it, 10);
  expect((await from('198.51.100.3')).statusCode).toBe(429);
  expect((await from('198.51.100.3', String(known))).statusCode).toBe(303);
  const vera = await logIn(it.app, 'vera', PASSWORD, { remoteAddress: '198.51.100.4' });
  expect(vera.statusCode).toBe(303);
  // Of somebody else's browser it says nothing.
  const veras = String(vera.headers['set-cookie']).match(/relay_known=[^;]+/)?.[0];
  expect((await from('198.51.100.4', String(veras))).statusCode).toBe(429);
});

test('the right password is no guess, however often it comes at once', async () => {
  const { app } = await site();
  const all = await Promise.all([
    ...Array.from({ length: 40 }, () => app.inject({ url: '/board', headers: { authorization: basic } })),
    ...Array.from({ length: 40 }, () => logIn(app, 'olga')),
  ]);
  expect(new Set(all.map(({ statusCode }) => statusCode))).toEqual(new Set([200, 303]));
});

test('a hundred passwords at once are not all computed: most are refused, and do not wait for the others', async () => {
  const { app } = await site();
  const answered: number[] = [];
  const all = await Promise.all(
    Array.from({ length: 100 }, async (_, i) => {
      const answer = await logIn(app, `nobody${i}`, `wrong password ${i}`, { remoteAddress: `192.0.2.${i}` });
      answered.push(answer.statusCode);
      return answer;
    }),
  );
  const refused = all.filter(({ statusCode }) => statusCode === 429);
  // Two are computed, ten wait; a few more where these are done soon.
  expect(refused.length).toBeGreaterThan(50);
  expect(refused[0]?.headers['retry-after']).toBe('1');
  expect(answered.slice(0, 50).filter((code) => code === 429).length).toBeGreaterThan(35);
});

test('an address is one however a proxy writes it, and a port makes no other', async () => {
  for (const text of ['192.0.2.7', '192.0.2.7:50123', '[::ffff:192.0.2.7]:1', '::ffff:192.0.2.7'])
    expect(addressOf(text), text).toBe('192.0.2.7');
  for (const text of [
    '2001:db8:0:1::5',
    '[2001:DB8:0:1:aaaa::]:443',
    '2001:db8:0:1::',
    '2001:db8::1:0:0:0:9',
  ])
    expect(addressOf(text), text).toBe('2001:db8:0:1::/64');
  expect(addressOf('fe80::1%eth0')).toBe('fe80:0:0:0::/64');
  for (const text of ['', 'unknown', '_hidden', '1.2.3.4.5', '<script>'])
    expect(addressOf(text)).toBe('no address');

  const { app } = await site();
  const tries = Array.from({ length: 12 }, (_, i) =>
    logIn(app, `nobody${i}`, 'wrong password', {
      remoteAddress: '10.0.0.1',
      headers: { 'x-forwarded-for': `203.0.113.9:${50_000 + i}` },
    }),
  );
  const codes = (await Promise.all(tries)).map(({ statusCode }) => statusCode);
  expect(codes.filter((it) => it === 429)).toHaveLength(2);
});

test('after a wrong password only that is to be typed again', async () => {
  const { app } = await site();
  const { body } = await logIn(app, '"><b>olga', 'wrong password');
  expect(body).toContain('name="name" value="&#34;&#62;&#60;b&#62;olga"');
  expect(body).not.toContain('wrong password');
});

test('a script logs in with every request, and its password is computed once', async () => {
  const { app } = await site();
  const act = (authorization: string) =>
    app.inject({ method: 'POST', url: '/act', headers: { authorization } });
  // More than may be tried in a minute.
  for (let i = 0; i < 15; i++)
    expect((await act(basic)).json()).toMatchObject({ operator: { name: 'olga' } });
  const wrong = await act(basicOf('olga', 'wrong password'));
  expect([wrong.statusCode, wrong.headers['www-authenticate']]).toEqual([401, 'Basic realm="relay"']);
  expect((await act(basicOf('vera'))).statusCode).toBe(403);
});

test('what changes anything does not come from another site', async () => {
  const { app } = await site();
  const cookie = await session(app, 'olga');
  const act = async (headers: Record<string, string>) =>
    (await app.inject({ method: 'POST', url: '/act', headers: { host: 'relay.test:8004', ...headers } }))
      .statusCode;
  expect(await act({ cookie, 'sec-fetch-site': 'same-origin' })).toBe(200);
  expect(await act({ cookie, origin: 'http://relay.test:8004' })).toBe(200);
  expect(await act({ authorization: basic })).toBe(200);
  for (const credentials of [{ cookie }, { authorization: basic }]) {
    expect(await act({ ...credentials, 'sec-fetch-site': 'cross-site' })).toBe(403);
    expect(
      await act({ ...credentials, 'sec-fetch-site': 'same-site', origin: 'http://relay.test:8004' }),
    ).toBe(403);
    expect(await act({ ...credentials, origin: 'http://relay.test:9000' })).toBe(403);
    expect(await act({ ...credentials, origin: 'null' })).toBe(403);
  }
  // A browser says where it comes from.
  expect(await act({ cookie })).toBe(403);
  const otherLogIn = await logIn(app, 'olga', PASSWORD, { headers: { 'sec-fetch-site': 'cross-site' } });
  expect(otherLogIn.statusCode).toBe(403);
});

test('after the log-in one ends up on a page of ours', async () => {
  const { app } = await site({ basePath: '/ops' });
  const next = async (to: string) =>
    (await app.inject({ url: `/login?next=${encodeURIComponent(to)}` })).body.match(
      /name="next" value="([^"]*)"/,
    )?.[1];
  expect(await next('/ops/board/queue/x?page=2')).toBe('/ops/board/queue/x?page=2');
  for (const to of [
    'https://evil.test/',
    '//evil.test',
    '/\\evil.test',
    '/ops//evil.test\r\nx: y',
    '/other',
    '"><b>',
  ])
    expect(await next(to), to).toBe('/ops/board');
});

test('under a path of a proxy, links and cookie have it', async () => {
  const { app } = await site({ basePath: '/ops' });
  const page = await app.inject({ url: '/board', headers: { accept: 'text/html' } });
  expect(page.headers.location).toBe('/ops/login?next=%2Fops%2Fboard');
  expect(String((await logIn(app, 'olga')).headers['set-cookie'])).toContain('; Path=/ops/;');
  expect((await app.inject({ url: '/login' })).body).toContain('action="/ops/login"');
});

test('whoever logs out is out', async () => {
  const { app } = await site();
  const headers = { cookie: await session(app, 'vera'), 'sec-fetch-site': 'same-origin' };
  expect((await app.inject({ url: '/logout', headers })).body).toContain('You are vera, viewer.');
  const out = await app.inject({ method: 'POST', url: '/logout', headers });
  expect([out.statusCode, out.headers.location]).toEqual([303, '/login']);
  expect(String(out.headers['set-cookie'])).toMatch(/^relay_session=; .*Expires=Thu, 01 Jan 1970/);
});

test('without users only this machine is let in, and no page or proxy in its name', async () => {
  const { app } = await site({ who: [] });
  const status = async (headers: Record<string, string>) =>
    (await app.inject({ method: 'POST', url: '/act', headers })).statusCode;
  for (const host of ['localhost:8004', '127.0.0.1:8004', '[::1]:8004'])
    expect(await status({ host })).toBe(200);
  // A page that made its own name point here.
  expect(await status({ host: 'evil.test:8004' })).toBe(403);
  expect(await status({ host: 'localhost.evil.test' })).toBe(403);
  expect(await status({ host: 'localhost', 'x-forwarded-for': '192.0.2.1' })).toBe(403);
  expect(await status({ host: 'localhost', origin: 'http://evil.test' })).toBe(403);
  expect(await status({ host: 'localhost:8004', origin: 'http://localhost:8004' })).toBe(200);
  const look = async (headers: Record<string, string>) =>
    (await app.inject({ url: '/board', headers: { host: 'localhost:8004', ...headers } })).statusCode;
  expect(await look({})).toBe(200);
  for (const [header, value] of [
    ...[
      ['via', '1.1 proxy'],
      ['forwarded', 'for=192.0.2.1'],
      ['x-real-ip', '192.0.2.1'],
    ],
    ...[
      ['x-forwarded-host', 'relay.test'],
      ['cf-connecting-ip', '192.0.2.1'],
      ['origin', 'http://localhost:9000'],
    ],
    ...[
      ['x-forwarded-proto', 'https'],
      ['x-client-ip', '192.0.2.1'],
      ['origin', 'null'],
    ],
  ] as const)
    expect(await look({ [header as string]: value as string }), header).toBe(403);
});
