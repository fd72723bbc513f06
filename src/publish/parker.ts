import { levelOf } from '../connections/outage.ts';
import { aggregateKey, type OutboxEvent } from '../event.ts';
import type { Refiller } from '../finalize/refiller.ts';
import { pause } from '../lifecycle.ts';
import type { Outbox } from '../outbox/outbox.ts';
import type { Logger } from '../telemetry/logger.ts';
import { inBatches } from './in-batches.ts';

/** Rows in one statement, at most. */
const BATCH_MAX = 500;
/**
 * Delays before the second and later tries of one batch. A row that is not parked holds up its aggregate until its lease
 * ends: after 5 s of a read-only database 323 such rows stopped the whole flow for 40 s (chaos).
 */
const RETRY_DELAYS_MS = [100, 400, 1_600, 3_000, 3_000, 3_000, 3_000, 3_000];

type ToPark = Readonly<{ event: OutboxEvent; failedBefore: boolean }>;

export type Parker = ReturnType<typeof createParker>;

/**
 * Parks the rows of released jobs. Rows that are released in one iteration of the event loop, or while a statement runs,
 * are parked together, in the next statement.
 */
export function createParker(deps: {
  outbox: Pick<Outbox, 'park'>;
  refiller: Pick<Refiller, 'request'>;
  logger: Logger;
}) {
  let stopped = false;

  const released = inBatches<ToPark>(BATCH_MAX, async (batch) => {
    const failed = batch.flatMap(({ event, failedBefore }) =>
      failedBefore && event.after ? [event.after] : [],
    );
    const aggregates = [...new Map(batch.map(({ event }) => [aggregateKey(event), event])).values()];
    const eventIds = batch.map(({ event }) => event.eventId);
    if (await tryPark(eventIds, [...new Set(failed)])) deps.refiller.request(aggregates);
  });

  async function tryPark(eventIds: readonly string[], failed: readonly string[]): Promise<boolean> {
    for (let attempt = 0; ; attempt++) {
      try {
        await deps.outbox.park(eventIds, failed);
        return true;
      } catch (error) {
        const delay = RETRY_DELAYS_MS[attempt];
        const about = { err: error, events: eventIds.length };
        const level = levelOf(error as Error);
        if (delay === undefined || stopped) {
          deps.logger[level](
            about,
            'cannot park rows that wait behind an earlier event; the lease reaper frees them when their leases end',
          );
          return false;
        }
        if (attempt === 0)
          deps.logger[level](about, 'cannot park rows that wait behind an earlier event; again');
        await pause(delay);
      }
    }
  }

  return {
    /** `failedBefore`: the event right before it has failed. */
    park(event: OutboxEvent, failedBefore: boolean): void {
      released.add({ event, failedBefore });
    },

    /** Resolves when nothing is left to park. What fails from now on is left to the lease reaper. */
    drain: async (): Promise<void> => {
      stopped = true;
      await released.drain();
    },
  };
}
