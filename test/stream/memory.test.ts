import { beforeEach, expect, test } from 'vitest';
import { APPEND_CONNECTION } from '../../src/stream/append.ts';
import { createMemory, MemoryLostError } from '../../src/stream/memory.ts';
import { createRedis } from '../support/servers.ts';
import { openRedis } from '../support/stages.ts';

const KEY = 'bull:relay:memory';
const server = await createRedis();
const redis = openRedis(server.url);

beforeEach(async () => {
  await redis.flushall();
});

test('a key that is made for the first time is no loss', async () => {
  const memory = createMemory(redis, KEY);
  await memory.assertIntactSince(0);
  await memory.assertIntactSince(0);
  expect(memory.generation()).toBe(0);
  expect(await redis.exists(KEY)).toBe(1);
});

test('after FLUSHALL every receipt of before is void, and those that come after are good', async () => {
  await redis.set(KEY, 'a');
  const memory = createMemory(redis, KEY);
  await memory.assertIntactSince(0);
  await redis.flushall();
  await expect(memory.assertIntactSince(0)).rejects.toThrow(MemoryLostError);
  expect(memory.generation()).toBe(1);
  await memory.assertIntactSince(1);
  // Right after the first loss, before anybody else made the key again.
  await redis.flushall();
  await expect(memory.assertIntactSince(1)).rejects.toThrow(MemoryLostError);
});

test('a loss that was over before anybody looked is noticed too', async () => {
  await redis.set(KEY, 'a');
  const memory = createMemory(redis, KEY);
  await memory.assertIntactSince(0);
  await redis.flushall();
  await redis.set(KEY, 'b');
  await expect(memory.assertIntactSince(0)).rejects.toThrow(MemoryLostError);
});

test('a Redis that does not answer has lost nothing yet', async () => {
  const away = openRedis('redis://127.0.0.1:1', { ...APPEND_CONNECTION, retryStrategy: () => null });
  away.on('error', () => {});
  const memory = createMemory(away, KEY);
  const error = await memory.assertIntactSince(0).catch((it: Error) => it);
  expect(error).toBeInstanceOf(Error);
  expect(error).not.toBeInstanceOf(MemoryLostError);
  expect(memory.generation()).toBe(0);
});
