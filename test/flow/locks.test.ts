import { expect, onTestFinished, test } from 'vitest';
import { anEvent, insertEvents } from '../support/events.ts';
import { type Stage, setStage } from '../support/flow.ts';
import { asRelay, PRODUCER_ROLE } from '../support/least-privilege.ts';
import { openPool } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

/** Pods take turns by locks that need a right; whoever keeps one all the same is named. */

const LOCKS = ['relay_claim_lock', 'relay_epoch_lock', 'relay_prune_lock'];
/** Keys of the advisory locks of the relay, now and before. */
const ADVISORY = ['1668047209', '1936028780', '1886549358', '2002873189', '1835624306'];

const expectFlow = async (stage: Stage) => {
  const event = anEvent();
  await insertEvents(stage.pool, [event]);
  await waitFor(async () => (await stage.row(event.eventId)).published, {
    what: 'an event to be published',
  });
};

test('a log-in that holds every advisory lock stops nothing, and may lock none of the tables', async () => {
  const stage = await setStage();
  const pods = await Promise.all([stage.pod(), stage.pod()]);
  const stranger = openPool(asRelay(stage.databaseUrl, PRODUCER_ROLE));
  const session = await stranger.connect();
  onTestFinished(() => session.release(true));
  await expectFlow(stage);
  for (const share of ['_shared', '']) {
    for (const key of ADVISORY)
      await session.query(`SELECT pg_try_advisory_lock${share}(1919705465, ${key})`);
    await expectFlow(stage);
    await session.query('SELECT pg_advisory_unlock_all()');
  }
  for (const name of LOCKS)
    for (const mode of ['ACCESS SHARE', 'ROW SHARE', 'EXCLUSIVE'])
      await expect(session.query(`LOCK TABLE identity.${name} IN ${mode} MODE`), name).rejects.toThrow(
        /no transaction|permission denied|can only be used in transaction/,
      );
  for (const name of LOCKS) {
    await session.query('BEGIN');
    await expect(session.query(`LOCK TABLE identity.${name} IN ROW SHARE MODE`), name).rejects.toThrow(
      'permission denied',
    );
    await session.query('ROLLBACK');
  }
  for (const pod of pods) expect((await fetch(`${pod.url}/readyz`)).status).toBe(200);
});

for (const name of ['relay_claim_lock', 'relay_epoch_lock']) {
  test(`who keeps ${name} is named by readiness and log, and when it is gone all goes on`, async () => {
    const stage = await setStage();
    const pods = await Promise.all([stage.pod(), stage.pod()]);
    await expectFlow(stage);
    const session = await stage.pool.connect();
    onTestFinished(() => session.release(true));
    const { rows } = await session.query<{ pid: number }>('SELECT pg_backend_pid() AS pid');
    const holder = `process ${rows[0]?.pid} of PostgreSQL holds`;
    await session.query(`SET application_name = 'maintenance script'`);
    await session.query(`BEGIN; LOCK TABLE identity.${name} IN EXCLUSIVE MODE`);
    const event = anEvent();
    await insertEvents(stage.pool, [event]);
    for (const pod of pods) {
      await waitFor(
        async () => {
          const answer = await fetch(`${pod.url}/readyz`);
          const text = await answer.text();
          return answer.status === 503 && text.includes(holder) && text.includes('maintenance script');
        },
        { what: 'the pod to name the holder, and not to be ready' },
      );
    }
    await waitFor(() => pods.some((pod) => pod.logs().some((it) => JSON.stringify(it).includes(holder))), {
      what: 'a line in the log',
    });
    expect((await stage.row(event.eventId)).published).toBe(false);
    await session.query('ROLLBACK');
    for (const pod of pods) await pod.waitReady();
    await expectFlow(stage);
    await stage.rested();
    await stage.expectPromisesHeld();
  });
}

// CREATE INDEX takes the first, with which rows can be read and locked, but not changed; VACUUM FULL takes the second.
for (const mode of ['SHARE', 'ACCESS EXCLUSIVE']) {
  test(`while a session keeps the outbox in ${mode} mode a pod is not ready, and names the session`, async () => {
    const stage = await setStage();
    const pod = await stage.pod();
    await expectFlow(stage);
    const session = await stage.pool.connect();
    onTestFinished(() => session.release(true));
    const { rows } = await session.query<{ pid: number }>('SELECT pg_backend_pid() AS pid');
    await session.query(`BEGIN; LOCK TABLE identity.outbox IN ${mode} MODE`);
    const holder = `lock on identity.outbox, which process ${rows[0]?.pid} of PostgreSQL holds`;
    await waitFor(
      async () => {
        const answer = await fetch(`${pod.url}/readyz`);
        return answer.status === 503 && (await answer.text()).includes(holder);
      },
      { what: 'the pod to name the holder, and not to be ready', timeoutMs: 60_000 },
    );
    await session.query('ROLLBACK');
    await pod.waitReady();
    await expectFlow(stage);
  });
}

test('a session that waits to alter the outbox behind a long SELECT, and has all others wait, is named as well', async () => {
  const stage = await setStage();
  const pod = await stage.pod();
  await expectFlow(stage);
  const [reader, altering] = [await stage.pool.connect(), await stage.pool.connect()];
  onTestFinished(() => [reader, altering].forEach((it) => void it.release(true)));
  const { rows } = await altering.query<{ pid: number }>('SELECT pg_backend_pid() AS pid');
  await reader.query('BEGIN; SELECT FROM identity.outbox LIMIT 1');
  const altered = altering.query('ALTER TABLE identity.outbox ADD COLUMN note text');
  altered.catch(() => {}); // where the test fails before it is awaited
  const waiting = `lock on identity.outbox, which process ${rows[0]?.pid} of PostgreSQL waits for`;
  await waitFor(
    async () => {
      const answer = await fetch(`${pod.url}/readyz`);
      return answer.status === 503 && (await answer.text()).includes(waiting);
    },
    { what: 'the pod to name who waits, and not to be ready', timeoutMs: 60_000 },
  );
  await reader.query('ROLLBACK');
  await altered;
  await pod.waitReady();
  await expectFlow(stage);
});
