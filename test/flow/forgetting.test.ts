/** PostgreSQL forgets what became of its rows: none that is there is lost, doubled or out of order. */
import pg from 'pg';
import { expect, onTestFinished, test } from 'vitest';
import { gradeLedger, violationsOf } from '../demo/ledger.ts';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { DLQ, STREAM, type Stage, setStage } from '../support/flow.ts';
import { startLoad } from '../support/load.ts';
import { type NetworkLink, startProxy, through } from '../support/proxy.ts';
import { copyPostgres, createPostgres, type TestPostgres } from '../support/servers.ts';
import { waitFor } from '../support/wait.ts';

const WORDS = 'dictionary.word.v1';
const BROKEN = 'identity.broken.v1';
const PACE = { RELAY_POLL_INTERVAL: '1', RELAY_RETRY_BASE_DELAY: '0.2', RELAY_MAX_RETRY_ATTEMPTS: '1' };

/** Resolves when so many more events are published. */
async function published(stage: Stage, more: number): Promise<void> {
  const before = await stage.count('published');
  await waitFor(async () => (await stage.count('published')) >= before + more, {
    what: `${more} more events to be published`,
  });
}

const entriesOf = async (stage: Stage, stream: string) =>
  (await stage.redis.type(stream)) === 'stream' ? stage.entries(stream) : [];

/** Every promise about the rows that are there now; the entries of rows that are gone may remain. */
async function expectNoRowHarmed(stage: Stage): Promise<{ forgotten: number; entries: number }> {
  await stage.rested();
  const { unknown, ...grade } = await gradeLedger({
    ...{ pool: stage.pool, redis: stage.redis, defaultStream: STREAM, dlqStream: DLQ },
  });
  expect(violationsOf({ ...grade, unknown: 0 })).toEqual([]);
  // Each row knows its own entry.
  const entries = new Set<string>();
  for (const stream of [STREAM, WORDS, DLQ, BROKEN])
    for (const { entryId, fields } of await entriesOf(stage, stream))
      entries.add(`${fields.event_id} ${entryId}`);
  for (const row of await stage.rows()) expect(entries).toContain(`${row.event_id} ${row.stream_entry_id}`);
  return { forgotten: unknown, entries: grade.entries };
}

type Address = Stage & Readonly<{ link: NetworkLink; primary: TestPostgres }>;

/** A PostgreSQL at an address that can be made to lead to another one. */
async function setAddress(env: Readonly<Record<string, string>> = PACE): Promise<Address> {
  const primary = await createPostgres();
  const link = await startProxy(primary.port);
  onTestFinished(link.close);
  const stage = await setStage({ databaseUrl: through(link, primary.adminUrl), env });
  return { ...stage, link, primary };
}

/** The address leads there from now on. */
function leadTo({ link }: Address, to: TestPostgres): void {
  link.leadTo(to.port);
  link.cut();
}

async function onServer<T>(server: TestPostgres, sql: string): Promise<T[]> {
  const client = new pg.Client({ connectionString: server.adminUrl });
  await client.connect();
  try {
    return (await client.query(sql)).rows as T[];
  } finally {
    await client.end();
  }
}

/** A standby of the primary, and what lies between the two. */
async function addStandby({
  primary,
}: Address): Promise<{ standby: TestPostgres; replication: NetworkLink }> {
  const replication = await startProxy(primary.port);
  onTestFinished(replication.close);
  const { password } = new URL(primary.adminUrl);
  const conninfo = `host=127.0.0.1 port=${replication.port} user=postgres password=${password}`;
  const standby = await copyPostgres(primary, conninfo);
  await waitFor(
    async () =>
      (await onServer<{ state: string }>(primary, 'SELECT state FROM pg_stat_replication'))[0]?.state ===
      'streaming',
    { what: 'the standby to follow' },
  );
  return { standby, replication };
}

/** How many new events, which were not among these, are published. */
async function publishedBeside(stage: Stage, events: readonly string[]): Promise<number> {
  const { rows } = await stage.pool.query<{ n: number }>(
    'SELECT count(*)::int AS n FROM identity.outbox WHERE published AND NOT (event_id = ANY ($1::uuid[]))',
    [events],
  );
  return rows[0]?.n ?? 0;
}

/**
 * Pods and writers work on a primary whose standby lags: some rows are lost, of some that remain it is forgotten that
 * they were published or dead-lettered. Then the standby is promoted by `failOver`, and writers go on there.
 */
async function loseByFailover(
  failOver: (stage: Address, standby: TestPostgres) => Promise<void>,
): Promise<void> {
  const stage = await setAddress();
  const { standby, replication } = await addStandby(stage);
  await stage.redis.set(BROKEN, 'a string');
  const pods = [await stage.pod(), await stage.pod()];
  const load = startLoad(stage.pool, { aggregates: 12 });
  await published(stage, 100);
  const publish = stage.queue('publish');
  await publish.pause();
  const written = load.written();
  await waitFor(() => load.written() > written + 50, { what: 'rows to wait' });
  const doomed = [anEvent({ topic: BROKEN }), anEvent({ topic: BROKEN })];
  await insertEvents(stage.pool, doomed);
  const [at] = await onServer<{ lsn: string }>(stage.primary, 'SELECT pg_current_wal_lsn() AS lsn');
  await waitFor(
    async () =>
      (await onServer<{ it: boolean }>(standby, `SELECT pg_last_wal_replay_lsn() >= '${at?.lsn}' AS it`))[0]
        ?.it,
    { what: 'the standby to have the rows' },
  );
  // What is committed from here on is lost with the primary.
  replication.halfOpen();
  await publish.resume();
  await published(stage, 200);
  await waitFor(async () => (await stage.count('dead_lettered_at IS NOT NULL')) === 2, {
    what: 'the dead letters',
  });
  const before = await stage.rows();

  await failOver(stage, standby);
  const known = before.map((it) => it.event_id);
  await waitFor(async () => (await publishedBeside(stage, known).catch(() => 0)) > 200, {
    what: 'new events to be published',
  });
  await load.stop();
  const { forgotten } = await expectNoRowHarmed(stage);
  expect(forgotten).toBeGreaterThan(0);
  // Ids were given out again.
  const events = new Map(before.map((row) => [row.id, row.event_id]));
  const again = (await stage.rows()).filter(
    ({ id, event_id }) => events.has(id) && events.get(id) !== event_id,
  );
  expect(again.length).toBeGreaterThan(0);
  for (const { eventId } of doomed) expect((await stage.row(eventId)).dead_lettered_at).not.toBeNull();
  expect(await stage.entries(DLQ)).toHaveLength(2);
  expect(
    pods.flatMap((pod) => pod.logs()).find(({ msg }) => String(msg).includes('had forgotten')),
  ).toMatchObject({
    published: expect.any(Number),
    dead: 2,
  });
  for (const pod of pods) expect((await fetch(`${pod.url}/readyz`)).status).toBe(200);
}

test('a standby that lagged takes over: no row of it is lost, doubled or out of order', async () => {
  await loseByFailover(async (stage, standby) => {
    await stage.primary.kill('SIGQUIT');
    await onServer(standby, 'SELECT pg_promote()');
    leadTo(stage, standby);
  });
});

test('a standby that lagged takes over while sessions to the old primary, which still runs, remain', async () => {
  await loseByFailover(async (stage, standby) => {
    await onServer(standby, 'SELECT pg_promote()');
    stage.link.leadTo(standby.port);
    // Writers leave it; of each pod some sessions remain.
    await onServer(
      stage.primary,
      `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
       WHERE application_name = 'test' OR application_name LIKE 'relay-service%' AND pid % 3 = 0
          OR pid = (SELECT min(pid) FROM pg_stat_activity WHERE application_name LIKE 'relay-service%')`,
    );
  });
});

/** What became of these rows is forgotten: they are as they were written. */
const forget = (stage: Stage, condition: string) =>
  stage.pool.query(
    `UPDATE identity.outbox SET published = false, published_at = NULL, next_attempt_at = NULL, attempts = 0,
       error_message = NULL, stream_entry_id = NULL, dead_lettered_at = NULL WHERE ${condition}`,
  );

test('a folder that was copied back is of its old timeline: what was published since is not published again', async () => {
  const stage = await setAddress();
  const pods = [await stage.pod()];
  await insertEvents(stage.pool, someEvents(100, 10));
  await stage.rested();
  // Rows of which the copy does not know that they are published, behind some of which others wait.
  const publish = stage.queue('publish');
  await publish.pause();
  const waiting = someEvents(200, 5);
  await insertEvents(stage.pool, waiting);
  await waitFor(async () => (await stage.count('NOT published AND next_attempt_at IS NULL')) === 0, {
    what: 'the claim',
  });
  const copy = await copyPostgres(stage.primary);
  await publish.resume();
  const lost = someEvents(50, 5);
  await insertEvents(stage.pool, lost);
  await stage.rested();

  await stage.primary.kill('SIGQUIT');
  leadTo(stage, copy);
  const events = someEvents(60, 5);
  await waitFor(() => insertEvents(stage.pool, events).catch(() => null), {
    what: 'a writer to reach the copy',
  });
  const { forgotten, entries } = await expectNoRowHarmed(stage);
  expect({ forgotten, entries }).toEqual({ forgotten: 50, entries: 410 });
  expect(pods[0]?.logs().findLast(({ msg }) => String(msg).includes('had forgotten'))).toMatchObject({
    published: 200,
    dead: 0,
  });
});

test('rows that were emptied out and written back as they were before are found in their streams, and in order', async () => {
  const stage = await setStage({ env: PACE });
  await stage.redis.set(BROKEN, 'a string');
  await Promise.all([stage.pod(), stage.pod()]);
  const words = someEvents(40, 4, { topic: WORDS });
  await insertEvents(stage.pool, [...someEvents(300, 10), ...words, anEvent({ topic: BROKEN })]);
  await stage.rested();
  // As a dump of before has them; TRUNCATE changes no timeline and ends no session.
  const restoring = await stage.pool.connect();
  await restoring.query(`
    BEGIN;
    CREATE TABLE dump AS SELECT * FROM identity.outbox;
    TRUNCATE identity.outbox RESTART IDENTITY;
    INSERT INTO identity.outbox (id, event_id, event_type, aggregate_type, aggregate_id, payload, created_at, topic)
    SELECT id, event_id, event_type, aggregate_type, aggregate_id, payload, created_at, topic FROM dump;
    SELECT setval('identity.outbox_id_seq', 1000)`);
  // It takes its time: a claim has begun meanwhile, and waits for the table.
  await waitFor(
    async () => {
      const { rows } = await stage.pool.query(
        `SELECT FROM pg_locks epoch JOIN pg_locks rows USING (pid)
         WHERE epoch.relation = 'identity.relay_epoch_lock'::regclass AND epoch.granted
           AND rows.relation = 'identity.outbox'::regclass AND NOT rows.granted`,
      );
      return rows.length > 0;
    },
    { what: 'a claim to wait for the table' },
  );
  await restoring.query('COMMIT');
  restoring.release();
  await insertEvents(stage.pool, someEvents(50, 5));
  const { forgotten, entries } = await expectNoRowHarmed(stage);
  expect({ forgotten, entries }).toEqual({ forgotten: 0, entries: 390 });
  expect(await stage.entries(DLQ)).toHaveLength(1);
});

test.each([
  'TRUNCATE identity.outbox RESTART IDENTITY',
  'TRUNCATE identity.outbox',
  'DELETE FROM identity.outbox',
])(
  'after %s jobs, entries and dead letters of rows that are gone leave no trace on those that come',
  async (statement) => {
    const stage = await setStage({ env: { ...PACE, RELAY_CLAIM_LEASE: '3', RELAY_PUBLISH_TIMEOUT: '2' } });
    await stage.redis.set(BROKEN, 'a string');
    await Promise.all([stage.pod(), stage.pod()]);
    const aggregates = someEvents(6).map((event) => event.aggregateId);
    const some = (count: number) =>
      Array.from({ length: count }, (_, i) =>
        anEvent({
          aggregateId: aggregates[i % 6] as string,
          ...(i % 20 === 7 && { topic: BROKEN }),
        }),
      );
    await insertEvents(stage.pool, some(60));
    await stage.rested();
    const publish = stage.queue('publish');
    await publish.pause();
    await insertEvents(stage.pool, some(60));
    await waitFor(
      async () =>
        (await stage.count('NOT published AND dead_lettered_at IS NULL AND next_attempt_at IS NULL')) === 0,
      {
        what: 'the claim',
      },
    );
    await stage.pool.query(statement);
    await stage.redis.del(BROKEN);
    const events = some(90);
    await insertEvents(stage.pool, events);
    await publish.resume();
    await expectNoRowHarmed(stage);
    const rows = await stage.rows();
    expect(rows.map((row) => row.event_id)).toEqual(events.map((event) => event.eventId));
    for (const row of rows)
      expect(row).toMatchObject({ published: true, attempts: 0, dead_lettered_at: null });
    await waitFor(async () => (await publish.getJobCountByTypes('waiting', 'active', 'delayed')) === 0, {
      what: 'every job to end',
    });
  },
);

test('rows that are parked, dead, leased or fresh though they were published are found before anything is claimed', async () => {
  const stage = await setAddress();
  await stage.pod();
  const events = someEvents(80, 4);
  await insertEvents(stage.pool, events);
  await stage.rested();
  // A tick between the statements that make the server forget would claim its rows: a server that forgets is not at work.
  await stage.queue('claim').pause();
  // One that is under way goes on for a moment, in case that more is written.
  await waitFor(async () => (await stage.queue('claim').getActiveCount()) === 0, {
    what: 'the last claim to end',
  });
  await forget(stage, 'true');
  await stage.pool.query(`UPDATE identity.outbox SET
    next_attempt_at = CASE id % 4 WHEN 1 THEN 'infinity' WHEN 2 THEN 'infinity' WHEN 3 THEN now() + interval '1 hour' END,
    dead_lettered_at = CASE id % 4 WHEN 2 THEN now() - interval '1 hour' END`);
  // The server is started anew: another generation.
  await stage.primary.restart();
  await stage.queue('claim').resume();
  await waitFor(async () => (await stage.count('published').catch(() => 0)) === 80, {
    what: 'the rows to be found',
  });
  const { entries } = await expectNoRowHarmed(stage);
  expect(entries).toBe(80);
});
