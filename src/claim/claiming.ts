import type { Context } from '../context.ts';
import { createWakeup } from '../outbox/wakeup.ts';
import { createClaim } from './claim.ts';
import { createClaimWorker } from './claim-worker.ts';

/** The claim stage: its worker, and the wake-up. `onTick` starts what a tick does besides claiming. */
export function createClaiming(context: Context, onTick: () => void) {
  const { config, servers, generation, queues, scheduler, maintenance, logger } = context;
  const wakeup = createWakeup({ pool: servers.pool, generation, logger, onWake: scheduler.wake });
  const claimWorker = createClaimWorker({
    ...{ connection: servers.workerRedis, queuePrefix: config.queuePrefix, queueName: config.queueName },
    ...{ claim: createClaim({ ...context, options: config }), outbox: context.outbox, scheduler, logger },
    onRefused: context.metrics.refused,
    removeUnreadable: (jobId) => queues.removeUnreadable(queues.claim, jobId),
    ...{ onTick, begin: maintenance.begin, arm: config.notify ? wakeup.arm : async () => 'deaf' as const },
  });
  return {
    wakeup: config.notify ? wakeup : undefined,
    workers: claimWorker.workers,
    start: claimWorker.start,
    stop: claimWorker.stop,
  };
}
