import { beforeAll, beforeEach, expect, test } from 'vitest';
import { createStreamInspector, entriesAfter } from '../../src/streams/inspect.ts';
import { asRelay } from '../support/least-privilege.ts';
import { createRedis, type TestRedis } from '../support/servers.ts';
import { type AdminRedis, openAdminRedis, openRedis } from '../support/stages.ts';

let server: TestRedis;
let redis: AdminRedis;
let inspectStreams: ReturnType<typeof createStreamInspector>;

beforeAll(async () => {
  server = await createRedis();
  redis = openAdminRedis(server.adminUrl);
  inspectStreams = createStreamInspector(openRedis(server.url));
});

beforeEach(async () => {
  await redis.flushall();
});

/** Entries 1000-0, 2000-0, … */
async function fill(stream: string, count: number): Promise<void> {
  for (let i = 1; i <= count; i++) await redis.xadd(stream, `${i * 1_000}-0`, 'payload', 'x');
}

async function inspect(...streams: string[]) {
  const found = await inspectStreams(streams);
  return found.map(({ groups, ...rest }) => ({
    ...rest,
    groups: Object.fromEntries(groups.map(({ group, ...figures }) => [group, figures])),
  }));
}

test('a stream tells its length, and how far behind each group is', async () => {
  await fill('a', 10);
  await redis.xgroup('CREATE', 'a', 'new', '0');
  await redis.xgroup('CREATE', 'a', 'reading', '0');
  await redis.xreadgroup('GROUP', 'reading', 'me', 'COUNT', 4, 'STREAMS', 'a', '>');
  await redis.xack('a', 'reading', '1000-0', '3000-0');
  await redis.xgroup('CREATE', 'a', 'done', '$');
  expect(await inspect('a')).toEqual([
    {
      stream: 'a',
      length: 10,
      moreGroups: 0,
      groups: {
        new: { consumers: 0, pending: 0, lag: 10, unacknowledged: 10, isEstimate: false },
        // 2000-0 is not acknowledged: it and the eight that follow must be spared.
        reading: { consumers: 1, pending: 2, lag: 6, unacknowledged: 9, isEstimate: false },
        done: { consumers: 0, pending: 0, lag: 0, unacknowledged: 0, isEstimate: false },
      },
    },
  ]);
});

/** `count` entries that came in the same millisecond, with a field of so many bytes. */
async function burst(stream: string, ms: number, count: number, bytes = 1): Promise<void> {
  const pipeline = redis.pipeline();
  for (let i = 0; i < count; i++) pipeline.xadd(stream, `${ms}-${i}`, 'payload', 'x'.repeat(bytes));
  await pipeline.exec();
}

async function read(stream: string, group: string, count: number): Promise<void> {
  await redis.xgroup('CREATE', stream, group, '0');
  await redis.xreadgroup('GROUP', group, 'me', 'COUNT', count, 'STREAMS', stream, '>');
}

test('after a restart, when Redis tells the lag no more, it is as exact as before', async () => {
  await fill('a', 10);
  await burst('a', 20_000, 90);
  await redis.xadd('a', '1000000-0', 'payload', 'x');
  for (const [group, count] of [
    ['slow', 4],
    ['quick', 60],
    ['nearly', 100],
    ['done', 101],
  ] as const)
    await read('a', group, count);
  await redis.xack('a', 'quick', '1000-0', '2000-0');
  const before = await inspect('a');
  expect(before).toMatchObject([
    {
      groups: {
        slow: { lag: 97, unacknowledged: 101, isEstimate: false },
        quick: { lag: 41, isEstimate: false },
        nearly: { lag: 1, unacknowledged: 101, isEstimate: false },
        done: { lag: 0, unacknowledged: 101, isEstimate: false },
      },
    },
  ]);
  await server.restart();
  expect(await inspect('a')).toEqual(before);
});

test('deleted entries are not counted', async () => {
  await fill('a', 101);
  await read('a', 'behind', 41);
  // Redis 7 knows no lag of a group that has deleted entries before it.
  await redis.xdel('a', '80000-0');
  await redis.xdel('a', '101000-0');
  const [found] = await inspect('a');
  expect(found?.groups.behind).toEqual({
    ...{ consumers: 1, pending: 41, lag: 58, unacknowledged: 99, isEstimate: false },
  });
});

test('beyond the last 1,000 entries of a stream a lag is estimated by the times of those before', async () => {
  await fill('a', 200);
  await burst('a', 201_000, 1_000);
  // Redis tells no lag of a group that begins anywhere.
  for (const id of ['5000-0', '150000-0', '201000-899', '201000-999'])
    await redis.xgroup('CREATE', 'a', id, id);
  const [found] = await inspect('a');
  expect(found?.groups).toMatchObject({
    '5000-0': { lag: 1_195, unacknowledged: 1_195, isEstimate: true },
    '150000-0': { lag: 1_050, isEstimate: true },
    '201000-899': { lag: 100, isEstimate: false },
    '201000-999': { lag: 0, isEstimate: false },
  });
  // What was trimmed unread counts for nothing, so that is exact again.
  await redis.xtrim('a', 'MAXLEN', 1_190);
  const [trimmed] = await inspect('a');
  expect(trimmed?.groups['5000-0']).toMatchObject({ lag: 1_190, isEstimate: false });
});

test('no more than about 1 MiB of entries is read to count them', async () => {
  await burst('a', 1_000, 8, 400_000);
  for (const id of ['1000-1', '1000-5']) await redis.xgroup('CREATE', 'a', id, id);
  const [found] = await inspect('a');
  expect(found?.groups).toMatchObject({
    '1000-1': { isEstimate: true },
    '1000-5': { lag: 2, isEstimate: false },
  });
});

test('what was trimmed unread is not there to be read any more', async () => {
  await fill('a', 10);
  await redis.xgroup('CREATE', 'a', 'late', '0');
  await redis.xreadgroup('GROUP', 'late', 'me', 'COUNT', 2, 'NOACK', 'STREAMS', 'a', '>');
  await redis.xtrim('a', 'MAXLEN', 4);
  const [found] = await inspect('a');
  expect(found).toMatchObject({ length: 4, groups: { late: { lag: 4, unacknowledged: 4 } } });
});

test('an estimate is exact at both ends and never beyond them', () => {
  const extent = { length: 11, first: '1000-0', last: '2000-0' };
  expect(entriesAfter('0-0', extent)).toBe(11);
  expect(entriesAfter('1000-0', extent)).toBe(10);
  expect(entriesAfter('1500-0', extent)).toBe(5);
  expect(entriesAfter('1999-9', extent)).toBe(1);
  expect(entriesAfter('2000-0', extent)).toBe(0);
  expect(entriesAfter('9000-0', extent)).toBe(0);
  expect(entriesAfter('5-1', { length: 3, first: '5-0', last: '5-2' })).toBe(2);
  expect(entriesAfter('1-0', { length: 0, first: '', last: '5-2' })).toBe(0);
});

test('keys that are no streams are left out, and groups beyond the tenth', async () => {
  await redis.set('text', 'no stream');
  await fill('a', 1);
  for (let i = 0; i < 12; i++) await redis.xgroup('CREATE', 'a', `group-${i}`, '0');
  const found = await inspectStreams(['text', 'absent', 'a']);
  expect(found.map(({ stream, groups, moreGroups }) => [stream, groups.length, moreGroups])).toEqual([
    ['a', 10, 2],
  ]);
});

test('a Redis that is away is an error, not an empty answer', async () => {
  const gone = openRedis(asRelay('redis://127.0.0.1:9'), {
    enableOfflineQueue: false,
    retryStrategy: () => null,
  });
  await expect(createStreamInspector(gone)(['a'])).rejects.toThrow();
});
