import { expect, test } from 'vitest';
import { connected } from '../../src/connections/preflight.ts';
import { asRelay } from '../support/least-privilege.ts';
import { openRedis } from '../support/stages.ts';

test('to ask again and again whether a Redis that is away is connected leaves no listener behind', async () => {
  const redis = openRedis(asRelay('redis://127.0.0.1:9'), {
    enableOfflineQueue: false,
    maxRetriesPerRequest: 0,
  });
  const before = redis.listenerCount('error');
  for (let i = 0; i < 3; i++) await expect(connected(redis, 1_000)).rejects.toThrow();
  expect(redis.listenerCount('error')).toBe(before);
});
