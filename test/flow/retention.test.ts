import { expect, test } from 'vitest';
import { insertEvents, someEvents } from '../support/events.ts';
import { type Stage, setStage } from '../support/flow.ts';
import { waitFor } from '../support/wait.ts';

const ONE_HOUR = { RELAY_PUBLISHED_RETENTION: '3600' };

/** Rows as the relay leaves them, published two hours ago. */
async function addOld(stage: Stage, rows: number): Promise<void> {
  await stage.pool.query(
    `INSERT INTO identity.outbox (event_type, aggregate_id, payload, published, published_at, stream_entry_id)
     SELECT 'UserCreated', gen_random_uuid(), '{}', true, now() - interval '2 hours', i || '-1'
     FROM generate_series(1, $1::int) i`,
    [rows],
  );
}
const old = (stage: Stage) => stage.count(`published_at < now() - interval '90 minutes'`);

test('old published rows go while events flow; a killed pod’s turn is taken over, and SIGTERM does not wait for the rest', async () => {
  const stage = await setStage({ env: ONE_HOUR });
  await stage.pool.query('GRANT DELETE ON identity.outbox TO relay_pod');
  await addOld(stage, 60_000);
  const first = await stage.pod();
  await waitFor(async () => (await old(stage)) < 58_000, { what: 'rows to be deleted' });
  await insertEvents(stage.pool, someEvents(100, 10));
  await stage.rested();
  await first.kill('SIGKILL');
  const left = await old(stage);
  expect(left).toBeGreaterThan(2_000);
  // Its next turn is a minute away: as an operator would, it is called for.
  const second = await stage.pod();
  await stage.queue('claim').add('prune', {});
  await waitFor(async () => (await old(stage)) < left - 1_000, { what: 'another pod to go on' });
  expect(await second.kill('SIGTERM')).toMatchObject({ code: 0 });
  expect(await old(stage)).toBeGreaterThan(0);
  expect(await stage.count('true')).toBe((await old(stage)) + 100);
  // No event, and no row that is needed, went with them.
  await stage.pool.query(`DELETE FROM identity.outbox WHERE published_at < now() - interval '90 minutes'`);
  expect(await stage.expectPromisesHeld()).toMatchObject({ events: 100, entries: 100 });
});

test('without retention nothing is deleted, and a schedule that was left behind goes', async () => {
  const stage = await setStage();
  await stage.queue('claim').upsertJobScheduler('prune', { every: 60_000 }, { name: 'prune' });
  await addOld(stage, 10);
  await stage.pod();
  await waitFor(
    async () => (await stage.queue('claim').getJobSchedulers()).map(({ key }) => key).join() === 'tick',
    {
      what: 'the schedule of the ticks alone',
    },
  );
  await insertEvents(stage.pool, someEvents(10));
  await stage.rested();
  expect(await old(stage)).toBe(10);
});

test('relay prune deletes by hand what it says, and asks before it does', async () => {
  const stage = await setStage();
  await addOld(stage, 2_500);
  const prune = async (...args: string[]) => {
    const { code, lines } = await stage.command(['prune', ...args]);
    return { code, text: lines.join('\n') };
  };
  expect(await prune('--older-than', '10m', '--yes')).toMatchObject({
    ...{ code: 1, text: expect.stringMatching(/last 3600 s are needed.*RELAY_RESYNC_WINDOW/) },
  });
  expect(await prune('--older-than', '90m', '--dry-run')).toMatchObject({
    ...{ code: 0, text: expect.stringMatching(/^2500 rows were published before .*; none was deleted\.$/m) },
  });
  expect(await prune('--older-than', '90m')).toMatchObject({
    code: 1,
    text: expect.stringMatching(/no terminal to ask in/),
  });
  await stage.redis.set('bull:relay:epoch', 'checking:somebody');
  expect(await prune('--older-than', '90m', '--yes')).toMatchObject({
    code: 1,
    text: expect.stringMatching(/compared/),
  });
  await stage.redis.del('bull:relay:epoch');
  expect(await old(stage)).toBe(2_500);
  expect(await prune('--older-than', '90m', '--yes')).toMatchObject({
    ...{ code: 0, text: expect.stringMatching(/^Deleted 2500 rows in/m) },
  });
  expect(await old(stage)).toBe(0);
});
