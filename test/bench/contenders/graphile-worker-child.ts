/** A graphile-worker with one task, which appends. Works from the request `start` until `stop`. */
import { Logger, type Runner, run, type TaskList } from 'graphile-worker';
import { Redis } from 'ioredis';
import { envelopeFields } from '../../../src/streams/envelope.ts';
import { answerParent, childConfig } from '../contender.ts';
import type { EventJob } from '../workload.ts';
import type { GraphileWorkerConfig } from './graphile-worker.ts';

const { databaseUrl, redisUrl, stream, concurrency, localQueue } = childConfig<GraphileWorkerConfig>();
const redis = new Redis(redisUrl);
/** Its own would write a line for each job to stdout, where requests are answered. */
const logger = new Logger(() => (level, message) => {
  if (String(level) === 'error') console.error(message);
});
let runner: Runner | undefined;

const taskList: TaskList = {
  async publish(job) {
    const { payload, ...event } = job as EventJob;
    await redis.xadd(
      stream,
      '*',
      ...envelopeFields({
        ...{ ...event, id: event.eventId, topic: stream, attempts: 0 },
        ...{ tenantId: payload.tenant_id, correlationId: null, payload: JSON.stringify(payload) },
      }),
    );
  },
};

await answerParent(async (request: 'start' | 'stop') => {
  if (request === 'stop') await runner?.stop();
  else {
    const worker = {
      ...{ connectionString: databaseUrl, logger, concurrentJobs: concurrency },
      // As its documentation advises.
      maxPoolSize: concurrency + 2,
      ...{ localQueue: { size: localQueue }, completeJobBatchDelay: 0 },
    };
    runner = await run({ preset: { worker }, taskList, parsedCronItems: [], noHandleSignals: true });
  }
});
