import { UnrecoverableError } from 'bullmq';
import { beforeEach, expect, test } from 'vitest';
import { createRecovery } from '../../src/recovery/recovery.ts';
import { openContext } from '../support/context.ts';
import { insertEvents, someEvents } from '../support/events.ts';
import { readStates, silent } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const stage = await openContext({ RELAY_FAILED_JOBS_KEPT: '2', RELAY_CLAIM_LEASE: '60' });
const { pool, context } = stage;
const { queues, outbox } = context;

beforeEach(() => stage.clear());

/** Events whose jobs have failed for good, the earliest first; their rows are leased. */
async function failed(count: number): Promise<string[]> {
  await insertEvents(pool, someEvents(count));
  const events = await stage.claim();
  for (const { eventId } of events) await queues.remove(eventId);
  for (const event of events) {
    // One after the other: BullMQ orders them by the time at which they failed.
    const now = Date.now();
    await waitFor(() => Date.now() > now, { what: 'the next millisecond' });
    await queues.addPublishJobs([event]);
    await stage.runJobs(() => Promise.reject(new UnrecoverableError('WRONGTYPE')));
  }
  return events.map((it) => it.eventId);
}

async function bury(eventIds: readonly string[]): Promise<void> {
  const { rows } = await pool.query<{ id: string }>(
    'SELECT id::text FROM identity.outbox WHERE event_id = ANY ($1)',
    [eventIds],
  );
  for (const event of await outbox.unfinishedEvents(rows.map((row) => row.id))) {
    const job = await queues.failedJob(event);
    if (job === null) throw new Error(`no failed job of ${event.eventId}`);
    await context.deadLetters.bury(job);
  }
}

const failedJobs = async () => (await queues.publish.getFailed()).map((job) => job.id);

test('failed jobs are kept for the dashboard, the latest so many; never is one removed whose dead letter is not written yet', async () => {
  const [first, second, third, fourth, fifth] = (await failed(5)) as [string, string, string, string, string];
  await bury([first, third, fourth, fifth]);
  await createRecovery(context).maintain();
  expect(await failedJobs()).toEqual([fifth, fourth, second]);
  await bury([second]);
  await createRecovery(context).maintain();
  expect(await failedJobs()).toEqual([fifth, fourth]);
});

test('a duty that fails does not keep the others from being done', async () => {
  const eventIds = await failed(3);
  await bury(eventIds);
  await insertEvents(pool, someEvents(2));
  await pool.query(`UPDATE identity.outbox SET next_attempt_at = now() - interval '1 s' WHERE id = 4`);
  await pool.query(`UPDATE identity.outbox SET next_attempt_at = 'infinity' WHERE id = 5`);
  const duties: unknown[] = [];
  const logger = { ...silent, warn: (about: unknown) => void duties.push((about as { duty: unknown }).duty) };
  const fails = () => Promise.reject(new Error('no'));

  await createRecovery({
    ...{ ...context, logger, outbox: { ...outbox, expired: fails } },
    queues: { ...queues, failedBeyond: fails },
  }).maintain();
  expect([duties, (await readStates(pool)).at(-1), (await failedJobs()).length]).toEqual([
    ...[['lease reaper', 'removal of failed jobs'], 'fresh', 3],
  ]);
  duties.length = 0;
  await createRecovery({ ...context, logger, refiller: { ...context.refiller, sweep: fails } }).maintain();
  expect(duties.filter((it) => it !== undefined)).toEqual(['sweep']);
  expect([(await readStates(pool))[3], (await failedJobs()).length]).toEqual(['fresh', 2]);
});
