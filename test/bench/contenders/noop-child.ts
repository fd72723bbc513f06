/** Adds and processes jobs that do nothing, in this one process. Answers `{jobs}` with `{seconds}`. */
import { randomUUID } from 'node:crypto';
import { Queue, Worker } from 'bullmq';
import { Redis } from 'ioredis';
import { answerParent, childConfig } from '../contender.ts';
import type { NoopConfig } from './noop.ts';

const { redisUrl, concurrency, batch, sample } = childConfig<NoopConfig>();
const connect = () => new Redis(redisUrl, { maxRetriesPerRequest: null });
const queue = new Queue('noop', { connection: connect(), defaultJobOptions: { removeOnComplete: true } });
let onCompleted = (): void => {};
const worker = new Worker('noop', async () => onCompleted(), { connection: connect(), concurrency });
await worker.waitUntilReady();

const { jobId: _, ...sampleOpts } = sample.opts;
const aJob = () => {
  const eventId = randomUUID();
  return {
    name: sample.name,
    data: { ...sample.data, eventId },
    opts: { ...sampleOpts, jobId: eventId },
  };
};

await answerParent(async ({ jobs }: { jobs: number }) => {
  let left = jobs;
  const finished = new Promise<void>((resolve) => {
    onCompleted = () => {
      left--;
      if (left === 0) resolve();
    };
  });
  const startedAt = performance.now();
  for (let added = 0; added < jobs; added += batch) {
    await queue.addBulk(Array.from({ length: Math.min(batch, jobs - added) }, aJob));
  }
  await finished;
  return { seconds: (performance.now() - startedAt) / 1_000 };
});
