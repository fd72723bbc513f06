import { expect, test } from 'vitest';
import { FRESH, openOutboxTable } from '../support/outbox-table.ts';
import { deferred } from '../support/stages.ts';

const table = await openOutboxTable();
const { outbox, insertOf, states, names, publish } = table;

const USER = '11111111-1111-1111-1111-111111111111';

test('transactions of an epoch do not wait for each other', async () => {
  await insertOf(USER, FRESH, FRESH);
  await outbox.inEpoch(async () => {
    await publish(1);
    await publish(2);
  });
  expect(await states()).toEqual(['published', 'published']);
});

test('a comparison of table and streams waits until every transaction of an epoch has ended', async () => {
  await insertOf(USER, FRESH);
  const [begun, confirmed] = [deferred(), deferred()];
  const marked = (await names(1)).map((name) => ({ ...name, entryId: '1-1' }));
  const acknowledging = outbox.inEpoch(async (tx) => {
    await outbox.markPublished(tx, marked);
    begun.resolve();
    await confirmed.promise;
  });
  await begun.promise;
  let seen: string[] | undefined;
  const comparing = outbox.epochsEnded().then(async () => {
    seen = await states();
  });
  await table.aTransactionWaits();
  expect(seen).toBeUndefined();
  confirmed.resolve();
  await Promise.all([acknowledging, comparing]);
  expect(seen).toEqual(['published']);
});

test('a transaction of an epoch that fails lets the comparison go on, and leaves nothing behind', async () => {
  await insertOf(USER, FRESH);
  const marked = (await names(1)).map((name) => ({ ...name, entryId: '1-1' }));
  const failing = outbox.inEpoch(async (tx) => {
    await outbox.markPublished(tx, marked);
    throw new Error('the epoch is over');
  });
  await expect(failing).rejects.toThrow('the epoch is over');
  await outbox.epochsEnded();
  expect(await states()).toEqual(['fresh']);
});
