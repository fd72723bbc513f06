import { randomUUID } from 'node:crypto';
import { afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { createOutbox, type Outbox } from '../../src/outbox/outbox.ts';
import { createOrphanWatch, type OrphanWatch } from '../../src/triage/orphans.ts';
import { createDatabase } from '../support/servers.ts';
import { type AdminPool, openAdminPool, openPool, silent } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

let pool: AdminPool;
let outbox: Outbox;
const watches: OrphanWatch[] = [];

beforeAll(async () => {
  const { url, adminUrl } = await createDatabase();
  pool = openAdminPool(adminUrl);
  outbox = createOutbox(openPool(url), {
    ...{
      ordering: 'aggregate',
      deadLetterPolicy: 'continue',
      claimLeaseMs: 60_000,
      maxEventBytes: 1_048_576,
    },
    ...{ streamName: 'identity.user.v1', statementTimeoutMs: 10_000 },
  });
});

beforeEach(async () => {
  await pool.query('TRUNCATE identity.outbox RESTART IDENTITY');
});

afterEach(async () => {
  await Promise.all(watches.splice(0).map((it) => it.stop()));
});

function startWatch(deps: Partial<Parameters<typeof createOrphanWatch>[0]> = {}) {
  const released = { times: 0 };
  const watch = createOrphanWatch({
    ...{ release: outbox.releaseOrphans, parkedAggregates: outbox.parkedAggregates, logger: silent },
    onReleased: () => void released.times++,
    ...deps,
  });
  watches.push(watch);
  return { ...watch, released };
}

/** Rows parked behind nobody, each of an aggregate of its own. */
async function orphans(count: number) {
  const { rows } = await pool.query<{ aggregateType: string; aggregateId: string }>(
    `INSERT INTO identity.outbox (event_type, aggregate_id, payload, next_attempt_at)
     SELECT 'UserCreated', gen_random_uuid(), '{}', 'infinity' FROM generate_series(1, $1)
     RETURNING aggregate_type AS "aggregateType", aggregate_id AS "aggregateId"`,
    [count],
  );
  return rows;
}

async function parked(): Promise<number> {
  const { rows } = await pool.query(
    `SELECT count(*)::int AS n FROM identity.outbox WHERE next_attempt_at = 'infinity'`,
  );
  return rows[0].n;
}

describe('an aggregate that is watched', () => {
  test('has its orphan released soon, and a claim is asked for', async () => {
    const watch = startWatch();
    watch.watch(await orphans(1));
    await waitFor(() => watch.released.times === 1, { what: 'the release' });
    expect(await parked()).toBe(0);
  });

  test('is looked at even when it is told of in the middle of a look', async () => {
    const [first, second] = await orphans(2);
    const looks: string[][] = [];
    const watch = startWatch({
      release: async (aggregates) => {
        looks.push(aggregates.map((it) => it.aggregateId));
        await parked();
        if (looks.length === 1 && second) watch.watch([second]);
        return outbox.releaseOrphans(aggregates);
      },
    });
    if (first) watch.watch([first]);
    await waitFor(async () => (await parked()) === 0, { what: 'both to be released' });
  });

  test('is one of any number', async () => {
    const watch = startWatch();
    watch.watch(await orphans(2_500));
    await waitFor(async () => (await parked()) === 0, { what: 'all to be released' });
  });

  test('asks for no claim when nothing was released', async () => {
    let looked = false;
    const watch = startWatch({
      release: async (aggregates) => {
        const released = await outbox.releaseOrphans(aggregates);
        looked = true;
        return released;
      },
    });
    watch.watch([{ aggregateType: 'user', aggregateId: randomUUID() }]);
    await waitFor(() => looked, { what: 'the look' });
    await watch.stop();
    expect(watch.released.times).toBe(0);
  });

  test('that cannot be looked at is left to the sweep, and the watch goes on', async () => {
    let failures = 1;
    const watch = startWatch({
      release: (aggregates) =>
        failures-- > 0 ? Promise.reject(new Error('no database')) : outbox.releaseOrphans(aggregates),
    });
    watch.watch(await orphans(1));
    await waitFor(() => failures === 0, { what: 'the failure' });
    watch.watch(await orphans(1));
    await waitFor(async () => (await parked()) === 1, { what: 'the second to be released' });
    await watch.sweep();
    expect(await parked()).toBe(0);
  });
});

describe('the sweep', () => {
  test('finds what nobody told of, and steps through all aggregates in turn', async () => {
    await orphans(2_300);
    const watch = startWatch();
    const left: number[] = [];
    for (let round = 0; round < 3; round++) {
      await watch.sweep();
      left.push(await parked());
    }
    expect(left).toEqual([1_300, 300, 0]);
    expect(watch.released.times).toBe(3);
    await orphans(10);
    await watch.sweep();
    expect(await parked()).toBe(0);
  });

  test('gets past a thousand aggregates that wait for good reason', async () => {
    // Each has a row on its way and one parked behind it.
    await pool.query(
      `INSERT INTO identity.outbox (event_type, aggregate_type, aggregate_id, payload, next_attempt_at)
       SELECT 'UserCreated', 'a', md5(n::text)::uuid, '{}', CASE WHEN row = 1 THEN now() + interval '1 h' ELSE 'infinity' END
         FROM generate_series(1, 1100) n, generate_series(1, 2) row ORDER BY row`,
    );
    await orphans(1); // type `user`: after all of them
    const watch = startWatch();
    await watch.sweep();
    expect(await parked()).toBe(1_101);
    await watch.sweep();
    expect(await parked()).toBe(1_100);
  });
});

test('a watch that was stopped looks no more', async () => {
  const watch = startWatch();
  watch.watch(await orphans(1));
  await watch.stop();
  expect(await parked()).toBe(1);
  await watch.stop();
});
