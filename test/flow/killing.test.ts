import { expect, test } from 'vitest';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { STREAM, setStage } from '../support/flow.ts';
import { startLoad } from '../support/load.ts';
import { catchMidAppend } from '../support/mid-append.ts';
import { waitFor } from '../support/wait.ts';

test('kill -9 of one of two pods, caught between append and acknowledgement, doubles and loses nothing', async () => {
  const stage = await setStage();
  const { pod, release } = await catchMidAppend(stage);
  await stage.pod();
  await pod.kill('SIGKILL');
  await release();
  // Others are served at once, those of the killed pod when it is found to be gone.
  const event = anEvent();
  await insertEvents(stage.pool, [event]);
  await waitFor(async () => (await stage.row(event.eventId)).published, { what: 'a new event' });
  await waitFor(async () => (await stage.count('NOT published')) === 0, {
    what: 'the killed pod to be replaced',
  });
  const grade = await stage.expectPromisesHeld();
  expect(grade).toMatchObject({ events: 61, entries: 61, deadLetters: 0 });
});

test('kill -9 of one of two pods under load: nothing is lost, doubled or out of order', async () => {
  const stage = await setStage();
  const [first] = await Promise.all([stage.pod(), stage.pod()]);
  await insertEvents(stage.pool, someEvents(1_500, 30));
  const load = startLoad(stage.pool);
  await waitFor(async () => (await stage.redis.xlen(STREAM)) > 300, { what: 'the load to flow' });
  await first.kill('SIGKILL');
  const killedAt = Date.now();
  const sofar = await stage.redis.xlen(STREAM);
  await waitFor(async () => (await stage.redis.xlen(STREAM)) > sofar + 200, {
    what: 'the other pod to carry on',
  });
  expect(Date.now() - killedAt).toBeLessThan(15_000);
  await load.stop();
  await stage.rested();
  const grade = await stage.expectPromisesHeld();
  expect(grade.deadLetters).toBe(0);
});
