import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { APPEND_CONNECTION } from '../../src/stream/append.ts';
import { createEpoch, type Epoch, EpochOverError, type Loss } from '../../src/stream/epoch.ts';
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
    restore?: (loss: Loss) => Promise<void>;
    databaseTime?: () => Promise<string>;
  } = {},
) {
  const losses: Loss[] = [];
  const redis = openRedis((options.on ?? server).url, { ...APPEND_CONNECTION, retryStrategy: () => 50 });
  const epoch = createEpoch({
    ...{ redis, key: KEY, logger: silent },
    databaseTime: options.databaseTime ?? (async () => new Date(++clock).toISOString()),
    restore: async (loss) => {
      losses.push(loss);
      await options.restore?.(loss);
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
    expect(pod.losses).toEqual([{ intactUntil: null, guard: expect.stringMatching(/^checking:/) }]);
    await pod.confirm(name);
  });

  test('is shared by all pods: one compares, the others wait for it', async () => {
    const comparing = deferred();
    const done = deferred();
    const restore = () => {
      comparing.resolve();
      return done.promise;
    };
    const pods = [startPod({ restore }), startPod({ restore }), startPod({ restore })];
    await comparing.promise;
    expect(await admin.get(KEY)).toMatch(/^checking:/);
    for (const pod of pods) expect(pod.current()).toBeUndefined();
    done.resolve();
    const names = await Promise.all(pods.map((pod) => pod.found()));
    expect(new Set(names).size).toBe(1);
    expect(pods.flatMap((pod) => pod.losses)).toHaveLength(1);
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
    pods[0].doubtAll(name);
    const next = await waitFor(async () => (await admin.get(KEY)) !== name && pods[0].found(), {
      what: 'the next epoch',
      ...NOTICED,
    });
    await waitFor(() => pods[1].current() === next, { what: 'the other pod to follow', ...NOTICED });
    const losses = pods.flatMap((pod) => pod.losses);
    expect(losses.at(-1)).toMatchObject({ intactUntil: null });
    expect(losses).toHaveLength(2);
    // One that speaks of an epoch that is over ends nothing.
    pods[1].doubtAll(name);
    expect(pods[1].current()).toBe(next);
  });
});

describe('a Redis that an idle pod is connected to', () => {
  test('is found emptied, though nobody asks for anything', async () => {
    const pod = startPod();
    const name = await pod.found();
    await admin.flushall();
    await waitFor(() => pod.losses.length === 2, { what: 'the loss to be noticed', ...NOTICED });
    expect(await waitFor(pod.current, { what: 'the next epoch', ...NOTICED })).not.toBe(name);
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
    const pod = startPod({
      databaseTime: async () => {
        if (isAway) throw new Error('no database');
        return new Date(++clock).toISOString();
      },
    });
    await pod.found();
    isAway = true;
    const stamp = await admin.get(`${KEY}:intact`);
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
      restore: async () => {
        if (++tries < 3) throw new Error('no database');
      },
    });
    await pod.found();
    expect(tries).toBe(3);
  });

  test('a comparison that a second loss overtakes is void', async () => {
    let tries = 0;
    const pod = startPod({
      restore: async () => {
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
    const replica = await createRedis({ args: ['--replicaof', '127.0.0.1', String(server.port)] });
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
