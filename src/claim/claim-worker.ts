import type { Redis } from 'ioredis';
import { levelOf } from '../connections/outage.ts';
import { brief } from '../event.ts';
import { pause } from '../lifecycle.ts';
import type { Outbox } from '../outbox/outbox.ts';
import type { Wakeup } from '../outbox/wakeup.ts';
import { claimQueueName } from '../queue/queues.ts';
import { type Scheduler, TICK, WAKE } from '../queue/scheduler.ts';
import { createWorkers, type Fate, type Run } from '../queue/workers.ts';
import { createSpacedWarnings, type Logger } from '../telemetry/logger.ts';
import type { ClaimOutcome } from './claim.ts';

/** A claim job ends after this time and asks for another one: other pods claim too, and dashboards show progress. */
const JOB_MS = 2_000;
/** Interval between claims while there is no room, or while a writer has yet to commit. */
const PAUSE_MS = 5;
/**
 * Interval between the beginnings of two claims while events keep coming: fewer, larger claims, without NOTIFY. Small
 * claims are expensive: 1,100 µs of the pod per event at 600 events/s, 890 with 20 ms between claims. But each event waits
 * for half of the interval: at half the drain rate p99 is 63 ms with 20 ms, and 29 with 10 (measured).
 */
const PACE_MS = 10;
/** Delay of the claim after one that failed. It does not wait for the next tick: the database may be back. */
const AGAIN_AFTER_MS = 1_000;
/** Interval at which failures are logged: an outage makes one a second. */
const REPEAT_AFTER_MS = 10_000;
const FAILED = 'claiming failed; nothing was claimed, trying again';
const FOREIGN_JOB = 'a job of the claim queue is none of the relay’s; ignored';
/** Longest time for a claim job. Its last claim may go on row by row. */
export const CLAIM_JOB_DEADLINE_MS = 120_000;

export type ClaimWorker = ReturnType<typeof createClaimWorker>;

/** Runs claim jobs: each claims while there is work and room, so throughput does not depend on the ticks. */
export function createClaimWorker(deps: {
  connection: Redis;
  queuePrefix: string;
  queueName: string;
  claim: () => Promise<ClaimOutcome>;
  outbox: Pick<Outbox, 'withClaimLock'>;
  /** Starts what a tick does besides claiming; not waited for. */
  onTick: () => void;
  /** Starts the work of another schedule, named by the job; not waited for. Answers whether there is such a schedule. */
  begin: (name: string) => boolean;
  /** Makes writers send NOTIFY from now on. */
  arm: Wakeup['arm'];
  scheduler: Pick<Scheduler, 'wake'>;
  onRefused: (reason: string) => void;
  /** Removes a job that BullMQ cannot read; answers whether it was one. */
  removeUnreadable: (jobId: string) => Promise<boolean>;
  logger: Logger;
}) {
  const { claim, scheduler, logger } = deps;
  const warn = createSpacedWarnings(logger, REPEAT_AFTER_MS);
  let stopping = false;
  let again: NodeJS.Timeout | undefined;

  async function process({ name }: Run<unknown>): Promise<Fate<void>> {
    if (deps.begin(name)) return COMPLETED;
    if (name === TICK) deps.onTick();
    else if (name !== WAKE) {
      logger.warn({ job: brief(name) }, FOREIGN_JOB);
      return COMPLETED;
    }
    const claimed = await deps.outbox.withClaimLock(claimAll);
    if (claimed !== 'busy' && claimed.events > 0) logger.info({ events: claimed.events }, 'claimed events');
    // `busy`: the other pod may have read the table before the insert that requested this job. So ask again.
    if ((claimed === 'busy' || !claimed.exhausted) && !stopping) await scheduler.wake();
    return COMPLETED;
  }

  /**
   * Claims until the job's time is over, or until nothing is left.
   * @returns `exhausted` when nothing is left, and the next writer wakes the relay, or the next tick does
   */
  async function claimAll(): Promise<{ events: number; exhausted: boolean }> {
    const endsAt = performance.now() + JOB_MS;
    let events = 0;
    let armed = false;
    while (!stopping && performance.now() < endsAt) {
      const beganAt = performance.now();
      const found = await claim();
      if (found.kind === 'no-room') {
        await pause(PAUSE_MS);
        continue;
      }
      events += found.events;
      if (found.kind === 'more') continue;
      // Several events at once: more are likely to come. The pod claims again by itself, so that no writer needs to notify.
      if (found.events > 1 && !armed) {
        await pause(Math.max(0, beganAt + PACE_MS - performance.now()));
        continue;
      }
      if (!armed) {
        const arming = await deps.arm();
        if (arming === 'deaf' && found.events === 0) return { events, exhausted: true };
        if (arming === 'deaf') await pause(Math.max(0, beganAt + PACE_MS - performance.now()));
        if (arming === 'writers') await pause(PAUSE_MS);
        armed = arming === 'armed';
        // Writers that committed before the wake-up was armed sent no NOTIFY. So claim once more.
        if (arming !== 'already-armed') continue;
      }
      return { events, exhausted: true };
    }
    return { events, exhausted: false };
  }

  const workers = createWorkers({
    ...{ connection: deps.connection, queuePrefix: deps.queuePrefix, logger },
    queueName: claimQueueName(deps.queueName),
    concurrency: 1,
    timeoutMs: CLAIM_JOB_DEADLINE_MS,
    process,
    onRefused: deps.onRefused,
    async onStalled(jobId) {
      if (await deps.removeUnreadable(jobId).catch(() => false)) logger.warn({ job: jobId }, FOREIGN_JOB);
    },
    onFailed({ error }) {
      // After a delay, not at once: BullMQ would give the new job to this pod, and this pod may be the only one that fails.
      clearTimeout(again);
      if (!stopping) again = setTimeout(() => void scheduler.wake(), AGAIN_AFTER_MS);
      if (levelOf(error) === 'debug') logger.debug({ err: error }, FAILED);
      else warn({ err: error }, FAILED);
    },
  });

  return {
    start: workers.start,
    async stop(deadlineMs: number): Promise<void> {
      stopping = true;
      clearTimeout(again);
      await workers.stop(deadlineMs);
    },
    workers,
  };
}

const COMPLETED: Fate<void> = { kind: 'completed', result: undefined };
