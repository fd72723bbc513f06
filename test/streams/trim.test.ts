import { beforeEach, describe, expect, test } from 'vitest';
import { createLookup } from '../../src/streams/lookup.ts';
import { createTrimmer } from '../../src/streams/trim.ts';
import type { Logger } from '../../src/telemetry/logger.ts';
import { asRelay, redisRules } from '../support/least-privilege.ts';
import { createRedis } from '../support/servers.ts';
import { openAdminRedis, openRedis, silent } from '../support/stages.ts';

const STREAM = 'identity.user.v1';
const LIST = 'bull:relay:trimmed';
const EPOCH_KEY = 'bull:relay:epoch';
const EPOCH = 'server/history:1';
/** Entries that Redis keeps in one node: it trims whole ones. */
const NODE = 100;

const server = await createRedis();
const redis = openAdminRedis(server.adminUrl);
const relay = openRedis(server.url);

beforeEach(async () => {
  await redis.flushall();
  await redis.set(EPOCH_KEY, EPOCH);
});

const id = (n: number) => `1000-${n}`;
async function add(count: number, from = 1, cap = 0): Promise<void> {
  const pipeline = redis.pipeline();
  for (let n = from; n < from + count; n++) {
    if (cap > 0) pipeline.xadd(STREAM, 'MAXLEN', '~', cap, id(n), 'n', n);
    else pipeline.xadd(STREAM, id(n), 'n', n);
  }
  await pipeline.exec();
}
const read = (group: string, count: number) =>
  redis.xreadgroup('GROUP', group, 'me', 'COUNT', count, 'STREAMS', STREAM, '>');
async function consume(group: string, count: number, from = 1): Promise<void> {
  await read(group, count);
  await redis.xack(STREAM, group, ...Array.from({ length: count }, (_, i) => id(from + i)));
}
const firstId = async () => (await redis.xrange(STREAM, '-', '+', 'COUNT', 1))[0]?.[0];

function trimmerOf(streamMaxLen = 0, epoch: string | null = EPOCH, client = relay) {
  const warnings: { group: unknown; message: string }[] = [];
  const logger: Logger = {
    ...silent,
    warn: (fields: Record<string, unknown>, message: string) =>
      void warnings.push({ group: fields.group, message }),
  };
  const trimmer = createTrimmer(client, {
    ...{ streamMaxLen, epochKey: EPOCH_KEY, listKey: LIST, epoch: () => epoch ?? undefined, logger },
  });
  return { ...trimmer, trim: () => trimmer.run(() => true), warnings };
}

describe('a stream is trimmed', () => {
  test('up to what the slowest group has acknowledged, never beyond', async () => {
    await add(1_000);
    for (const group of ['quick', 'slow']) await redis.xgroup('CREATE', STREAM, group, '0');
    const { remember, trim } = trimmerOf();
    remember(STREAM);
    await consume('quick', 1_000);
    await consume('slow', 450);
    expect(await trim()).toBe(400);
    expect(await firstId()).toBe(id(401));
    await consume('slow', 550, 451);
    await trim();
    // The entry that was delivered last stays, and with it the node that it is in.
    expect(await redis.xlen(STREAM)).toBe(NODE);
  });

  test('not where an entry is pending, though later ones are acknowledged', async () => {
    await add(500);
    await redis.xgroup('CREATE', STREAM, 'group', '0');
    await read('group', 500);
    await redis.xack(
      STREAM,
      'group',
      ...Array.from({ length: 500 }, (_, i) => id(i + 1)).filter((it) => it !== id(301)),
    );
    const { remember, trim } = trimmerOf();
    remember(STREAM);
    expect(await trim()).toBe(300);
    expect(await firstId()).toBe(id(301));
    expect(await redis.xpending(STREAM, 'group')).toMatchObject([1, id(301), id(301), expect.anything()]);
  });

  test.each([
    ['without a group', async () => {}],
    [
      'with a group that was made at 0 and has read nothing',
      async () => void (await redis.xgroup('CREATE', STREAM, 'new', '0')),
    ],
    [
      'with a group that was set back to 0',
      async () => {
        await redis.xgroup('CREATE', STREAM, 'again', '$');
        await redis.xgroup('SETID', STREAM, 'again', '0');
      },
    ],
  ])('not at all %s', async (_, prepare) => {
    await add(500);
    await prepare();
    const { remember, trim } = trimmerOf();
    remember(STREAM);
    expect(await trim()).toBe(0);
    expect(await redis.xlen(STREAM)).toBe(500);
  });

  test('by another pod too, and after a restart, once one has published to it', async () => {
    await add(500);
    await redis.xgroup('CREATE', STREAM, 'group', '$');
    const one = trimmerOf();
    one.remember(STREAM);
    one.remember('no.such.stream');
    await one.run(() => false);
    expect(await trimmerOf().trim()).toBe(400);
    // What is not there, or no stream, leaves the list.
    expect(await redis.hkeys(LIST)).toEqual([STREAM]);
  });

  test('though Redis refuses another stream, which is named', async () => {
    await add(500);
    await redis.xgroup('CREATE', STREAM, 'group', '$');
    await redis.call('ACL', 'SETUSER', 'limited', ...redisRules({ RELAY_ALLOWED_TOPICS: STREAM }));
    const limited = trimmerOf(0, EPOCH, openRedis(asRelay(server.url, 'limited')));
    for (const stream of ['forbidden', STREAM]) limited.remember(stream);
    await expect(limited.trim()).rejects.toThrow('forbidden');
    expect(await redis.hkeys(LIST)).toEqual(['forbidden', STREAM]);
    expect(await redis.xlen(STREAM)).toBe(NODE);
  });

  test('though Redis is full: beside streams without groups, and before it takes new ones', async () => {
    await add(500);
    await redis.xgroup('CREATE', STREAM, 'group', '0');
    await redis.xadd('unread', '*', 'n', 1);
    const { remember, trim } = trimmerOf();
    for (const stream of ['unread', STREAM]) remember(stream);
    await trim();
    await consume('group', 250);
    await redis.config('SET', 'maxmemory', '1');
    try {
      expect(await trim()).toBe(200);
      await redis.xgroup('SETID', STREAM, 'group', id(500));
      remember('new');
      await expect(trim()).rejects.toThrow('OOM');
      expect(await redis.xlen(STREAM)).toBe(NODE);
    } finally {
      await redis.config('SET', 'maxmemory', '0');
    }
    await redis.xadd('new', '*', 'n', 1);
    await trim();
    expect(await redis.hkeys(LIST)).toContain('new');
  });

  test('only while the epoch lasts, as Redis says and as the pod knows: nothing may be lost unseen', async () => {
    await add(500);
    await redis.xgroup('CREATE', STREAM, 'group', '$');
    const { remember, trim } = trimmerOf();
    remember(STREAM);
    for (const name of ['checking:me', 'server/history:2']) {
      await redis.set(EPOCH_KEY, name);
      expect(await trim()).toBe(0);
    }
    await redis.del(EPOCH_KEY);
    expect(await trim()).toBe(0);
    expect(await redis.xlen(STREAM)).toBe(500);
    await redis.set(EPOCH_KEY, EPOCH);
    expect(await trimmerOf(0, null).trim()).toBe(0);
    expect(await trim()).toBe(400);
  });

  test('so that a comparison does not take for trimmed what is lost: the last entry acknowledged stays', async () => {
    const lookup = createLookup(relay, {
      ...{ dlqStreamName: 'dlq', epochKey: EPOCH_KEY, topicProblem: () => null },
    });
    const rows = [id(1), id(500), id(501)].map((entryId) => ({ entryId, eventId: 'x' }));
    await redis.xadd(STREAM, id(1), 'event_id', 'x');
    await add(498, 2);
    await redis.xadd(STREAM, id(500), 'event_id', 'x');
    await redis.xgroup('CREATE', STREAM, 'group', '0');
    const { remember, trim } = trimmerOf();
    remember(STREAM);
    await consume('group', 500);
    await trim();
    // 501 was lost, after the group had read it.
    expect(await lookup.absent(STREAM, rows, false)).toEqual({
      ...{ lost: [rows[2]], trimmed: 1, unreadable: false },
    });
  });
});

describe('somebody is warned', () => {
  const NEAR = 'a consumer group lags so far behind that entries are about to be dropped unread';
  const DROPPED = 'entries were dropped that a consumer group had not acknowledged';

  test('before the cap drops what a group has not read, once, with its name', async () => {
    const { remember, trim, warnings } = trimmerOf(1_000);
    await redis.xgroup('CREATE', STREAM, 'quick', '0', 'MKSTREAM');
    await redis.xgroup('CREATE', STREAM, 'slow', '0');
    remember(STREAM);
    await add(890);
    await consume('quick', 890);
    await trim();
    expect(warnings).toEqual([]);
    await add(20, 891);
    await trim();
    expect(warnings).toEqual([{ group: 'slow', message: NEAR }]);
    await trim();
    // Nor by another pod, so soon.
    const other = trimmerOf(1_000);
    await other.trim();
    expect([...warnings.slice(1), ...other.warnings]).toEqual([]);
  });

  test.each([
    ['but for one entry', 110, 99, 98],
    ['to its only entry', 1, 1, 1],
  ])('not of a stream that is full of what was acknowledged, %s', async (_, cap, entries, acknowledged) => {
    const { remember, trim, warnings } = trimmerOf(cap);
    await redis.xgroup('CREATE', STREAM, 'group', '0', 'MKSTREAM');
    remember(STREAM);
    await add(entries);
    await consume('group', acknowledged);
    await trim();
    expect(warnings).toEqual([]);
  });

  test.each([
    ['that reads, more slowly than the cap drops', async () => consume('group', 150), true],
    ['that has stopped reading', async () => {}, true],
    ['that has not acknowledged what it has read', async () => void (await read('group', 950)), true],
    ['that has read everything in time', async () => consume('group', 950), false],
  ])('when entries were dropped: of a group %s', async (_, act, expected) => {
    const { remember, trim, warnings } = trimmerOf(1_000);
    await redis.xgroup('CREATE', STREAM, 'group', '0', 'MKSTREAM');
    remember(STREAM);
    await add(950);
    // So that only the cap trims from here on.
    await redis.xgroup('CREATE', STREAM, 'never', '0');
    await trim();
    await redis.xgroup('DESTROY', STREAM, 'never');
    await act();
    await add(350, 951, 1_000);
    await trim();
    expect(warnings.some((it) => it.message === DROPPED && it.group === 'group')).toBe(expected);
  });

  test.each([
    [
      'that deletes what it has acknowledged',
      1_000,
      async () => {
        await add(299, 2);
        await consume('group', 149, 2);
        await redis.xdel(STREAM, ...Array.from({ length: 150 }, (_, i) => id(i + 1)));
      },
    ],
    [
      'whose stream was empty, and is full',
      10,
      async () => {
        await add(100);
        await redis.xtrim(STREAM, 'MAXLEN', 0);
      },
    ],
  ])('not of a group %s', async (_, cap, act) => {
    const { remember, trim, warnings } = trimmerOf(cap);
    await redis.xgroup('CREATE', STREAM, 'group', '0', 'MKSTREAM');
    await add(1);
    await consume('group', 1);
    remember(STREAM);
    await trim();
    await act();
    await trim();
    await add(10, 301);
    await trim();
    expect(warnings.filter((it) => it.message === DROPPED)).toEqual([]);
  });
});
