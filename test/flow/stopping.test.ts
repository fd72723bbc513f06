import { expect, test } from 'vitest';
import { insertEvents, someEvents } from '../support/events.ts';
import { STREAM, setStage } from '../support/flow.ts';
import { startLoad } from '../support/load.ts';
import { catchMidAppend } from '../support/mid-append.ts';
import { waitFor } from '../support/wait.ts';

const status = async (url: string): Promise<number | string> =>
  fetch(url, { signal: AbortSignal.timeout(2_000) }).then(
    (response) => response.status,
    () => 'no answer',
  );

test('on SIGTERM readiness turns 503 first, what is in progress is finished and marked, and the exit code is 0', async () => {
  const stage = await setStage();
  const { pod, release } = await catchMidAppend(stage);
  expect(await status(`${pod.url}/readyz`)).toBe(200);
  const exited = pod.kill('SIGTERM');
  await waitFor(async () => (await status(`${pod.url}/readyz`)) === 503, { what: 'readiness to turn 503' });
  expect(await status(`${pod.url}/livez`)).toBe(200);
  await release();
  expect(await exited).toEqual({ code: 0, signal: null });
  // Nothing is left for others to find out: no job looks as if somebody worked on it, every entry's row is marked.
  expect(await stage.queue('publish').getActiveCount()).toBe(0);
  const entries = await stage.entries();
  expect(entries).toHaveLength(60);
  for (const { fields, entryId } of entries) {
    expect(await stage.row(fields.event_id ?? '')).toMatchObject({
      published: true,
      stream_entry_id: entryId,
    });
  }
  await stage.pod();
  await stage.rested();
  await stage.expectPromisesHeld();
}, 60_000);

test('SIGTERM under load exits 0 within RELAY_SHUTDOWN_TIMEOUT, and the other pod carries on', async () => {
  const stage = await setStage({ env: { RELAY_SHUTDOWN_TIMEOUT: '10' } });
  const [first] = await Promise.all([stage.pod(), stage.pod()]);
  await insertEvents(stage.pool, someEvents(1_000, 50));
  const load = startLoad(stage.pool);
  await waitFor(async () => (await stage.redis.xlen(STREAM)) > 300, { what: 'the load to flow' });
  const signalledAt = Date.now();
  expect(await first.kill('SIGTERM')).toEqual({ code: 0, signal: null });
  expect(Date.now() - signalledAt).toBeLessThan(10_000);
  const sofar = await stage.redis.xlen(STREAM);
  await waitFor(async () => (await stage.redis.xlen(STREAM)) > sofar + 200, {
    what: 'the other pod to go on',
  });
  await load.stop();
  await stage.rested();
  await stage.expectPromisesHeld();
}, 90_000);

test('SIGTERM exits 0 within RELAY_SHUTDOWN_TIMEOUT although what is in progress cannot be finished', async () => {
  const stage = await setStage({ env: { RELAY_SHUTDOWN_TIMEOUT: '2', RELAY_CLAIM_LEASE: '5' } });
  const { pod, release } = await catchMidAppend(stage);
  const signalledAt = Date.now();
  expect(await pod.kill('SIGTERM')).toEqual({ code: 0, signal: null });
  expect(Date.now() - signalledAt).toBeLessThan(2_000 + 500);
  await release();
  await stage.pod();
  await stage.rested();
  await stage.expectPromisesHeld();
}, 90_000);

test('a second SIGTERM exits at once, and nothing is lost or doubled by it', async () => {
  const stage = await setStage({ env: { RELAY_SHUTDOWN_TIMEOUT: '60', RELAY_CLAIM_LEASE: '5' } });
  const { pod, release } = await catchMidAppend(stage);
  const exited = pod.kill('SIGTERM');
  await waitFor(async () => (await status(`${pod.url}/readyz`)) === 503, { what: 'readiness to turn 503' });
  const signalledAt = Date.now();
  await pod.kill('SIGTERM');
  expect((await exited).code).toBe(1);
  expect(Date.now() - signalledAt).toBeLessThan(1_500);
  await release();
  await stage.pod();
  await stage.rested();
  await stage.expectPromisesHeld();
}, 90_000);

test('SIGTERM ends a pod that is still waiting for its servers', async () => {
  const stage = await setStage();
  await stage.server.kill();
  const pod = await stage.spawn(['start']);
  await waitFor(() => pod.logs().some((line) => line.level === 'warn'), {
    what: 'the pod to miss its Redis',
  });
  expect(await pod.kill('SIGTERM')).toEqual({ code: 0, signal: null });
});
