import { Client } from 'pg';
import { onTestFinished } from 'vitest';
import type { Pod } from '../demo/pod.ts';
import { insertEvents, someEvents } from './events.ts';
import type { Stage } from './flow.ts';
import { waitFor } from './wait.ts';

const EVENTS = 60;
const AGGREGATES = 20;

/**
 * Starts a pod and catches it between append and acknowledgement: 60 events of 20 aggregates are in the stream, and no
 * row can be marked before `release` is called, which ends the row locks that are held here.
 */
export async function catchMidAppend(
  stage: Omit<Stage, 'server'>,
): Promise<{ pod: Pod; release: () => Promise<void> }> {
  const pod = await stage.pod();
  // While the queue is paused the rows are leased and their jobs are there, and nobody works on them.
  const publish = stage.queue('publish');
  await publish.pause();
  await insertEvents(stage.pool, someEvents(EVENTS, AGGREGATES));
  await waitFor(async () => (await stage.count('next_attempt_at IS NULL')) === 0, {
    what: 'every row to be claimed',
  });
  const holder = new Client({ connectionString: stage.databaseUrl });
  holder.on('error', () => {});
  await holder.connect();
  onTestFinished(() => holder.end());
  await holder.query('BEGIN');
  await holder.query('SELECT FROM identity.outbox FOR UPDATE');
  await publish.resume();
  await waitFor(async () => (await stage.entries()).length === EVENTS, {
    what: 'every event to be appended',
  });
  return {
    pod,
    release: async () => {
      await holder.query('ROLLBACK');
    },
  };
}
