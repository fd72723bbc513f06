import type { Job, Queue } from 'bullmq';
import type { Fault } from './fault.ts';
import type { World } from './world.ts';

const JOBS = 100;
const ROWS = 100;
const PAUSED_MS = 4_000;

const both = ({ queues }: World): Queue[] => [queues.claim, queues.publish];

/** As somebody does who clicks down a list: jobs that have gone, or that somebody works on, give an error. */
async function eachJob(queue: Queue, act: (job: Job) => Promise<unknown>): Promise<void> {
  const jobs = await queue.getJobs(['active', 'waiting', 'delayed', 'failed'], 0, JOBS);
  await Promise.allSettled(jobs.filter((job) => job !== undefined).map(act));
}

const onBoard = (name: string, describe: string, act: (queue: Queue) => Promise<unknown>): Fault => ({
  name: `board-${name}`,
  describe: `Bull Board, both queues: ${describe}`,
  lane: 'redis',
  async inject(world) {
    for (const queue of both(world)) await act(queue);
    return undefined;
  },
});

const edited = (name: string, describe: string, value: string): Fault => ({
  name: `row-${name}`,
  describe: `by hand: next_attempt_at of unpublished rows is set to ${describe}`,
  lane: 'postgres',
  async inject({ sql }) {
    await sql(
      `UPDATE identity.outbox SET next_attempt_at = ${value}
        WHERE id IN (SELECT id FROM identity.outbox WHERE NOT published AND dead_lettered_at IS NULL
                      ORDER BY id DESC LIMIT ${ROWS})`,
    );
    return undefined;
  },
});

export const operatorFaults: readonly Fault[] = [
  onBoard('remove', 'jobs are removed', (queue) => eachJob(queue, (job) => job.remove())),
  onBoard('retry', 'failed jobs are retried', (queue) => queue.retryJobs({ state: 'failed', count: JOBS })),
  onBoard('promote', 'delayed jobs are promoted', (queue) => queue.promoteJobs({ count: JOBS })),
  onBoard('clean', 'waiting, delayed and failed jobs are cleaned', async (queue) => {
    for (const state of ['wait', 'delayed', 'failed', 'active'] as const) await queue.clean(0, JOBS, state);
  }),
  onBoard('drain', 'the queues are drained', (queue) => queue.drain(true)),
  {
    name: 'board-obliterate',
    describe: 'both queues are obliterated by force under load, then resumed',
    lane: 'redis',
    async inject(world) {
      for (const queue of both(world)) {
        await queue.obliterate({ force: true });
        await queue.resume();
      }
      return undefined;
    },
  },
  {
    name: 'board-pause',
    describe: 'both queues are paused for 4 s',
    lane: 'redis',
    lastsMs: PAUSED_MS,
    async inject(world) {
      for (const queue of both(world)) await queue.pause();
      return () => Promise.all(both(world).map((queue) => queue.resume()));
    },
  },
  edited('fresh', 'null', 'NULL'),
  edited('parked', 'infinity', "'infinity'"),
  edited('due', 'the past', "now() - interval '1 minute'"),
];
