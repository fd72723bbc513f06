import { join } from 'node:path';
import { Queue } from 'bullmq';
import { expect, onTestFinished, test } from 'vitest';
import { freePort } from '../demo/supervise.ts';
import { insertEvents, someEvents } from '../support/events.ts';
import { setStage } from '../support/flow.ts';
import { startProgram } from '../support/program.ts';
import { compile, sampleProject } from '../support/samples.ts';
import { waitFor } from '../support/wait.ts';

const patiently = (what: string) => ({ what });

test('the NestJS worker compiles, relays events, works on its own queue, shows both, and stops in good order', async () => {
  const folder = await sampleProject('nestjs', 'docs/examples/nestjs');
  expect(await compile(folder)).toBe('');

  const stage = await setStage();
  const [boardPort, httpPort] = [await freePort(), await freePort()];
  // Its own queue needs more rights in Redis than the relay's.
  const redisUrl = stage.server.adminUrl;
  const worker = startProgram(
    process.execPath,
    ['--preserve-symlinks', '--preserve-symlinks-main', join(folder, 'dist/worker.js')],
    {
      ...{ ...stage.env, RELAY_REDIS_URL: redisUrl, BOARD_PORT: String(boardPort) },
      ...{ RELAY_HTTP_HOST: '127.0.0.1', RELAY_HTTP_PORT: String(httpPort) },
    },
  );
  const said = () => worker.lines.slice(-20).join('\n');
  await waitFor(() => worker.lines.some((line) => line.startsWith('worker is up')), patiently('it to be up'));
  await insertEvents(stage.pool, someEvents(20, 5));
  await stage.rested().catch((error) => Promise.reject(new Error(said(), { cause: error })));
  await stage.expectPromisesHeld();

  const mails = new Queue('mails', { connection: { url: redisUrl } });
  onTestFinished(() => mails.close());
  const { id = '' } = await mails.add('welcome', { to: 'ada@example.org' });
  const sent = async () => (await mails.getJob(id))?.returnvalue;
  expect(await waitFor(sent, patiently('the mail to be sent'))).toBe('sent to ada@example.org');

  const board = `http://127.0.0.1:${boardPort}/board`;
  const { queues } = (await (await fetch(`${board}/api/queues`)).json()) as { queues: { name: string }[] };
  expect(queues.map(({ name }) => name).toSorted()).toEqual(['mails', 'relay-claim', 'relay-publish']);
  // The relay's own queues are protected there, the other is not.
  const status = (queue: string, action: string) =>
    fetch(`${board}/api/queues/${queue}/${action}`, { method: 'PUT' }).then(({ status }) => status);
  expect(await status('relay-publish', 'empty')).toBe(403);
  expect(await status('mails', 'empty')).toBe(200);

  expect(await worker.kill('SIGTERM')).toEqual({ code: null, signal: 'SIGTERM' });
  expect(said()).toContain('"msg":"stopped"');
});
