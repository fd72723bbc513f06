import type { Redis } from 'ioredis';
import { afterEach, beforeAll, beforeEach, expect, test } from 'vitest';
import { createSuspects, type Suspects } from '../../src/queue/suspects.ts';
import { asRelay } from '../support/least-privilege.ts';
import { createRedis } from '../support/servers.ts';
import { type AdminRedis, deferred, openAdminRedis, openRedis } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const EVENT = 'an-event';
const JOB = `job:${EVENT}`;

let redis: Redis;
let admin: AdminRedis;
const open: Suspects[] = [];

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
  for (const suspects of open.splice(0)) suspects.stop();
});

function aPod(maxCrashes = 3, connection = redis): Suspects {
  const suspects = createSuspects({ redis: connection, jobKey: (id) => `job:${id}`, maxCrashes });
  open.push(suspects);
  return suspects;
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

test('an event that ends its pod is condemned by its second start alone, the third crash in all', async () => {
  await dies();
  await dies();
  await expect(aPod().alone(EVENT, inTime(), async () => 'appended')).rejects.toThrow(
    'the pod ended 3 times while publishing this event; see RELAY_MAX_CRASHES',
  );
});

test('a limit of 1 condemns nobody by the first crash, which had several events in hand', async () => {
  expect(await aPod(1).alone(EVENT, inTime(), async () => 'appended')).toBe('appended');
  await admin.hset(JOB, 'stc', 1);
  await dies(1);
  await expect(aPod(1).alone(EVENT, inTime(), async () => 'appended')).rejects.toThrow('ended 2 times');
});

test('whatever the answer was, an event that was answered is no suspect any more', async () => {
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
}, 40_000);

test('a suspect is published alone: the others before it have ended, the others after it wait', async () => {
  const pod = aPod();
  const order: string[] = [];
  const [first, suspect] = [deferred(), deferred()];
  const work = (name: string, end: Promise<void>) => async () => {
    order.push(`${name} begins`);
    await end;
    order.push(`${name} ends`);
  };
  const all = [pod.together(inTime(), work('first', first.promise))];
  all.push(pod.alone(EVENT, inTime(), work('suspect', suspect.promise)));
  all.push(pod.alone('another', inTime(), work('another suspect', Promise.resolve())));
  all.push(pod.together(inTime(), work('last', Promise.resolve())));
  // Time enough for a suspect that would not wait to be counted and begin.
  for (let i = 0; i < 20; i++) expect(await starts()).toBeNull();
  first.resolve();
  await waitFor(async () => (await starts()) === '1', { what: 'the suspect to begin' });
  suspect.resolve();
  await Promise.all(all);
  expect(order).toEqual(
    ['first', 'suspect', 'another suspect', 'last'].flatMap((it) => [`${it} begins`, `${it} ends`]),
  );
});

test('whose turn does not come in time is not published', async () => {
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
  const tooLate = { status: 'rejected', reason: new Error('its turn did not come in time') };
  expect(await late).toEqual([tooLate, tooLate]);
  expect([ran, await starts()]).toEqual([0, null]);
});
