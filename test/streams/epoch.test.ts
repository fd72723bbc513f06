import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { FAILS_FAST } from '../../src/connections/servers.ts';
import type { DatabaseState } from '../../src/event.ts';
import { NotReadyError } from '../../src/lifecycle.ts';
import {
  type Epoch,
  EpochOverError,
  endEpoch,
  epochId,
  forgetEpoch,
  isComparing,
  type Loss,
} from '../../src/streams/epoch.ts';
import { keysOf } from '../../src/streams/epoch-script.ts';
import { createEpoch } from '../../src/streams/epoch-watch.ts';
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

const GENERATION = '00000001.1.1';
const database = async (): Promise<DatabaseState> => ({
  now: new Date(++clock).toISOString(),
  generation: GENERATION,
});

const isOurs = async (): Promise<void> => {};

/** A pod's epoch; `losses` are the comparisons that it was asked for. */
function startPod(
  options: {
    on?: TestRedis;
    recover?: (loss: Loss) => Promise<void>;
    database?: (known: string | null) => Promise<DatabaseState>;
    assertOwner?: () => Promise<void>;
    /** Between its look at the epoch and its attempt to be the one that compares. */
    beforeChecking?: () => Promise<void>;
  } = {},
) {
  const losses: Loss[] = [];
  const accepted: string[] = [];
  const redis = openRedis((options.on ?? server).url, { ...FAILS_FAST, retryStrategy: () => 50 });
  const set = redis.set.bind(redis) as (...args: unknown[]) => Promise<'OK' | null>;
  if (options.beforeChecking)
    redis.set = (async (...args: unknown[]) => {
      if (args[0] === `${KEY}:checker`) await options.beforeChecking?.();
      return set(...args);
    }) as typeof redis.set;
  const epoch = createEpoch({
    ...{ redis, key: KEY, logger: silent },
    database: options.database ?? database,
    accept: (generation) => void accepted.push(generation),
    assertOwner: options.assertOwner ?? isOurs,
    recover: async (loss) => {
      losses.push(loss);
      await options.recover?.(loss);
    },
  });
  running.push(epoch);
  epoch.start();
  return {
    ...epoch,
    redis,
    losses,
    accepted,
    found: () => waitFor(epoch.current, { what: 'an epoch', ...NOTICED }),
  };
}

describe('an epoch', () => {
  test('begins with a comparison, where there was none', async () => {
    const pod = startPod();
    const name = await pod.found();
    expect(await admin.get(KEY)).toBe(name);
    expect(pod.losses).toMatchObject([{ checkpoint: null, forgotten: true }]);
    await pod.confirm(name);
  });

  test('begins without a checkpoint that an earlier build wrote as its session printed times', async () => {
    await admin.set(`${KEY}:checkpoint`, '28.11.2026 23:43:17.123 IST');
    const pod = startPod();
    await pod.found();
    expect(pod.losses).toMatchObject([{ checkpoint: null }]);
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

  test('of before is not taken again, as after SWAPDB to and fro: everything since is compared', async () => {
    const pod = startPod();
    const first = await pod.found();
    await admin.set(KEY, 'of another database');
    await waitFor(() => pod.losses.length === 2, { what: 'the second comparison', ...NOTICED });
    const second = await pod.found();
    expect(second).not.toBe(first);
    await admin.set(KEY, first);
    await waitFor(() => pod.losses.length === 3, { what: 'the third comparison', ...NOTICED });
    expect([first, second]).not.toContain(await pod.found());
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
    await waitFor(() => admin.exists(`${KEY}:checkpoint`), { what: 'a stamp', ...NOTICED });
    pods[0].endFor(name);
    const next = await waitFor(async () => (await admin.get(KEY)) !== name && pods[0].found(), {
      what: 'the next epoch',
      ...NOTICED,
    });
    await waitFor(() => pods[1].current() === next, { what: 'the other pod to follow', ...NOTICED });
    const losses = pods.flatMap((pod) => pod.losses);
    expect(losses.at(-1)).toMatchObject({ checkpoint: null });
    expect(losses).toHaveLength(2);
    // One that speaks of an epoch that is over ends nothing.
    pods[1].endFor(name);
    expect(pods[1].current()).toBe(next);
  });

  test('is not ended by a pod that found the stream of the one before lost, and is slow', async () => {
    const [quick, slow] = [startPod(), startPod()] as const;
    const name = await quick.found();
    await slow.found();
    const get = slow.redis.get.bind(slow.redis);
    // The answer of Redis waits in the pod, as where its CPU is busy, until the next epoch has begun.
    slow.redis.get = (async (key: string) => {
      const found = await get(key);
      if (key === KEY && found === name) await quick.found();
      return found;
    }) as typeof get;
    for (const pod of [slow, quick]) pod.endFor(name);
    const next = await quick.found();
    await waitFor(() => slow.current() !== undefined, { what: 'the slow pod to follow', ...NOTICED });
    expect([await admin.get(KEY), slow.current()]).toEqual([next, next]);
    expect([...quick.losses, ...slow.losses]).toHaveLength(2);
  });
});

describe('a stream that was noted in an epoch', () => {
  const STREAM = 'identity.user.v1';
  const lookup = createLookup(openRedis(server.url), {
    ...{ dlqStreamName: 'dlq', epochKey: KEY, topicProblem: () => null },
  });

  /** Two entries, of which an append or a comparison has noted the last one. */
  async function noted(stream = STREAM): Promise<void> {
    for (const id of ['5-7', '5-8']) await admin.xadd(stream, id, 'event_id', 'x');
    await lookup.absent(stream, [], true);
  }
  /** Resolves when the pod has looked at Redis, and once more. */
  async function looks(): Promise<void> {
    for (let i = 0; i < 2; i++) {
      const stamp = await admin.get(`${KEY}:checkpoint`);
      await waitFor(async () => (await admin.get(`${KEY}:checkpoint`)) !== stamp, {
        what: 'a look',
        ...NOTICED,
      });
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
      'was replaced by an older copy that has entries',
      async () => {
        await admin.xtrim(STREAM, 'MAXLEN', 1);
        await admin.rename(STREAM, 'newer');
        await admin.xadd(STREAM, '5-7', 'event_id', 'x');
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
    expect(pod.losses[1]).toMatchObject({ checkpoint: null, forgotten: false });
    expect(await pod.found()).not.toBe(name);
    // The next one has its own notes.
    expect(await admin.exists(keysOf(KEY).lastEntries)).toBe(0);
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
    const [, seenFirst] = await admin.hscan(keysOf(KEY).lastEntries, '0', 'COUNT', 100);
    const later = streams.find((it) => !seenFirst.includes(it)) as string;
    expect(await admin.del(later)).toBe(1);
    await waitFor(() => pod.losses.length === 2, { what: 'the loss to be noticed' });
  });
});

describe('an operator who ends the epoch', () => {
  const redis = openRedis(server.url);
  function end(recover: (loss: Loss) => Promise<void>, timeoutMs = 15_000, on = redis): Promise<void> {
    return endEpoch({
      ...{ redis: on, key: KEY, timeoutMs, recover },
      ...{ database, assertOwner: isOurs },
    });
  }

  test('begins the next one after the comparison, which the pods await and take', async () => {
    const pods = [startPod(), startPod()];
    const names = await Promise.all(pods.map((pod) => pod.found()));
    const stamp = await waitFor(() => admin.get(`${KEY}:checkpoint`), { what: 'a stamp' });
    await admin.hset(keysOf(KEY).lastEntries, 'stream', '1-1');
    const losses: Loss[] = [];
    await end(async (loss) => {
      losses.push(loss);
      expect(await isComparing(redis, KEY)).toBe(true);
      expect(await admin.exists(keysOf(KEY).lastEntries)).toBe(0);
      for (const [i, pod] of pods.entries())
        await expect(pod.confirm(names[i] as string)).rejects.toThrow(EpochOverError);
      expect(pods.map((pod) => pod.current())).toEqual([undefined, undefined]);
    });
    const next = await admin.get(KEY);
    for (const pod of pods) expect(await pod.found()).toBe(next);
    expect(names).not.toContain(next);
    expect(losses).toMatchObject([{ checkpoint: expect.any(String), forgotten: false }]);
    expect((losses[0]?.checkpoint as string) >= stamp).toBe(true);
    // What the pods did at their start.
    expect(pods.flatMap((pod) => pod.losses)).toHaveLength(1);
    expect(await admin.exists(`${KEY}:checker`)).toBe(0);
  });

  test('of another database’s queue ends none', async () => {
    const pod = startPod();
    const name = await pod.found();
    const losses: Loss[] = [];
    const ending = endEpoch({
      ...{ redis, key: KEY, timeoutMs: 15_000, database },
      recover: async (loss) => void losses.push(loss),
      assertOwner: () => Promise.reject(new Error('belongs to another')),
    });
    await expect(ending).rejects.toThrow('belongs to another');
    expect([await admin.get(KEY), pod.current(), losses]).toEqual([name, name, []]);
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
    const began = await admin.get(`${KEY}:checkpoint`);
    await waitFor(async () => (await admin.get(`${KEY}:checkpoint`)) !== began, {
      what: 'a stamp',
      ...NOTICED,
    });
    const stamp = await admin.get(`${KEY}:checkpoint`);
    // A restart, as far as the epoch can tell.
    await admin.set(KEY, 'another');
    await waitFor(() => pod.losses.length === 2, { what: 'the comparison', ...NOTICED });
    expect(pod.losses[1]?.checkpoint).toBe(stamp);
  });

  test('is not stamped while the database is away, and is looked at all the same', async () => {
    let isAway = false;
    let asked = 0;
    const pod = startPod({
      database: () => {
        asked++;
        return isAway ? Promise.reject(new Error('no database')) : database();
      },
    });
    await pod.found();
    isAway = true;
    const stamp = await admin.get(`${KEY}:checkpoint`);
    const before = asked;
    await waitFor(() => asked >= before + 2, { what: 'the first of two looks to be over', ...NOTICED });
    expect(await admin.get(`${KEY}:checkpoint`)).toBe(stamp);
    await admin.set(KEY, 'another');
    await waitFor(() => pod.reason() === 'no database', { what: 'the end of the epoch', ...NOTICED });
    expect(pod.current()).toBeUndefined();
    isAway = false;
    await pod.found();
    expect(pod.losses.at(-1)?.checkpoint).toBe(stamp);
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

describe('a database of another generation', () => {
  /** A database that all pods are connected to. */
  function aDatabase(first = GENERATION) {
    const state = { generation: first };
    return { state, database: async () => ({ ...(await database()), generation: state.generation }) };
  }

  test('ends the epoch, and its rows are looked up before the next one begins, by one pod for all', async () => {
    const { state, database } = aDatabase();
    const pods = [startPod({ database }), startPod({ database })];
    const [name] = await Promise.all(pods.map((pod) => pod.found()));
    state.generation = '00000002.2.1';
    // Nobody asks for anything: the pods look by themselves.
    await waitFor(() => pods.flatMap((pod) => pod.losses).length === 2, { what: 'a comparison', ...NOTICED });
    await waitFor(() => pods.every((pod) => pod.current() && pod.current() !== name), {
      what: 'the next epoch',
      ...NOTICED,
    });
    expect(pods.flatMap((pod) => pod.losses).filter((loss) => loss.forgotten)).toHaveLength(2); // at the start, too
    expect(pods[0]?.current()).toBe(pods[1]?.current());
    for (const pod of pods) expect(pod.accepted.at(-1)).toBe('00000002.2.1');
    // Each later one knows it.
    const late = startPod({ database });
    await late.found();
    expect(late.losses).toEqual([]);
  });

  test('is looked up anew where it changed while its rows were looked up', async () => {
    const { state, database } = aDatabase();
    const pod = startPod({
      database,
      recover: async () => {
        if (pod.losses.length === 1) state.generation = '00000001.2.1';
      },
    });
    await pod.found();
    expect(pod.losses.map((loss) => loss.forgotten)).toEqual([true, true]);
  });

  test('is not looked up again because Redis lost something, or an operator ended the epoch', async () => {
    const pod = startPod();
    const name = await pod.found();
    pod.endFor(name);
    await waitFor(() => pod.losses.length === 2, { what: 'the comparison', ...NOTICED });
    await pod.found();
    await endEpoch({
      redis: openRedis(server.url),
      key: KEY,
      timeoutMs: 15_000,
      ...{ database, assertOwner: isOurs },
      recover: async () => {},
    });
    await waitFor(async () => pod.current() === (await admin.get(KEY)), {
      what: 'the next epoch',
      ...NOTICED,
    });
    expect(pod.losses.map((loss) => loss.forgotten)).toEqual([true, false]);
  });

  test('is left to the pods by an operator who ends the epoch first', async () => {
    await startPod().found();
    await Promise.all(running.splice(0).map((it) => it.stop()));
    const { database } = aDatabase('00000002.2.1');
    await endEpoch({
      redis: openRedis(server.url),
      key: KEY,
      timeoutMs: 15_000,
      ...{ database, assertOwner: isOurs },
      recover: async () => {},
    });
    const pod = startPod({ database });
    await pod.found();
    expect(pod.losses).toMatchObject([{ forgotten: true }]);
  });

  test('is told which one was looked up last, and again that there is none once an operator has said so', async () => {
    const told: (string | null)[] = [];
    const pod = startPod({
      database: (known) => {
        told.push(known);
        return database();
      },
    });
    await pod.found();
    expect(new Set(told)).toEqual(new Set([null, GENERATION]));
    told.length = 0;
    await forgetEpoch(openRedis(server.url), KEY);
    await waitFor(() => pod.losses.length === 2 && pod.current(), { what: 'the next epoch', ...NOTICED });
    expect(told).toContain(null);
    expect(pod.losses[1]).toMatchObject({ checkpoint: null, forgotten: true });
  });
});

test('an epoch is taken by no pod of a database that does not have the queue, also after Redis was emptied', async () => {
  let owner = 'ours';
  const pod = startPod({
    assertOwner: async () => {
      if (owner !== 'ours') throw new Error('belongs to another');
    },
  });
  await pod.found();
  owner = 'theirs';
  await admin.flushall();
  await waitFor(() => pod.reason() === 'belongs to another', { what: 'the reason', ...NOTICED });
  expect(pod.current()).toBeUndefined();
  expect(await admin.exists(KEY)).toBe(0);
});

test('an epoch is not begun where Redis was emptied and given to another database while the pod was about to compare', async () => {
  let owner = 'ours';
  const pod = startPod({
    assertOwner: async () => {
      if (owner !== 'ours') throw new Error('belongs to another');
      owner = 'theirs';
      await admin.flushall();
    },
  });
  await waitFor(() => pod.reason() === 'belongs to another', { what: 'the reason', ...NOTICED });
  expect([pod.current(), pod.losses]).toEqual([undefined, []]);
});

describe('two comparisons', () => {
  test('of one pod follow one another, though its connection is lost in the middle of the first', async () => {
    let comparing = 0;
    let most = 0;
    const first = deferred();
    const pod = startPod({
      recover: async () => {
        most = Math.max(most, ++comparing);
        if (pod.losses.length === 1) await first.promise;
        comparing--;
      },
    });
    await waitFor(() => pod.losses.length === 1, { what: 'the comparison', ...NOTICED });
    const ready = new Promise((resolve) => pod.redis.once('ready', resolve));
    await admin.call('CLIENT', 'KILL', 'TYPE', 'normal', 'SKIPME', 'yes');
    await ready;
    // Nobody else keeps it from beginning another.
    await admin.del(`${KEY}:checker`);
    pod.invalidate();
    await new Promise((resolve) => setImmediate(resolve));
    expect(pod.losses).toHaveLength(1);
    first.resolve();
    await pod.found();
    expect(pod.losses).toHaveLength(2);
    expect(most).toBe(1);
  });

  test('of two pods do not confirm what the other has found', async () => {
    const done = deferred();
    const slow = startPod({ recover: () => done.promise });
    await waitFor(() => slow.losses.length === 1, { what: 'the comparison', ...NOTICED });
    await slow.losses[0]?.confirm();
    // It hung, and was replaced.
    await admin.del(`${KEY}:checker`);
    const other = startPod();
    const name = await other.found();
    await expect(slow.losses[0]?.confirm()).rejects.toThrow(EpochOverError);
    done.resolve();
    expect(await slow.found()).toBe(name);
  });
});
