import { randomInt } from 'node:crypto';
import { expect, test } from 'vitest';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { DLQ, STREAM, type Stage, setStage } from '../support/flow.ts';
import { startLoad } from '../support/load.ts';
import { POISON, poisonable, superviseAPod } from '../support/poison.ts';
import { waitFor } from '../support/wait.ts';

const poisoned = () => anEvent({ eventType: 'WordAdded', payload: { word: POISON } });

/** Claims everything while nobody publishes, so that all of it is in progress at once afterwards. */
async function heapUp(stage: Stage): Promise<() => Promise<void>> {
  const publish = stage.queue('publish');
  await publish.pause();
  return async () => {
    await waitFor(async () => (await stage.count('NOT published AND next_attempt_at IS NULL')) === 0, {
      what: 'every row to be claimed',
    });
    await publish.resume();
  };
}

test('an event that kills its pod is dead after three pods, and the events beside it arrive unharmed', async () => {
  const stage = await setStage();
  const pod = await superviseAPod(stage, await poisonable());
  const begin = await heapUp(stage);
  const bad = poisoned();
  const events = someEvents(300, 150);
  // A successor of the poisonous one waits for it and goes on after it.
  const successor = anEvent({ aggregateId: bad.aggregateId });
  await insertEvents(stage.pool, [...events.slice(0, 100), bad, successor, ...events.slice(100)]);
  await begin();
  await stage.rested();

  expect(pod.deaths()).toBe(3);
  expect(await stage.expectPromisesHeld()).toMatchObject({ events: 302, entries: 301, deadLetters: 1 });
  const [letter] = await stage.entries(DLQ);
  expect(letter?.fields).toMatchObject({
    original_event_id: bad.eventId,
    error_message: 'the pod ended 3 times while publishing this event; see RELAY_MAX_CRASHES',
  });
  expect(await stage.count('published AND (attempts > 0 OR error_message IS NOT NULL)')).toBe(0);
  // The last pod found out without dying, and nothing holds it up.
  const event = anEvent();
  await insertEvents(stage.pool, [event]);
  await waitFor(async () => (await stage.row(event.eventId)).published, { what: 'the flow to go on' });
});

test('several events that kill their pods condemn themselves and nobody else', async () => {
  const stage = await setStage({ env: { RELAY_MAX_CRASHES: '2' } });
  const pod = await superviseAPod(stage, await poisonable());
  await superviseAPod(stage, await poisonable());
  const begin = await heapUp(stage);
  const bad = [poisoned(), poisoned(), poisoned()];
  await insertEvents(stage.pool, [...someEvents(100), ...bad, ...someEvents(100)]);
  await begin();
  await stage.rested();
  expect(pod.deaths()).toBeGreaterThan(0);
  expect(await stage.expectPromisesHeld()).toMatchObject({ events: 203, entries: 200, deadLetters: 3 });
  const letters = (await stage.entries(DLQ)).map(({ fields }) => fields.original_event_id);
  expect(letters.toSorted()).toEqual(bad.map(({ eventId }) => eventId).toSorted());
});

test('pods that are killed at random and a Redis that hangs longer than locks last condemn nobody', async () => {
  // The default limit. With a limit of 1, one kill that happens to hit an event while it is published alone condemns
  // it: nobody can tell that from a crash.
  const stage = await setStage({ env: { RELAY_CONCURRENCY: '50' } });
  const pods = await Promise.all([superviseAPod(stage, {}), superviseAPod(stage, {})]);
  const load = startLoad(stage.pool, { aggregates: 80 });
  const flows = async (): Promise<void> => {
    const length = await stage.redis.xlen(STREAM);
    await waitFor(async () => (await stage.redis.xlen(STREAM)) > length + 50, {
      what: 'the load to flow',
    });
  };
  for (let round = 0; round < 4; round++) {
    await flows();
    for (let i = 0; i < 3; i++) {
      await pods[i % 2]?.current().kill('SIGKILL');
      await new Promise((resolve) => setTimeout(resolve, randomInt(100, 1_500)));
    }
    await flows();
    stage.server.pause();
    await new Promise((resolve) => setTimeout(resolve, 7_000));
    stage.server.resume();
  }
  await load.stop();
  await stage.rested();
  expect(await stage.expectPromisesHeld()).toMatchObject({ deadLetters: 0 });
  expect(await stage.count('attempts > 0 OR error_message IS NOT NULL')).toBe(0);
});
