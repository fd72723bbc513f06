import { Redis } from 'ioredis';
import { expect, onTestFinished, test } from 'vitest';
import type { Pod } from '../demo/pod.ts';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { STREAM, type Stage, setStage } from '../support/flow.ts';
import { RELAY_USER, redisRules } from '../support/least-privilege.ts';
import { startLoad } from '../support/load.ts';
import { waitFor } from '../support/wait.ts';

/** Long enough for every event in progress to fail all its attempts, if they counted. */
const FAULT_MS = 6_000;
/** 10 s with the machine to itself, as `npm run chaos -- --each` measures it; here four test files share two cores. */
/** Each of the 600 events in progress may be refused once or twice a second; without a breath in between it is ten thousand. */
const MAX_REFUSALS_PER_SECOND = 1_500;
const FEW_ATTEMPTS = { RELAY_RETRY_BASE_DELAY: '0.2', RELAY_MAX_RETRY_ATTEMPTS: '2' };

const hold = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

type Answer = { status: number; body: string };
async function ask(pod: Pod, path: string): Promise<Answer> {
  const response = await fetch(`${pod.url}${path}`, { signal: AbortSignal.timeout(10_000) });
  return { status: response.status, body: await response.text() };
}

async function refusals(stage: Stage): Promise<number> {
  return Number(/total_error_replies:(\d+)/.exec(await stage.redis.info('stats'))?.[1]);
}

type Fault = Readonly<{
  what: string;
  /** Why, as the pods can tell. */
  reason: RegExp;
  begin: (stage: Stage) => Promise<void>;
  end: (stage: Stage) => Promise<void>;
}>;

const FAULTS: readonly Fault[] = [
  {
    what: 'a full Redis',
    reason: /OOM/,
    begin: async ({ redis }) => void (await redis.config('SET', 'maxmemory', '1')),
    end: async ({ redis }) => void (await redis.config('SET', 'maxmemory', '0')),
  },
  {
    what: 'a Redis that has become a replica, as in a failover',
    reason: /READONLY/,
    begin: async ({ redis }) => void (await redis.call('REPLICAOF', '127.0.0.1', '9')),
    end: async ({ redis }) => void (await redis.call('REPLICAOF', 'NO', 'ONE')),
  },
  {
    what: 'a Redis without the replicas that it must have',
    reason: /NOREPLICAS/,
    begin: async ({ redis }) => void (await redis.config('SET', 'min-replicas-to-write', '1')),
    end: async ({ redis }) => void (await redis.config('SET', 'min-replicas-to-write', '0')),
  },
  {
    what: 'a Redis that refuses the relay everything',
    reason: /NOPERM/,
    begin: async ({ redis }) => void (await redis.call('ACL', 'SETUSER', RELAY_USER, 'resetkeys', '-@all')),
    end: async ({ redis }) => void (await redis.call('ACL', 'SETUSER', RELAY_USER, ...redisRules())),
  },
  {
    what: 'a Redis whose password was changed before the relay’s',
    reason: /WRONGPASS|NOAUTH/,
    begin: async ({ redis }) => {
      await redis.call('ACL', 'SETUSER', RELAY_USER, 'resetpass', '>other');
      await redis.call('CLIENT', 'KILL', 'USER', RELAY_USER);
    },
    end: async ({ redis }) => void (await redis.call('ACL', 'SETUSER', RELAY_USER, ...redisRules())),
  },
  {
    what: 'a Redis that is busy with somebody’s script',
    reason: /BUSY|no answer|no connection|timeout/i,
    begin: async ({ server }) => {
      const slow = new Redis(server.url, { retryStrategy: () => null });
      slow.on('error', () => {});
      onTestFinished(async () => slow.disconnect());
      slow.eval('while true do end', 0).catch(() => {});
    },
    end: async ({ redis }) => void (await redis.call('SCRIPT', 'KILL')),
  },
];

const postponements = (pod: Pod): number =>
  pod.logs().filter(({ msg }) => msg === 'cannot publish now; events are postponed').length;

/** Two pods under load, and a Redis that is there but refuses them what they ask, for a reason that they can tell. */
test('a Redis that refuses everybody costs no event and no attempt, one reason after the other', async () => {
  const stage = await setStage({ env: FEW_ATTEMPTS, redisArgs: ['--lua-time-limit', '100'] });
  const pods = await Promise.all([stage.pod(), stage.pod()]);
  const load = startLoad(stage.pool);
  for (const { what, reason, begin, end } of FAULTS) {
    await insertEvents(stage.pool, someEvents(1_000, 250));
    const reached = await stage.redis.xlen(STREAM);
    await waitFor(async () => (await stage.redis.xlen(STREAM)) > reached + 200, {
      what: `${what}: the load to flow`,
    });

    const refusedSofar = await refusals(stage);
    const saidSofar = pods.map(postponements);
    await begin(stage);
    const begun = Date.now();
    for (const pod of pods) {
      await waitFor(async () => (await ask(pod, '/readyz')).status === 503, {
        what: `${what}: a pod not to be ready`,
      });
    }
    await hold(FAULT_MS - (Date.now() - begun));
    for (const pod of pods) {
      const { status, body } = await ask(pod, '/readyz');
      expect(status, what).toBe(503);
      expect(body, what).toMatch(reason);
      expect((await ask(pod, '/livez')).status, what).toBe(200);
    }
    await end(stage);
    const perSecond = ((await refusals(stage)) - refusedSofar) / ((Date.now() - begun) / 1_000);

    const event = anEvent();
    await insertEvents(stage.pool, [event]);
    await waitFor(async () => (await stage.row(event.eventId)).published, {
      what: `${what}: the flow to resume`,
    });
    for (const pod of pods) await pod.waitReady();
    expect(perSecond, what).toBeLessThan(MAX_REFUSALS_PER_SECOND);
    pods.forEach((pod, i) => {
      expect(postponements(pod) - (saidSofar[i] ?? 0), `${what}: lines about postponed events`).toBeLessThan(
        5,
      );
    });
    const cost = await stage.count('attempts > 0 OR error_message IS NOT NULL');
    expect(cost, `${what}: events it cost an attempt`).toBe(0);
  }
  await load.stop();
  await stage.rested();
  expect(await stage.expectPromisesHeld()).toMatchObject({ deadLetters: 0 });
  expect(await stage.count('attempts > 0 OR error_message IS NOT NULL')).toBe(0);
});
