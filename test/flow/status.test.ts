import { expect, test } from 'vitest';
import type { Status } from '../../src/operations/fleet-status.ts';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { DLQ, STREAM, type Stage, setStage } from '../support/flow.ts';
import { blocksUnder } from '../support/readme.ts';
import { waitFor } from '../support/wait.ts';

async function statusOf(stage: Stage, env: Readonly<Record<string, string>> = {}): Promise<Status> {
  const { code, lines } = await stage.command(['status', '--json'], env);
  expect(code, lines.join('\n')).toBe(0);
  return JSON.parse(lines.join('\n'));
}

/** The URL of a Redis user with no more rights than the documentation gives to the relay. */
async function leastPrivileged(stage: Stage): Promise<string> {
  const [acl = ''] = blocksUnder('docs/security.md', 'Rights', '');
  const [command = '', ...args] = acl.trim().split(' ');
  await stage.redis.call(command, ...args);
  const url = new URL(stage.server.url);
  url.username = 'relay';
  url.password = 'password';
  return url.href;
}

test('the status tells what there is, and what the oldest event of each state waits for', async () => {
  const stage = await setStage({
    env: { RELAY_RETRY_BASE_DELAY: '600', RELAY_MAX_RETRY_ATTEMPTS: '1', RELAY_STREAM_MAXLEN: '10' },
  });
  const env = { RELAY_REDIS_URL: await leastPrivileged(stage) };
  await stage.redis.xgroup('CREATE', STREAM, 'mailer', '$', 'MKSTREAM');
  const pods = [await stage.pod(env), await stage.pod(env)];
  await insertEvents(stage.pool, someEvents(60));
  await stage.rested();
  const hopeless = [anEvent({ topic: 'bull:relay-x' }), anEvent({ topic: DLQ })];
  // A topic that this user may not write: a retry in ten minutes, and the next of its aggregate behind it.
  const refused = anEvent({ topic: 'payments.v1' });
  const behind = anEvent({ aggregateId: refused.aggregateId });
  await insertEvents(stage.pool, [...hopeless, refused, behind]);
  const isRetrying = async () => (await stage.row(refused.eventId)).attempts === 1;
  await waitFor(isRetrying, { what: 'the first attempt to fail' });
  // What both pods have appended to is told with a heartbeat.
  const found = await waitFor(
    async () => {
      const status = await statusOf(stage, env);
      const isTold = status.figures.streams?.length === 2 && status.lastTickSecondsAgo !== null;
      return isTold ? status : null;
    },
    { what: 'the pods to tell of themselves' },
  );

  expect(found.problems).toEqual([]);
  expect(found.figures.backlog).toMatchObject({
    fresh: 0,
    leased: 0,
    retrying: 1,
    due: 0,
    parked: 1,
    dead: 2,
  });
  expect(found.figures.queues).toMatchObject({ publish: { delayed: 1, isPaused: false } });
  expect(found.figures.fleet?.pods.map(({ pod, phase }) => [pod.split('/')[1], phase]).toSorted()).toEqual(
    pods.map(({ pid }) => [String(pid), 'running']).toSorted(),
  );
  expect(found.lastTickSecondsAgo).toBeLessThan(15);
  expect(found.rates?.published.lastMinute).toBe(1);
  expect(found.figures.streams).toMatchObject([
    { stream: STREAM, groups: [{ group: 'mailer', pending: 0 }] },
    { stream: DLQ, length: 2, groups: [] },
  ]);
  expect(found.oldest?.map(({ state, eventId, waitsFor }) => [state, eventId, waitsFor])).toEqual([
    [
      'retrying',
      refused.eventId,
      expect.stringMatching(/^for attempt 2 in \d+ s, after: .*(?:NOPERM|ACL failure)/),
    ],
    ['parked', behind.eventId, `for event ${refused.eventId} before it`],
  ]);

  // Nobody claims while the queue is paused.
  await stage.queue('claim').pause();
  await stage.queue('publish').setGlobalConcurrency(7);
  const waiting = anEvent();
  await insertEvents(stage.pool, [waiting]);
  const { code, lines } = await stage.command(['status'], env);
  const text = lines.join('\n');
  expect(code, text).toBe(0);
  // In a file or a pipe there are no colours, and everything is said.
  expect(text).not.toContain('\x1b');
  expect(text).toMatch(/^ {2}fresh +1$/m);
  expect(text).toMatch(/^ {2}dead +2 {3}oldest /m);
  expect(text).toContain(`fresh     ${waiting.eventId}`);
  expect(text).toContain('waits to be claimed, but the claim queue is paused');
  expect(text).toMatch(/relay-claim .*PAUSED/);
  expect(text).toMatch(/relay-publish .*at most 7 in progress \(global concurrency\)/);
  expect(text).toMatch(/mailer +0 consumers +\d+ to read +0 pending +\d+ about to be trimmed unread/);
  // Streams stand in columns.
  expect(text).toMatch(/^ {2}identity\.user\.v1 {6}\d+ entries of about 10$/m);
  expect(text).toMatch(/^ {2}identity\.user\.v1\.dlq {2}2 entries of about \d+ +no group$/m);
  expect(text).toMatch(/last tick of the schedule: .* ago, due every 5 s/);
});

test('after a restart of Redis the status tells what groups have to read as exactly as before', async () => {
  const stage = await setStage({ env: { RELAY_STREAM_MAXLEN: '100' } });
  // A burst after a quiet time, and one entry long after it.
  const burst = Array.from({ length: 94 }, (_, i) => `4000-${i}`);
  const ids = ['1000-0', '2000-0', '3000-0', ...burst, '9000000-0'];
  for (const id of ids) await stage.redis.xadd(STREAM, id, 'payload', 'x');
  for (const [group, count] of [
    ['mailer', 3],
    ['printer', 97],
  ] as const) {
    await stage.redis.xgroup('CREATE', STREAM, group, '0');
    await stage.redis.xreadgroup('GROUP', group, 'me', 'COUNT', count, 'STREAMS', STREAM, '>');
    await stage.redis.xack(STREAM, group, ...ids.slice(0, count));
  }
  const groups = async () => {
    const { code, lines } = await stage.command(['status']);
    expect(code, lines.join('\n')).toBe(0);
    return lines.filter((it) => /mailer|printer/.test(it)).map((it) => it.trim().replace(/ +/g, ' '));
  };
  const told = [
    'mailer 1 consumer 95 to read 0 pending 5 about to be trimmed unread',
    'printer 1 consumer 1 to read 0 pending',
  ];
  expect(await groups()).toEqual(told);
  await stage.server.restart();
  expect(await groups()).toEqual(told);
});

test('a server that is away is named, and what the other knows is shown', async () => {
  const stage = await setStage();
  await insertEvents(stage.pool, [anEvent()]);
  const away = await stage.command(['status', '--json'], { RELAY_REDIS_URL: 'redis://127.0.0.1:9' });
  expect(away.code).toBe(1);
  const status: Status = JSON.parse(away.lines.join('\n'));
  expect(status.figures.backlog).toMatchObject({ fresh: 1 });
  expect(status.figures.queues).toBeUndefined();
  expect(status.problems).toEqual([
    expect.stringMatching(/^Redis: .*ECONNREFUSED.* \(see RELAY_REDIS_URL\)$/),
  ]);

  // What is not known is not left out in silence.
  const unknown = (lines: readonly string[]) =>
    lines.flatMap((line, i) => (line.startsWith('  unknown: ') ? [`${lines[i - 1]}${line}`] : []));
  const withoutRedis = await stage.command(['status'], { RELAY_REDIS_URL: 'redis://127.0.0.1:9' });
  expect(unknown(withoutRedis.lines)).toEqual(
    ['Queues', 'Pods', 'Streams'].map((it) => `${it}  unknown: Redis gives no answer`),
  );
  const withoutStreams = await stage.command(['status'], {
    RELAY_STREAM_REDIS_URL: 'redis://127.0.0.1:9',
  });
  expect(withoutStreams.lines[0]).toMatch(/^no answer: stream Redis: .* \(see RELAY_STREAM_REDIS_URL\)$/);
  expect(unknown(withoutStreams.lines)).toEqual(['Streams  unknown: its Redis gives no answer']);

  const { code, lines } = await stage.command(['status'], {
    RELAY_DATABASE_URL: 'postgres://me:hunter2@127.0.0.1:9/x',
  });
  expect(code).toBe(1);
  expect(lines[0]).toMatch(/^no answer: database: .*ECONNREFUSED.* \(see RELAY_DATABASE_URL\)$/);
  expect(unknown(lines)).toEqual(
    ['Backlog', 'Oldest events', 'Rates'].map((it) => `${it}  unknown: PostgreSQL gives no answer`),
  );
  expect(lines.join('\n')).toMatch(/^Queues$/m);
  expect(lines.join('\n')).toContain('no pod is running');
  expect(lines.join('\n')).not.toContain('hunter2');
});

test('the last tick of the schedule is not what a pod knew of that was killed long ago', async () => {
  const stage = await setStage();
  const killed = { pod: 'killed', version: '1.2.3', phase: 'running', upSeconds: 9, tickSecondsAgo: 1 };
  const facts = JSON.stringify({ ...killed, inProgress: 0, concurrency: 1, protocol: 3 });
  await stage.redis.hset('bull:relay:pods', 'killed', `${Date.now() - 540_000} ${facts}`);
  const { lines } = await stage.command(['status']);
  expect(lines).toContain('  last tick of the schedule: unknown, since no pod runs, due every 5 s');
  expect((await statusOf(stage)).lastTickSecondsAgo).toBe(null);
});

test('a watch goes on until it is interrupted, and shows what has changed', async () => {
  const stage = await setStage();
  const watch = await stage.spawn(['status', '--json', '--watch', '0.1']);
  const last = () => JSON.parse(watch.lines.at(-1) ?? 'null') as Status | null;
  await waitFor(() => last()?.figures.backlog?.fresh === 0, { what: 'the first look' });
  await insertEvents(stage.pool, [anEvent()]);
  await waitFor(() => last()?.figures.backlog?.fresh === 1, { what: 'the event to be shown' });
  expect(last()?.oldest?.[0]?.waitsFor).toBe('to be claimed, but no pod is there');
  expect(await watch.kill('SIGINT')).toEqual({ code: 0, signal: null });
});

test('before the migration, status and check say in one sentence what to run', async () => {
  const stage = await setStage();
  await stage.pool.query('DROP SCHEMA identity CASCADE');
  const sentence = 'this database lacks table identity.outbox: run "relay migrate" on this database first';
  const status = await stage.command(['status']);
  expect(status.code).toBe(1);
  expect(status.lines.filter((line) => line.includes('database'))).toEqual([`relay: ${sentence}`]);
  const check = await stage.command(['check']);
  expect(check.code).toBe(1);
  expect(check.lines.filter((line) => line.startsWith('failed'))).toEqual([
    `failed  table                  ${sentence}`,
  ]);
});
