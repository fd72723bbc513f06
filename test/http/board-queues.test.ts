/** What leaves the relay through Bull Board, a team's own one included: nothing of a payload where it is not to. */
import { createBullBoard } from '@bull-board/api';
import { FastifyAdapter } from '@bull-board/fastify';
import { Queue } from 'bullmq';
import { type FastifyInstance, fastify } from 'fastify';
import { beforeAll, expect, test } from 'vitest';
import { boardUrl, inWords } from '../../src/http/dashboard-options.ts';
import { createBoardQueues } from '../../src/index.ts';
import { atEndOfFile } from '../support/cleanup.ts';
import { createRedis } from '../support/servers.ts';
import { type AdminRedis, aClaimedEvent, openAdminRedis, openRedis } from '../support/stages.ts';

const SECRET = 'ada@example.org';

let admin: AdminRedis;
let publish: Queue;
let url: string;

beforeAll(async () => {
  const server = await createRedis();
  ({ url } = server);
  admin = openAdminRedis(server.adminUrl);
  publish = new Queue('relay-publish', { connection: openRedis(url) });
  atEndOfFile(() => publish.close());
});

async function board(payloads: boolean): Promise<FastifyInstance> {
  const relay = await createBoardQueues({ redis: openRedis(url) }, { payloads });
  atEndOfFile(relay.close);
  const app = fastify();
  const server = new FastifyAdapter();
  createBullBoard({
    ...{ queues: relay.queues, serverAdapter: server },
    options: { handlerHooks: relay.handlerHooks },
  });
  await app.register(server.registerPlugin(), { prefix: '/team' });
  return app;
}

/** A failed job of an event, with what BullMQ and a payload may leave in it. */
async function aFailedJob(): Promise<string> {
  const event = {
    ...aClaimedEvent(),
    ...{ payload: JSON.stringify({ email: SECRET }), tenantId: SECRET, correlationId: SECRET },
    trace: { traceparent: `00-${'1'.repeat(32)}-${'2'.repeat(16)}-01`, tracestate: `user=${SECRET}` },
  };
  const metadata = JSON.stringify(event.trace);
  await publish.add(event.eventType, event, { jobId: event.eventId, telemetry: { metadata } });
  await publish.addJobLog(event.eventId, SECRET);
  const key = `bull:relay-publish:${event.eventId}`;
  await admin.hset(key, {
    ...{ stacktrace: JSON.stringify([SECRET]), returnvalue: `"${SECRET}"`, progress: `"${SECRET}"` },
    ...{ failedReason: 'WRONGTYPE', atm: 6, finishedOn: Date.now(), defa: SECRET, pb: SECRET, deid: SECRET },
  });
  await admin.lrem('bull:relay-publish:wait', 1, event.eventId);
  await admin.zadd('bull:relay-publish:failed', Date.now(), event.eventId);
  return event.eventId;
}

test('nothing of a payload is in any answer of the board', async () => {
  const id = await aFailedJob();
  // Not the relay's: whoever added it knows what is in it, and we do not.
  await publish.add('job', { email: SECRET }, { jobId: 'foreign' });
  await publish.upsertJobScheduler('foreign', { every: 3_600_000 }, { name: 'job', data: { email: SECRET } });
  const app = await board(false);
  const job = `/team/api/queues/relay-publish/${id}`;
  for (const path of [
    ...['waiting', 'failed', 'delayed', 'latest'].map(
      (it) => `/team/api/queues?activeQueue=relay-publish&status=${it}`,
    ),
    ...[job, `${job}/logs`, `${job}/flow`, `${job}/flow?root=node`, '/team/api/job-schedulers'],
    ...['/team/api/queues/relay-publish/foreign', '/team/api/queues/relay-publish/foreign/flow?root=node'],
    ...['metrics', 'default-job-options', 'workers'].map((it) => `/team/api/queues/relay-publish/${it}`),
  ]) {
    const answer = await app.inject(path);
    expect(answer.statusCode, path).toBeLessThan(500);
    expect(answer.body, path).not.toContain(SECRET);
  }
  const { body } = await app.inject(job);
  expect(JSON.parse(body).job).toMatchObject({ failedReason: 'WRONGTYPE', attempts: 6, stacktrace: [] });

  const shown = await (await board(true)).inject(job);
  expect(shown.json().job.data.payload).toEqual({ email: SECRET });
  expect(shown.body.split(SECRET), 'once, in the payload').toHaveLength(2);
});

test('only jobs can be removed: no other key, though it has the name of one', async () => {
  const app = await board(true);
  const id = await aFailedJob();
  const remove = async (of: string) =>
    (
      await app.inject({
        method: 'PUT',
        url: `/team/api/queues/relay-publish/${encodeURIComponent(of)}/clean`,
      })
    ).statusCode;
  await publish.upsertJobScheduler('tick', { every: 3_600_000 }, { name: 'tick' });
  const keys = async () => (await admin.keys('bull:relay-publish:*')).toSorted();
  const before = await keys();
  for (const key of ['meta', 'repeat:tick', 'failed', 'events', 'id', 'stalled-check', `${id}:logs`])
    expect(await remove(key), key).toBe(404);
  expect(await keys()).toEqual(before);
  expect((await app.inject('/team/api/queues/relay-publish/failed')).statusCode).toBe(404);
  expect(await remove(id)).toBe(204);
  expect(await publish.getJobState(id)).toBe('unknown');
});

test('the summary of the publish queue begins with the dead letters, and says nothing of what is not there', () => {
  const none = { fresh: 0, leased: 0, retrying: 0, due: 0, parked: 0, dead: 0, limit: 10_000 };
  const oldestSeconds = { waiting: null, retrying: null, parked: null, dead: null };
  expect(inWords({ ...none, oldestSeconds })).toBe('No event waits.');
  expect(inWords({ ...none, dead: 5, oldestSeconds })).toBe('5 dead.');
  const some = { fresh: 1, leased: 2, retrying: 3, due: 4, parked: 10_000, dead: 5 };
  expect(inWords({ ...none, ...some, oldestSeconds: { ...oldestSeconds, waiting: 29.6 } })).toBe(
    '5 dead, 7 waiting (the oldest for 30 s), 3 waiting for a retry, 10,000+ behind an earlier event.',
  );
});

test.each([
  ['0.0.0.0', 'http://localhost:8004/board'],
  ['::', 'http://localhost:8004/board'],
  ['::1', 'http://[::1]:8004/board'],
  ['10.0.0.5', 'http://10.0.0.5:8004/board'],
  ['relay.internal', 'http://relay.internal:8004/board'],
])('a dashboard that listens on %s is opened as %s', (httpHost, url) => {
  expect(boardUrl({ httpHost, boardBasePath: '' }, 8004)).toBe(url);
});
