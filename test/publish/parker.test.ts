import { expect, test } from 'vitest';
import type { Aggregate } from '../../src/event.ts';
import { createParker } from '../../src/publish/parker.ts';
import { aClaimedEvent, deferred, silent } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

/** Statements that end when the test says so; `steps` tells what was done, one after the other. */
function setUp() {
  const statements: {
    eventIds: readonly string[];
    failed: readonly string[];
    end: ReturnType<typeof deferred<void>>;
  }[] = [];
  const steps: string[] = [];
  const requested: Aggregate[] = [];
  const parker = createParker({
    outbox: {
      async park(eventIds, failed) {
        const end = deferred();
        statements.push({ eventIds, failed, end });
        await end.promise;
        steps.push('parked');
      },
    },
    refiller: {
      request(aggregates) {
        steps.push('refill');
        requested.push(...aggregates);
      },
    },
    logger: { ...silent, warn: () => void steps.push('warned') },
  });
  const statement = (n: number) => waitFor(() => statements[n - 1], { what: `statement ${n}` });
  return { parker, statements, statement, steps, requested };
}

test('what is released in one turn of the loop is parked by one statement, and then each aggregate is refilled', async () => {
  const { parker, statements, statement, steps, requested } = setUp();
  const a = aClaimedEvent();
  const b = aClaimedEvent({ aggregateId: a.aggregateId });
  const c = aClaimedEvent();
  for (const event of [a, b, c]) parker.park(event, false);
  const { eventIds, failed, end } = await statement(1);
  expect([eventIds, failed]).toEqual([[a, b, c].map((it) => it.eventId), []]);
  expect(steps).toEqual([]);
  end.resolve();
  await parker.drain();
  expect(steps).toEqual(['parked', 'refill']);
  expect(requested.map((it) => it.aggregateId)).toEqual([b.aggregateId, c.aggregateId]);
  expect(statements).toHaveLength(1);
});

test('an event before that has failed is named once, and only where it has', async () => {
  const { parker, statement } = setUp();
  const [failed, other] = [aClaimedEvent().eventId, aClaimedEvent().eventId];
  parker.park(aClaimedEvent({ after: failed }), true);
  parker.park(aClaimedEvent({ after: failed }), true);
  parker.park(aClaimedEvent({ after: other }), false);
  parker.park(aClaimedEvent({ after: null }), true);
  parker.park(aClaimedEvent(), true);
  const parking = await statement(1);
  expect(parking.eventIds).toHaveLength(5);
  expect(parking.failed).toEqual([failed]);
  parking.end.resolve();
  await parker.drain();
});

test('what is released while a statement runs is parked by the next one, 500 rows at most', async () => {
  const { parker, statements, statement } = setUp();
  parker.park(aClaimedEvent(), false);
  const { end } = await statement(1);
  for (let i = 0; i < 501; i++) parker.park(aClaimedEvent(), false);
  await new Promise(setImmediate);
  expect(statements).toHaveLength(1);
  end.resolve();
  (await statement(2)).end.resolve();
  (await statement(3)).end.resolve();
  await parker.drain();
  expect(statements.map((it) => it.eventIds.length)).toEqual([1, 500, 1]);
});

test('rows that cannot be parked are tried again, with one warning, before those that come after them', async () => {
  const { parker, statements, statement, steps } = setUp();
  parker.park(aClaimedEvent(), false);
  const { end } = await statement(1);
  parker.park(aClaimedEvent(), false);
  end.reject(new Error('no database'));
  (await statement(2)).end.reject(new Error('no database'));
  (await statement(3)).end.resolve();
  (await statement(4)).end.resolve();
  await parker.drain();
  expect(steps).toEqual(['warned', 'parked', 'refill', 'parked', 'refill']);
  const [first, second, third, fourth] = statements.map((it) => it.eventIds);
  expect([second, third]).toEqual([first, first]);
  expect(fourth).not.toEqual(first);
});

test('rows that cannot be parked while the pod stops are left to the lease reaper', async () => {
  const { parker, statements, statement, steps } = setUp();
  parker.park(aClaimedEvent(), false);
  const { end } = await statement(1);
  const drained = parker.drain();
  end.reject(new Error('no database'));
  await drained;
  expect(steps).toEqual(['warned']);
  expect(statements).toHaveLength(1);
});

test('draining ends when everything is parked, at once where there is nothing', async () => {
  const { parker, statement, steps } = setUp();
  await parker.drain();
  parker.park(aClaimedEvent(), false);
  const draining = parker.drain().then(() => steps.push('drained'));
  (await statement(1)).end.resolve();
  await draining;
  expect(steps).toEqual(['parked', 'refill', 'drained']);
});

test('what is released in the moment in which nothing is left to park is parked too', async () => {
  const last = aClaimedEvent();
  const parked: string[] = [];
  const parker = createParker({
    outbox: { park: async (eventIds) => void parked.push(...eventIds) },
    refiller: {
      request() {
        if (parked.length === 1) queueMicrotask(() => parker.park(last, false));
      },
    },
    logger: silent,
  });
  parker.park(aClaimedEvent(), false);
  await waitFor(() => parked.includes(last.eventId), { what: 'the last one to be parked' });
});
