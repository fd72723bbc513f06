import { once } from 'node:events';
import { type AddressInfo, createServer } from 'node:net';
import { expect, onTestFinished, test } from 'vitest';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { STREAM, type Stage, setStage } from '../support/flow.ts';
import { startLoad } from '../support/load.ts';
import { createPostgres } from '../support/servers.ts';
import { waitFor } from '../support/wait.ts';

/** Longer than PUBLISH_TIMEOUT: what was on its way is given up and asked again. */
const OUTAGE_MS = 3_000;
const SHORT_TIMEOUTS = { RELAY_PUBLISH_TIMEOUT: '1', RELAY_CLAIM_LEASE: '5', RELAY_POLL_INTERVAL: '1' };

type Outage = Readonly<{ what: string; happen: () => Promise<void> }>;

/** Two pods under load, one outage after the other in its midst, and the load going on after each. */
async function suffer(stage: Stage, outages: readonly Outage[]): Promise<void> {
  await Promise.all([stage.pod(), stage.pod()]);
  const load = startLoad(stage.pool);
  for (const { what, happen } of outages) {
    // So many that the outage meets some in progress.
    await insertEvents(stage.pool, someEvents(2_000, 700));
    const reached = await stage.redis.xlen(STREAM);
    await waitFor(async () => (await stage.redis.xlen(STREAM)) > reached + 200, {
      what: `${what}: the load to flow`,
    });
    await happen();
    const event = anEvent();
    await waitFor(
      () =>
        insertEvents(stage.pool, [event]).then(
          () => true,
          () => false,
        ),
      { what: `${what}: the database to take an event after it` },
    );
    await waitFor(async () => (await stage.row(event.eventId)).published, {
      what: `${what}: the flow to resume by itself`,
    });
    const cost = await stage.count('attempts > 0 OR error_message IS NOT NULL');
    expect(cost, `${what}: events it cost an attempt`).toBe(0);
  }
  await load.stop();
  await stage.rested();
  expect(await stage.expectPromisesHeld()).toMatchObject({ deadLetters: 0 });
  expect(await stage.count('attempts > 0 OR error_message IS NOT NULL')).toBe(0);
}

const hold = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

test('a Redis that hangs, is restarted, is away, or is full for some seconds costs no event and no attempt', async () => {
  const stage = await setStage({ env: SHORT_TIMEOUTS });
  const { server, redis } = stage;
  const refused = async () => Number(/errorstat_OOM:count=(\d+)/.exec(await redis.info('errorstats'))?.[1]);
  await suffer(stage, [
    {
      what: 'a Redis that hangs for some seconds',
      happen: async () => {
        server.pause();
        await hold(OUTAGE_MS);
        server.resume();
      },
    },
    { what: 'a Redis that is restarted', happen: () => server.restart() },
    {
      what: 'a Redis that is away for some seconds',
      happen: async () => {
        await server.stop();
        await hold(OUTAGE_MS);
        await server.restart();
      },
    },
    {
      what: 'a full Redis',
      happen: async () => {
        await redis.config('SET', 'maxmemory', '1');
        await waitFor(async () => (await refused()) > 10, { what: 'Redis to refuse what the relay asks' });
        await redis.config('SET', 'maxmemory', '0');
      },
    },
  ]);
});

test('a PostgreSQL that crashes and recovers costs no event and no attempt', async () => {
  const postgres = await createPostgres();
  const stage = await setStage({ databaseUrl: postgres.adminUrl, env: SHORT_TIMEOUTS });
  const crash = async () => {
    await postgres.kill('SIGQUIT');
    await hold(OUTAGE_MS);
    await postgres.restart();
  };
  await suffer(stage, [{ what: 'the crash', happen: crash }]);
});

for (const notify of ['true', 'false'])
  test(`while PostgreSQL is away a pod says so once, and once when it is back: RELAY_NOTIFY=${notify}`, async () => {
    const postgres = await createPostgres();
    const env = { ...SHORT_TIMEOUTS, RELAY_NOTIFY: notify, RELAY_LOG_LEVEL: 'debug' };
    const stage = await setStage({ databaseUrl: postgres.adminUrl, env });
    const pod = await stage.pod();
    await insertEvents(stage.pool, someEvents(20, 5));
    await stage.rested();
    const before = pod.logs().length;
    const since = () => pod.logs().slice(before);
    const saying = (msg: string) => since().filter((line) => line.msg === msg);
    await postgres.stop();
    for (const msg of [
      'a duty of the tick failed; the next tick does it',
      'claiming failed; nothing was claimed, trying again',
    ])
      await waitFor(() => saying(msg).length >= 5, { what: `the pod to meet this five times: ${msg}` });
    const away = saying('no connection to PostgreSQL; trying again until it is back');
    expect(away).toHaveLength(1);
    expect(away[0]).toMatchObject({
      level: 'warn',
      host: new URL(stage.env.RELAY_DATABASE_URL).hostname,
      err: { message: expect.stringMatching(/./) },
    });
    // Each tick fails twice or more: none of that is a warning.
    const warnings = since().flatMap(({ level, msg }) => (level === 'warn' ? [msg] : []));
    expect(warnings.length, warnings.join('\n')).toBeLessThanOrEqual(6);
    expect(saying('a duty of the tick failed; the next tick does it').map(({ duty }) => duty)).toEqual(
      expect.arrayContaining(['lease reaper', 'sweep']),
    );
    await postgres.restart();
    await waitFor(() => saying('the connection to PostgreSQL is back').length > 0, {
      what: 'the pod to say that PostgreSQL is back',
    });
    await insertEvents(stage.pool, [anEvent()]);
    await stage.rested();
    expect(saying('no connection to PostgreSQL; trying again until it is back')).toHaveLength(1);
    expect(saying('the connection to PostgreSQL is back')).toHaveLength(1);
  });

test('a pod that starts while its servers are away waits for them, says so, and then works', async () => {
  const postgres = await createPostgres();
  const stage = await setStage({ databaseUrl: postgres.adminUrl, env: { RELAY_STARTUP_TIMEOUT: '60' } });
  const event = anEvent();
  await insertEvents(stage.pool, [event]);
  await Promise.all([stage.server.stop(), postgres.stop()]);
  const pod = await stage.spawn(['start']);
  for (const server of ['PostgreSQL', 'Redis']) {
    const msg = 'waiting for a server to answer';
    await waitFor(() => pod.logs().some((line) => line.msg === msg && line.server === server), {
      what: `the pod to say that it waits for ${server}`,
    });
  }
  const ready = await fetch(`${pod.url}/readyz`).then(
    ({ ok }) => ok,
    () => false,
  );
  expect(ready).toBe(false);
  await Promise.all([stage.server.restart(), postgres.restart()]);
  await pod.waitReady();
  await stage.rested();
  expect((await stage.entries()).map(({ fields }) => fields.event_id)).toEqual([event.eventId]);
});

test('a command says in one line that Redis refuses the password, and does not wait as long as a pod', async () => {
  const stage = await setStage({ env: { RELAY_STARTUP_TIMEOUT: '600' } });
  const wrong = new URL(stage.server.url);
  wrong.password = 'hunter2';
  const { code, lines } = await stage.command(['dlq', 'list'], { RELAY_REDIS_URL: wrong.href });
  expect([code, lines]).toEqual([
    78,
    [expect.stringMatching(/^relay: Redis does not let the relay in: WRONGPASS.*RELAY_REDIS_URL/)],
  ]);
  expect(lines.join()).not.toContain('hunter2');
});

test('commands do not wait for a PostgreSQL that takes the connection and never answers', async () => {
  const stage = await setStage({ env: { RELAY_STARTUP_TIMEOUT: '600' } });
  const mute = createServer(() => {}).listen(0, '127.0.0.1');
  await once(mute, 'listening');
  onTestFinished(() => void mute.close());
  const { port } = mute.address() as AddressInfo;
  const env = { RELAY_DATABASE_URL: `postgres://me:hunter2@127.0.0.1:${port}/db` };
  await Promise.all(
    [['dlq', 'list'], ['verify', '--since', '1h'], ['own'], ['status'], ['check']].map(async (args) => {
      const { code, lines } = await stage.command(args, env);
      const printed = lines.join('\n');
      expect([1, 69], `${args.join(' ')}: ${printed}`).toContain(code);
      const named = /PostgreSQL cannot be reached|no answer: |failed +database/;
      expect(
        lines.filter((line) => named.test(line)),
        printed,
      ).toHaveLength(1);
    }),
  );
});

test('with a database number that Redis does not have, nothing goes to database 0, which may be of others', async () => {
  const stage = await setStage();
  const env = { RELAY_REDIS_URL: `${stage.server.adminUrl}/99` };
  for (const command of [
    ['start'],
    ['own', '--yes'],
    ['dlq', 'list'],
    ['board'],
    ['verify', '--since', '1h'],
  ]) {
    const { code, lines } = await stage.command(command, env);
    expect([command, code, lines.join('\n')]).toEqual([
      ...[command, 78],
      expect.stringMatching(/DB index is out of range.*RELAY_REDIS_URL/),
    ]);
  }
  expect((await stage.command(['status'], env)).code).toBe(1);
  expect(await stage.redis.keys('*')).toEqual([]);
});

for (const [server, variable] of [
  ['Redis', 'RELAY_REDIS_URL'],
  ['PostgreSQL', 'RELAY_DATABASE_URL'],
] as const) {
  test(`a pod that cannot reach ${server} in time exits 69 and says which variable to look at`, async () => {
    const stage = await setStage({ env: { RELAY_STARTUP_TIMEOUT: '1' } });
    const nowhere = { Redis: 'redis://127.0.0.1:9', PostgreSQL: 'postgres://me:hunter2@127.0.0.1:9/db' }[
      server
    ];
    const { code, lines } = await stage.command(['start'], { [variable]: nowhere });
    expect(code).toBe(69);
    expect(lines.join('\n')).toMatch(new RegExp(`${server} cannot be reached.*${variable}.*ECONNREFUSED`));
    expect(lines.join('\n')).not.toContain('hunter2');
  });
}

test('a pod whose database has no outbox yet exits 69 and says what to run', async () => {
  const stage = await setStage();
  await stage.pool.query('DROP SCHEMA identity CASCADE');
  const { code, lines } = await stage.command(['start']);
  expect(code).toBe(69);
  expect(lines.join('\n')).toMatch(/identity\.outbox.*relay migrate/);
});
