import { brief, type Failure } from '../event.ts';
import type { Outbox } from '../outbox/outbox.ts';
import type { FailedJob, Queues } from '../queue/queues.ts';
import type { Streams } from '../streams/append.ts';
import type { Epoch } from '../streams/epoch.ts';
import type { Logger } from '../telemetry/logger.ts';
import type { Metrics } from '../telemetry/metrics.ts';
import type { Tally } from '../telemetry/tally.ts';
import type { Tracing } from '../telemetry/tracing.ts';
import type { Acknowledger } from './acknowledger.ts';
import type { Refiller } from './refiller.ts';

export type DeadLetters = ReturnType<typeof createDeadLetters>;

/**
 * Gives events up: appends the dead letter, then marks the row dead, and its aggregate goes on (or is held). Both steps are
 * idempotent, and the failed job stays in BullMQ until both are done. So the failed-event handler may be followed by the
 * lease reaper, which finishes what a dead pod began.
 */
export function createDeadLetters(deps: {
  streams: Pick<Streams, 'deadLetter'>;
  outbox: Pick<Outbox, 'inEpoch' | 'markDead'>;
  queues: Pick<Queues, 'remove'>;
  epoch: Pick<Epoch, 'confirm'>;
  acknowledger: Pick<Acknowledger, 'acknowledge'>;
  refiller: Pick<Refiller, 'request'>;
  metrics: Pick<Metrics, 'deadLettered'>;
  tracing: Pick<Tracing, 'deadLetter'>;
  tally: Tally;
  logger: Logger;
}) {
  const { streams, outbox, queues, epoch: epochs, acknowledger, refiller, tally, logger } = deps;

  /** @param madeAt of the failed job; null where a dead row has lost its letter */
  async function write(failure: Failure, madeAt: number | null): Promise<void> {
    const { event, attempts, reason } = failure;
    const { id, eventId } = event;
    const about = { eventId, topic: brief(event.topic), eventType: brief(event.eventType), attempts };
    const outcome = await deps.tracing.deadLetter(event, failure, (traced) =>
      streams.deadLetter({ ...failure, event: traced }, madeAt),
    );
    switch (outcome.status) {
      case 'appended':
      case 'remembered': {
        const { entryId, epoch } = outcome;
        const isMarked = await outbox.inEpoch(async (tx) => {
          const marked = await outbox.markDead(tx, { id, eventId, attempts, reason, entryId });
          await epochs.confirm(epoch);
          return marked;
        });
        if (outcome.status === 'appended') deps.metrics.deadLettered(event);
        tally.flushFor(eventId); // its failed attempts come first
        logger.warn(
          { ...about, reason, dlqEntryId: entryId },
          // The entry was there, and so was the dead row: an alert that counts dead letters must not count this one again.
          outcome.status === 'remembered' && !isMarked
            ? 'a retried dead letter failed again; it stays dead'
            : 'event moved to the dead-letter stream',
        );
        refiller.request([event]);
        return;
      }
      case 'published':
        await acknowledger.acknowledge({ event, entryId: outcome.entryId, epoch: outcome.epoch });
        await queues.remove(eventId);
        logger.warn(
          { ...about, reason, entryId: outcome.entryId },
          'the failed job of an event remembers its entry; the event is published',
        );
        return;
      case 'gone':
        tally.warn(
          eventId,
          {},
          'failed jobs were removed before their dead letters were written; their rows will be tried again',
        );
        return;
      case 'refused':
      case 'unavailable':
        tally.error(
          eventId,
          { reason: outcome.reason },
          'cannot write dead-letter entries; the events stay in the outbox and this is tried again when their leases end',
        );
        return;
      default:
        throw new Error(`a dead letter is not "${outcome.status}"`);
    }
  }

  return {
    /** Gives up the event of a job whose retries are spent. */
    bury: ({ madeAt, ...failure }: FailedJob): Promise<void> => write(failure, madeAt),

    /** Appends the dead letter of a dead row again, after Redis lost it. */
    writeAgain: (failure: Failure): Promise<void> => write(failure, null),
  };
}
