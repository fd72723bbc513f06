import { performance } from 'node:perf_hooks';
import { Redis } from 'ioredis';
import { expect, onTestFinished, test } from 'vitest';
import type { SampleEvent } from '../demo/sample.ts';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { STREAM, type Stage, setStage } from '../support/flow.ts';
import { startLoad } from '../support/load.ts';
import { waitFor } from '../support/wait.ts';

/** Too long for any of these tests: whatever arrives, arrives by the wake-up. */
const NEVER_POLLS = { RELAY_POLL_INTERVAL: '600' };

/** Milliseconds from the answer to the commit until a blocking reader holds the entry. */
async function latencies(stage: Stage, count: number): Promise<number[]> {
  const reader = new Redis(stage.server.adminUrl);
  onTestFinished(() => reader.disconnect());
  const measured: number[] = [];
  for (let i = 0; i < count; i++) {
    const event = anEvent();
    const last = (await stage.redis.xrevrange(STREAM, '+', '-', 'COUNT', 1))[0]?.[0] ?? '0';
    const arrival = reader.xread('BLOCK', 60_000, 'STREAMS', STREAM, last).then((found) => {
      expect(found?.[0]?.[1][0]?.[1]).toContain(event.eventId);
      return performance.now();
    });
    await insertEvents(stage.pool, [event]);
    const committed = performance.now();
    measured.push((await arrival) - committed);
    await stage.rested();
  }
  return measured.toSorted((a, b) => a - b);
}

const isIdle = async (stage: Stage) => {
  const { rowCount } = await stage.pool.query(
    `SELECT FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' AND granted AND objsubid = 2
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`,
  );
  return rowCount === 1;
};

test('an idle relay is woken by a commit, long before it would have polled', async () => {
  const stage = await setStage({ env: NEVER_POLLS });
  await Promise.all([stage.pod(), stage.pod()]);
  await latencies(stage, 3);
  const measured = await latencies(stage, 25);
  // 3 ms on a machine of its own.
  expect(measured[12], `of ${measured.map(Math.round).join(', ')} ms`).toBeLessThan(1_500);
  expect(measured.at(-1), `of ${measured.map(Math.round).join(', ')} ms`).toBeLessThan(30_000);
});

for (const [why, migration, env] of [
  ['without the trigger', ['migrate', '--no-notify'], {}],
  ['with RELAY_NOTIFY=false', ['migrate'], { RELAY_NOTIFY: 'false' }],
] as const) {
  test(`${why} an event waits no longer than the poll interval`, async () => {
    const stage = await setStage({ env: { ...env, RELAY_POLL_INTERVAL: '1' } });
    expect(await stage.command(migration)).toMatchObject({ code: 0 });
    const trigger = await stage.pool.query(`SELECT FROM pg_trigger WHERE tgname = 'relay_outbox_wakeup'`);
    expect(trigger.rowCount).toBe(0);
    await stage.pod();
    const measured = await latencies(stage, 6);
    // The interval, and what a busy machine adds.
    expect(measured.at(-1), `of ${measured.map(Math.round).join(', ')} ms`).toBeLessThan(1_000 + 1_500);
  });
}

test('migrating again brings the trigger back that was left out', async () => {
  const stage = await setStage({ env: NEVER_POLLS });
  await stage.command(['migrate', '--no-notify']);
  await stage.command(['migrate']);
  await stage.pod();
  await latencies(stage, 3);
});

test('a writer that wrote while the relay was busy, and commits when it is idle, is not missed', async () => {
  const stage = await setStage({ env: NEVER_POLLS });
  await stage.pod();
  const writer = await stage.pool.connect();
  try {
    const late = await writeSilently(stage, () => insertInOpenTransaction());
    // Everything else is published, and nothing more is written: the relay would sleep, were it not for this writer.
    await waitFor(async () => (await stage.count('NOT published')) === 0, {
      what: 'the load to be published',
    });
    await writer.query('COMMIT');
    await waitFor(async () => (await stage.row(late.eventId)).published, {
      what: 'the late event to be published',
    });
  } finally {
    writer.release();
  }
  await waitFor(() => isIdle(stage), { what: 'the relay to fall asleep' });
  await stage.expectPromisesHeld();

  async function insertInOpenTransaction(): Promise<{ event: SampleEvent; silent: boolean }> {
    await writer.query('BEGIN');
    const event = anEvent();
    await insertEvents(writer, [event]);
    // The trigger keeps its share of the lock when it says nothing.
    const { rowCount } = await writer.query(
      `SELECT FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock' AND pid = pg_backend_pid()`,
    );
    if (rowCount !== 1) await writer.query('ROLLBACK');
    return { event, silent: rowCount === 1 };
  }
});

/** Tries, under load, until the writer met a relay that was awake: its insert notified nobody. */
async function writeSilently(
  stage: Stage,
  attempt: () => Promise<{ event: SampleEvent; silent: boolean }>,
): Promise<SampleEvent> {
  await insertEvents(stage.pool, someEvents(500, 20));
  const load = startLoad(stage.pool);
  try {
    return await waitFor(
      async () => {
        const { event, silent } = await attempt();
        return silent ? event : undefined;
      },
      { what: 'an insert while the relay is busy' },
    );
  } finally {
    await load.stop();
  }
}

test('the wake-up survives the loss of its database connection', async () => {
  const stage = await setStage({ env: NEVER_POLLS });
  await stage.pod();
  await latencies(stage, 1);
  await stage.pool.query(
    `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
      WHERE datname = current_database() AND application_name = 'relay-service wake-up'`,
  );
  // Whatever is written before it listens again is found when it does.
  const event = anEvent();
  await insertEvents(stage.pool, [event]);
  await waitFor(async () => (await stage.row(event.eventId)).published, {
    what: 'the event to be published',
  });
  await latencies(stage, 3);
});
