import type { Redis } from 'ioredis';
import { afterEach, beforeAll, beforeEach, expect, onTestFinished, test } from 'vitest';
import { withDeadline } from '../../src/lifecycle.ts';
import { createPoisonGuard, type PoisonGuard } from '../../src/publish/poison-guard.ts';
import { asRelay } from '../support/least-privilege.ts';
import { createRedis } from '../support/servers.ts';
import { type AdminRedis, deferred, openAdminRedis, openRedis } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const EVENT = 'an-event';
const JOB = `job:${EVENT}`;

let redis: Redis;
let admin: AdminRedis;
const open: PoisonGuard[] = [];

beforeAll(async () => {
  const { url, adminUrl } = await createRedis();
  redis = openRedis(url);
  admin = openAdminRedis(adminUrl);
});

beforeEach(async () => {
  await admin.flushall();
  await admin.hset(JOB, { timestamp: 1, stc: 1 });
});

afterEach(() => {
  for (const guard of open.splice(0)) guard.stop();
});

function aPod(maxCrashes = 3, connection = redis): PoisonGuard {
  const guard = createPoisonGuard({ redis: connection, jobKey: (id) => `job:${id}`, maxCrashes });
  open.push(guard);
  return guard;
}
const inTime = () => Date.now() + 10_000;

/** A pod that starts to publish the event and is never heard of again. */
async function dies(maxCrashes?: number): Promise<void> {
  const begun = deferred();
  void aPod(maxCrashes).alone(EVENT, inTime(), () => {
    begun.resolve();
    return new Promise(() => {});
  });
  await begun.promise;
}
const starts = () => admin.hget(JOB, 'relay:starts');

test('an event that ends its pod is given up at the second crash while it was alone, the third in all', async () => {
  await dies();
  await dies();
  await expect(aPod().alone(EVENT, inTime(), async () => 'appended')).rejects.toThrow(
    'the pod ended 3 times while publishing this event; see RELAY_MAX_CRASHES',
  );
});

test('a limit of 1 gives nobody up for the first crash, when several events were in progress', async () => {
  expect(await aPod(1).alone(EVENT, inTime(), async () => 'appended')).toBe('appended');
  await admin.hset(JOB, 'stc', 1);
  await dies(1);
  await expect(aPod(1).alone(EVENT, inTime(), async () => 'appended')).rejects.toThrow('ended 2 times');
});

test('whatever the answer was, nothing is counted against an event that was answered', async () => {
  for (const answer of [async () => 'refused', () => Promise.reject(new Error('unavailable'))]) {
    await admin.hset(JOB, 'stc', 1);
    await dies();
    await aPod()
      .alone(EVENT, inTime(), answer)
      .catch(() => {});
    expect(await admin.hkeys(JOB)).toEqual(['timestamp']);
  }
});

test('a job that is gone is not brought back by its count', async () => {
  await admin.del(JOB);
  const thereMeanwhile = await aPod().alone(EVENT, inTime(), () => admin.exists(JOB));
  expect(thereMeanwhile).toBe(0);
  expect(await admin.exists(JOB)).toBe(0);
});

test('without a count nothing is started', async () => {
  const away = openRedis(asRelay('redis://127.0.0.1:9'), {
    enableOfflineQueue: false,
    maxRetriesPerRequest: 0,
  });
  let ran = false;
  const attempt = aPod(3, away).alone(EVENT, Date.now() + 300, async () => {
    ran = true;
  });
  await expect(attempt).rejects.toThrow();
  expect(ran).toBe(false);
});

test('a count that cannot be taken back at once, since Redis is away, is taken back when it is there again', async () => {
  const own = await createRedis();
  const connection = openRedis(own.url, { enableOfflineQueue: false, maxRetriesPerRequest: 0 });
  await waitFor(() => connection.status === 'ready', { what: 'the connection' });
  await connection.hset(JOB, { timestamp: 1, stc: 1 });
  const attempt = aPod(3, connection).alone(EVENT, Date.now() + 500, async () => {
    await own.kill();
    throw new Error('connection lost');
  });
  await expect(attempt).rejects.toThrow('connection lost');
  await own.restart();
  await waitFor(async () => (await connection.hkeys(JOB).catch(() => [])).join() === 'timestamp', {
    what: 'the count to be taken back',
  });
});

test('an event whose job has stalled is published alone: those before it have ended, those after it wait', async () => {
  const pod = aPod();
  const order: string[] = [];
  const [first, second] = [deferred(), deferred()];
  const work = (name: string, end: Promise<void>) => async () => {
    order.push(`${name} begins`);
    await end;
    order.push(`${name} ends`);
  };
  const all = [pod.together(inTime(), work('first', first.promise))];
  all.push(pod.alone(EVENT, inTime(), work('stalled one', second.promise)));
  all.push(pod.alone('another', inTime(), work('another', Promise.resolve())));
  all.push(pod.together(inTime(), work('last', Promise.resolve())));
  // Time enough for one that would not wait to be counted and begin.
  for (let i = 0; i < 20; i++) expect(await starts()).toBeNull();
  first.resolve();
  await waitFor(async () => (await starts()) === '1', { what: 'it to begin' });
  second.resolve();
  await Promise.all(all);
  expect(order).toEqual(
    ['first', 'stalled one', 'another', 'last'].flatMap((it) => [`${it} begins`, `${it} ends`]),
  );
});

test('an event whose turn does not come in time is not published', async () => {
  const pod = aPod();
  const hanging = deferred();
  const before = pod.alone('another', inTime(), () => hanging.promise);
  let ran = 0;
  const count = async () => ran++;
  const late = Promise.allSettled([
    pod.alone(EVENT, Date.now() + 20, count),
    pod.together(Date.now() + 20, count),
  ]);
  const begun = Date.now();
  await waitFor(() => Date.now() > begun + 25, { what: 'the time to pass' });
  hanging.resolve();
  await before;
  const tooLate = {
    status: 'rejected',
    reason: new Error('it could not begin in time: events that are published alone went first'),
  };
  expect(await late).toEqual([tooLate, tooLate]);
  expect([ran, await starts()]).toEqual([0, null]);
});

test('an event that is started again on purpose has no count', async () => {
  await dies();
  expect(await starts()).toBe('1');
  await aPod().clear(EVENT, inTime());
  expect(await admin.hkeys(JOB)).toEqual(['timestamp']);
});

test('to take a count back is given up in time while Redis is away, and when the guard stops', async () => {
  const away = openRedis(asRelay('redis://127.0.0.1:9'), {
    enableOfflineQueue: false,
    maxRetriesPerRequest: 0,
  });
  const guard = aPod(3, away);
  await withDeadline(5_000, guard.clear(EVENT, Date.now() + 20));
  const clearing = guard.clear(EVENT, inTime());
  guard.stop();
  await withDeadline(5_000, clearing);
});

test('while Redis refuses it, the count of an event is taken back by one at a time, however often the event runs', async () => {
  let asked = 0;
  const connection = redis.duplicate();
  onTestFinished(() => connection.disconnect());
  const refusing = Object.assign(connection, {
    hdel: async () => {
      asked++;
      throw new Error('NOPERM');
    },
  });
  const guard = aPod(3, refusing as unknown as Redis);
  await Promise.all(Array.from({ length: 20 }, () => guard.clear(EVENT, Date.now() + 20)));
  expect(asked).toBeGreaterThan(0);
  // The second, where this took a second.
  expect(asked).toBeLessThanOrEqual(2);
});
