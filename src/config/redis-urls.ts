/**
 * Where Redis is: one server, the nodes of a cluster, or sentinels that name the master. Read leniently as redis-py
 * reads its URLs, written back in the one form that ioredis' options are made from.
 *
 * A URL is a secret as a whole. No error made here holds any part of one.
 */
import { isIPv6 } from 'node:net';
import type { ConnectionOptions } from 'node:tls';
import { hostOf, queryParameters, splitUrl, tlsFiles, UrlError, type UrlParts } from './connection-urls.ts';

/** Options for `new Redis(...)` of ioredis and for the `connection` of BullMQ. */
export type RedisOptions = Readonly<{
  host: string;
  port: number;
  username?: string;
  password?: string;
  db: number;
  family?: 0 | 4 | 6;
  tls?: ConnectionOptions;
}>;

/** `family` is ioredis's; the others are redis-py's. */
const REDIS_PARAMETERS = [
  ...['db', 'username', 'password', 'family'],
  ...['ssl_cert_reqs', 'ssl_check_hostname', 'ssl_ca_certs', 'ssl_certfile', 'ssl_keyfile'],
] as const;

/** Known to redis-py, and about its own behaviour: dropped. */
const REDIS_IGNORED = [
  ...['decode_responses', 'encoding', 'health_check_interval', 'max_connections', 'protocol', 'client_name'],
  ...['retry_on_timeout', 'socket_connect_timeout', 'socket_keepalive', 'socket_timeout', 'timeout'],
] as const;

/**
 * Any accepted Redis URL in the form `redis://user:password@host:port/database?...`.
 *
 * @throws {UrlError} also for a TLS file that cannot be read.
 */
export function normaliseRedisUrl(text: string): string {
  const { parts, parameters } = splitRedisUrl(text);
  const { username, password, db } = redisOptions(text);
  const query = new URLSearchParams();
  for (const [name, value] of parameters) {
    if (!['db', 'username', 'password'].includes(name)) query.set(name, value);
  }
  const user = username === undefined ? '' : encodeURIComponent(username);
  const userInfo = password === undefined ? '' : `${user}:${encodeURIComponent(password)}@`;
  const queryText = query.size === 0 ? '' : `?${query}`;
  return `${parts.scheme}://${userInfo}${nodesOf(parts, REDIS_PORT).map(addressOf).join(',')}/${db}${queryText}`;
}

/** Of a server, or of a node of a cluster. */
export type RedisNode = Readonly<{ host: string; port: number }>;

const REDIS_PORT = 6379;
const SENTINEL_PORT = 26379;

/** Every host that a Redis URL names: one server, or several nodes of a cluster. */
export const redisNodes = (redisUrl: string): RedisNode[] =>
  nodesOf(splitRedisUrl(redisUrl).parts, REDIS_PORT);

/**
 * Nodes as `host:port,host:port`.
 *
 * @throws {UrlError}
 */
export function nodeList(text: string): RedisNode[] {
  const [first = hostOf(''), ...others] = text.split(',').map((it) => hostOf(it.trim()));
  return nodesOf({ ...first, others }, REDIS_PORT);
}

function nodesOf({ host, port, others }: Pick<UrlParts, 'host' | 'port' | 'others'>, defaultPort: number) {
  return [{ host, port }, ...others].map((node): RedisNode => {
    if (node.host === '') throw new UrlError('it has no host');
    return { host: node.host, port: node.port ?? defaultPort };
  });
}

const addressOf = ({ host, port }: RedisNode): string => `${isIPv6(host) ? `[${host}]` : host}:${port}`;

/** What ioredis needs to ask sentinels where the master is. */
type SentinelOptions = Readonly<{
  sentinels: RedisNode[];
  sentinelUsername?: string;
  sentinelPassword?: string;
  sentinelTLS?: ConnectionOptions;
}>;

/**
 * Any accepted list of sentinels in the form `redis+sentinel://user:password@host:port,host:port`: that, or hosts and
 * ports alone. User and password are those of the sentinels.
 *
 * @throws {UrlError} also for a TLS file that cannot be read.
 */
export function normaliseSentinels(text: string): string {
  const url = text.includes('://') ? text : `redis+sentinel://${text.replaceAll(/,\s+/g, ',')}`;
  sentinelOptions(url);
  return url;
}

/** @throws {UrlError} also for a TLS file that cannot be read. */
export function sentinelOptions(url: string): SentinelOptions {
  const parts = splitUrl(url);
  if (!/^rediss?\+sentinel$/.test(parts.scheme))
    throw new UrlError('its scheme is neither redis+sentinel nor rediss+sentinel');
  if (parts.path !== '')
    throw new UrlError('it has a path: the name of the master goes into RELAY_REDIS_SENTINEL_NAME');
  const known = REDIS_PARAMETERS.filter((name) => name.startsWith('ssl_'));
  const { tls } = redisTls(parts.scheme.startsWith('rediss'), queryParameters(parts.query, known, []));
  return {
    sentinels: nodesOf(parts, SENTINEL_PORT),
    ...(parts.user !== '' && { sentinelUsername: parts.user }),
    ...(parts.password !== '' && { sentinelPassword: parts.password }),
    ...(tls && { sentinelTLS: tls }),
  };
}

function splitRedisUrl(text: string): { parts: UrlParts; parameters: Map<string, string> } {
  const parts = splitUrl(text);
  if (parts.scheme !== 'redis' && parts.scheme !== 'rediss') {
    throw new UrlError('its scheme is neither redis nor rediss');
  }
  return { parts, parameters: queryParameters(parts.query, REDIS_PARAMETERS, REDIS_IGNORED) };
}

/**
 * What ioredis needs to connect to `redisUrl`, the first node of several.
 *
 * @throws {UrlError} also for a TLS file that cannot be read.
 */
export function redisOptions(redisUrl: string): RedisOptions {
  const { parts, parameters } = splitRedisUrl(redisUrl);
  if (parts.host === '') throw new UrlError('it has no host');
  if (parts.host.startsWith('/')) throw new UrlError('unix sockets are not supported');
  const dbText = parameters.get('db') ?? (parts.path.replace(/\/$/, '') || '0');
  const db = Number(dbText);
  if (!/^\d{1,9}$/.test(dbText))
    throw new UrlError('its database (the part after the host) is not a whole number');
  const family = parameters.get('family');
  if (family !== undefined && !/^[046]$/.test(family)) {
    throw new UrlError('its query parameter family is not 0, 4 or 6');
  }
  const username = parameters.get('username') ?? parts.user;
  const password = parameters.get('password') ?? parts.password;
  if (username !== '' && password === '') throw new UrlError('it has a user name but no password');
  return {
    host: parts.host,
    port: parts.port ?? REDIS_PORT,
    ...(username !== '' && { username }),
    ...(password !== '' && { password }),
    db,
    ...(family !== undefined && { family: Number(family) as 0 | 4 | 6 }),
    ...redisTls(parts.scheme === 'rediss', parameters),
  };
}

function redisTls(isTls: boolean, parameters: ReadonlyMap<string, string>): Pick<RedisOptions, 'tls'> {
  const isAsked = [...parameters.keys()].some((name) => name.startsWith('ssl_'));
  if (!isTls) {
    if (isAsked) throw new UrlError('its TLS parameters (ssl_...) need the scheme rediss');
    return {};
  }
  const requirement = (parameters.get('ssl_cert_reqs') ?? 'required').toLowerCase();
  if (!['required', 'optional', 'none'].includes(requirement)) {
    throw new UrlError('its query parameter ssl_cert_reqs is not required, optional or none');
  }
  const checksHost = (parameters.get('ssl_check_hostname') ?? 'true').toLowerCase();
  if (!['true', 'false'].includes(checksHost)) {
    throw new UrlError('its query parameter ssl_check_hostname is neither true nor false');
  }
  const files = tlsFiles(parameters, { ca: 'ssl_ca_certs', cert: 'ssl_certfile', key: 'ssl_keyfile' });
  return {
    tls: {
      ...files,
      ...(requirement !== 'required' && { rejectUnauthorized: false }),
      ...(checksHost === 'false' && { checkServerIdentity: () => undefined }),
    },
  };
}
