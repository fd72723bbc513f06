import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, test } from 'vitest';
import { describeVariables, settings } from '../../src/commands/variables.ts';
import { VARIABLES } from '../../src/config/config.ts';
import type { ConfigProblem } from '../../src/config/conflicts.ts';
import { pgOptions, redactUrls } from '../../src/config/connection-urls.ts';
import { ConfigError, loadConfig } from '../../src/config/load-config.ts';
import { redisOptions } from '../../src/config/redis-urls.ts';
import { unknownVariables } from '../../src/config/unknown-variables.ts';
import { CERTIFICATE } from '../support/certificate.ts';

const problemsOf = (env: Record<string, string>): readonly ConfigProblem[] => {
  try {
    loadConfig(env);
  } catch (error) {
    if (error instanceof ConfigError) return error.problems;
    throw error;
  }
  return [];
};

const folder = mkdtempSync(join(tmpdir(), 'relay-config-'));
afterAll(() => rmSync(folder, { recursive: true }));

const certificateFile = join(folder, 'ca.pem');
writeFileSync(certificateFile, CERTIFICATE);

describe('defaults', () => {
  test('an empty environment gives the documented configuration', () => {
    expect(loadConfig({})).toEqual({
      databaseUrl: 'postgresql://postgres:postgres@localhost:5432/markdown_manager',
      databasePoolSize: 10,
      redisUrl: 'redis://localhost:6379/0',
      redisCluster: false,
      redisSentinels: 'none',
      redisSentinelName: 'mymaster',
      streamRedisUrl: 'same',
      batchSize: 100,
      maxBatchSize: 400,
      pollIntervalMs: 5_000,
      maxRetryAttempts: 5,
      retryBaseDelayMs: 60_000,
      maxCrashes: 3,
      streamName: 'identity.user.v1',
      allowedTopics: '*',
      maxEventBytes: 1_048_576,
      dlqStreamName: 'identity.user.v1.dlq',
      streamMaxLen: 100_000,
      streamTrim: 'maxlen',
      dlqMaxLen: 10_000,
      shutdownTimeoutMs: 25_000,
      publishTimeoutMs: 10_000,
      claimLeaseMs: 60_000,
      resyncWindowMs: 3_600_000,
      publishedRetentionMs: 0,
      concurrency: expect.any(Number),
      maxInFlight: 2_000,
      ordering: 'aggregate',
      deadLetterPolicy: 'continue',
      validation: 'warn',
      notify: true,
      metricsPrefix: false,
      queuePrefix: 'bull',
      queueName: 'relay',
      httpHost: '0.0.0.0',
      httpPort: 8_004,
      board: false,
      boardUsers: [],
      boardBasePath: '',
      trustedProxies: [],
      logLevel: 'info',
      failedJobsKept: 10_000,
      startupTimeoutMs: 30_000,
    });
  });

  test('the configuration cannot be changed', () => {
    const config = loadConfig({});
    expect(Object.isFrozen(config)).toBe(true);
    const parts = Object.values(config).filter((value) => typeof value === 'object');
    expect(parts.every((part) => Object.isFrozen(part))).toBe(true);
  });

  test('other variables of the environment do not matter', () => {
    expect(loadConfig({ PATH: '/bin', BATCH_SIZE: 'many', RELAY_UNHEARD_OF: '1' })).toEqual(loadConfig({}));
  });

  test('each variable is described, and its default is what an unset variable means', () => {
    const config = loadConfig({}) as unknown as Record<string, unknown>;
    expect(VARIABLES.map(({ property }) => property).sort()).toEqual(Object.keys(config).sort());
    expect(new Set(VARIABLES.map(({ name }) => name)).size).toBe(VARIABLES.length);
    for (const { name, property, default: text, description } of VARIABLES) {
      expect(description.length, name).toBeGreaterThan(10);
      const given = loadConfig({ [name]: text }) as unknown as Record<string, unknown>;
      expect(given[property], name).toEqual(config[property]);
    }
  });

  test('the log shows every value but the secrets: URLs, and who may log in', () => {
    const config = loadConfig({});
    const secrets = ['databaseUrl', 'redisUrl', 'redisSentinels', 'streamRedisUrl', 'boardUsers'];
    const shown = Object.entries(config).filter(([property]) => !secrets.includes(property));
    expect(settings(config)).toEqual(Object.fromEntries(shown));
  });

  test('the help text holds every name and default', () => {
    const help = describeVariables(80);
    for (const { name, default: text } of VARIABLES)
      expect(help).toMatch(new RegExp(`${name}\\s+\\(${escaped(text)}`));
    expect(Math.max(...help.split('\n').map((line) => line.length))).toBeLessThanOrEqual(80);
  });
});

const escaped = (text: string) => text.replaceAll(/[.*+?^${}()|[\]\\]/g, '\\$&');

/** As `relay hash-password` prints it. */
const HASH = `scrypt.15.8.1.${'a'.repeat(22)}.${'b'.repeat(43)}`;

describe('good values', () => {
  const cases: [string, string, string, unknown][] = [
    ['RELAY_BATCH_SIZE', ' 7\n', 'batchSize', 7],
    ['RELAY_POLL_INTERVAL', '0.2', 'pollIntervalMs', 200],
    ['RELAY_POLL_INTERVAL', '.25', 'pollIntervalMs', 250],
    ['RELAY_RETRY_BASE_DELAY', '1.0015', 'retryBaseDelayMs', 1_002],
    ['RELAY_MAX_RETRY_ATTEMPTS', '0', 'maxRetryAttempts', 0],
    ['RELAY_STREAM_MAXLEN', '0', 'streamMaxLen', 0],
    ['RELAY_ORDERING', 'NONE', 'ordering', 'none'],
    ['RELAY_DEAD_LETTER_POLICY', 'Hold', 'deadLetterPolicy', 'hold'],
    ['RELAY_VALIDATION', 'Strict', 'validation', 'strict'],
    ['RELAY_STREAM_TRIM', 'Acknowledged', 'streamTrim', 'acknowledged'],
    ['RELAY_PUBLISHED_RETENTION', '604800', 'publishedRetentionMs', 604_800_000],
    ['RELAY_LOG_LEVEL', 'INFO', 'logLevel', 'info'],
    ['RELAY_LOG_LEVEL', 'WARNING', 'logLevel', 'warn'],
    ['RELAY_LOG_LEVEL', 'Critical', 'logLevel', 'fatal'],
    ['RELAY_LOG_LEVEL', 'NOTSET', 'logLevel', 'trace'],
    ['RELAY_QUEUE_PREFIX', '{identity.user.v1}', 'queuePrefix', '{identity.user.v1}'],
    [
      'RELAY_ALLOWED_TOPICS',
      'dictionary.* , identity.user.v?',
      'allowedTopics',
      'dictionary.* , identity.user.v?',
    ],
    ['RELAY_MAX_EVENT_BYTES', '1024', 'maxEventBytes', 1_024],
    ['RELAY_HTTP_HOST', '::1', 'httpHost', '::1'],
    ['RELAY_HTTP_PORT', '0', 'httpPort', 0],
    ['RELAY_BOARD_BASE_PATH', '/ops/relay/', 'boardBasePath', '/ops/relay'],
    [
      'RELAY_TRUSTED_PROXIES',
      'loopback, 10.0.0.0/8,::1',
      'trustedProxies',
      ['loopback', '10.0.0.0/8', '::1'],
    ],
    [
      'RELAY_BOARD_USERS',
      `olga:operator:${HASH}, vera:viewer:${HASH}\n`,
      'boardUsers',
      [
        { name: 'olga', role: 'operator', hash: HASH },
        { name: 'vera', role: 'viewer', hash: HASH },
      ],
    ],
    ...['true', '1', 'YES', 'on'].map((text): [string, string, string, unknown] => [
      'RELAY_NOTIFY',
      text,
      'notify',
      true,
    ]),
    ...['False', '0', 'no', 'OFF'].map((text): [string, string, string, unknown] => [
      'RELAY_NOTIFY',
      text,
      'notify',
      false,
    ]),
  ];
  test.each(cases)('%s=%j', (name, text, property, value) => {
    expect((loadConfig({ [name]: text }) as unknown as Record<string, unknown>)[property]).toEqual(value);
  });
});

describe('bad values', () => {
  const notWhole = ['many', '1.5', '1e3', '0x10', '1,000', '12 34', '--1', '9'.repeat(40), 'NaN', 'Infinity'];
  const notSeconds = ['soon', '1e3', '1s', '1,5', '.', '5 5', 'NaN', 'Infinity', '-1'];
  const notKey = ['a b', 'a\tb', 'a\u0000b', 'x'.repeat(600)];
  const bad: Record<string, string[]> = {
    RELAY_DATABASE_URL: [
      ...['localhost', 'mysql://localhost/db', 'postgresqlx://localhost/db', 'postgresql:/localhost'],
      ...['postgresql://h:x/db', 'postgresql://h:0/db', 'postgresql://h:65536/db', 'postgresql://u:%zz@h/db'],
      ...[
        'postgresql://a,b/db',
        'postgresql://[nonsense]/db',
        'postgresql://u:p?w@h/db',
        'postgresql://a b/db',
      ],
      ...[
        'postgresql://h/db?sslmode=full',
        'postgresql://h/db?ssl=maybe',
        'postgresql://h/db?sslmod=require',
      ],
      ...['postgresql://h/db?ssl=true&sslmode=require', 'postgresql://h/db?sslmode=verify-ca'],
      ...['postgresql://h/db?host=a&host=b', 'postgresql://h/db?connect_timeout=soon'],
      ...['postgresql://h/db?sslnegotiation=direct', 'postgresql://h/db?sslmode=require&sslcert=/x'],
      `postgresql://h/db?sslmode=verify-full&sslrootcert=${folder}/missing.pem`,
      `postgresql://h/db?sslmode=verify-full&sslrootcert=${folder}`,
    ],
    RELAY_REDIS_CLUSTER: ['maybe:no', 'a:b:c', 'a,,b', 'redis://a'],
    RELAY_REDIS_SENTINELS: [
      'a:b:c',
      'a,,b',
      'redis://a',
      'redis+sentinel://a/name',
      'redis+sentinel://a?ssl_x=1',
    ],
    RELAY_REDIS_SENTINEL_NAME: ['my master', 'x'.repeat(201)],
    RELAY_STREAM_REDIS_URL: ['none', 'http://host', 'redis://host/x', 'redis://'],
    RELAY_REDIS_URL: [
      ...['localhost:6379', 'http://localhost', 'unix:///run/redis.sock', 'redis:///0', 'redis://:@/0'],
      ...[
        'redis://h:x/0',
        'redis://h:99999/0',
        'redis://h/abc',
        'redis://h/-1',
        'redis://h/1.5',
        'redis://h/0/1',
      ],
      ...[
        'redis://h/0?family=5',
        'redis://h/0?tls=true',
        'redis://user@h/0',
        'redis://h/0?ssl_cert_reqs=none',
      ],
      ...['rediss://h/0?ssl_cert_reqs=maybe', 'rediss://h/0?ssl_check_hostname=1', 'redis://h?db=x'],
      `rediss://h/0?ssl_ca_certs=${folder}/missing.pem`,
    ],
    RELAY_DATABASE_POOL_SIZE: [...notWhole, '2', '101'],
    RELAY_BATCH_SIZE: [...notWhole, '0', '-1', '10001'],
    RELAY_MAX_BATCH_SIZE: [...notWhole, '0', '-1', '10001'],
    RELAY_POLL_INTERVAL: [...notSeconds, '0', '0.049', '3600.1'],
    RELAY_MAX_RETRY_ATTEMPTS: [...notWhole, '-1', '21'],
    RELAY_RETRY_BASE_DELAY: [...notSeconds, '0', '86401'],
    RELAY_MAX_CRASHES: [...notWhole, '0', '101'],
    RELAY_STREAM_NAME: [...notKey, 'bull:relay-claim:wait', 'bull:x', 'bull:relay:memory'],
    RELAY_DLQ_STREAM_NAME: [...notKey, 'identity.user.v1', 'bull:relay-', 'bull:dlq'],
    RELAY_ALLOWED_TOPICS: [...notKey, 'a,,b', ',', 'dictionary.*', 'identity.user.v?.dlq', 'x'.repeat(513)],
    RELAY_MAX_EVENT_BYTES: [...notWhole, '0', '1023', '134217729'],
    RELAY_STREAM_MAXLEN: [...notWhole, '-1', '1000000001'],
    RELAY_DLQ_MAXLEN: [...notWhole, '-1', '1000000001'],
    RELAY_SHUTDOWN_TIMEOUT: [...notSeconds, '0', '3601'],
    RELAY_PUBLISH_TIMEOUT: [...notSeconds, '0', '60', '3601'],
    RELAY_CLAIM_LEASE: [...notSeconds, '0', '86401'],
    RELAY_RESYNC_WINDOW: [...notSeconds.filter((value) => value !== '0'), '-1', '2592001'],
    RELAY_CONCURRENCY: [...notWhole, '0', '1001'],
    RELAY_MAX_IN_FLIGHT: [...notWhole, '0', '1000001'],
    RELAY_ORDERING: ['strict', 'true', 'aggregate,none'],
    RELAY_DEAD_LETTER_POLICY: ['stop', '__proto__'],
    RELAY_VALIDATION: ['on', 'constructor'],
    RELAY_STREAM_TRIM: ['minid', 'true'],
    RELAY_PUBLISHED_RETENTION: [...notSeconds.filter((value) => value !== '0'), '-1', '315360001'],
    RELAY_NOTIFY: ['maybe', '2', 'y e s'],
    RELAY_METRICS_PREFIX: ['maybe', 'relay_'],
    RELAY_QUEUE_PREFIX: [...notKey],
    RELAY_QUEUE_NAME: [...notKey, 'a:b'],
    RELAY_HTTP_HOST: ['http://0.0.0.0', 'a b', 'host/path', '[::1]'],
    RELAY_HTTP_PORT: [...notWhole, '-1', '65536', 'tcp://10.0.0.1:8004'],
    RELAY_BOARD: ['maybe'],
    RELAY_BOARD_USERS: [
      ...['olga', 'olga:operator', `olga:admin:${HASH}`, `ol ga:viewer:${HASH}`, `:viewer:${HASH}`],
      ...[`olga:viewer:${HASH}x`, `olga:viewer:${HASH}:x`, 'olga:viewer:secret', `none,olga:viewer:${HASH}`],
      ...[`olga:viewer:${HASH} olga:operator:${HASH}`, `olga:viewer:${HASH.replace('15', '30')}`],
    ],
    RELAY_BOARD_BASE_PATH: ['ops', '//ops', '/ops//relay', '/../x', '/a b', 'https://host/ops', '/%2e'],
    RELAY_TRUSTED_PROXIES: ['true', '10.0.0', '10.0.0.0/33', '10.0.0.0/0', '::/129', 'proxy.test', 'a,,b'],
    RELAY_LOG_LEVEL: ['loud', 'silent', '30'],
    RELAY_FAILED_JOBS_KEPT: [...notWhole, '0', '1000001'],
    RELAY_STARTUP_TIMEOUT: [...notSeconds, '0', '3601'],
  };

  test('every variable has bad values in this table', () => {
    expect(Object.keys(bad).sort()).toEqual(VARIABLES.map(({ name }) => name as string).sort());
  });

  const cases = Object.entries(bad).flatMap(([name, values]) =>
    ['', '  ', ...values].map((value) => [name, value]),
  );
  test.each(cases)('%s=%j is named, with what was expected', (name = '', value = '') => {
    const problems = problemsOf({ [name]: value });
    expect(problems.map(({ variable }) => variable)).toEqual([name]);
    const problem = problems[0]?.problem ?? '';
    expect(problem).toMatch(
      /^(?:expected .{10,}|must .{10,}|is set but empty; remove it to use the default)$/,
    );
    // biome-ignore lint/suspicious/noControlCharactersInRegex: control characters are what is looked for
    expect(problem).not.toMatch(/[\u0000-\u001f\u007f-\u009f\u202e]/);
    expect(problem.length).toBeLessThan(400);
  });

  test('all of them are named at once', () => {
    const env = Object.fromEntries(VARIABLES.map(({ name }) => [name, ' ! \u202e']));
    env.RELAY_STREAM_NAME = env.RELAY_DLQ_STREAM_NAME = env.RELAY_QUEUE_PREFIX = env.RELAY_QUEUE_NAME = '';
    const problems = problemsOf(env);
    expect(problems.map(({ variable }) => variable)).toEqual(VARIABLES.map(({ name }) => name));
    expect(new ConfigError(problems).message.split('\n')).toHaveLength(VARIABLES.length);
  });

  test('a value that is shown is escaped and cut', () => {
    const [problem] = problemsOf({ RELAY_ORDERING: `\u001b[31m\n${'é'.repeat(500)}` });
    expect(problem?.problem).toMatch(
      /^expected one of aggregate, none; got "\\u001b\[31m\\n(?:\\u00e9)+\.\.\."$/,
    );
  });

  test('nothing of a connection URL is shown', () => {
    const urls = (secret: string) => [
      `postgresql://user:${secret}@host:x/db`,
      `${secret}://user:pw@host/db`,
      `postgresql://h/db?sslmode=${secret}`,
      `postgresql://h/db?${secret}=1`,
      `postgresql://h/db?sslrootcert=/${secret}&sslmode=require`,
      `postgresql://u:%${secret}@h/db`,
      `redis://:${secret}@host/x`,
      `redis://host/${secret}`,
      `redis://${secret}:6379:1/0`,
      secret,
    ];
    for (const text of urls('s3cr3t')) {
      for (const name of ['RELAY_DATABASE_URL', 'RELAY_REDIS_URL']) {
        const problems = problemsOf({ [name]: text });
        expect(problems, text).toHaveLength(1);
        expect(new ConfigError(problems).message).not.toMatch(/s3cr3t|s3cr/);
      }
    }
  });

  test('nothing of the users is shown', () => {
    for (const text of [`s3cr3t:viewer:${HASH}x`, `s3cr3t:x:${HASH}`, 's3cr3t'])
      expect(new ConfigError(problemsOf({ RELAY_BOARD_USERS: text })).message).not.toMatch(/s3cr3t|bbbb/);
  });

  test('a URL that was put into the wrong variable is shown without its password', () => {
    expect(problemsOf({ RELAY_HTTP_HOST: 'redis://me:s3cr3t@host' })[0]?.problem).toContain(
      '"redis://***@host"',
    );
  });

  test('a variable that Kubernetes overwrote is explained', () => {
    expect(problemsOf({ RELAY_HTTP_PORT: 'tcp://10.0.0.1:8004' })[0]?.problem).toContain(
      'enableServiceLinks: false',
    );
  });
});

describe('values that are wrong together', () => {
  const cases: [string, Record<string, string>][] = [
    ['RELAY_PUBLISH_TIMEOUT', { RELAY_PUBLISH_TIMEOUT: '5', RELAY_CLAIM_LEASE: '5' }],
    ['RELAY_PUBLISHED_RETENTION', { RELAY_PUBLISHED_RETENTION: '3599' }],
    ['RELAY_BATCH_SIZE', { RELAY_BATCH_SIZE: '11', RELAY_MAX_IN_FLIGHT: '10' }],
    ['RELAY_MAX_BATCH_SIZE', { RELAY_BATCH_SIZE: '11', RELAY_MAX_BATCH_SIZE: '10' }],
    ['RELAY_DLQ_STREAM_NAME', { RELAY_STREAM_NAME: 'x', RELAY_DLQ_STREAM_NAME: 'x' }],
    ['RELAY_ALLOWED_TOPICS', { RELAY_STREAM_NAME: 'x', RELAY_ALLOWED_TOPICS: 'identity.*' }],
    ['RELAY_STREAM_NAME', { RELAY_STREAM_NAME: 'p:x', RELAY_QUEUE_PREFIX: 'p' }],
    ['RELAY_RETRY_BASE_DELAY', { RELAY_RETRY_BASE_DELAY: '3600', RELAY_MAX_RETRY_ATTEMPTS: '20' }],
    ['RELAY_BOARD_USERS', { RELAY_BOARD: 'true' }],
    [
      'RELAY_BOARD_USERS',
      { RELAY_BOARD: 'true', RELAY_HTTP_HOST: '127.0.0.1', RELAY_BOARD_BASE_PATH: '/ops' },
    ],
    ['RELAY_BOARD_USERS', { RELAY_BOARD: 'true', RELAY_HTTP_HOST: '::1', RELAY_TRUSTED_PROXIES: '::1' }],
  ];
  test.each(cases)('%s %j', (name, env) => {
    expect(problemsOf(env).map(({ variable }) => variable)).toEqual([name]);
  });

  test('a dashboard without users is for loopback addresses', () => {
    for (const host of ['127.0.0.1', 'localhost', '::1'])
      expect(loadConfig({ RELAY_BOARD: 'true', RELAY_HTTP_HOST: host }).board).toBe(true);
    expect(loadConfig({ RELAY_BOARD: 'true', RELAY_BOARD_USERS: `olga:operator:${HASH}` }).board).toBe(true);
  });

  test('the defaults of batch size and publish timeout give way to a value that bounds them', () => {
    expect(loadConfig({ RELAY_MAX_IN_FLIGHT: '1' }).batchSize).toBe(1);
    expect(loadConfig({ RELAY_MAX_IN_FLIGHT: '150' }).maxBatchSize).toBe(150);
    // Who sets one size means that size.
    expect(loadConfig({ RELAY_BATCH_SIZE: '50' }).maxBatchSize).toBe(50);
    expect(loadConfig({ RELAY_CLAIM_LEASE: '0.5' }).publishTimeoutMs).toBe(250);
    expect(loadConfig({ RELAY_CLAIM_LEASE: '86400' }).publishTimeoutMs).toBe(10_000);
  });
});

describe('database URLs', () => {
  test.each([
    ['postgres://u:p@h:1/db', 'postgresql://u:p@h:1/db'],
    ['postgresql+asyncpg://u:p@h/db', 'postgresql://u:p@h/db'],
    ['POSTGRESQL+psycopg2://h', 'postgresql://h/'],
    ['postgresql:///db', 'postgresql:///db'],
    ['postgresql://u@/db?host=/run/pg', 'postgresql://u@/db?host=%2Frun%2Fpg'],
    ['postgresql://u:a%40b@[::1]:5433/db', 'postgresql://u:a%40b@[::1]:5433/db'],
    ['postgresql://u:p/w#x@h/db', 'postgresql://u:p%2Fw%23x@h/db'],
    ['postgresql://h/db?ssl=require&command_timeout=5', 'postgresql://h/db?ssl=require'],
  ])('%s is read as %s', (given, expected) => {
    const { databaseUrl } = loadConfig({ RELAY_DATABASE_URL: given });
    expect(databaseUrl).toBe(expected);
    expect(loadConfig({ RELAY_DATABASE_URL: databaseUrl }).databaseUrl).toBe(expected);
  });

  test.each([
    ['postgresql://u:p%40%2F%3A%25s@db.example:5433/my%20db', 'u', 'p@/:%s', 'db.example', 5433, 'my db'],
    [
      'postgresql+asyncpg://user%40corp:p@ss@[fe80::1%25eth0]/d',
      'user@corp',
      'p@ss',
      'fe80::1%25eth0',
      undefined,
      'd',
    ],
    ['postgresql://u:p@/d?host=/var/run/postgresql&port=6000', 'u', 'p', '/var/run/postgresql', 6000, 'd'],
    ['postgresql://u:p@%2Fvar%2Frun%2Fpostgresql/d', 'u', 'p', '/var/run/postgresql', undefined, 'd'],
    ['postgresql://h?user=u&password=p&dbname=d', 'u', 'p', 'h', undefined, 'd'],
    ['postgresql://', undefined, undefined, undefined, undefined, undefined],
  ])('%s', (text, user, password, host, port, database) => {
    for (const form of [text, loadConfig({ RELAY_DATABASE_URL: text }).databaseUrl]) {
      const options = pgOptions(form);
      expect([options.user, options.password, options.host, options.port, options.database]).toEqual([
        user,
        password,
        host,
        port,
        database,
      ]);
    }
  });

  const unverified = { rejectUnauthorized: false };
  test.each([
    ['', false, true],
    ['?sslmode=disable', false, false],
    ['?ssl=false', false, false],
    ['?sslmode=allow', false, true],
    ['?sslmode=prefer', false, true],
    ['?sslmode=require', unverified, false],
    ['?ssl=require', unverified, false],
    ['?ssl=no-verify', unverified, false],
    ['?sslmode=VERIFY-FULL', {}, false],
    ['?ssl=true', {}, false],
    [`?sslmode=verify-full&sslrootcert=${certificateFile}`, { ca: CERTIFICATE }, false],
    [
      `?sslmode=verify-ca&sslrootcert=${certificateFile}`,
      { ca: CERTIFICATE, checkServerIdentity: expect.any(Function) },
      false,
    ],
    [
      `?sslmode=require&sslrootcert=${certificateFile}`,
      { ca: CERTIFICATE, checkServerIdentity: expect.any(Function) },
      false,
    ],
    ['?sslmode=require&host=/run/pg', false, false],
  ])('TLS with %j', (query, ssl, preferTls) => {
    expect(pgOptions(`postgresql://h/db${query}`)).toMatchObject({ ssl, preferTls });
  });

  test('a TLS file that is missing or is no certificate is a configuration error, without its path', () => {
    writeFileSync(join(folder, 'text.pem'), 'not a certificate');
    const key = join(folder, 'text.pem');
    for (const [query, text] of [
      [`sslrootcert=${folder}/missing.pem`, 'sslrootcert'],
      [`sslcert=${certificateFile}&sslkey=${key}`, 'TLS files'],
    ]) {
      const problems = problemsOf({ RELAY_DATABASE_URL: `postgresql://h/db?sslmode=require&${query}` });
      expect(problems).toEqual([
        { variable: 'RELAY_DATABASE_URL', problem: expect.stringContaining(text ?? '') },
      ]);
      expect(problems[0]?.problem).not.toContain(folder);
    }
  });

  test('connection options of libpq and asyncpg reach node-postgres', () => {
    const query = 'application_name=relay&options=-c%20search_path%3Dx&timeout=2.5&channel_binding=require';
    expect(pgOptions(`postgresql://h/db?${query}`)).toMatchObject({
      application_name: 'relay',
      options: '-c search_path=x',
      connectionTimeoutMillis: 2_500,
      enableChannelBinding: true,
    });
  });
});

describe('Redis URLs', () => {
  test.each([
    ['redis://h', 'redis://h:6379/0'],
    ['REDIS://h:1/', 'redis://h:1/0'],
    ['redis://:p%40ss@h/3', 'redis://:p%40ss@h:6379/3'],
    ['redis://me:p/w@[::1]:7000/2?family=6', 'redis://me:p%2Fw@[::1]:7000/2?family=6'],
    ['rediss://h?db=4&decode_responses=True', 'rediss://h:6379/4'],
  ])('%s is read as %s', (given, expected) => {
    const { redisUrl } = loadConfig({ RELAY_REDIS_URL: given });
    expect(redisUrl).toBe(expected);
    expect(loadConfig({ RELAY_REDIS_URL: redisUrl }).redisUrl).toBe(expected);
  });

  test('user, password, database, family and TLS reach ioredis', () => {
    expect(redisOptions('redis://h')).toEqual({ host: 'h', port: 6379, db: 0 });
    expect(redisOptions('rediss://me:p%40%3A@[::1]:7000/2?family=6')).toEqual({
      host: '::1',
      port: 7000,
      username: 'me',
      password: 'p@:',
      db: 2,
      family: 6,
      tls: {},
    });
    const query = `ssl_cert_reqs=none&ssl_ca_certs=${certificateFile}&ssl_check_hostname=false`;
    expect(redisOptions(`rediss://h?${query}`).tls).toEqual({
      ca: CERTIFICATE,
      rejectUnauthorized: false,
      checkServerIdentity: expect.any(Function),
    });
  });
});

describe('redaction', () => {
  test.each([
    ['postgresql+asyncpg://u:p@h:1/db?sslmode=require', 'postgresql+asyncpg://***@h:1/db?sslmode=require'],
    ['redis://:p@ss/w@h/0', 'redis://***@h/0'],
    [
      'postgresql://h/db?user=u&password=s3cr3t&sslpassword=x',
      'postgresql://h/db?user=***&password=***&sslpassword=***',
    ],
    ['redis://h/0', 'redis://h/0'],
  ])('%s is logged as %s', (url, expected) => {
    expect(redactUrls(url)).toBe(expected);
  });

  test('URLs within a text are redacted, paths of source files are not', () => {
    expect(redactUrls('no route to redis://u:p@h:1, nor "postgres://x:y@z/db"')).toBe(
      'no route to redis://***@h:1, nor "postgres://***@z/db"',
    );
    const frame = 'at file:///app/node_modules/@scope/package/x.js:1:2';
    expect(redactUrls(frame)).toBe(frame);
  });
});

describe('unknown variables', () => {
  test('a typing error is found, with the name that was probably meant', () => {
    expect(
      unknownVariables({ RELAY_BATCHSIZE: '1', relay_stream_name: 'x', RELAY_MAX_RETRIES: '3' }),
    ).toEqual([
      { name: 'RELAY_BATCHSIZE', nearest: 'RELAY_BATCH_SIZE' },
      { name: 'relay_stream_name', nearest: 'RELAY_STREAM_NAME' },
      { name: 'RELAY_MAX_RETRIES' },
    ]);
  });

  test('known variables, those of the tests and those that Kubernetes sets are not reported', () => {
    const known = Object.fromEntries(VARIABLES.map(({ name, default: text }) => [name, text]));
    const kubernetes = {
      RELAY_PORT: 'tcp://10.0.0.1:8004',
      RELAY_PORT_8004_TCP_ADDR: '10.0.0.1',
      RELAY_SERVICE_HOST: '10.0.0.1',
      RELAY_SERVICE_PORT_HTTP: '8004',
    };
    expect(unknownVariables({ ...known, ...kubernetes, RELAY_REDIS_SERVER_BIN: '/x', HOME: '/' })).toEqual(
      [],
    );
  });
});
