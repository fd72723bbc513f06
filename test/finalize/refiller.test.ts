import { randomUUID } from 'node:crypto';
import { beforeEach, describe, expect, test } from 'vitest';
import type { Aggregate } from '../../src/event.ts';
import { createRefiller, type Refiller } from '../../src/finalize/refiller.ts';
import { atEndOfFile } from '../support/cleanup.ts';
import { openContext } from '../support/context.ts';
import { deferred, readStates, silent } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const stage = await openContext();
const { pool } = stage;
const { outbox } = stage.context;

beforeEach(async () => {
  await pool.query('DELETE FROM identity.outbox');
});

type Deps = Parameters<typeof createRefiller>[0];

function startRefiller(deps: Partial<Omit<Deps, 'outbox'>> & { outbox?: Partial<Deps['outbox']> } = {}) {
  const claims = { wanted: 0 };
  const refiller: Refiller = createRefiller({
    scheduler: {
      async wake() {
        claims.wanted++;
      },
    },
    ...{ options: { ordering: 'aggregate', maxInFlight: 1_000 }, logger: silent },
    ...deps,
    outbox: { ...outbox, ...deps.outbox },
  });
  atEndOfFile(refiller.stop);
  return { ...refiller, claims };
}

/** Rows parked behind nothing, each of an aggregate of its own. */
async function parkedRows(count: number): Promise<Aggregate[]> {
  const { rows } = await pool.query<Aggregate>(
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

/** Its timer ends after those that were set before. */
async function anotherOneRefills(): Promise<void> {
  const { request, claims } = startRefiller();
  request(await parkedRows(1));
  await waitFor(() => claims.wanted === 1, { what: 'another refiller' });
}

const noneParked = (what: string) => waitFor(async () => (await parked()) === 0, { what });

describe('an aggregate for which a refill is requested', () => {
  test('has its first parked row freed, and a claim is asked for', async () => {
    const { request, claims } = startRefiller();
    request(await parkedRows(1));
    await waitFor(() => claims.wanted === 1, { what: 'a claim to be asked for' });
    expect(await parked()).toBe(0);
  });

  test('does not wait for others whose rows the database refuses to change', async () => {
    const aggregates = await parkedRows(5);
    const refusing = aggregates[3]?.aggregateId;
    await pool.query(
      `ALTER TABLE identity.outbox ADD CONSTRAINT young CHECK (aggregate_id <> '${refusing}') NOT VALID`,
    );
    try {
      const { request, claims } = startRefiller();
      request(aggregates);
      await waitFor(() => claims.wanted === 1, { what: 'a claim to be asked for' });
      expect(await parked()).toBe(1);
    } finally {
      await pool.query('ALTER TABLE identity.outbox DROP CONSTRAINT young');
    }
  });

  test('gets one row freed: the claim takes those behind it', async () => {
    const { rows } = await pool.query<Aggregate>(
      `INSERT INTO identity.outbox (event_type, aggregate_id, payload, next_attempt_at)
       SELECT 'UserCreated', $1, '{}', 'infinity' FROM generate_series(1, 3)
       RETURNING aggregate_type AS "aggregateType", aggregate_id AS "aggregateId"`,
      [randomUUID()],
    );
    const { request, claims } = startRefiller();
    request(rows);
    await waitFor(() => claims.wanted === 1, { what: 'a claim to be asked for' });
    expect(await readStates(pool)).toEqual(['fresh', 'parked', 'parked']);
  });

  test('is refilled after the statement that runs when it is requested, one statement at a time', async () => {
    const [first, second] = (await parkedRows(2)) as [Aggregate, Aggregate];
    const statements: string[][] = [];
    const [begun, end] = [deferred(), deferred()];
    const { request } = startRefiller({
      outbox: {
        async refill(aggregates) {
          statements.push(aggregates.map((it) => it.aggregateId));
          begun.resolve();
          await end.promise;
          return outbox.refill(aggregates);
        },
      },
    });
    request([first]);
    await begun.promise;
    request([second]);
    await anotherOneRefills();
    expect(statements).toEqual([[first.aggregateId]]);
    end.resolve();
    await noneParked('both to be freed');
    expect(statements).toEqual([[first.aggregateId], [second.aggregateId]]);
  });

  test('is one of any number, each once, a thousand in a statement', async () => {
    const statements: number[] = [];
    const { request } = startRefiller({
      outbox: {
        refill(aggregates) {
          statements.push(aggregates.length);
          return outbox.refill(aggregates);
        },
      },
    });
    const aggregates = await parkedRows(2_500);
    request(aggregates);
    request(aggregates);
    await noneParked('all to be freed');
    expect(statements).toEqual([1_000, 1_000, 500]);
  });

  test('asks for no claim when nothing was freed', async () => {
    let isAsked = false;
    const { request, stop, claims } = startRefiller({
      outbox: {
        async refill(aggregates) {
          const refilled = await outbox.refill(aggregates);
          isAsked = true;
          return refilled;
        },
      },
    });
    request([{ aggregateType: 'user', aggregateId: randomUUID() }]);
    await waitFor(() => isAsked, { what: 'the statement' });
    await stop();
    expect(claims.wanted).toBe(0);
  });

  test('that cannot be refilled is left to the sweep, and the refiller goes on', async () => {
    let failures = 1;
    const { request, sweep } = startRefiller({
      outbox: {
        refill: (aggregates) =>
          failures-- > 0 ? Promise.reject(new Error('no database')) : outbox.refill(aggregates),
      },
    });
    request(await parkedRows(1));
    await waitFor(() => failures === 0, { what: 'the failure' });
    request(await parkedRows(1));
    await waitFor(async () => (await parked()) === 1, { what: 'the second to be freed' });
    await sweep();
    expect(await parked()).toBe(0);
  });
});

describe('the sweep', () => {
  test('finds what was never requested, and steps through all aggregates in turn', async () => {
    await parkedRows(2_300);
    const { sweep, claims } = startRefiller();
    const left: number[] = [];
    for (let round = 0; round < 3; round++) {
      await sweep();
      left.push(await parked());
    }
    expect(left).toEqual([1_300, 300, 0]);
    expect(claims.wanted).toBe(3);
    await parkedRows(10);
    await sweep();
    expect(await parked()).toBe(0);
  });

  test('gets past a thousand aggregates that wait for good reason', async () => {
    // Each has a row that waits for its retry, and one parked behind it.
    await pool.query(
      `INSERT INTO identity.outbox (event_type, aggregate_type, aggregate_id, payload, attempts, next_attempt_at)
       SELECT 'UserCreated', 'a', md5(n::text)::uuid, '{}', 2 - place,
              CASE WHEN place = 1 THEN now() + interval '1 h' ELSE 'infinity' END
         FROM generate_series(1, 1100) n, generate_series(1, 2) place ORDER BY place`,
    );
    await parkedRows(1); // type `user`: after all of them
    const { sweep } = startRefiller();
    await sweep();
    expect(await parked()).toBe(1_101);
    await sweep();
    expect(await parked()).toBe(1_100);
  });
});

describe('without ordering', () => {
  const options = { ordering: 'none', maxInFlight: 1_000 } as const;

  test('the sweep frees all that an earlier configuration parked, as many at a time as may be in Redis', async () => {
    await parkedRows(1_500);
    const { sweep, claims } = startRefiller({ options });
    await sweep();
    expect([await parked(), claims.wanted]).toEqual([500, 1]);
    await sweep();
    expect([await parked(), claims.wanted]).toEqual([0, 2]);
    await sweep();
    expect(claims.wanted).toBe(2);
  });

  test('nothing is refilled on request: nothing was parked', async () => {
    startRefiller({ options }).request(await parkedRows(1));
    await anotherOneRefills();
    expect(await parked()).toBe(1);
  });
});

test('a refiller that is stopped first frees what was requested: no other pod knows of it', async () => {
  const { request, stop, claims } = startRefiller();
  request(await parkedRows(1));
  await stop();
  expect([await parked(), claims.wanted]).toEqual([0, 1]);
});

test('a refiller that was stopped frees nothing more', async () => {
  const requested = startRefiller();
  requested.request(await parkedRows(1));
  await requested.stop();
  const aggregates = await parkedRows(1);
  for (const { request, stop } of [requested, startRefiller()]) {
    await stop();
    request(aggregates);
    await anotherOneRefills();
    expect(await parked()).toBe(1);
    await stop();
  }
});

test('a refiller that is stopped in the middle of a statement waits for it', async () => {
  const [begun, end] = [deferred(), deferred()];
  const done: string[] = [];
  const { request, stop } = startRefiller({
    outbox: {
      async refill(aggregates) {
        begun.resolve();
        await end.promise;
        const refilled = await outbox.refill(aggregates);
        done.push('refilled');
        return refilled;
      },
    },
  });
  request(await parkedRows(1));
  await begun.promise;
  const stopped = stop().then(() => done.push('stopped'));
  end.resolve();
  await stopped;
  expect([done, await parked()]).toEqual([['refilled', 'stopped'], 0]);
});
