import { expect, onTestFinished, test } from 'vitest';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { STREAM, type Stage, setStage } from '../support/flow.ts';
import { RELAY_USER } from '../support/least-privilege.ts';
import { startLoad } from '../support/load.ts';
import { createPostgres } from '../support/servers.ts';
import { waitFor } from '../support/wait.ts';

/** What is done a minute later is done by a retry or a lease that ended: not by another session right away. */
const AT_ONCE_MS = 30_000;

const expectFlow = async (stage: Stage) => {
  const event = anEvent();
  await insertEvents(stage.pool, [event]);
  await waitFor(async () => (await stage.row(event.eventId)).published, {
    what: 'an event to be published',
    timeoutMs: AT_ONCE_MS,
  });
};

const costNothing = async (stage: Stage) => {
  await stage.rested();
  const grade = await stage.expectPromisesHeld();
  expect(grade.deadLetters).toBe(0);
  expect(await stage.count('attempts > 0 OR error_message IS NOT NULL'), 'events it cost an attempt').toBe(0);
};

const loaded = async (stage: Stage) => {
  const load = startLoad(stage.pool);
  await waitFor(async () => (await stage.redis.xlen(STREAM)) > 100, {
    what: 'the load to flow',
  });
  return load;
};

test('a table whose columns get another type while pods run costs no event an attempt, and the flow goes on', async () => {
  const stage = await setStage();
  const pods = await Promise.all([stage.pod(), stage.pod()]);
  const load = await loaded(stage);
  for (const type of ['varchar(400)', 'text']) {
    for (const column of ['event_type', 'aggregate_type', 'error_message'])
      await stage.pool.query(`ALTER TABLE identity.outbox ALTER COLUMN ${column} TYPE ${type}`);
    await expectFlow(stage);
  }
  await load.stop();
  await costNothing(stage);
  const failures = pods
    .flatMap((pod) => pod.logs())
    .filter((line) => /cannot mark|claiming failed/.test(String(line.msg)))
    // A table that is written anew is looked at as after a restore: what was claimed meanwhile is claimed again.
    .filter((line) => !/EpochOverError|OtherGenerationError/.test(JSON.stringify(line)));
  // The sessions that failed are logged, not the work, which others did.
  expect(failures).toEqual([]);
});

test('sessions that became read-only cost nothing while new ones can write; while none can, pods say so', async () => {
  const postgres = await createPostgres();
  const stage = await setStage({ databaseUrl: postgres.adminUrl });
  const pods = await Promise.all([stage.pod(), stage.pod()]);
  const load = await loaded(stage);
  const readOnly = async (on: boolean) => {
    await stage.pool.query(`ALTER SYSTEM SET default_transaction_read_only = ${on}`);
    await stage.pool.query('SELECT pg_reload_conf()');
  };
  const own = await stage.pool.connect();
  onTestFinished(() => own.release());
  await own.query('SET default_transaction_read_only = off');

  // Sessions that are there follow the server; those that come get what the role says.
  await own.query(`ALTER ROLE ${RELAY_USER} SET default_transaction_read_only = off`);
  await own.query('ALTER ROLE postgres SET default_transaction_read_only = off');
  await readOnly(true);
  await load.stop().catch(() => {});
  const event = anEvent();
  await insertEvents(own, [event]);
  await waitFor(
    async () =>
      (await own.query('SELECT FROM identity.outbox WHERE published AND event_id = $1', [event.eventId]))
        .rowCount,
    { what: 'the flow to go on by new sessions', timeoutMs: AT_ONCE_MS },
  );

  await own.query(`ALTER ROLE ${RELAY_USER} SET default_transaction_read_only = on`);
  await own.query(`SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '${RELAY_USER}'`);
  for (const pod of pods) {
    await waitFor(
      async () => {
        const answer = await fetch(`${pod.url}/readyz`);
        return (
          answer.status === 503 && /no session can write: new ones are read-only/.test(await answer.text())
        );
      },
      { what: 'the pod to say that no session can write' },
    );
  }
  await own.query(`ALTER ROLE ${RELAY_USER} RESET default_transaction_read_only`);
  await own.query('ALTER SYSTEM RESET default_transaction_read_only');
  await own.query('SELECT pg_reload_conf()');
  for (const pod of pods) await pod.waitReady();
  await expectFlow(stage);
  await costNothing(stage);
});

test('two pods whose role may have twelve sessions, or four, work with what they get, and say so', async () => {
  const stage = await setStage();
  for (const limit of [12, 4]) {
    await stage.pool.query(
      `CREATE ROLE limited_${limit} LOGIN PASSWORD 'open-sesame' CONNECTION LIMIT ${limit} IN ROLE ${RELAY_USER}`,
    );
    const url = new URL(stage.env.RELAY_DATABASE_URL);
    url.username = `limited_${limit}`;
    const pods = await Promise.all([1, 2].map(() => stage.pod({ RELAY_DATABASE_URL: url.href })));
    const load = await loaded(stage);
    await insertEvents(stage.pool, someEvents(2_000, 300));
    await load.stop();
    await costNothing(stage);
    await expectFlow(stage);
    const said = pods
      .flatMap((pod) => pod.logs())
      .filter((line) => /fewer sessions than RELAY_DATABASE_POOL_SIZE/.test(String(line.msg)));
    // On a quick machine pods may get by with six sessions each, and never ask for a seventh.
    if (limit === 4) expect(said.length).toBeGreaterThan(0);
    for (const pod of pods) {
      await pod.kill('SIGTERM');
      await pod.exited;
    }
    await stage.pool.query(`DROP ROLE limited_${limit}`);
  }
});

test('a pod that gets no session for HTTP is ready: its own sessions answer', async () => {
  const stage = await setStage();
  await stage.pool.query(`CREATE ROLE without_more LOGIN PASSWORD 'open-sesame' IN ROLE ${RELAY_USER}`);
  const url = new URL(stage.env.RELAY_DATABASE_URL);
  url.username = 'without_more';
  const pod = await stage.pod({ RELAY_DATABASE_URL: url.href });
  const ofHttp = `SELECT FROM pg_stat_activity WHERE usename = 'without_more' AND application_name = 'relay-service http'`;
  await waitFor(async () => (await stage.pool.query(ofHttp)).rowCount === 0, {
    what: 'the idle sessions for HTTP to end',
  });
  await stage.pool.query('ALTER ROLE without_more CONNECTION LIMIT 1');
  const answer = await fetch(`${pod.url}/readyz`);
  expect(answer.status, await answer.text()).toBe(200);
  expect((await stage.pool.query(ofHttp)).rowCount).toBe(0);
  await pod.kill('SIGTERM');
  await stage.pool.query('DROP ROLE without_more');
});
