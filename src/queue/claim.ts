import { type Job, Worker } from 'bullmq';
import type { Redis } from 'ioredis';
import type { Logger } from '../logger.ts';
import { claimQueueName, closeWorker, reportErrors, WORKER_OPTIONS } from './queues.ts';
import { TICK } from './scheduler.ts';

/** A claim job gives way after so long and asks for another: other pods get their turn, dashboards move. */
const TURN_MS = 2_000;
/** Looks again this soon while there is no room, while another pod claims, or while a writer has yet to commit. */
const PAUSE_MS = 5;

/**
 * What one round found.
 * - `more`: as much as it could take, so there may be more
 * - `all`: everything that is fresh, `events` of it (perhaps none)
 * - `no-room`: as many jobs in Redis as are allowed
 * - `busy`: another pod is claiming
 */
export type ClaimRound = { kind: 'more' | 'all'; events: number } | { kind: 'no-room' } | { kind: 'busy' };

export type ClaimWorker = Readonly<{
  start(): void;
  stop(deadlineMs: number): Promise<void>;
  isRunning(): boolean;
  /** When a claim last came to its end, or was found to have nothing to do; ms since the epoch. */
  lastTurnAt(): number;
}>;

/** Runs claim jobs: each claims while there is work and room, so throughput does not depend on the ticks. */
export function createClaimWorker(deps: {
  connection: Redis;
  queuePrefix: string;
  queueName: string;
  claim: () => Promise<ClaimRound>;
  /** What a tick does besides claiming: reconcile, sweep, trim. */
  maintain: () => Promise<void>;
  /** Asks writers to wake us up from now on. */
  arm: () => Promise<'armed' | 'already-armed' | 'writers' | 'deaf'>;
  wake: () => Promise<void>;
  logger: Logger;
}): ClaimWorker {
  const { claim, logger } = deps;
  let stopping = false;
  let lastTurnAt = Date.now();

  async function process(job: Job): Promise<void> {
    if (job.name === TICK) await deps.maintain();
    const { events, exhausted } = await takeTurn();
    lastTurnAt = Date.now();
    if (events > 0) logger.info({ events }, 'claimed a batch of events');
    if (!exhausted && !stopping) await deps.wake();
  }

  /** Claims until nothing is left (and writers will wake us), or the turn is over. */
  async function takeTurn(): Promise<{ events: number; exhausted: boolean }> {
    const endsAt = Date.now() + TURN_MS;
    let events = 0;
    let armed = false;
    while (!stopping && Date.now() < endsAt) {
      const round = await claim();
      if (round.kind === 'no-room' || round.kind === 'busy') {
        await pause();
        continue;
      }
      events += round.events;
      if (round.kind === 'more') continue;
      // Whoever wrote before the wake-up was armed said nothing: armed, look once more.
      if (armed) return { events, exhausted: true };
      const arming = await deps.arm();
      if (arming === 'already-armed' || arming === 'deaf') return { events, exhausted: true };
      if (arming === 'armed') armed = true;
      else await pause();
    }
    return { events, exhausted: false };
  }

  const worker = new Worker(claimQueueName(deps.queueName), process, {
    ...WORKER_OPTIONS,
    connection: deps.connection,
    prefix: deps.queuePrefix,
    concurrency: 1,
    // A claim job that was cut off is simply run again: nothing about it can be to blame.
    maxStalledCount: 1_000_000,
  });
  reportErrors(worker, logger);
  worker.on('failed', (_job, error) =>
    logger.warn({ err: error }, 'claiming failed; nothing was claimed, trying again'),
  );

  return {
    start() {
      worker.run().catch((error) => logger.error({ err: error }, 'claim worker ended'));
    },
    async stop(deadlineMs) {
      stopping = true;
      await closeWorker(worker, deadlineMs);
    },
    isRunning: () => worker.isRunning() && !worker.isPaused(),
    lastTurnAt: () => lastTurnAt,
  };
}

const pause = () => new Promise<void>((resolve) => setTimeout(resolve, PAUSE_MS));
