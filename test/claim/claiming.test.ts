import { expect, test } from 'vitest';
import { createClaiming } from '../../src/claim/claiming.ts';
import { atEndOfFile } from '../support/cleanup.ts';
import { openContext } from '../support/context.ts';
import { waitFor } from '../support/wait.ts';

const { context, pool, currentEpoch } = await openContext();

const LISTENERS = `SELECT pid FROM pg_stat_activity WHERE application_name = 'relay-service wake-up'`;
const listeners = async () => (await pool.query<{ pid: number }>(LISTENERS)).rows.map(({ pid }) => pid);

test('the session that listens leaves a former primary, where no event is inserted any more', async () => {
  const { wakeup } = createClaiming(context, () => {});
  if (wakeup === undefined) throw new Error('there is no wake-up');
  atEndOfFile(wakeup.stop);
  await currentEpoch();
  const { generation: here } = await context.outbox.databaseState();
  wakeup.start();
  const before = await waitFor(async () => (await listeners())[0], { what: 'a session to listen' });
  // As when this pod's other sessions have reached the new primary, on the next timeline.
  context.generation.accept(here.replace(/^[^.]+/, '000000FF'));
  await waitFor(async () => !(await listeners()).includes(before), {
    ...{ what: 'it to be closed', timeoutMs: 60_000 },
  });
  await waitFor(async () => (await listeners()).length === 1, { what: 'another one to listen' });
  expect(await listeners()).not.toContain(before);
});
