import type { Queue } from 'bullmq';
import type { Redis } from 'ioredis';
import { loop } from '../lifecycle.ts';
import type { Workers } from './workers.ts';

/** Interval of the checks. */
const LOOK_INTERVAL_MS = 2_000;
/** A pod is stuck when a job waits for this time beside a free worker, or is in progress for this time after its deadline. */
const STUCK_AFTER_MS = 30_000;

/** The workers of a queue. */
export type Workplace = Readonly<{
  workers: Pick<Workers, 'lastStartedAt' | 'inProgress' | 'oldestStartedAt' | 'slots'>;
  queue: Queue;
  /** Longest time of a job, while Redis and database answer or refuse. */
  deadlineMs: number;
  /**
   * Whether the queue has one job at a time. Then other pods may take every job: only a job that stays the same proves that
   * none is taken.
   */
  oneByOne: boolean;
}>;

export type ProgressWatch = ReturnType<typeof createProgressWatch>;

/**
 * Notices a pod that is alive and does nothing, though there is work, the pod has room for it, and nothing forbids it. A pod
 * is not stuck while Redis is away or takes nothing, while an operator has paused or limited the queue, or while other pods
 * do all the work: a restart would not help.
 */
export function createProgressWatch(deps: {
  redis: Redis;
  workplaces: readonly Workplace[];
  /** @throws when Redis takes nothing now */
  assertWritable: () => Promise<void>;
  stuckAfterMs?: number;
  lookIntervalMs?: number;
}) {
  const { redis, assertWritable, stuckAfterMs = STUCK_AFTER_MS, lookIntervalMs = LOOK_INTERVAL_MS } = deps;
  const watches = deps.workplaces.map(watch);

  function watch({ workers, queue, deadlineMs, oneByOne }: Workplace) {
    /** Since when each check has found that a job waits beside a free worker. */
    let idleSince: number | undefined;
    /** Since when each check has found that a job is beyond its deadline. */
    let overdueSince: number | undefined;
    /** The job that was next at the last check. */
    let next: string | null = null;

    /** The job that these workers should take now, or null when it has no reason to take any. */
    async function nextJob(): Promise<string | null> {
      if (workers.inProgress() >= workers.slots()) return null;
      const [paused, maxed, limitedForMs] = await Promise.all([
        queue.isPaused(),
        queue.isMaxed(),
        queue.getRateLimitTtl(),
      ]);
      if (paused || maxed || limitedForMs > 0) return null;
      return redis.lindex(queue.toKey('wait'), -1);
    }

    async function look(): Promise<void> {
      const now = performance.now();
      const isOverdue = now - (workers.oldestStartedAt() ?? now) > deadlineMs;
      const isIdle = now - workers.lastStartedAt() > lookIntervalMs;
      let waiting: string | null = null;
      // While workers take jobs, Redis is not asked: under load this costs it no command.
      if (isOverdue || isIdle) {
        try {
          await assertWritable();
          if (isIdle) waiting = await nextJob();
        } catch {
          idleSince = overdueSince = undefined;
          return;
        }
      }
      overdueSince = isOverdue ? (overdueSince ?? now) : undefined;
      const isTheSame = idleSince !== undefined && workers.lastStartedAt() < idleSince;
      if (waiting === null) idleSince = undefined;
      else if (!isTheSame || (oneByOne && waiting !== next)) idleSince = now;
      next = waiting;
    }

    function reasons(): string[] {
      const now = performance.now();
      const found: string[] = [];
      if (idleSince !== undefined && now - idleSince >= stuckAfterMs) {
        found.push(`jobs wait in ${queue.name} and this pod takes none, since ${secondsSince(idleSince)} s`);
      }
      if (overdueSince !== undefined && now - overdueSince >= stuckAfterMs) {
        found.push(`a job of ${queue.name} does not end, ${secondsSince(overdueSince)} s after its deadline`);
      }
      return found;
    }
    return { look, reasons };
  }

  return {
    ...loop(() => Promise.all(watches.map((it) => it.look())), lookIntervalMs),
    /** What is stuck and would go on after a restart of this process; empty when nothing is. */
    reasons: (): string[] => watches.flatMap((it) => it.reasons()),
  };
}

const secondsSince = (time: number) => Math.round((performance.now() - time) / 1_000);
