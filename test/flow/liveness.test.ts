import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { setStage } from '../support/flow.ts';
import { catchMidAppend } from '../support/mid-append.ts';
import { redisHook } from '../support/redis-hook.ts';
import { folderOfFile } from '../support/servers.ts';
import { waitFor } from '../support/wait.ts';

/** 30 s of consecutive looks, and some patience. */

/** What the commands that ask for the next publish job begin with: the script, the number of its keys, the first one. */
const SWALLOW_FETCHES = `const [, keys, first, second] = command.args;
      const fetches = /^eval/.test(command.name) && Number(keys) === 11 && first === 'bull:relay-publish:wait' && second === 'bull:relay-publish:active';
      return fetches && existsSync(process.env.SWALLOW) ? new Promise(() => {}) : send();`;

async function livez(url: string): Promise<{ status: number; reasons: string[] }> {
  const response = await fetch(`${url}/livez`, { signal: AbortSignal.timeout(10_000) });
  const { reasons } = (await response.json()) as { reasons: string[] };
  return { status: response.status, reasons };
}

test('a pod whose worker no longer takes jobs says so, one with nothing to do and one with a paused queue are alive', async () => {
  const trigger = join(await folderOfFile(), 'swallow.now');
  const [stage, idle, paused] = [await setStage(), await setStage(), await setStage()];
  const hooked = { NODE_OPTIONS: await redisHook('swallow', SWALLOW_FETCHES), SWALLOW: trigger };
  const stuckPod = await stage.pod(hooked);
  const idlePod = await idle.pod(hooked);
  // Its retry is a minute away, so its worker would like to wait for longer than a connection may be silent.
  await idle.redis.set('identity.broken.v1', 'no stream');
  await insertEvents(idle.pool, [anEvent({ topic: 'identity.broken.v1' })]);
  const pausedPod = await paused.pod();
  await paused.queue('publish').pause();
  await insertEvents(paused.pool, [anEvent()]);
  expect(await livez(stuckPod.url)).toEqual({ status: 200, reasons: [] });

  await writeFile(trigger, '');
  await insertEvents(stage.pool, [anEvent(), anEvent()]);
  await waitFor(async () => (await livez(stuckPod.url)).status === 503, {
    what: 'the pod to find itself stuck',
  });
  expect((await livez(stuckPod.url)).reasons).toEqual([
    expect.stringMatching(/^jobs wait in relay-publish and this pod takes none, since \d+ s$/),
  ]);
  expect((await fetch(`${stuckPod.url}/readyz`)).status).toBe(200);
  // Its jobs are taken by another pod, and so it has nothing to do.
  await stage.pod();
  await stage.rested();
  await waitFor(async () => (await livez(stuckPod.url)).status === 200, { what: 'nothing to be left to do' });

  expect(await livez(idlePod.url)).toEqual({ status: 200, reasons: [] });
  const logs = [...idlePod.logs(), ...pausedPod.logs()];
  expect(logs.filter(({ msg }) => /connection to Redis|worker met an error/.test(String(msg)))).toEqual([]);
  expect(await paused.count('next_attempt_at IS NOT NULL AND NOT published')).toBe(1);
  expect(await livez(pausedPod.url)).toEqual({ status: 200, reasons: [] });
});

test('pods that were all stopped for a while, as on a laptop that slept, tell of it in a line or two, not job by job', async () => {
  const stage = await setStage();
  // Before the others: what is caught is given up after some seconds, and a pod may take longer to start.
  const other = await stage.pod();
  const { pod, release } = await catchMidAppend(stage);
  const pods = [pod, other];
  for (const { pid } of pods) process.kill(pid, 'SIGSTOP');
  // Until every lock on a job has ended.
  const publish = stage.queue('publish');
  await waitFor(async () => (await stage.redis.keys(`${publish.toKey('')}*:lock`)).length === 0, {
    what: 'the locks to end',
  });
  await release();
  for (const { pid } of pods) process.kill(pid, 'SIGCONT');
  await stage.rested();
  await insertEvents(stage.pool, someEvents(100));
  await stage.rested();
  await stage.expectPromisesHeld();
  const logs = pods.flatMap((it) => it.logs());
  const takenOver = () =>
    pods.flatMap((it) => it.logs()).filter(({ msg }) => String(msg).startsWith('took over events'));
  await waitFor(() => takenOver().length > 0, { what: 'the line about what was taken over' });
  expect(takenOver().length).toBeLessThan(5);
  const events = takenOver().reduce((sum, line) => sum + Number(line.events), 0);
  expect(events).toBeGreaterThan(10);
  for (const text of new Set(logs.map(({ msg }) => String(msg)))) {
    const lines = logs.filter(({ msg }) => msg === text);
    expect(lines.length, `${text}: ${JSON.stringify(lines[0])}`).toBeLessThan(12);
  }
});
