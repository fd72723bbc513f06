/** Adds and processes jobs that do nothing, in this one process. Answers `{jobs}` with `{seconds}`. */
import { randomUUID } from 'node:crypto';
import { Queue, Worker } from 'bullmq';
import { Redis } from 'ioredis';
import { answerParent, childConfig } from '../contender.ts';
import type { NoopConfig } from './noop.ts';

const { redisUrl, concurrency, batch, calls, mostWaiting, sample } = childConfig<NoopConfig>();
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
  let added = 0;
  let done = 0;
  let onRoom: (() => void)[] = [];
  const finished = new Promise<void>((resolve) => {
    onCompleted = () => {
      done++;
      if (added - done < mostWaiting && onRoom.length > 0) {
        for (const go of onRoom) go();
        onRoom = [];
      }
      if (done === jobs) resolve();
    };
  });
  const startedAt = performance.now();
  await Promise.all(Array.from({ length: calls }, addAll));
  await finished;
  return { seconds: (performance.now() - startedAt) / 1_000 };

  async function addAll(): Promise<void> {
    while (added < jobs) {
      const size = Math.min(batch, jobs - added);
      added += size;
      await queue.addBulk(Array.from({ length: size }, aJob));
      if (added - done >= mostWaiting) await new Promise<void>((resolve) => onRoom.push(resolve));
    }
  }
});
