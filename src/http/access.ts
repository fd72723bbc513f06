import { createHmac, randomBytes } from 'node:crypto';
import { setTimeout as delay } from 'node:timers/promises';
import cookie from '@fastify/cookie';
import formBody from '@fastify/formbody';
import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify';
import type { BoardUser, Role } from '../config/board-users.ts';
import { counted } from '../event.ts';
import { createSpacedWarnings, type Logger } from '../telemetry/logger.ts';
import { BusyError } from './admission.ts';
import { logInPage, logOutPage, refusalPage } from './pages.ts';
import { isPassword, NOBODYS_HASH } from './passwords.ts';
import { createSeals } from './seals.ts';
import { addressOf, createTries } from './tries.ts';

/** Authentication and roles: who sends a request, and what they may do. */

export type Operator = Readonly<{ name: string; role: Role }>;

declare module 'fastify' {
  interface FastifyRequest {
    /** Set by the hook of `requires`. */
    operator: Operator | null;
  }
}

const SESSION = { cookie: 'relay_session', kind: 'session' } as const;
/** One working day. The server cannot end a single session, only all of them. */
const SESSION_MS = 8 * 3_600_000;
/** The user has logged in with this browser before. Wrong guesses from elsewhere do not lock the name out here. */
const KNOWN = { cookie: 'relay_known', kind: 'known' } as const;
const KNOWN_MS = 90 * 86_400_000;
/** Minimum time to answer a wrong name or password: guessing is slow, and the time does not tell which one was wrong. */
const WRONG_ANSWER_MS = 1_000;
/** Limits on wrong passwords per window: from one address (a /64 of IPv6), and for one name. */
const WINDOW_MS = 60_000;
const TRIES_BY_ADDRESS = 10;
const TRIES_BY_NAME = 100;
/** A script sends its password with every request. Its hash is computed once, and again after this time without a request. */
const REMEMBERED_MS = 600_000;
const REMEMBERED_MAX = 200;
const MAX_FORM_BYTES = 8_192;
const REPEAT_AFTER_MS = 10_000;

const SAFE_METHODS = new Set(['GET', 'HEAD']);
export const isRead = (request: FastifyRequest): boolean => SAFE_METHODS.has(request.method);

type Checked = { operator: Operator } | { wrong: true } | { tooMany: true; retryInS: number };

/**
 * Log-in by page and session cookie, or by HTTP Basic.
 *
 * A session is a signed cookie with the user's name and an expiry time. The role is looked up at each request.
 *
 * @param users if empty, everyone who can reach the address is the operator "local"; only for loopback addresses
 * @param secret of the deployment; signs sessions
 * @param basePath path of the whole server as the browser sees it, without a trailing slash
 */
export function createAccess(deps: {
  users: readonly BoardUser[];
  secret: () => Promise<string>;
  basePath: string;
  logger: Logger;
}) {
  const { users, basePath, logger } = deps;
  const byName = new Map(users.map((user) => [user.name, user]));
  const seals = createSeals(deps.secret, users);
  const remembered = createCredentialCache();
  const wrongByAddress = createTries({ max: TRIES_BY_ADDRESS, windowMs: WINDOW_MS });
  const wrongByName = createTries({ max: TRIES_BY_NAME, windowMs: WINDOW_MS });
  /** Refusals without a check cost nothing, and so come at any speed: they must not fill the log. */
  const warn = createSpacedWarnings(logger, REPEAT_AFTER_MS);
  const checking = new Map<string, Promise<Checked>>();

  /** Simultaneous requests with the same credentials from the same address share one hash computation. */
  function check(request: FastifyRequest, name: string, password: string): Promise<Checked> {
    const address = addressOf(request.ip);
    const asked = remembered.digest(`${address} ${name}:${password}`);
    const pending = checking.get(asked);
    if (pending !== undefined) return pending;
    const answer = checkAnew(request, address, name, password).finally(() => checking.delete(asked));
    checking.set(asked, answer);
    return answer;
  }

  async function checkAnew(
    request: FastifyRequest,
    address: string,
    name: string,
    password: string,
  ): Promise<Checked> {
    const isKnownBrowser = (await seals.open(KNOWN.kind, request.cookies[KNOWN.cookie], KNOWN_MS)) === name;
    const taken: (() => void)[] = [];
    const tooMany = (retryInS: number, message: string): Checked => {
      for (const giveBack of taken) giveBack();
      warn({ address, user: loggableName(name) }, message);
      return { tooMany: true, retryInS };
    };
    for (const [tries, key] of [
      [wrongByAddress, address],
      [wrongByName, isKnownBrowser ? `${name} ${address}` : name],
    ] as const) {
      const retryInS = tries.take(key);
      if (retryInS > 0) return tooMany(retryInS, 'too many wrong passwords; refused without a check');
      taken.push(() => tries.giveBack(key));
    }
    const user = byName.get(name);
    const answerAt = delay(WRONG_ANSWER_MS, undefined, { ref: false });
    try {
      if ((await isPassword(password, user?.hash ?? NOBODYS_HASH)) && user !== undefined) {
        for (const giveBack of taken) giveBack();
        return { operator: { name: user.name, role: user.role } };
      }
    } catch (error) {
      if (error instanceof BusyError)
        return tooMany(error.retryAfterSeconds, 'too many log-ins at once; refused without a check');
      throw error;
    }
    await answerAt;
    logger.warn({ address, user: loggableName(name) }, 'wrong name or password');
    return { wrong: true };
  }

  /** An unknown name is not logged: it may be a password in the wrong field. */
  const loggableName = (name: string): string | null => byName.get(name)?.name ?? null;

  async function byBasic(request: FastifyRequest, credentials: string): Promise<Checked> {
    const text = Buffer.from(credentials, 'base64').toString('utf8');
    const colon = text.indexOf(':');
    if (colon < 0) return { wrong: true };
    const before = byName.get(remembered.nameOf(text) ?? '');
    if (before !== undefined) return { operator: before };
    const checked = await check(request, text.slice(0, colon), text.slice(colon + 1));
    if ('operator' in checked) remembered.add(text, checked.operator.name);
    return checked;
  }

  async function bySession(request: FastifyRequest): Promise<Operator | null> {
    const name = await seals.open(SESSION.kind, request.cookies[SESSION.cookie], SESSION_MS);
    return byName.get(name ?? '') ?? null;
  }

  /** Without users: serves only people on this machine, not proxies or pages of other sites. */
  function byAddress(request: FastifyRequest): Operator | string {
    const { headers, raw, hostname, host } = request;
    // DNS rebinding: any site can point its own name at 127.0.0.1.
    if (!LOOPBACK_NAME.test(hostname)) return 'without RELAY_BOARD_USERS only localhost is served';
    // Proxies that add no header usually speak HTTP/1.0, as nginx does by default.
    if (raw.httpVersion === '1.0' || Object.keys(headers).some((name) => OF_A_PROXY.test(name)))
      return 'this request came through a proxy: set RELAY_BOARD_USERS';
    if (headers.origin !== undefined && hostOf(headers.origin) !== host)
      return 'this request comes from a page of another site';
    return { name: 'local', role: 'operator' };
  }

  async function identify(request: FastifyRequest): Promise<Checked | null | string> {
    if (users.length === 0) {
      const found = byAddress(request);
      return typeof found === 'string' ? found : { operator: found };
    }
    const [, credentials] = /^Basic +(\S+)$/i.exec(request.headers.authorization ?? '') ?? [];
    if (credentials !== undefined) return byBasic(request, credentials);
    const operator = await bySession(request);
    return operator && { operator };
  }

  /** A hook (onRequest or later) that requires the role, and sets `request.operator`. */
  function requires(role: Role) {
    return async (request: FastifyRequest, reply: FastifyReply): Promise<unknown> => {
      const found = await identify(request);
      if (typeof found === 'string') return refuse(request, reply, 403, found);
      if (found === null || 'wrong' in found) return askToLogIn(request, reply, found !== null);
      if ('tooMany' in found)
        return refuseForNow(reply, found.retryInS).send({ error: tooManyTries(found.retryInS) });
      const { name, role: has } = found.operator;
      request.operator = { name, role: has };
      if (role === 'operator' && has !== 'operator')
        return refuse(request, reply, 403, `${name} is a viewer; acting needs the role operator`);
      return undefined;
    };
  }

  function askToLogIn(request: FastifyRequest, reply: FastifyReply, byScript: boolean): FastifyReply {
    if (wantsPage(request) && !byScript) {
      const next = encodeURIComponent(`${basePath}${request.url}`);
      return reply.redirect(`${basePath}/login?next=${next}`, 303);
    }
    // Only requests with Basic credentials get a challenge: a browser would open its own log-in window over the dashboard.
    if (byScript) reply.header('www-authenticate', 'Basic realm="relay"');
    return reply.code(401).send({ error: byScript ? WRONG : 'log in first' });
  }

  function refuse(request: FastifyRequest, reply: FastifyReply, code: 403, reason: string): FastifyReply {
    if (!wantsPage(request)) return reply.code(code).send({ error: reason });
    return reply.code(code).type('text/html; charset=utf-8').send(refusalPage(reason));
  }

  const refuseForNow = (reply: FastifyReply, retryInS: number): FastifyReply =>
    reply.code(429).header('retry-after', retryInS);

  /** Allows only our own paths as `next`: no open redirect. */
  function ownPath(next: unknown): string {
    const home = `${basePath}/board`;
    if (typeof next !== 'string' || !/^\/(?![/\\])[\x21-\x5b\x5d-\x7e]{0,2000}$/.test(next)) return home;
    return next.startsWith(`${basePath}/`) ? next : home;
  }

  /**
   * CSRF: a request that changes something must come from our own page, or from no page at all. SameSite=Strict does not
   * withhold the cookie from other ports and subdomains of the same site, and nothing withholds Basic credentials.
   */
  async function refuseOtherSites(request: FastifyRequest, reply: FastifyReply): Promise<unknown> {
    if (isRead(request) || isOfOurOwn(request)) return undefined;
    logger.warn(
      { address: addressOf(request.ip), path: pathOf(request) },
      'a request of another site was refused',
    );
    return reply.code(403).send({ error: 'this request does not come from a page of this site' });
  }

  function isOfOurOwn({ headers, host, cookies }: FastifyRequest): boolean {
    const site = headers['sec-fetch-site'];
    if (site !== undefined) return site === 'same-origin';
    if (headers.origin !== undefined) return hostOf(headers.origin) === host;
    // Browsers send one of the two headers, scripts neither. A session cookie without them is refused.
    return cookies[SESSION.cookie] === undefined;
  }

  function addLogIn(app: FastifyInstance): void {
    const logIn = `${basePath}/login`;
    const html = (reply: FastifyReply) => reply.type('text/html; charset=utf-8');

    app.get('/login', async (request, reply) => {
      const next = ownPath((request.query as { next?: unknown }).next);
      if (users.length === 0 || (await bySession(request))) return reply.redirect(next, 303);
      return html(reply).send(logInPage(logIn, next));
    });

    app.post('/login', { bodyLimit: MAX_FORM_BYTES }, async (request, reply) => {
      const form = (request.body ?? {}) as Record<string, unknown>;
      const [name, password] = [form.name, form.password].map((it) => (typeof it === 'string' ? it : ''));
      const next = ownPath(form.next);
      const checked = await check(request, name ?? '', password ?? '');
      const again = (problem: string) => logInPage(logIn, next, { problem, name: name ?? '' });
      if ('wrong' in checked) return html(reply.code(401)).send(again(WRONG));
      if ('tooMany' in checked)
        return html(refuseForNow(reply, checked.retryInS)).send(again(tooManyTries(checked.retryInS)));
      const { operator } = checked;
      logger.info({ user: operator.name, role: operator.role, address: addressOf(request.ip) }, 'logged in');
      for (const [{ cookie: of, kind }, lifetimeMs] of [
        [SESSION, SESSION_MS],
        [KNOWN, KNOWN_MS],
      ] as const) {
        const sealed = await seals.seal(kind, operator.name, lifetimeMs);
        reply.setCookie(of, sealed, { ...cookieOptions(request), maxAge: lifetimeMs / 1_000 });
      }
      return reply.redirect(next, 303);
    });

    app.get('/logout', { onRequest: requires('viewer') }, async (request, reply) =>
      html(reply).send(logOutPage(`${basePath}/logout`, `${basePath}/board`, request.operator as Operator)),
    );

    app.post('/logout', async (request, reply) => {
      const user = (await bySession(request))?.name;
      if (user !== undefined) logger.info({ user, address: addressOf(request.ip) }, 'logged out');
      return reply.clearCookie(SESSION.cookie, cookieOptions(request)).redirect(logIn, 303);
    });
  }

  const cookieOptions = (request: FastifyRequest) => ({
    path: `${basePath}/`,
    httpOnly: true,
    sameSite: 'strict' as const,
    secure: request.protocol === 'https',
  });

  return {
    requires,

    /** Adds the log-in to `app`. Routes that are added afterwards are protected from other sites. */
    async register(app: FastifyInstance): Promise<void> {
      await app.register(cookie);
      await app.register(formBody, { bodyLimit: MAX_FORM_BYTES });
      app.decorateRequest('operator', null);
      app.addHook('onRequest', refuseOtherSites);
      addLogIn(app);
    },
  };
}

const WRONG = 'Wrong name or password.';
const tooManyTries = (retryInS: number) => `Too many tries. Wait ${counted(retryInS, 'second')}.`;
/** Headers that proxies add. */
const OF_A_PROXY =
  /^(via|forwarded|x-(forwarded|real|client|original|cluster)\b.*|.*connecting-ip|true-client-ip)$/;
const LOOPBACK_NAME = /^(localhost|127(\.\d{1,3}){3}|\[::1\])$/i;

const wantsPage = (request: FastifyRequest): boolean =>
  isRead(request) && /\btext\/html\b/.test(request.headers.accept ?? '');

const hostOf = (origin: string): string | null => {
  try {
    return new URL(origin).host;
  } catch {
    return null;
  }
};

const pathOf = (request: FastifyRequest): string => request.routeOptions.url ?? 'unknown';

/** Remembers which credentials were right lately, as keyed hashes. The key is lost with the process. */
function createCredentialCache() {
  const key = randomBytes(32);
  const names = new Map<string, { name: string; until: number }>();
  const digest = (text: string) => createHmac('sha256', key).update(text).digest('base64');
  const add = (of: string, name: string) => {
    if (names.size >= REMEMBERED_MAX) names.clear();
    names.set(of, { name, until: Date.now() + REMEMBERED_MS });
  };
  return {
    digest,
    nameOf(credentials: string): string | undefined {
      const of = digest(credentials);
      const found = names.get(of);
      if (found === undefined || Date.now() >= found.until) return undefined;
      add(of, found.name);
      return found.name;
    },
    add: (credentials: string, name: string) => add(digest(credentials), name),
  };
}
