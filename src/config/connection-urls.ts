/**
 * Connection URLs in general, and that of the database: read leniently as the Python clients of the platform read them
 * (SQLAlchemy, asyncpg; for Redis see redis-urls.ts), written back in the one form that node-postgres understands.
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
type PgOptions = Readonly<{
  host?: string;
  port?: number;
  user?: string;
  password?: string;
  database?: string;
  ssl: false | ConnectionOptions;
  /**
   * `ssl` is false, yet TLS is wanted if the server offers it (libpq's and asyncpg's default). node-postgres cannot
   * ask by itself: `createPool` in `connections/pool.ts` does.
   */
  preferTls: boolean;
  sslnegotiation?: 'direct';
  enableChannelBinding?: true;
  application_name?: string;
  options?: string;
  connectionTimeoutMillis?: number;
}>;

export type UrlParts = {
  scheme: string;
  user: string;
  password: string;
  /** Without the brackets of an IPv6 address; '' if the URL names none. */
  host: string;
  port: number | undefined;
  /** Hosts after the first, separated by commas: several nodes of one service. */
  others: readonly { host: string; port: number | undefined }[];
  /** Decoded, without the leading slash. */
  path: string;
  query: URLSearchParams;
};

/**
 * Splits `scheme://user:password@host:port/path?query`. Not `new URL()`: it knows no empty host
 * (`postgresql://user@/db?host=/run/postgresql`), and it takes `/` and `#` in a password, which SQLAlchemy allows, for
 * the end of the host.
 */
export function splitUrl(text: string): UrlParts {
  const schemeEnd = text.indexOf('://');
  if (schemeEnd < 1) throw new UrlError('it has no scheme (something before "://")');
  const scheme = text.slice(0, schemeEnd).toLowerCase();
  const rest = text.slice(schemeEnd + 3);

  const at = endOfUserInfo(rest);
  const [user = '', password = ''] = at < 0 ? [] : splitOnce(rest.slice(0, at), ':').map(percentDecode);
  const [address, queryText] = splitOnce(rest.slice(at + 1), '?');
  const [hostAndPort, path] = splitOnce(address, '/');

  const [first = hostOf(''), ...others] = hostAndPort.split(',').map(hostOf);
  const query = new URLSearchParams(queryText);
  return { scheme, user, password, ...first, others, path: percentDecode(path), query };
}

/** `host`, `host:port`, `[ipv6]:port`; also nothing, or the port alone. */
export function hostOf(text: string): { host: string; port: number | undefined } {
  const match = /^(?:\[(?<ipv6>[^\]]*)\]|(?<name>[^:[\]]*))(?::(?<port>\d*))?$/.exec(text);
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
    host: checkedHost(ipv6 ?? percentDecode(name ?? '')),
    port: port ? portNumber(port) : undefined,
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
export function queryParameters(
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
  ...['sslmode', 'ssl', 'sslrootcert', 'sslcert', 'sslkey', 'sslpassword'],
  ...['sslnegotiation', 'channel_binding'],
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
  if (parts.others.length > 0) throw new UrlError('it names more than one host');
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
  const names = { ca: 'sslrootcert', cert: 'sslcert', key: 'sslkey', passphrase: 'sslpassword' };
  const files = tlsFiles(parameters, names);

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
export function tlsFiles(
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
  if (ca === undefined && cert === undefined) return {};
  const passphrase = names.passphrase === undefined ? undefined : parameters.get(names.passphrase);
  return checkedTls({
    ...(ca !== undefined && { ca }),
    ...(cert !== undefined && { cert }),
    ...(key !== undefined && { key }),
    ...(passphrase !== undefined && { passphrase }),
  });
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
