/** Few aggregates with many events each: they flow, not one event after the other's acknowledgement. */
import { expect, test } from 'vitest';
import { insertEvents, someEvents } from '../support/events.ts';
import { STREAM, type Stage, setStage, setStageOn } from '../support/flow.ts';
import { createRedis } from '../support/servers.ts';
import { openAdminRedis } from '../support/stages.ts';

const COUNT = 1_000;
const AGGREGATES = 5;
/**
 * With what costs more the events take 1.5 times as long or less, one by one more than 10 times; the machine may be busy
 * with other things.
 */
const RATIO = 5;

type AnyStage = Omit<Stage, 'server'>;

/** Two pods publish the events; how long that takes, in seconds. */
async function secondsOf(stage: AnyStage): Promise<number> {
  await Promise.all([stage.pod(), stage.pod()]);
  // Plans and connections are made once.
  await insertEvents(stage.pool, someEvents(200, AGGREGATES));
  await stage.rested();
  await insertEvents(stage.pool, someEvents(COUNT, AGGREGATES));
  const startedAt = performance.now();
  await stage.rested();
  const seconds = (performance.now() - startedAt) / 1_000;
  expect(await stage.expectPromisesHeld()).toMatchObject({ entries: COUNT + 200, deadLetters: 0 });
  return seconds;
}

async function setTwoServers(env: Readonly<Record<string, string>>): Promise<AnyStage> {
  const names = { RELAY_ALLOWED_TOPICS: STREAM, RELAY_STREAM_REDIS_URL: 'redis://streams' };
  const [queues, streams] = await Promise.all([
    createRedis({ env: names, on: 'queues' }),
    createRedis({ env: names, on: 'streams' }),
  ]);
  return setStageOn({
    redis: openAdminRedis(streams.adminUrl, { maxRetriesPerRequest: null }),
    env: { ...names, RELAY_REDIS_URL: queues.url, RELAY_STREAM_REDIS_URL: streams.url, ...env },
    queuesAt: queues.adminUrl,
  });
}

const HOLD = { RELAY_DEAD_LETTER_POLICY: 'hold' };

test('a thousand events of five aggregates flow in order on two pods, with RELAY_DEAD_LETTER_POLICY=hold and with two servers', async () => {
  const usual = await secondsOf(await setStage());
  const found = {
    hold: (await secondsOf(await setStage({ env: HOLD }))) / usual,
    'two servers': (await secondsOf(await setTwoServers({}))) / usual,
    'two servers, hold': (await secondsOf(await setTwoServers(HOLD))) / usual,
  };
  for (const [which, ratio] of Object.entries(found)) expect(ratio, which).toBeLessThan(RATIO);
});
