/**
 * The two connection URLs: read leniently as the Python clients of the platform read them (SQLAlchemy, asyncpg,
 * redis-py), written back in the one form that node-postgres and ioredis understand.
 *
 * A URL is a secret as a whole. No error made here holds any part of one.
 */
import { readFileSync } from 'node:fs';
import { isIPv6 } from 'node:net';
import { type ConnectionOptions, createSecureContext } from 'node:tls';

/** What is wrong with a URL, in words that are safe to log. */
export class UrlError extends Error {
  override readonly name = 'UrlError';
}

/** Options of node-postgres for a client or a pool, apart from `preferTls`. */
export type PgOptions = Readonly<{
  host?: string;
  port?: number;
  user?: string;
  password?: string;
  database?: string;
  ssl: false | ConnectionOptions;
  /**
   * `ssl` is false, yet TLS is wanted if the server offers it (libpq's and asyncpg's default). node-postgres cannot
   * ask by itself: `createPool` in `outbox/pool.ts` does.
   */
  preferTls: boolean;
  sslnegotiation?: 'direct';
  enableChannelBinding?: true;
  application_name?: string;
  options?: string;
  connectionTimeoutMillis?: number;
}>;

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

type UrlParts = {
  scheme: string;
  user: string;
  password: string;
  /** Without the brackets of an IPv6 address; '' if the URL names none. */
  host: string;
  port: number | undefined;
  /** Decoded, without the leading slash. */
  path: string;
  query: URLSearchParams;
};

/**
 * Splits `scheme://user:password@host:port/path?query`. Not `new URL()`: it knows no empty host
 * (`postgresql://user@/db?host=/run/postgresql`), and it takes `/` and `#` in a password, which SQLAlchemy allows, for
 * the end of the host.
 */
function splitUrl(text: string): UrlParts {
  const schemeEnd = text.indexOf('://');
  if (schemeEnd < 1) throw new UrlError('it has no scheme (something before "://")');
  const scheme = text.slice(0, schemeEnd).toLowerCase();
  const rest = text.slice(schemeEnd + 3);

  const at = endOfUserInfo(rest);
  const [user = '', password = ''] = at < 0 ? [] : splitOnce(rest.slice(0, at), ':').map(percentDecode);
  const [address, queryText] = splitOnce(rest.slice(at + 1), '?');
  const [hostAndPort, path] = splitOnce(address, '/');

  const match = /^(?:\[(?<ipv6>[^\]]*)\]|(?<name>[^:[\]]*))(?::(?<port>\d*))?$/.exec(hostAndPort);
  if (match?.groups === undefined) {
    throw new UrlError(
      'its host and port cannot be read (in user name and password, percent-encode @ : / ? # and %; put an IPv6 address in [ ])',
    );
  }
  const { ipv6, name, port } = match.groups;
  if (ipv6 !== undefined && !isIPv6(ipv6.replace(/%.*$/, ''))) {
    throw new UrlError('what stands in [ ] is not an IPv6 address');
  }
  return {
    scheme,
    user,
    password,
    host: checkedHost(ipv6 ?? percentDecode(name ?? '')),
    port: port ? portNumber(port) : undefined,
    path: percentDecode(path),
    query: new URLSearchParams(queryText),
  };
}

/** Where the `@` after the user info stands, or -1. */
function endOfUserInfo(rest: string): number {
  const authorityEnd = rest.search(/[/?]/);
  const at = (authorityEnd < 0 ? rest : rest.slice(0, authorityEnd)).lastIndexOf('@');
  // `user:pa/ss@host`: the slash belongs to the password, as SQLAlchemy reads it.
  return at < 0 && /^[^/?:@]*:[^?@]*@/.test(rest) ? rest.indexOf('@') : at;
}

/** `['a', 'b']` of `a<separator>b`; the second part is '' where there is no separator. */
function splitOnce(text: string, separator: string): [string, string] {
  const at = text.indexOf(separator);
  return at < 0 ? [text, ''] : [text.slice(0, at), text.slice(at + separator.length)];
}

function percentDecode(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    throw new UrlError(
      'it holds a % that is not part of a percent-encoded character (write %25 for a plain %)',
    );
  }
}

function portNumber(text: string): number {
  const port = Number(text);
  if (!Number.isInteger(port) || port < 1 || port > 65535)
    throw new UrlError('its port is not from 1 to 65535');
  return port;
}

function checkedHost(host: string): string {
  if (host.includes(',')) throw new UrlError('it names more than one host');
  // biome-ignore lint/suspicious/noControlCharactersInRegex: control characters are what is looked for
  if (/[\s\u0000-\u001f\u007f]/.test(host)) throw new UrlError('its host holds white space');
  return host;
}

/** The query parameters in `known`. Refuses one that is in neither list, and one that is given twice. */
function queryParameters(
  query: URLSearchParams,
  known: readonly string[],
  ignored: readonly string[],
): Map<string, string> {
  const parameters = new Map<string, string>();
  for (const [name, value] of query) {
    if (ignored.includes(name)) continue;
    if (!known.includes(name))
      throw new UrlError(`it has an unknown query parameter (known: ${known.join(', ')})`);
    if (parameters.has(name)) throw new UrlError(`its query parameter ${name} is given twice`);
    parameters.set(name, value);
  }
  return parameters;
}

function milliseconds(name: string, seconds: string): number {
  const value = Number(seconds);
  if (seconds.trim() === '' || !(value >= 0 && value <= 86_400)) {
    throw new UrlError(`its query parameter ${name} is not a number of seconds from 0 to 86400`);
  }
  return Math.round(value * 1000);
}

/** Reads the file that query parameter `name` points to. */
function fileOf(name: string, path: string): string {
  try {
    return readFileSync(path, 'utf8');
  } catch (error) {
    const code = error instanceof Error && 'code' in error ? String(error.code) : 'unknown reason';
    throw new UrlError(`the file that its query parameter ${name} points to cannot be read (${code})`);
  }
}

/** Fails now, with a clear text, rather than at the first connection. */
function checkedTls(tls: ConnectionOptions): ConnectionOptions {
  try {
    createSecureContext(tls);
  } catch {
    throw new UrlError(
      'its TLS files are not a valid certificate, key and authority in PEM form, or do not match',
    );
  }
  return tls;
}

// ---------------------------------------------------------------------------------------------- PostgreSQL

const POSTGRES_SCHEME = /^postgres(?:ql)?(?:\+[a-z0-9_]+)?$/;

const SSL_MODES = ['disable', 'allow', 'prefer', 'require', 'verify-ca', 'verify-full'] as const;
type SslMode = (typeof SSL_MODES)[number];

/**
 * Values of `ssl=` beside the names of sslmode. `true` is what asyncpg and node-postgres mean by it: verify everything.
 */
const SSL_ALIASES: ReadonlyMap<string, SslMode> = new Map([
  ['true', 'verify-full'],
  ['1', 'verify-full'],
  ['false', 'disable'],
  ['0', 'disable'],
  ['no-verify', 'require'],
]);

const POSTGRES_PARAMETERS = [
  ...['host', 'port', 'user', 'password', 'dbname'],
  ...[
    'sslmode',
    'ssl',
    'sslrootcert',
    'sslcert',
    'sslkey',
    'sslpassword',
    'sslnegotiation',
    'channel_binding',
  ],
  ...['application_name', 'options', 'connect_timeout', 'timeout'],
] as const;

/** Known to libpq, asyncpg or SQLAlchemy, and without a meaning for node-postgres or for one host: dropped. */
const POSTGRES_IGNORED = [
  ...['fallback_application_name', 'client_encoding', 'gssencmode', 'target_session_attrs', 'uselibpqcompat'],
  ...['keepalives', 'keepalives_idle', 'keepalives_interval', 'keepalives_count', 'tcp_user_timeout'],
  ...['command_timeout', 'statement_cache_size', 'prepared_statement_cache_size', 'async_fallback'],
  ...['prepared_statement_name_func', 'max_cached_statement_lifetime', 'max_cacheable_statement_size'],
] as const;

/**
 * Any accepted database URL in the form `postgresql://user:password@host:port/database?...`.
 *
 * @throws {UrlError} also for a TLS file that cannot be read.
 */
export function normaliseDatabaseUrl(text: string): string {
  const { parts, parameters } = splitDatabaseUrl(text);
  pgOptions(text);
  const query = new URLSearchParams();
  for (const [name, value] of parameters) query.set(name, value);
  const user = parts.user === '' ? '' : encodeURIComponent(parts.user);
  const password = parts.password === '' ? '' : `:${encodeURIComponent(parts.password)}`;
  const at = user === '' && password === '' ? '' : '@';
  const host = isIPv6(parts.host.replace(/%.*$/, '')) ? `[${parts.host}]` : encodeURIComponent(parts.host);
  const port = parts.port === undefined ? '' : `:${parts.port}`;
  const queryText = query.size === 0 ? '' : `?${query}`;
  return `postgresql://${user}${password}${at}${host}${port}/${encodeURIComponent(parts.path)}${queryText}`;
}

function splitDatabaseUrl(text: string): { parts: UrlParts; parameters: Map<string, string> } {
  const parts = splitUrl(text);
  if (!POSTGRES_SCHEME.test(parts.scheme)) {
    throw new UrlError('its scheme is not postgresql, postgres or postgresql+driver');
  }
  return { parts, parameters: queryParameters(parts.query, POSTGRES_PARAMETERS, POSTGRES_IGNORED) };
}

/**
 * What node-postgres needs to connect to `databaseUrl`, with the meaning that libpq gives to the TLS parameters. A
 * part that the URL leaves out is left to node-postgres (PGHOST, PGUSER, ... or its defaults).
 *
 * @throws {UrlError} also for a TLS file that cannot be read.
 */
export function pgOptions(databaseUrl: string): PgOptions {
  const { parts, parameters } = splitDatabaseUrl(databaseUrl);
  const host = checkedHost(parameters.get('host') ?? parts.host);
  const portText = parameters.get('port');
  const port = portText === undefined ? parts.port : portNumber(portText);
  const user = parameters.get('user') ?? parts.user;
  const password = parameters.get('password') ?? parts.password;
  const database = parameters.get('dbname') ?? parts.path;
  const timeout = parameters.has('connect_timeout') ? 'connect_timeout' : 'timeout';
  const timeoutSeconds = parameters.get(timeout);
  const applicationName = parameters.get('application_name');
  const options = parameters.get('options');
  return {
    ...(host !== '' && { host }),
    ...(port !== undefined && { port }),
    ...(user !== '' && { user }),
    ...(password !== '' && { password }),
    ...(database !== '' && { database }),
    ...(applicationName !== undefined && { application_name: applicationName }),
    ...(options !== undefined && { options }),
    ...(timeoutSeconds !== undefined && { connectionTimeoutMillis: milliseconds(timeout, timeoutSeconds) }),
    ...(parameters.get('channel_binding') === 'require' && { enableChannelBinding: true as const }),
    ...postgresTls(parameters, host.startsWith('/')),
  };
}

function postgresTls(
  parameters: ReadonlyMap<string, string>,
  isUnixSocket: boolean,
): Pick<PgOptions, 'ssl' | 'preferTls' | 'sslnegotiation'> {
  const mode = sslModeOf(parameters);
  const negotiation = parameters.get('sslnegotiation') ?? 'postgres';
  if (!['postgres', 'direct'].includes(negotiation)) {
    throw new UrlError('its query parameter sslnegotiation is neither postgres nor direct');
  }
  const isVerified = mode === 'require' || mode === 'verify-ca' || mode === 'verify-full';
  if (negotiation === 'direct' && !isVerified) {
    throw new UrlError('sslnegotiation=direct needs sslmode=require or stricter');
  }
  const files = tlsFiles(parameters, {
    ca: 'sslrootcert',
    cert: 'sslcert',
    key: 'sslkey',
    passphrase: 'sslpassword',
  });

  // libpq never speaks TLS on a unix socket, whatever sslmode says.
  if (mode === 'disable' || isUnixSocket) return { ssl: false, preferTls: false };
  // `allow` asks libpq to try without TLS first. Taking TLS where it is offered reaches every server that `allow` does.
  if (mode === 'allow' || mode === 'prefer') return { ssl: false, preferTls: true };
  if (mode === 'verify-ca' && files.ca === undefined)
    throw new UrlError('sslmode=verify-ca needs sslrootcert');

  const direct = negotiation === 'direct' ? { sslnegotiation: 'direct' as const } : {};
  const usesSystemRoots = parameters.get('sslrootcert') === 'system';
  if (mode === 'verify-full' || usesSystemRoots) return { ssl: files, preferTls: false, ...direct };
  // libpq: `require` verifies nothing, unless a root certificate is given: then it is the same as verify-ca.
  const ssl =
    files.ca === undefined ? { rejectUnauthorized: false } : { checkServerIdentity: () => undefined };
  return { ssl: { ...files, ...ssl }, preferTls: false, ...direct };
}

function sslModeOf(parameters: ReadonlyMap<string, string>): SslMode {
  const [sslmode, ssl] = [parameters.get('sslmode'), parameters.get('ssl')];
  if (sslmode !== undefined && ssl !== undefined) throw new UrlError('it has both sslmode and ssl: give one');
  const text = (sslmode ?? ssl ?? 'prefer').toLowerCase();
  const mode = SSL_MODES.find((name) => name === text) ?? SSL_ALIASES.get(text);
  if (mode === undefined) {
    const parameter = sslmode === undefined ? 'ssl' : 'sslmode';
    throw new UrlError(`its query parameter ${parameter} is not one of ${SSL_MODES.join(', ')}`);
  }
  return mode;
}

/** Reads the files that the query parameters in `names` point to. `system` as authority means Node's own list. */
function tlsFiles(
  parameters: ReadonlyMap<string, string>,
  names: { ca: string; cert: string; key: string; passphrase?: string },
): ConnectionOptions {
  const read = (name: string): string | undefined => {
    const path = parameters.get(name);
    return path === undefined || path === 'system' ? undefined : fileOf(name, path);
  };
  const [ca, cert, key] = [read(names.ca), read(names.cert), read(names.key)];
  if ((cert === undefined) !== (key === undefined))
    throw new UrlError(`${names.cert} and ${names.key} go together`);
  const passphrase = names.passphrase === undefined ? undefined : parameters.get(names.passphrase);
  return checkedTls({
    ...(ca !== undefined && { ca }),
    ...(cert !== undefined && { cert }),
    ...(key !== undefined && { key }),
    ...(passphrase !== undefined && { passphrase }),
  });
}

// --------------------------------------------------------------------------------------------------- Redis

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
  const { host, port, username, password, db } = redisOptions(text);
  const query = new URLSearchParams();
  for (const [name, value] of parameters) {
    if (!['db', 'username', 'password'].includes(name)) query.set(name, value);
  }
  const user = username === undefined ? '' : encodeURIComponent(username);
  const userInfo = password === undefined ? '' : `${user}:${encodeURIComponent(password)}@`;
  const queryText = query.size === 0 ? '' : `?${query}`;
  return `${parts.scheme}://${userInfo}${isIPv6(host) ? `[${host}]` : host}:${port}/${db}${queryText}`;
}

function splitRedisUrl(text: string): { parts: UrlParts; parameters: Map<string, string> } {
  const parts = splitUrl(text);
  if (parts.scheme !== 'redis' && parts.scheme !== 'rediss') {
    throw new UrlError('its scheme is neither redis nor rediss');
  }
  return { parts, parameters: queryParameters(parts.query, REDIS_PARAMETERS, REDIS_IGNORED) };
}

/**
 * What ioredis needs to connect to `redisUrl`.
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
    port: parts.port ?? 6379,
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

// ------------------------------------------------------------------------------------------------ redaction

const SECRET_PARAMETER = /([?&\s](?:password|sslpassword|passwd|pwd|user|username)=)[^&\s'"]*/gi;

/** `text` with the user info and the secret query parameters of every URL in it replaced by `***`. */
export function redactUrls(text: string): string {
  // Greedy up to the last @ before white space or a quote: a password that holds a raw @ or / is hidden as well.
  // Not file://, which stack traces hold (`node_modules/@scope`).
  return text
    .replace(/\b(?!file:)([a-z][a-z0-9+.-]*:\/\/)[^\s'"<>]*@/gi, '$1***@')
    .replace(SECRET_PARAMETER, '$1***');
}

/** One URL for a log line: `postgresql://***@db:5432/app?sslmode=require`. Text that is not a URL becomes `***`. */
export function redactUrl(url: string): string {
  return /^[a-z][a-z0-9+.-]*:\/\//i.test(url) ? redactUrls(url.replaceAll(/\s/g, '')) : '***';
}
