import { execFile } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { once } from 'node:events';
import { join } from 'node:path';
import type { Readable } from 'node:stream';
import { text } from 'node:stream/consumers';
import { createBullBoard } from '@bull-board/api';
import { BullMQAdapter } from '@bull-board/api/bullMQAdapter';
import { FastifyAdapter } from '@bull-board/fastify';
import { Queue } from 'bullmq';
import { fastify } from 'fastify';
import { expect, inject, onTestFinished, test } from 'vitest';
import { loadConfig } from '../../src/config/load-config.ts';
import { isPassword } from '../../src/http/passwords.ts';
import { createBoardQueues } from '../../src/index.ts';
import type { Pod } from '../demo/pod.ts';
import { basicOf, boardApi, boardUsers, PASSWORD } from '../support/board.ts';
import { anEvent, insertEvents } from '../support/events.ts';
import { DLQ, STREAM, type Stage, setStage } from '../support/flow.ts';
import { asRelay, OPERATOR_ROLE, RELAY_USER } from '../support/least-privilege.ts';
import { startProxy, through } from '../support/proxy.ts';
import { aClaimedEvent, openRedis } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

type Board = Readonly<{ stage: Stage; pod: Pod; api: ReturnType<typeof boardApi> }>;

/** A relay with a board, and its operator. The role of the pods is enough for every button, as the advice says. */
async function board(env: Readonly<Record<string, string>> = {}, role = RELAY_USER): Promise<Board> {
  const stage = await setStage();
  const pod = await stage.pod({
    ...{ RELAY_BOARD: 'true', RELAY_BOARD_USERS: await boardUsers() },
    RELAY_DATABASE_URL: asRelay(stage.databaseUrl, role),
    ...{ RELAY_POLL_INTERVAL: '0.2', RELAY_CLAIM_LEASE: '1', RELAY_MAX_RETRY_ATTEMPTS: '0' },
    ...env,
  });
  return { stage, pod, api: boardApi(pod.url, 'olga') };
}

/** Topics whose stream Redis refuses, until `mend`. */
async function brokenTopic(stage: Stage, topic = `broken.${randomUUID()}`) {
  await stage.redis.set(topic, 'no stream');
  return { topic, mend: () => stage.redis.del(topic) };
}

const isDead = async (stage: Stage, eventId: string) => (await stage.row(eventId)).dead_lettered_at !== null;
const isPublished = async (stage: Stage, eventId: string) => (await stage.row(eventId)).published;
const jobState = (stage: Stage, eventId: string) => stage.queue('publish').getJobState(eventId);
const eventIds = async (stage: Stage, stream = STREAM) =>
  (await stage.entries(stream)).map(({ fields }) => fields.event_id);

test('Retry on a failed job publishes its event, closes its dead letter and lets its aggregate go on', async () => {
  const { stage, pod, api } = await board({ RELAY_DEAD_LETTER_POLICY: 'hold' });
  const { topic, mend } = await brokenTopic(stage);
  const first = anEvent({ topic });
  const second = anEvent({ topic, aggregateId: first.aggregateId });
  await insertEvents(stage.pool, [first, second]);
  await waitFor(() => isDead(stage, first.eventId), { what: 'the dead letter' });

  expect(pod.logs().find(({ msg }) => msg === 'relay started')?.dashboard).toBe(`${pod.url}/board`);
  // Too early: it fails again, and is as dead as before.
  const before = await stage.row(first.eventId);
  expect((await api('PUT', `/relay-publish/${first.eventId}/retry`)).status).toBe(204);
  const told = (text: string) => pod.logs().filter(({ msg }) => msg === text);
  const failedAgain = () => told('a retried dead letter failed again; it stays dead')[0];
  expect(await waitFor(failedAgain, { what: 'the second failure' })).toMatchObject({
    ...{ level: 'warn', eventId: first.eventId, dlqEntryId: before.stream_entry_id },
  });
  expect(told('event moved to the dead-letter stream'), 'what an alert counts').toHaveLength(1);
  expect(await stage.row(first.eventId)).toEqual(before);
  expect(await eventIds(stage, DLQ)).toEqual([first.eventId]);

  await mend();
  const advice = /may not replay or discard.*while Retry in the dashboard works/;
  await waitFor(() => pod.lines.some((it) => advice.test(it)), { what: 'the advice on its role' });
  expect((await api('PUT', `/relay-publish/${first.eventId}/retry`)).status).toBe(204);
  await stage.rested();
  const [entry] = await stage.entries(topic);
  expect(await stage.row(first.eventId)).toMatchObject({
    ...{ published: true, dead_lettered_at: null, next_attempt_at: null, stream_entry_id: entry?.entryId },
  });
  expect(await eventIds(stage, topic)).toEqual([first.eventId, second.eventId]);
  expect(await eventIds(stage, DLQ)).toEqual([]);
  await stage.expectPromisesHeld();
  // The entry id is that of the entry: nothing is taken for lost.
  expect((await stage.command(['verify', '--since', '1h'])).code).toBe(0);
  expect(await jobState(stage, first.eventId)).toBe('unknown');
  expect(pod.logs()).toContainEqual(
    expect.objectContaining({
      ...{ level: 'info', msg: 'an operator acted', operator: 'olga', action: 'retry' },
      ...{ queue: 'relay-publish', jobId: first.eventId },
    }),
  );
});

test('the API beside the board lists a dead letter and replays it, for whoever may, and says who did it', async () => {
  const { stage, pod } = await board({}, OPERATOR_ROLE);
  const { topic, mend } = await brokenTopic(stage);
  const event = anEvent({ topic });
  await insertEvents(stage.pool, [event]);
  await waitFor(() => isDead(stage, event.eventId), { what: 'the dead letter' });
  await mend();
  const ask = (path: string, name?: string, body?: object) =>
    fetch(`${pod.url}/api${path}`, {
      headers: {
        ...(name !== undefined && { authorization: basicOf(name) }),
        ...(body && { 'content-type': 'application/json' }),
      },
      ...(body && { method: 'POST', body: JSON.stringify(body) }),
    });
  expect((await ask('/dlq')).status).toBe(401);
  expect(await (await ask('/dlq', 'vera')).json()).toMatchObject({
    letters: [{ eventId: event.eventId, topic }],
  });
  const replay = { eventIds: [event.eventId] };
  // As curl -d sends it. The log-in page takes forms, the API does not.
  const asForm = await fetch(`${pod.url}/api/dlq/replay`, {
    ...{ method: 'POST', body: JSON.stringify(replay) },
    headers: { authorization: basicOf('olga'), 'content-type': 'application/x-www-form-urlencoded' },
  });
  expect([asForm.status, await asForm.text()]).toEqual([415, expect.stringContaining('application/json')]);
  expect((await ask('/dlq/replay', 'vera', replay)).status).toBe(403);
  expect(await (await ask('/dlq/replay', 'olga', replay)).json()).toMatchObject({ done: 1, refused: 0 });
  await waitFor(() => isPublished(stage, event.eventId), { what: 'the event to be published' });
  expect(await eventIds(stage, topic)).toEqual([event.eventId]);
  expect(await eventIds(stage, DLQ)).toEqual([]);
  expect(pod.logs()).toContainEqual(
    expect.objectContaining({ msg: 'dead letters were replayed', by: 'olga', events: 1 }),
  );
});

test('Retry all, Remove and Clean leave each row as it must be', async () => {
  const { stage, api } = await board();
  const [removed, cleaned, ...retried] = await Promise.all(
    Array.from({ length: 5 }, () => brokenTopic(stage)),
  );
  const events = [removed, cleaned, ...retried].map((it) => anEvent({ topic: it?.topic ?? '' }));
  const [one, two, ...others] = events.map(({ eventId }) => eventId) as [string, string, ...string[]];
  await insertEvents(stage.pool, events);
  await waitFor(async () => (await stage.count('dead_lettered_at IS NOT NULL')) === 5, {
    what: '5 dead letters',
  });

  // What is removed stays dead, with its dead letter: for the row's own replay.
  expect((await api('PUT', `/relay-publish/${one}/clean`)).status).toBe(204);
  // Bull Board spares what ended within 5 s.
  await stage.redis.zadd('bull:relay-publish:failed', 'XX', 1, two);
  await stage.redis.hset(`bull:relay-publish:${two}`, 'finishedOn', 1);
  expect((await api('PUT', '/relay-publish/clean/failed')).status).toBe(200);
  expect(await jobState(stage, one)).toBe('unknown');
  expect(await jobState(stage, two)).toBe('unknown');

  for (const { mend } of retried) await mend();
  expect(await api('PUT', '/relay-publish/retry/failed')).toEqual({
    status: 200,
    body: { retried: 3, skipped: 0 },
  });
  await waitFor(async () => (await stage.count('published')) === 3, { what: 'three published rows' });
  for (const eventId of others)
    expect(await stage.row(eventId)).toMatchObject({ published: true, dead_lettered_at: null });
  for (const eventId of [one, two])
    expect(await stage.row(eventId)).toMatchObject({ published: false, dead_lettered_at: expect.any(Date) });
  await stage.expectPromisesHeld();
});

test('jobs that wait are held by Pause, brought forward by Promote and come back when removed', async () => {
  const { stage, api } = await board({ RELAY_MAX_RETRY_ATTEMPTS: '3', RELAY_RETRY_BASE_DELAY: '600' });
  const { topic, mend } = await brokenTopic(stage);
  const events = Array.from({ length: 3 }, () => anEvent({ topic }));
  const [one, two, three] = events.map(({ eventId }) => eventId) as [string, string, string];
  await insertEvents(stage.pool, events);
  await waitFor(async () => (await stage.count('attempts = 1')) === 3, { what: 'three failed attempts' });
  await mend();

  // Long before their time.
  expect((await api('PUT', `/relay-publish/${one}/promote`)).status).toBe(204);
  await waitFor(() => isPublished(stage, one), { what: 'the promoted event to be published' });
  expect(await eventIds(stage, topic)).toEqual([one]);
  expect((await api('PUT', `/relay-publish/${two}/clean`)).status).toBe(204);
  expect((await api('PUT', '/relay-publish/promote')).status).toBe(200);
  await waitFor(() => isPublished(stage, three), { what: 'the other promoted event to be published' });
  // Its time is that of its retry; we cannot wait so long.
  await stage.pool.query('UPDATE identity.outbox SET next_attempt_at = now() WHERE event_id = $1', [two]);
  await waitFor(() => isPublished(stage, two), { what: 'the removed event to be published' });

  for (const [pause, resume] of [
    ['/relay-publish/pause', '/relay-publish/resume'],
    ['/pause', '/resume'],
  ] as const) {
    expect((await api('PUT', pause)).status).toBe(200);
    const event = anEvent();
    await insertEvents(stage.pool, [event]);
    if (pause === '/relay-publish/pause') {
      const waits = async () => (await jobState(stage, event.eventId)) === 'waiting';
      await waitFor(waits, { what: 'a job that waits' });
      // Removed, it comes back when its lease has ended, and waits again.
      expect((await api('PUT', `/relay-publish/${event.eventId}/clean`)).status).toBe(204);
      await waitFor(waits, { what: 'the job to be back' });
      await stage.redis.hset(`bull:relay-publish:${event.eventId}`, 'timestamp', 1);
      expect((await api('PUT', '/relay-publish/clean/wait')).status).toBe(200);
      expect(await jobState(stage, event.eventId)).toBe('unknown');
    }
    expect(await isPublished(stage, event.eventId)).toBe(false);
    expect((await api('PUT', resume)).status).toBe(200);
    await waitFor(() => isPublished(stage, event.eventId), { what: 'the event to be published' });
  }
  await stage.expectPromisesHeld();
});

test('what harms the relay is refused with a reason; viewers see no buttons and no payloads', async () => {
  const { stage, pod, api } = await board();
  const { topic } = await brokenTopic(stage);
  const event = anEvent({ topic });
  await insertEvents(stage.pool, [event]);
  await waitFor(() => isDead(stage, event.eventId), { what: 'the dead letter' });
  const job = `/relay-publish/${event.eventId}`;
  const hash = () => stage.redis.hgetall(`bull:relay-publish:${event.eventId}`);
  const before = await hash();

  for (const [method, path, body, reason] of [
    ['PATCH', `${job}/update-data`, { jobData: { eventId: 'x' } }, /what was committed/],
    ['PUT', '/relay-publish/obliterate', { force: true }, /Pause the queue/],
    ['PUT', '/relay-publish/empty', {}, /Pause the queue/],
    ['POST', '/relay-publish/add', { name: 'x', data: {} }, /nothing is added here/],
    ['POST', '/relay-claim/add', { name: 'tick', data: {} }, /nothing is added here/],
    ['PUT', '/relay-claim/promote', {}, /next tick/],
    ['PUT', '/relay-publish/concurrency', { concurrency: 1 }, /RELAY_CONCURRENCY/],
    ['PUT', '/relay-claim/job-schedulers/tick/remove', {}, /next tick/],
  ] as const) {
    const answer = await api(method, path, body);
    expect(answer, path).toMatchObject({ status: 403, body: { message: expect.stringMatching(reason) } });
  }
  expect(await hash()).toEqual(before);
  expect(await stage.queue('publish').getGlobalConcurrency()).toBeNull();

  const queues = '?activeQueue=relay-publish&status=failed';
  const shown = async (name: string) =>
    (await boardApi(pod.url, name)('GET', queues)).body as {
      queues: { name: string; readOnlyMode: boolean; jobs: { name: string; data: object }[] }[];
    };
  const { payload: _, eventType, aggregateType, aggregateId } = event;
  const name = `${eventType} · ${aggregateType}:${aggregateId} · ${topic} · given up after 1 attempt`;
  const about = { event_id: event.eventId, event_type: eventType, topic };
  expect(await shown('olga')).toMatchObject({
    queues: [
      {
        ...{ name: 'relay-publish', readOnlyMode: false },
        jobs: [{ name, data: { ...about, payload: event.payload } }],
      },
      { name: 'relay-claim' },
    ],
  });
  const seen = await shown('vera');
  expect(seen).toMatchObject({
    queues: [
      { readOnlyMode: true, allowRetries: false, jobs: [{ name, data: about }] },
      { readOnlyMode: true, allowRetries: false },
    ],
  });
  const { email } = event.payload as { email: string };
  expect(JSON.stringify(await shown('olga'))).toContain(email);
  expect(JSON.stringify(seen)).not.toContain(email);
  const one = await boardApi(pod.url, 'vera')('GET', job);
  expect(one.status).toBe(200);
  expect(JSON.stringify(one.body)).not.toContain(email);
  const act = await boardApi(pod.url, 'vera')('PUT', `${job}/retry`);
  expect(act).toEqual({ status: 403, body: { error: 'vera is a viewer; acting needs the role operator' } });
  expect(await jobState(stage, event.eventId)).toBe('failed');
  expect(pod.logs()).toContainEqual(
    expect.objectContaining({
      ...{ msg: 'an action of an operator was refused, or failed', status: 403 },
      ...{ operator: 'olga', action: 'obliterate', queue: 'relay-publish' },
    }),
  );
  expect(pod.lines.join('\n')).not.toContain(email);
});

test('the board alone asks nothing of another host, under a path of a proxy as well, beside endpoints that stay open', async () => {
  const stage = await setStage();
  const alone = await stage.spawn(['board'], {
    ...{ RELAY_BOARD_USERS: await boardUsers(), RELAY_BOARD_BASE_PATH: '/ops/relay' },
  });
  await alone.waitReady();
  const { url } = alone.logs().find(({ msg }) => msg === 'dashboard started') ?? {};
  expect(url).toBe(`${alone.url}/ops/relay/board`);
  const get = (path: string, name?: string) =>
    fetch(alone.url + path, { redirect: 'manual', headers: name ? { authorization: basicOf(name) } : {} });
  expect((await get('/livez')).status).toBe(200);
  expect((await get('/health')).headers.get('content-security-policy')).toBeNull();
  expect((await get('/board/static/favicon.ico')).status).toBe(401);

  // The proxy takes its path away, or leaves it.
  for (const path of ['/board', '/ops/relay/board', '/ops/relay/board/queue/relay-publish']) {
    const page = await get(path, 'vera');
    const html = await page.text();
    expect(page.status, path).toBe(200);
    expect(html).toContain('<base href="/ops/relay/board/" />');
    expect(html).toContain('static/js/main');
    expect(html.match(/https?:\/\//g)).toBeNull();
    expect(page.headers.get('content-security-policy')).toContain("default-src 'none';script-src 'self'");
    expect(page.headers.get('content-security-policy')).toContain("frame-ancestors 'none'");
  }
  // Nobody makes it read more jobs at once than its pages have.
  const jobs = Array.from({ length: 101 }, () => ({ name: 'job', data: aClaimedEvent() }));
  await stage.queue('publish').addBulk(jobs);
  const all = '?activeQueue=relay-publish&status=waiting&jobsPerPage=1e6';
  const { queues } = (await boardApi(alone.url, 'vera')('GET', all)).body as {
    queues: { jobs: unknown[]; pagination: { pageCount: number } }[];
  };
  expect(queues[0]?.jobs).toHaveLength(100);
  expect(queues[0]?.pagination.pageCount).toBe(2);
  await insertEvents(stage.pool, [anEvent()]);
  expect(await boardApi(alone.url, 'vera')('GET', '')).toMatchObject({
    ...{ status: 200, body: { queues: [{ name: 'relay-publish' }, { name: 'relay-claim' }] } },
  });
  expect(await stage.count('published OR next_attempt_at IS NOT NULL'), 'rows that it took').toBe(0);
  expect(await alone.kill('SIGTERM')).toMatchObject({ code: 0 });
  expect(alone.logs().at(-1)).toMatchObject({ level: 'info', msg: 'stopped' });
});

test('a path of a proxy may be one of the relay’s own, and may be asked for without a slash at its end', async () => {
  const stage = await setStage();
  for (const [basePath, paths] of [
    ['/board', ['/board', '/board/board']],
    ['/api', ['/board', '/api/board']],
    ['/health', ['/board', '/health/board']],
  ] as const) {
    const alone = await stage.spawn(['board'], {
      ...{ RELAY_BOARD_USERS: await boardUsers(), RELAY_BOARD_BASE_PATH: basePath },
    });
    await alone.waitReady();
    const get = (path: string) =>
      fetch(alone.url + path, { redirect: 'manual', headers: { authorization: basicOf('vera') } });
    // The proxy takes its path away, or leaves it.
    for (const board of paths)
      for (const path of [board, `${board}/queue/relay-publish/a:b`, `${board}/api/queues`])
        expect((await get(path)).status, `${path} under ${basePath}`).toBe(200);
    for (const path of ['/health/detailed', '/api/dlq?limit=1'])
      for (const before of ['', basePath])
        expect((await get(before + path)).status, `${before}${path} under ${basePath}`).toBe(200);
    await alone.kill('SIGTERM');
  }
  const alone = await stage.spawn(['board'], {
    ...{ RELAY_BOARD_USERS: await boardUsers(), RELAY_BOARD_BASE_PATH: '/ops' },
  });
  await alone.waitReady();
  for (const path of ['/ops', '/ops?x=1', '/ops/']) {
    const { status, headers } = await fetch(alone.url + path, { redirect: 'manual' });
    expect([status, headers.get('location')], path).toEqual([303, '/ops/board']);
  }
});

test('while a server is away board and API answer 503 with its name, no address, and when to try again; then they work again', async () => {
  const stage = await setStage();
  const redis = await startProxy(stage.server.port);
  const database = await startProxy(Number(new URL(stage.databaseUrl).port));
  onTestFinished(async () => void (await Promise.all([redis.close(), database.close()])));
  const alone = await stage.spawn(['board'], {
    ...{ RELAY_BOARD_USERS: await boardUsers(), RELAY_REDIS_URL: through(redis, stage.env.RELAY_REDIS_URL) },
    RELAY_DATABASE_URL: through(database, stage.env.RELAY_DATABASE_URL),
  });
  await alone.waitReady();
  type Answer = { queues: { description: string }[] };
  const ask = async (path: string, body?: object) => {
    const response = await fetch(alone.url + path, {
      headers: { authorization: basicOf('olga'), ...(body && { 'content-type': 'application/json' }) },
      ...(body && { method: 'POST', body: JSON.stringify(body) }),
    });
    const retryAfter = response.headers.get('retry-after');
    return { status: response.status, retryAfter, body: (await response.json()) as Answer };
  };
  const away = { status: 503, retryAfter: '5' };
  const queues = '/board/api/queues';
  expect((await ask(queues)).status).toBe(200);

  await redis.refuse();
  const noRedis = 'Redis cannot be reached; try again';
  expect(await ask(queues)).toEqual({ ...away, body: { error: noRedis } });
  const replay = () => ask('/api/dlq/replay', { eventIds: [randomUUID()] });
  expect(await replay()).toEqual({ ...away, body: { error: noRedis } });
  await redis.heal();
  await waitFor(async () => (await ask(queues)).status === 200, { what: 'the board to work again' });

  await database.refuse();
  expect(await ask('/api/dlq')).toEqual({
    ...away,
    body: { error: 'PostgreSQL cannot be reached; try again' },
  });
  const unknown = async () => (await ask(queues)).body.queues[0]?.description;
  await waitFor(async () => /^Dead: unknown, PostgreSQL gives no answer\./.test((await unknown()) ?? ''), {
    what: 'the board to say that it does not know how many are dead',
  });
  await database.heal();
  await waitFor(async () => (await ask('/api/dlq')).status === 200, { what: 'the API to work again' });
  const levels = new Set(alone.logs().map(({ level }) => level));
  expect(levels).toEqual(new Set(['info', 'warn']));
  const told = alone.logs().filter(({ msg }) => /^a server cannot be reached; requests/.test(String(msg)));
  expect(new Set(told.map(({ server }) => server))).toEqual(new Set(['Redis', 'PostgreSQL']));
});

test('the board does not start where everybody could use it', async () => {
  const stage = await setStage();
  const { code, lines } = await stage.command(['board'], { RELAY_HTTP_HOST: '0.0.0.0' });
  expect(code).toBe(78);
  expect(lines.join('\n')).toMatch(/RELAY_BOARD_USERS: needs an entry of "relay hash-password"/);
});

test('relay hash-password takes the password from stdin, and its entry lets that one in', async () => {
  const run = (name: string, password: string) => {
    const child = execFile(process.execPath, [
      ...[join(inject('root'), 'dist/cli.js'), 'hash-password', name, '--role', 'operator'],
    ]);
    child.stdin?.end(`${password}\n`);
    return Promise.all([
      text(child.stdout as Readable),
      text(child.stderr as Readable),
      once(child, 'close'),
    ]);
  };
  const [[entry], [none, problem, [code]]] = await Promise.all([run('olga', PASSWORD), run('olga', 'short')]);
  expect(entry).toMatch(/^olga:operator:scrypt\.15\.8\.1\.[\w-]{22}\.[\w-]{43}\n$/);
  const [user] = loadConfig({ RELAY_BOARD_USERS: entry }).boardUsers;
  expect(await isPassword(PASSWORD, user?.hash ?? '')).toBe(true);
  expect(await isPassword(`${PASSWORD} `, user?.hash ?? '')).toBe(false);
  expect([none, problem, code]).toEqual(['', expect.stringContaining('has 5 characters'), 1]);
});

test('a Bull Board of one’s own shows the relay’s queues readably, refuses what harms them, and keeps its own as they are', async () => {
  const stage = await setStage();
  const data = aClaimedEvent();
  await stage.queue('publish').add(data.eventType, data, { jobId: data.eventId });
  const redis = openRedis(stage.server.url);
  const own = new Queue('own', { connection: redis });
  for (const from of [{ redis }, stage.config()]) {
    const relay = await createBoardQueues(from);
    const app = fastify();
    const server = new FastifyAdapter();
    createBullBoard({
      queues: [new BullMQAdapter(own), ...relay.queues],
      serverAdapter: server,
      options: { handlerHooks: relay.handlerHooks },
    });
    await app.register(server.registerPlugin(), { prefix: '/team' });
    const { queues } = (await app.inject('/team/api/queues?activeQueue=relay-publish')).json();
    expect(queues.map(({ name }: { name: string }) => name)).toEqual(['own', 'relay-publish', 'relay-claim']);
    expect(queues[1].jobs).toMatchObject([
      {
        name: `UserCreated · user:${data.aggregateId} · identity.user.v1 · attempt 1 of 1`,
        data: { event_id: data.eventId, payload: 'hidden: it may hold personal data' },
      },
    ]);
    const empty = async (queue: string) =>
      (await app.inject({ method: 'PUT', url: `/team/api/queues/${queue}/empty` })).statusCode;
    expect([await empty('relay-publish'), await empty('own')]).toEqual([403, 200]);
    await relay.close();
    await app.close();
  }
  expect(await redis.ping(), 'a client that was given stays open').toBe('PONG');
  const clients = async () => (String(await stage.redis.client('LIST')).match(/^id=/gm) ?? []).length;
  // The test's own three.
  await waitFor(async () => (await clients()) === 3, { what: 'what was opened to be closed' });
  await own.close();
});
