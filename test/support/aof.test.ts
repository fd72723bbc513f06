import { dirname } from 'node:path';
import { expect, test } from 'vitest';
import { cutAof, endOfAof, lastBoundary } from './aof.ts';
import { createRedis } from './servers.ts';
import { openAdminRedis } from './stages.ts';

/** Commands as an append-only file has them. */
const aof = (...commands: string[][]): Buffer =>
  Buffer.from(
    commands
      .map(
        (parts) =>
          `*${parts.length}\r\n${parts.map((it) => `$${Buffer.byteLength(it)}\r\n${it}\r\n`).join('')}`,
      )
      .join(''),
  );

test('a power cut takes what was written after a moment, and nothing that was written before', async () => {
  const server = await createRedis();
  const redis = openAdminRedis(server.adminUrl);
  const both = `redis.call('XADD', KEYS[1], '*', 'at', ARGV[1]) return redis.call('INCR', KEYS[2])`;
  const write = async (name: string, count: number) => {
    for (let i = 0; i < count; i++)
      await redis.eval(both, 2, `stream ${name}`, `counter ${name}`, `${name}\r\n${i}`);
  };
  const directory = dirname(server.logFile);
  await write('before', 50);
  const position = await endOfAof(directory);
  await write('after', 30);
  await server.kill('SIGKILL');
  expect(await cutAof(directory, position)).toBeGreaterThan(0);
  await server.restart();
  expect((await redis.keys('*')).sort()).toEqual(['counter before', 'stream before']);
  expect(await redis.xlen('stream before')).toBe(50);
});

test('nothing that was written is lost by kill -9 alone', async () => {
  // With `everysec` Redis puts a write off, by 2 s at most, while an fsync is under way: on a busy disk kill -9 takes that.
  const server = await createRedis({ args: ['--appendfsync', 'always'] });
  const redis = openAdminRedis(server.adminUrl);
  for (let i = 0; i < 50; i++) await redis.incr('counter');
  await server.kill('SIGKILL');
  await server.restart();
  expect(await redis.get('counter')).toBe('50');
});

test('an increment that began after the moment is cut to nothing', async () => {
  const server = await createRedis();
  const redis = openAdminRedis(server.adminUrl);
  await redis.set('before', '1');
  const directory = dirname(server.logFile);
  const position = { ...(await endOfAof(directory)), file: 'an older increment' };
  await redis.set('after', '1');
  await server.kill('SIGKILL');
  await cutAof(directory, position);
  expect((await endOfAof(directory)).bytes).toBe(0);
});

test('the cut falls between commands, and never into a transaction', () => {
  const file = aof(
    ['SELECT', '0'],
    ['SET', 'a', 'ü\r\n*1\r\n'],
    ['MULTI'],
    ['SET', 'b', '1'],
    ['EXEC'],
    ['SET', 'c', '1'],
  );
  const end = (count: number) =>
    aof(
      ...[
        ['SELECT', '0'],
        ['SET', 'a', 'ü\r\n*1\r\n'],
        ['MULTI'],
        ['SET', 'b', '1'],
        ['EXEC'],
        ['SET', 'c', '1'],
      ].slice(0, count),
    ).length;
  expect(lastBoundary(file, file.length)).toBe(file.length);
  expect(lastBoundary(file, file.length - 1)).toBe(end(5));
  expect(lastBoundary(file, end(5) - 1)).toBe(end(2));
  expect(lastBoundary(file, end(2))).toBe(end(2));
  expect(lastBoundary(file, end(2) - 1)).toBe(end(1));
  expect(lastBoundary(file, 3)).toBe(0);
});
