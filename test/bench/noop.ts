/**
 * The engine's limit: a BullMQ queue whose jobs do nothing, added and processed in this one process.
 * Run by throughput.ts. For each line on stdin with a number of jobs, answers with the milliseconds they took.
 */
import { createInterface } from 'node:readline';
import { Queue, Worker } from 'bullmq';
import { Redis } from 'ioredis';

const BATCH = 100;

const [url = '', concurrency = '100', payloadBytes = '250'] = process.argv.slice(2);
const connect = () => new Redis(url, { maxRetriesPerRequest: null });
const queue = new Queue('noop', { connection: connect(), defaultJobOptions: { removeOnComplete: true } });
let onCompleted = (): void => {};
const worker = new Worker('noop', async () => onCompleted(), {
  connection: connect(),
  concurrency: Number(concurrency),
});
await worker.waitUntilReady();
const payload = 'x'.repeat(Number(payloadBytes));

console.log('ready');
for await (const line of createInterface({ input: process.stdin })) {
  const jobs = Number(line);
  let left = jobs;
  const finished = new Promise<void>((resolve) => {
    onCompleted = () => {
      left--;
      if (left === 0) resolve();
    };
  });
  const startedAt = performance.now();
  for (let added = 0; added < jobs; added += BATCH) {
    const size = Math.min(BATCH, jobs - added);
    await queue.addBulk(
      Array.from({ length: size }, (_, i) => ({ name: 'noop', data: { i: added + i, payload } })),
    );
  }
  await finished;
  console.log(String(performance.now() - startedAt));
}
process.exit(0);
