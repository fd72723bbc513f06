import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { hostname } from 'node:os';
import type { Readable } from 'node:stream';
import { text } from 'node:stream/consumers';
import { describe, expect, inject, onTestFinished, test, vi } from 'vitest';
import { createPool } from '../../src/connections/pool.ts';
import {
  createLogger,
  createSpacedWarnings,
  errorText,
  type Logger,
  type LogLevel,
  serializeError,
} from '../../src/telemetry/logger.ts';
import { asRelay } from '../support/least-privilege.ts';
import { createRedis } from '../support/servers.ts';
import { openRedis } from '../support/stages.ts';

/** What a reader of the logs sees. */
function logged(
  work: (logger: Logger) => void,
  level: LogLevel = 'trace',
): { text: string; lines: LogLine[] } {
  let text = '';
  work(
    createLogger(level, {
      write: (line) => {
        text += line;
      },
    }),
  );
  return {
    text,
    lines: text
      .split('\n')
      .filter(Boolean)
      .map((line) => JSON.parse(line)),
  };
}
type LogLine = Record<string, unknown> & { err?: ReturnType<typeof serializeError> };

const failureOf = async (work: () => Promise<unknown>): Promise<Error> => {
  try {
    await work();
  } catch (error) {
    return error as Error;
  }
  throw new Error('it was to fail');
};

describe('a line', () => {
  test('is one JSON object with level, time, service, pod, process, fields and text', () => {
    const { lines } = logged((logger) => logger.info({ eventId: 'e' }, 'published'));
    expect(lines).toEqual([
      {
        level: 'info',
        time: expect.stringMatching(/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/),
        service: 'relay-service',
        pod: hostname(),
        pid: process.pid,
        eventId: 'e',
        msg: 'published',
      },
    ]);
  });

  test('names its level', () => {
    const levels = ['trace', 'debug', 'info', 'warn', 'error', 'fatal'] as const;
    const { lines } = logged((logger) => {
      for (const level of levels) logger[level]({}, 'text');
    });
    expect(lines.map(({ level }) => level)).toEqual(levels);
  });

  test('below the level is left out', () => {
    const { lines } = logged((logger) => {
      logger.info({}, 'quiet');
      logger.warn({}, 'loud');
    }, 'warn');
    expect(lines.map(({ msg }) => msg)).toEqual(['loud']);
  });
});

describe('an error', () => {
  test('keeps its message, stack, code and causes', () => {
    const inner = Object.assign(new Error('refused'), { code: 'ECONNREFUSED' });
    const outer = new TypeError('no database', { cause: new AggregateError([inner], '') });
    const { lines } = logged((logger) => logger.error({ err: outer }, 'failed'));
    expect(lines[0]?.err).toMatchObject({
      type: 'TypeError',
      message: 'no database',
      stack: expect.stringContaining('logger.test.ts'),
      cause: { type: 'AggregateError', errors: [{ message: 'refused', code: 'ECONNREFUSED' }] },
    });
    expect(errorText(outer)).toBe('no database: refused');
  });

  test('is written without the credentials of a URL', () => {
    const url = 'postgresql+asyncpg://me:s3cr3t@db/app?password=s3cr3t';
    const err = new Error(`cannot reach ${url}`, { cause: `redis://:s3cr3t@cache/0 is down` });
    const { text } = logged((logger) => logger.error({ err }, 'failed'));
    expect(text).not.toContain('s3cr3t');
    expect(text).toContain('db/app');
    expect(errorText(err)).not.toContain('s3cr3t');
  });

  test.each([undefined, null, 'text', 17, Symbol('s'), { password: 's3cr3t' }, [], Object.create(null)])(
    'may be anything that was thrown',
    (thrown) => {
      const { text, lines } = logged((logger) => logger.error({ err: thrown }, 'failed'));
      expect(lines).toHaveLength(1);
      expect(text).not.toContain('s3cr3t');
      expect(errorText(thrown)).not.toBe('');
    },
  );

  test('that contains itself is written', () => {
    const err = new Error('loop');
    err.cause = err;
    expect(logged((logger) => logger.error({ err }, 'failed')).lines).toHaveLength(1);
    expect(errorText(err)).toBe('loop: loop');
  });

  test('is bounded', () => {
    const err = new AggregateError(
      Array.from({ length: 1_000 }, () => new Error('x'.repeat(100_000))),
      'many',
    );
    expect(logged((logger) => logger.error({ err }, 'failed')).text.length).toBeLessThan(60_000);
    expect(errorText(err).length).toBeLessThanOrEqual(2_000);
  });
});

describe('errors of the libraries hold no data of events', () => {
  const PERSONAL = 'ada@example.com';

  test('PostgreSQL: the row in a violated constraint, the parameters, the password', async () => {
    const pool = createPool(asRelay(inject('adminUrl')), { max: 1 });
    const client = await pool.connect();
    await client.query('CREATE TEMP TABLE person (email text CHECK (email IS NULL))');
    const error = await failureOf(() => client.query('INSERT INTO person VALUES ($1)', [PERSONAL]));
    client.release();
    await pool.end();
    // What pg-pool does to the error of an idle connection.
    Object.assign(error, { client });
    expect(JSON.stringify((error as { detail?: string }).detail)).toContain(PERSONAL);
    const { text, lines } = logged((logger) => logger.error({ err: error }, 'failed'));
    expect(text).not.toContain(PERSONAL);
    expect(text).not.toContain(client.password ?? 'no password');
    expect(lines[0]?.err).toMatchObject({ code: '23514', message: expect.stringContaining('person') });
  });

  test('Redis: the arguments of the refused command, of all commands of its transaction', async () => {
    const redis = openRedis((await createRedis()).url);
    await redis.set('text', 'x');
    const errors = [
      await failureOf(() => redis.xadd('text', '*', 'payload', PERSONAL)),
      await failureOf(() => redis.call('NOSUCHCOMMAND', PERSONAL)),
      await failureOf(() =>
        redis.multi().call('NOSUCHCOMMAND', PERSONAL).xadd('text', '*', 'p', PERSONAL).exec(),
      ),
    ];
    for (const err of errors) {
      const { text } = logged((logger) => logger.error({ err }, 'failed'));
      expect(text).not.toContain(PERSONAL);
      expect(errorText(err)).not.toContain(PERSONAL);
    }
    expect(serializeError(errors[0])).toMatchObject({
      message: expect.stringContaining('WRONGTYPE'),
      command: 'xadd',
    });
  });

  test('drizzle: the parameters in its message', () => {
    const cause = Object.assign(new Error('duplicate key'), { code: '23505' });
    const error = Object.assign(new Error(`Failed query: insert\nparams: ${PERSONAL}`, { cause }), {
      query: 'insert',
      params: [PERSONAL],
    });
    const { text } = logged((logger) => logger.error({ err: error }, 'failed'));
    expect(text).not.toContain(PERSONAL);
    expect(errorText(error)).toBe('Failed query: duplicate key');
  });
});

test('a process that is killed has written every line before, in order', async () => {
  const program = `
    import { createLogger } from '${inject('root')}/dist/telemetry/logger.js';
    const logger = createLogger('info');
    for (let n = 0; n < 200; n++) logger.info({ n }, 'a line');
    process.kill(process.pid, 'SIGKILL');`;
  const child = spawn(process.execPath, ['--input-type=module', '--eval', program], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  const [written] = await Promise.all([text(child.stdout), once(child, 'close')]);
  const numbers = written
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line).n);
  expect(numbers).toEqual(Array.from({ length: 200 }, (_, n) => n));
});

test('a process whose disk for logs is full goes on', { skip: !existsSync('/dev/full') }, async () => {
  const program = `
    import { createLogger } from '${inject('root')}/dist/telemetry/logger.js';
    const logger = createLogger('info');
    for (let n = 0; n < 200; n++) logger.info({ n, text: 'x'.repeat(10_000) }, 'a line');
    setTimeout(() => console.error('it goes on'), 10);`;
  const full = await open('/dev/full', 'w');
  const child = spawn(process.execPath, ['--input-type=module', '--eval', program], {
    stdio: ['ignore', full.fd, 'pipe'],
  });
  const [said, [code]] = await Promise.all([text(child.stderr as Readable), once(child, 'close')]);
  await full.close();
  expect({ said, code }).toEqual({ said: 'it goes on\n', code: 0 });
});

test('warnings that come at most once in a while go on where the clock is set back', () => {
  let wall = Date.now();
  let ms = 0;
  const spies = [
    vi.spyOn(Date, 'now').mockImplementation(() => wall),
    vi.spyOn(performance, 'now').mockImplementation(() => ms),
  ];
  onTestFinished(() => {
    for (const spy of spies) spy.mockRestore();
  });
  const { lines } = logged((logger) => {
    const warn = createSpacedWarnings(logger, 10_000);
    warn({}, 'no answer');
    wall -= 3_600_000;
    for (let i = 0; i < 2; i++) {
      ms += 6_000;
      wall += 6_000;
      warn({}, 'no answer');
    }
  });
  expect(lines.map(({ sinceTheLast }) => sinceTheLast)).toEqual([undefined, 1]);
});
