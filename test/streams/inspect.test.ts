import { beforeAll, beforeEach, expect, test } from 'vitest';
import { createStreamInspector, entriesAfter } from '../../src/streams/inspect.ts';
import { asRelay } from '../support/least-privilege.ts';
import { createRedis } from '../support/servers.ts';
import { type AdminRedis, openAdminRedis, openRedis } from '../support/stages.ts';

let redis: AdminRedis;
let inspectStreams: ReturnType<typeof createStreamInspector>;

beforeAll(async () => {
  const { url, adminUrl } = await createRedis();
  redis = openAdminRedis(adminUrl);
  inspectStreams = createStreamInspector(openRedis(url));
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

test('where Redis cannot tell a lag, as before version 7, it is estimated by the times of the entries', async () => {
  await fill('a', 101);
  await redis.xgroup('CREATE', 'a', 'behind', '0');
  await redis.xreadgroup('GROUP', 'behind', 'me', 'COUNT', 41, 'STREAMS', 'a', '>');
  // Redis 7 knows no lag of a group that has deleted entries before it.
  await redis.xdel('a', '80000-0');
  const [found] = await inspect('a');
  expect(found?.groups.behind).toEqual({
    ...{ consumers: 1, pending: 41, lag: 59, unacknowledged: 100, isEstimate: true },
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
