/**
 * The engine's limit: a BullMQ queue whose jobs do nothing, added and processed in this one process. The jobs are
 * those of the relay: the same data, ids and options.
 * Run by throughput.ts. For each line on stdin with a number of jobs, answers with the milliseconds they took.
 */
import { randomUUID } from 'node:crypto';
import { createInterface } from 'node:readline';
import { Queue, Worker } from 'bullmq';
import { Redis } from 'ioredis';

const BATCH = 100;
/** About what the payload of the benchmark's events takes. */
const PAYLOAD_BYTES = 250;

const [url = '', concurrency = '100'] = process.argv.slice(2);
const connect = () => new Redis(url, { maxRetriesPerRequest: null });
const queue = new Queue('noop', { connection: connect(), defaultJobOptions: { removeOnComplete: true } });
let onCompleted = (): void => {};
const worker = new Worker('noop', async () => onCompleted(), {
  connection: connect(),
  concurrency: Number(concurrency),
});
await worker.waitUntilReady();

const aJob = (i: number) => {
  const eventId = randomUUID();
  const data = {
    ...{ id: String(i), eventId, eventType: 'UserCreated', aggregateType: 'user', aggregateId: eventId },
    ...{
      topic: 'identity.user.v1',
      occurredAt: '2026-01-01T00:00:00.000000Z',
      correlationId: null,
      attempts: 0,
    },
    ...{ tenantId: '11111111-1111-1111-1111-111111111111', payload: 'x'.repeat(PAYLOAD_BYTES) },
  };
  const opts = { jobId: eventId, attempts: 6, backoff: { type: 'exponential', delay: 60_000 } };
  return { name: 'UserCreated', data, opts };
};

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
    await queue.addBulk(Array.from({ length: size }, (_, i) => aJob(added + i)));
  }
  await finished;
  console.log(String(performance.now() - startedAt));
}
process.exit(0);
