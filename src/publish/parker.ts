import { aggregateKey, type OutboxEvent } from '../event.ts';
import type { Refiller } from '../finalize/refiller.ts';
import type { Outbox } from '../outbox/outbox.ts';
import type { Logger } from '../telemetry/logger.ts';

/** Rows in one statement, at most. */
const BATCH_MAX = 500;

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
  const released: { event: OutboxEvent; failedBefore: boolean }[] = [];
  let running: Promise<void> | undefined;

  async function parkAll(): Promise<void> {
    while (released.length > 0) {
      const batch = released.splice(0, BATCH_MAX);
      const failed = batch.flatMap(({ event, failedBefore }) =>
        failedBefore && event.after ? [event.after] : [],
      );
      const aggregates = [...new Map(batch.map(({ event }) => [aggregateKey(event), event])).values()];
      try {
        await deps.outbox.park(
          batch.map(({ event }) => event.eventId),
          [...new Set(failed)],
        );
        deps.refiller.request(aggregates);
      } catch (error) {
        deps.logger.warn(
          { err: error, events: batch.length },
          'cannot park rows that wait behind an earlier event; the lease reaper frees them when their leases end',
        );
      }
    }
  }

  return {
    /** `failedBefore`: the event right before it has failed. */
    park(event: OutboxEvent, failedBefore: boolean): void {
      released.push({ event, failedBefore });
      running ??= new Promise<void>((resolve) => setImmediate(resolve)).then(parkAll).finally(() => {
        running = undefined;
      });
    },

    /** Resolves when nothing is left to park. */
    drain: async (): Promise<void> => {
      await running;
    },
  };
}
