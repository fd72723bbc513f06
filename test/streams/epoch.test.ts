import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { NotReadyError } from '../../src/lifecycle.ts';
import { APPEND_CONNECTION, notesKeyOf } from '../../src/streams/append.ts';
import {
  createEpoch,
  type Epoch,
  EpochOverError,
  endEpoch,
  epochId,
  isComparing,
  type Loss,
} from '../../src/streams/epoch.ts';
import { createLookup } from '../../src/streams/lookup.ts';
import { createRedis, type TestRedis } from '../support/servers.ts';
import { deferred, openAdminRedis, openRedis, silent } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const KEY = 'bull:relay:epoch';
/** The epoch is found out within milliseconds; a connection is back within a second. */
const NOTICED = { timeoutMs: 15_000 };

const server = await createRedis();
const admin = openAdminRedis(server.adminUrl);
const running: Epoch[] = [];
let clock = 0;

beforeEach(async () => {
  await admin.flushall();
  clock = 0;
});

afterEach(async () => {
  await Promise.all(running.splice(0).map((it) => it.stop()));
});

/** A pod's epoch; `losses` are the comparisons that it was asked for. */
function startPod(
  options: {
    on?: TestRedis;
    recover?: (loss: Loss) => Promise<void>;
    databaseTime?: () => Promise<string>;
    /** Between its look at the epoch and its attempt to be the one that compares. */
    beforeChecking?: () => Promise<void>;
  } = {},
) {
  const losses: Loss[] = [];
  const redis = openRedis((options.on ?? server).url, { ...APPEND_CONNECTION, retryStrategy: () => 50 });
  const set = redis.set.bind(redis) as (...args: unknown[]) => Promise<'OK' | null>;
  if (options.beforeChecking)
    redis.set = (async (...args: unknown[]) => {
      if (args[0] === `${KEY}:checker`) await options.beforeChecking?.();
      return set(...args);
    }) as typeof redis.set;
  const epoch = createEpoch({
    ...{ redis, key: KEY, logger: silent },
    databaseTime: options.databaseTime ?? (async () => new Date(++clock).toISOString()),
    recover: async (loss) => {
      losses.push(loss);
      await options.recover?.(loss);
    },
  });
  running.push(epoch);
  epoch.start();
  return { ...epoch, redis, losses, found: () => waitFor(epoch.current, { what: 'an epoch', ...NOTICED }) };
}

describe('an epoch', () => {
  test('begins with a comparison, where there was none', async () => {
    const pod = startPod();
    const name = await pod.found();
    expect(await admin.get(KEY)).toBe(name);
    expect(pod.losses).toEqual([{ intactUntil: null }]);
    await pod.confirm(name);
  });

  test('is shared by all pods: one compares, the others wait for it', async () => {
    const comparing = deferred();
    const done = deferred();
    const recover = () => {
      comparing.resolve();
      return done.promise;
    };
    const pods = [startPod({ recover }), startPod({ recover }), startPod({ recover })];
    await comparing.promise;
    expect(await isComparing(openRedis(server.url), KEY)).toBe(true);
    for (const pod of pods) expect(pod.current()).toBeUndefined();
    done.resolve();
    const names = await Promise.all(pods.map((pod) => pod.found()));
    expect(await isComparing(openRedis(server.url), KEY)).toBe(false);
    expect(new Set(names).size).toBe(1);
    expect(pods.flatMap((pod) => pod.losses)).toHaveLength(1);
  });

  test('is not compared for again by a pod that saw it begin too late', async () => {
    const done = deferred();
    const first = startPod({ recover: () => done.promise });
    await waitFor(() => first.losses.length === 1, { what: 'the comparison' });
    // It has seen that the first one compares, and becomes the next one to do so.
    const second = startPod({
      beforeChecking: async () => {
        done.resolve();
        await first.found();
      },
    });
    expect(await second.found()).toBe(first.current());
    expect(second.losses).toEqual([]);
    expect(await admin.exists(`${KEY}:checker`)).toBe(0);
  });

  test('is taken without a comparison by a pod that starts later, and lasts through a lost connection', async () => {
    const name = await startPod().found();
    const later = startPod();
    expect(await later.found()).toBe(name);
    await admin.call('CLIENT', 'KILL', 'TYPE', 'normal', 'SKIPME', 'yes');
    await waitFor(() => later.current() === undefined, { what: 'the connection to be lost' });
    expect(await later.found()).toBe(name);
    expect(later.losses).toEqual([]);
  });

  test('is over for what was appended in it, once Redis was emptied', async () => {
    const pod = startPod();
    const name = await pod.found();
    await admin.flushall();
    await expect(pod.confirm(name)).rejects.toThrow(EpochOverError);
    const next = await waitFor(() => pod.current(), { what: 'the next epoch', ...NOTICED });
    expect(next).not.toBe(name);
    await expect(pod.confirm(name)).rejects.toThrow(EpochOverError);
    await pod.confirm(next);
    expect(pod.losses).toHaveLength(2);
  });

  test('is not confirmed when Redis does not answer; it is not over for that', async () => {
    const pod = startPod();
    const name = await pod.found();
    pod.redis.disconnect();
    const error = await pod.confirm(name).catch((it: Error) => it);
    expect(error).toBeInstanceOf(Error);
    await waitFor(() => pod.current() === undefined, { what: 'the connection to be lost' });
    pod.redis.connect().catch(() => {});
    expect(await pod.found()).toBe(name);
    await pod.confirm(name);
  });

  test('ends for all pods when a stream has vanished, and everything is compared', async () => {
    const pods = [startPod(), startPod()] as const;
    const name = await pods[0].found();
    await pods[1].found();
    await waitFor(() => admin.exists(`${KEY}:intact`), { what: 'a stamp', ...NOTICED });
    pods[0].endFor(name);
    const next = await waitFor(async () => (await admin.get(KEY)) !== name && pods[0].found(), {
      what: 'the next epoch',
      ...NOTICED,
    });
    await waitFor(() => pods[1].current() === next, { what: 'the other pod to follow', ...NOTICED });
    const losses = pods.flatMap((pod) => pod.losses);
    expect(losses.at(-1)).toMatchObject({ intactUntil: null });
    expect(losses).toHaveLength(2);
    // One that speaks of an epoch that is over ends nothing.
    pods[1].endFor(name);
    expect(pods[1].current()).toBe(next);
  });
});

describe('a stream that was noted in an epoch', () => {
  const STREAM = 'identity.user.v1';
  const lookup = createLookup(openRedis(server.url), { dlqStreamName: 'dlq', epochKey: KEY });

  /** Two entries, of which an append or a comparison has noted the last one. */
  async function noted(stream = STREAM): Promise<void> {
    for (const id of ['5-7', '5-8']) await admin.xadd(stream, id, 'event_id', 'x');
    await lookup.absent(stream, [], true);
  }
  /** Resolves when the pod has looked at Redis, and once more. */
  async function looks(): Promise<void> {
    for (let i = 0; i < 2; i++) {
      const stamp = await admin.get(`${KEY}:intact`);
      await waitFor(async () => (await admin.get(`${KEY}:intact`)) !== stamp, { what: 'a look', ...NOTICED });
    }
  }

  test.each([
    ['was deleted', async () => void (await admin.del(STREAM))],
    [
      'was deleted and made again by a consumer',
      async () => {
        await admin.del(STREAM);
        await admin.xgroup('CREATE', STREAM, 'group', '$', 'MKSTREAM');
      },
    ],
    [
      'was deleted, and an older one written and emptied',
      async () => {
        await admin.del(STREAM);
        await admin.xadd(STREAM, '1-9', 'n', '1');
        await admin.xtrim(STREAM, 'MAXLEN', 0);
      },
    ],
    [
      'was deleted, and one written and emptied that lacks its last entry alone',
      async () => {
        const [last] = await admin.xrevrange(STREAM, '+', '-', 'COUNT', 1);
        const [ms, sequence] = (last?.[0] ?? '').split('-').map(Number);
        await admin.del(STREAM);
        await admin.xadd(STREAM, `${ms}-${Number(sequence) - 1}`, 'n', '1');
        await admin.xtrim(STREAM, 'MAXLEN', 0);
      },
    ],
  ])('and %s ends it, though nobody appends: everything is compared', async (_, lose) => {
    const pod = startPod();
    const name = await pod.found();
    await noted();
    await lose();
    await waitFor(() => pod.losses.length === 2, { what: 'the loss to be noticed', ...NOTICED });
    expect(pod.losses[1]).toEqual({ intactUntil: null });
    expect(await pod.found()).not.toBe(name);
    // The next one has its own notes.
    expect(await admin.exists(notesKeyOf(KEY))).toBe(0);
    await looks();
    expect(pod.losses).toHaveLength(2);
  });

  test('and trimmed to nothing, emptied entry by entry, or replaced by something else, is not lost', async () => {
    const pod = startPod();
    const name = await pod.found();
    for (const stream of [STREAM, 'other', 'string']) await noted(stream);
    await admin.xtrim(STREAM, 'MAXLEN', 0);
    for (const [id] of await admin.xrange('other', '-', '+')) await admin.xdel('other', id);
    await admin.set('string', 'x');
    await looks();
    expect(pod.current()).toBe(name);
    expect(pod.losses).toHaveLength(1);
  });

  test('is looked at in its turn, where there are many', async () => {
    // Redis scans a hash whole that is as small as that.
    await admin.config('SET', 'hash-max-listpack-entries', '16');
    const pod = startPod();
    await pod.found();
    const streams = Array.from({ length: 150 }, (_, i) => `${STREAM}.${i}`);
    for (const stream of streams) await noted(stream);
    const [, seenFirst] = await admin.hscan(notesKeyOf(KEY), '0', 'COUNT', 100);
    const later = streams.find((it) => !seenFirst.includes(it)) as string;
    expect(await admin.del(later)).toBe(1);
    await waitFor(() => pod.losses.length === 2, { what: 'the loss to be noticed', timeoutMs: 25_000 });
  });
});

describe('an operator who ends the epoch', () => {
  const redis = openRedis(server.url);
  function end(recover: (loss: Loss) => Promise<void>, timeoutMs = 15_000, on = redis): Promise<void> {
    return endEpoch({
      ...{ redis: on, key: KEY, timeoutMs, recover },
      databaseTime: async () => new Date(++clock).toISOString(),
    });
  }

  test('begins the next one after the comparison, which the pods await and take', async () => {
    const pods = [startPod(), startPod()];
    const names = await Promise.all(pods.map((pod) => pod.found()));
    const stamp = await waitFor(() => admin.get(`${KEY}:intact`), { what: 'a stamp' });
    await admin.hset(notesKeyOf(KEY), 'stream', '1-1');
    const losses: Loss[] = [];
    await end(async (loss) => {
      losses.push(loss);
      expect(await isComparing(redis, KEY)).toBe(true);
      expect(await admin.exists(notesKeyOf(KEY))).toBe(0);
      for (const [i, pod] of pods.entries())
        await expect(pod.confirm(names[i] as string)).rejects.toThrow(EpochOverError);
      expect(pods.map((pod) => pod.current())).toEqual([undefined, undefined]);
    });
    const next = await admin.get(KEY);
    for (const pod of pods) expect(await pod.found()).toBe(next);
    expect(names).not.toContain(next);
    expect(losses).toEqual([{ intactUntil: expect.any(String) }]);
    expect((losses[0]?.intactUntil as string) >= stamp).toBe(true);
    // What the pods did at their start.
    expect(pods.flatMap((pod) => pod.losses)).toHaveLength(1);
    expect(await admin.exists(`${KEY}:checker`)).toBe(0);
  });

  test('waits for another process that compares', async () => {
    const done = deferred();
    const pod = startPod({ recover: () => done.promise });
    await waitFor(() => pod.losses.length === 1, { what: 'the comparison' });
    let isOver = false;
    const ending = end(async () => {
      expect(isOver).toBe(true);
    });
    await expect(end(async () => {}, 300)).rejects.toThrow(NotReadyError);
    isOver = true;
    done.resolve();
    await ending;
    await waitFor(async () => pod.current() === (await admin.get(KEY)) && pod.current(), {
      what: 'the pod to follow',
      ...NOTICED,
    });
  });

  test('whose comparison fails leaves it to the pods', async () => {
    const pod = startPod();
    const name = await pod.found();
    await expect(end(() => Promise.reject(new Error('no database')))).rejects.toThrow('no database');
    await waitFor(() => pod.losses.length === 2, { what: 'the pod to compare', ...NOTICED });
    expect(await pod.found()).not.toBe(name);
  });

  test('whose comparison is overtaken by a loss begins anew', async () => {
    let tries = 0;
    await end(async () => {
      if (++tries === 1) await admin.flushall();
    });
    expect(tries).toBe(2);
    expect(await startPod().found()).toBe(await admin.get(KEY));
  });

  test('is refused by a replica', async () => {
    const replica = await createRedis({ args: ['--replicaof', '127.0.0.1', String(server.port)] });
    await expect(end(async () => {}, 300, openRedis(replica.url))).rejects.toThrow(NotReadyError);
  });
});

test('the name of an epoch has a short id, by which entries remember it', async () => {
  const name = await startPod().found();
  expect(name).toMatch(/^\w+\/\w+:[\w-]{12}$/);
  expect(name.endsWith(`:${epochId(name)}`)).toBe(true);
  expect(epochId(name)).toMatch(/^[\w-]{12}$/);
});

describe('a Redis that an idle pod is connected to', () => {
  test('is found emptied, though nobody asks for anything', async () => {
    const pod = startPod();
    const name = await pod.found();
    await admin.flushall();
    await waitFor(() => pod.losses.length === 2, { what: 'the loss to be noticed', ...NOTICED });
    expect(await waitFor(pod.current, { what: 'the next epoch', ...NOTICED })).not.toBe(name);
  });

  test('is found to have had another history in between, though the connection has lasted', async () => {
    const own = await createRedis();
    const ownAdmin = openAdminRedis(own.adminUrl);
    const pod = startPod({ on: own });
    const name = await pod.found();
    await ownAdmin.call('REPLICAOF', '127.0.0.1', '1');
    await ownAdmin.call('REPLICAOF', 'NO', 'ONE');
    await waitFor(() => pod.losses.length === 2, { what: 'the change to be noticed', ...NOTICED });
    expect(await pod.found()).not.toBe(name);
  });

  test('is stamped with the time up to which nothing can have been lost', async () => {
    const pod = startPod();
    await pod.found();
    const began = await admin.get(`${KEY}:intact`);
    await waitFor(async () => (await admin.get(`${KEY}:intact`)) !== began, { what: 'a stamp', ...NOTICED });
    const stamp = await admin.get(`${KEY}:intact`);
    // A restart, as far as the epoch can tell.
    await admin.set(KEY, 'another');
    await waitFor(() => pod.losses.length === 2, { what: 'the comparison', ...NOTICED });
    expect(pod.losses[1]?.intactUntil).toBe(stamp);
  });

  test('is not stamped while the database is away, and is looked at all the same', async () => {
    let isAway = false;
    let asked = 0;
    const pod = startPod({
      databaseTime: async () => {
        asked++;
        if (isAway) throw new Error('no database');
        return new Date(++clock).toISOString();
      },
    });
    await pod.found();
    isAway = true;
    const stamp = await admin.get(`${KEY}:intact`);
    const before = asked;
    await waitFor(() => asked >= before + 2, { what: 'the first of two looks to be over', ...NOTICED });
    expect(await admin.get(`${KEY}:intact`)).toBe(stamp);
    await admin.set(KEY, 'another');
    await waitFor(() => pod.losses.length >= 2, { what: 'the comparison', ...NOTICED });
    expect(pod.losses.at(-1)?.intactUntil).toBe(stamp);
    expect(pod.current()).toBeUndefined();
    isAway = false;
    await pod.found();
  });
});

describe('after a restart', () => {
  test('an old name that came back with the data is not taken for an epoch', async () => {
    const fragile = await createRedis();
    const pod = startPod({ on: fragile });
    const name = await pod.found();
    await fragile.restart();
    const next = await waitFor(() => pod.losses.length === 2 && pod.current(), {
      what: 'the next epoch',
      ...NOTICED,
    });
    expect(next).not.toBe(name);
    await expect(pod.confirm(name)).rejects.toThrow(EpochOverError);
  });

  test('a comparison that fails is made again, and nothing is appended before it is through', async () => {
    let tries = 0;
    const pod = startPod({
      recover: async () => {
        if (++tries < 3) throw new Error('no database');
      },
    });
    await pod.found();
    expect(tries).toBe(3);
  });

  test('a comparison that a second loss overtakes is void', async () => {
    let tries = 0;
    const pod = startPod({
      recover: async () => {
        if (++tries === 1) await admin.flushall();
      },
    });
    const name = await pod.found();
    expect(tries).toBe(2);
    expect(await admin.get(KEY)).toBe(name);
  });

  test('a pod that dies in mid-comparison is replaced', async () => {
    // As it left things.
    await admin.set(`${KEY}:checker`, 'dead', 'PX', 1_000);
    await admin.set(KEY, 'checking:dead');
    const pod = startPod();
    await pod.found();
    expect(pod.losses).toHaveLength(1);
  });

  test('a replica takes no epoch; promoted, it begins one of its own', async () => {
    await startPod().found();
    // Even one that would take writes.
    const replica = await createRedis({
      args: ['--replicaof', '127.0.0.1', String(server.port), '--replica-read-only', 'no'],
    });
    const reader = openAdminRedis(replica.adminUrl);
    const known = async () => {
      const [there, here] = await Promise.all([reader.get(KEY), admin.get(KEY)]);
      return there !== null && there === here && there;
    };
    const name = await waitFor(known, { what: 'the replica to be in step' });
    const pod = startPod({ on: replica });
    expect(await pod.known()).toBeUndefined();
    await reader.call('REPLICAOF', 'NO', 'ONE');
    expect(await pod.found()).not.toBe(name);
    expect(pod.losses).toHaveLength(1);
  });
});
