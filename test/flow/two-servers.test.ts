/** Queues on one Redis, streams on another: whichever of them fails, once and in order. */
import { dirname } from 'node:path';
import { expect, onTestFinished, test } from 'vitest';
import type { PrivateRedis } from '../demo/servers.ts';
import { cutAof, endOfAof } from '../support/aof.ts';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { DLQ, STREAM, setStageOn } from '../support/flow.ts';
import { catchMidAppend } from '../support/mid-append.ts';
import { startProxy, through } from '../support/proxy.ts';
import { createRedis } from '../support/servers.ts';
import { openAdminRedis } from '../support/stages.ts';
import { underTraffic } from '../support/traffic.ts';
import { waitFor } from '../support/wait.ts';

const MIB = 1024 * 1024;
const BROKEN = 'identity.broken.v1';
const QUICK_DEATH = { RELAY_RETRY_BASE_DELAY: '0.1', RELAY_MAX_RETRY_ATTEMPTS: '1' };
/** Of what the rights depend on; the address does not matter to them. */
const NAMES = {
  RELAY_ALLOWED_TOPICS: `${STREAM},${BROKEN}`,
  RELAY_STREAM_REDIS_URL: 'redis://streams',
};

async function setTwoServers(env: Readonly<Record<string, string>> = {}) {
  const [queues, streams] = await Promise.all([
    createRedis({ env: NAMES, on: 'queues' }),
    createRedis({ env: NAMES, on: 'streams' }),
  ]);
  const stage = await setStageOn({
    redis: openAdminRedis(streams.adminUrl, { maxRetriesPerRequest: null }),
    env: {
      ...{ ...NAMES, ...QUICK_DEATH },
      RELAY_REDIS_URL: queues.url,
      RELAY_STREAM_REDIS_URL: streams.url,
      ...env,
    },
    queuesAt: queues.adminUrl,
  });
  return {
    ...stage,
    queues,
    streams,
    queueRedis: openAdminRedis(queues.adminUrl, { maxRetriesPerRequest: null }),
  };
}

test('events flow from the one to the other, each command and endpoint looks where it has to', async () => {
  const stage = await setTwoServers({ RELAY_STREAM_TRIM: 'acknowledged', RELAY_POLL_INTERVAL: '0.5' });
  const check = await stage.command(['check']);
  expect(check.code, check.lines.join('\n')).toBe(0);
  expect(check.lines.join('\n')).toMatch(/^ok\s+stream AOF\s+on$/m);
  // It tries whether it may do more.
  for (const redis of [stage.redis, stage.queueRedis]) await redis.call('ACL', 'LOG', 'RESET');
  const pod = await stage.pod();
  await stage.redis.set(BROKEN, 'a string');
  const dead = anEvent({ topic: BROKEN });
  await insertEvents(stage.pool, [dead, ...someEvents(300, 20)]);
  await stage.rested();
  expect(await stage.expectPromisesHeld()).toMatchObject({ entries: 300, deadLetters: 1 });

  const onQueues = await stage.queueRedis.keys('*');
  expect(onQueues.filter((key) => !key.startsWith('bull:relay'))).toEqual([]);
  const onStreams = await stage.redis.keys('*');
  expect(onStreams.filter((key) => key.startsWith('bull:relay-'))).toEqual([]);

  const health = (await (await fetch(`${pod.url}/health/detailed`)).json()) as { checks: object };
  expect(health.checks).toMatchObject({
    redis: { status: 'healthy' },
    stream_redis: { status: 'healthy', aof_enabled: true },
  });
  const status = JSON.parse((await stage.command(['status', '--json'])).lines.at(-1) ?? '');
  expect(status).toMatchObject({ problems: [] });
  expect(JSON.stringify(status.figures.streams)).toContain(`"stream":"${STREAM}","length":300`);
  const verify = await stage.command(['verify', '--since', '1h']);
  expect(verify.code, verify.lines.join('\n')).toBe(0);

  await stage.redis.xgroup('CREATE', STREAM, 'group', '$');
  await waitFor(async () => (await stage.redis.xlen(STREAM)) <= 100, { what: 'the stream to be trimmed' });

  // It dies again after a replay, and then not any more.
  const replay = ['dlq', 'replay', dead.eventId, '--yes'];
  expect((await stage.command(replay)).code).toBe(0);
  await waitFor(
    async () => {
      const [letter, ...others] = await stage.entries(DLQ);
      const { stream_entry_id } = await stage.row(dead.eventId);
      return others.length === 0 && letter?.entryId === stream_entry_id;
    },
    { what: 'the second dead letter alone' },
  );
  await stage.rested();
  await stage.redis.del(BROKEN);
  expect((await stage.command(replay)).code).toBe(0);
  await waitFor(async () => (await stage.row(dead.eventId)).published, { what: 'the replay' });
  expect(await stage.entries(BROKEN)).toHaveLength(1);
  expect(await stage.entries(DLQ)).toEqual([]);

  await stage.redis.del(STREAM);
  expect((await stage.command(['verify', '--since', '1h', '--repair'])).code).toBe(0);
  await stage.rested();
  expect(await stage.redis.xlen(STREAM)).toBe(300);
  for (const redis of [stage.redis, stage.queueRedis]) expect(await redis.call('ACL', 'LOG')).toEqual([]);
});

test('kill -9 between append and acknowledgement doubles and loses nothing', async () => {
  const stage = await setTwoServers();
  const { pod, release } = await catchMidAppend(stage);
  await stage.pod();
  await pod.kill('SIGKILL');
  await release();
  await stage.rested();
  expect(await stage.expectPromisesHeld()).toMatchObject({ entries: 60, deadLetters: 0 });
});

test('kill -9 of one of two pods under traffic costs nothing', async () => {
  const stage = await setTwoServers();
  const [first] = await Promise.all([stage.pod(), stage.pod()]);
  await underTraffic(stage, async () => {
    await first.kill('SIGKILL');
  });
});

/** Loses the last moments of what was written. */
async function powerCut(server: PrivateRedis, meanwhile: () => Promise<void>): Promise<void> {
  const folder = dirname(server.logFile);
  const kept = await endOfAof(folder);
  await meanwhile();
  await server.kill('SIGKILL');
  await cutAof(folder, kept);
  await server.restart();
}

test('the streams’ server loses its end, and everything, under traffic: all is appended again, in order', async () => {
  const stage = await setTwoServers();
  await Promise.all([stage.pod(), stage.pod()]);
  await underTraffic(stage, async (flows) => {
    await powerCut(stage.streams, () => flows(100, 'entries to be lost'));
    await flows(100, 'the load after the power cut');
    await stage.redis.flushall();
    await flows(100, 'the load after FLUSHALL');
    await stage.streams.restart();
  });
});

test('the queues’ server loses its end, and everything, under traffic: no event is appended twice', async () => {
  const stage = await setTwoServers();
  await Promise.all([stage.pod(), stage.pod()]);
  await underTraffic(stage, async (flows) => {
    await powerCut(stage.queues, () => flows(100, 'jobs to be lost'));
    await flows(100, 'the load after the power cut');
    await stage.queueRedis.flushall();
    await flows(100, 'the load after FLUSHALL');
    await stage.queues.restart();
  });
});

test('streams on a server that takes no request above a size: who is larger is dead-lettered, without its payload', async () => {
  const stage = await setTwoServers();
  const proxy = await startProxy(stage.streams.port);
  onTestFinished(proxy.close);
  proxy.limit(MIB, 'close');
  const huge = anEvent({ payload: { x: 'x'.repeat(2 * MIB) } });
  await insertEvents(stage.pool, [...someEvents(100), huge, ...someEvents(100)]);
  await stage.pod({
    RELAY_MAX_EVENT_BYTES: '4000000',
    RELAY_STREAM_REDIS_URL: through(proxy, stage.streams.url),
  });
  await stage.rested();
  expect(await stage.entries()).toHaveLength(200);
  const reason = expect.stringMatching(
    /^Redis, or what is before it, closes the connection at this request of 2\d{6}/,
  );
  expect(await stage.entries(DLQ)).toEqual([
    expect.objectContaining({
      fields: expect.objectContaining({
        ...{ event_id: huge.eventId, payload: 'null', error_message: reason, attempts: '2' },
        payload_withheld: expect.stringContaining('identity.outbox'),
      }),
    }),
  ]);
});
