import { levelOf } from '../connections/outage.ts';
import type { Context } from '../context.ts';
import { createLeaseReaper } from './lease-reaper.ts';

/** Failed jobs that one tick removes, at most. */
const TRIM_LIMIT = 1_000;

/** The recovery stage: what each tick starts besides its claims. The claims do not wait for it. */
export function createRecovery(context: Context) {
  const { config, outbox, queues, removeJobs, refiller, logger } = context;
  const reapLeases = createLeaseReaper(context);

  /** Removes failed jobs beyond RELAY_FAILED_JOBS_KEPT, but none whose dead letter is still to be written. */
  async function trimFailedJobs(): Promise<void> {
    const excess = await queues.failedBeyond(config.failedJobsKept, TRIM_LIMIT);
    if (excess.length === 0) return;
    const live = new Set(await outbox.liveOf(excess.map((it) => it.eventId)));
    await removeJobs(excess.filter((it) => !live.has(it.eventId)));
  }

  const duties = {
    'lease reaper': reapLeases,
    sweep: refiller.sweep,
    'removal of failed jobs': trimFailedJobs,
  };
  return {
    async maintain(goesOn?: () => boolean): Promise<void> {
      for (const [duty, run] of Object.entries(duties)) {
        try {
          await run(goesOn);
        } catch (error) {
          logger[levelOf(error as Error)](
            { err: error, duty },
            'a duty of the tick failed; the next tick does it',
          );
        }
      }
    },
  };
}
