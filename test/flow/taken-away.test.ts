/** What the relay needs may be taken away while it runs. Some of it gives no error: the pods see an empty backlog. */
import { expect, test } from 'vitest';
import { insertEvents, someEvents } from '../support/events.ts';
import { setStage } from '../support/flow.ts';
import { RELAY_USER } from '../support/least-privilege.ts';
import { waitFor } from '../support/wait.ts';

test('what a running relay needs and no longer has, its readiness and its log name, until it is there again', async () => {
  const stage = await setStage();
  const { pool, redis } = stage;
  await pool.query('ALTER SEQUENCE identity.outbox_id_seq CACHE 2');
  const pod = await stage.pod();
  await insertEvents(pool, someEvents(10));
  await stage.rested();

  let answer = '';
  const readiness = async (): Promise<number> => {
    const response = await fetch(`${pod.url}/readyz`);
    answer = await response.text();
    return response.status;
  };
  const named = (...causes: readonly RegExp[]) =>
    waitFor(async () => (await readiness()) === 503 && causes.every((it) => it.test(answer)), {
      what: `readiness to name ${causes.join(' and ')}`,
    });

  // Rows that nobody sees are no error: the backlog is empty.
  await pool.query('ALTER TABLE identity.outbox ENABLE ROW LEVEL SECURITY');
  await redis.call('ACL', 'SETUSER', RELAY_USER, '-evalsha', '-eval');
  await insertEvents(pool, someEvents(10));
  await named(/row security: row level security of identity\.outbox hides rows/, /NOPERM.*relay grants/);

  // Nor is a row that stays as it is.
  await pool.query(`
    ALTER TABLE identity.outbox DISABLE ROW LEVEL SECURITY;
    CREATE FUNCTION public.keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
    CREATE TRIGGER keep BEFORE UPDATE ON identity.outbox FOR EACH ROW EXECUTE FUNCTION public.keep()`);
  await redis.call('ACL', 'SETUSER', RELAY_USER, '+evalsha', '+eval');
  await redis.config('SET', 'maxmemory-policy', 'allkeys-lru');
  await named(/claim: a row stays as it is .*trigger BEFORE UPDATE/, /eviction policy: allkeys-lru/);

  await pool.query(
    'DROP TRIGGER keep ON identity.outbox; ALTER TABLE identity.outbox RENAME replayed_at TO gone',
  );
  await redis.config('SET', 'maxmemory-policy', 'noeviction');
  await named(/the outbox lacks column replayed_at/, /^(?!.*eviction policy)/);

  await pool.query('ALTER TABLE identity.outbox RENAME gone TO replayed_at');
  await waitFor(async () => (await readiness()) === 200, {
    what: 'the pod to be ready again',
  });
  await stage.rested();
  expect((await stage.expectPromisesHeld()).entries).toBe(20);
  const said = (message: string) => pod.lines.filter((it) => it.includes(message)).length;
  expect(said('the relay cannot work any more')).toBeGreaterThanOrEqual(3);
  expect(said('has everything that it needs again')).toBe(1);
  // Advice is given once, however often the pod tries what it needs.
  expect(said('not as well as it could')).toBe(1);
});
