import { type AppendOutcome, brief, type OutboxEvent, type Receipt } from '../event.ts';
import type { Logger } from '../logger.ts';

export type Failure = Readonly<{ event: OutboxEvent; attempts: number; reason: string; failedAt: Date }>;

/**
 * Gives an event up: one entry in the dead-letter stream, then the row is dead and its aggregate goes on
 * (or is held). Both halves are idempotent and the failed job stays until both are done, so that whoever
 * finds it (the failed-event handler, or the reconciliation of due rows after a crash) may run it again.
 */
export function createDeadLetter(deps: {
  append: (event: OutboxEvent, failure: Failure) => Promise<AppendOutcome>;
  /** Marks the row dead and sees to its successor; rejects when the entry may be lost since. */
  markDead: (
    dead: Receipt & Readonly<{ attempts: number; reason: string }>,
    epoch: string,
    event: OutboxEvent,
  ) => Promise<void>;
  onDead: (event: OutboxEvent) => void;
  /** Told of each entry once, however often its dead letter is gone through. */
  onWritten?: (event: OutboxEvent) => void;
  logger: Logger;
}) {
  const { append, markDead, onDead, logger } = deps;

  return async function deadLetter(failure: Failure): Promise<void> {
    const { event, attempts, reason } = failure;
    const { eventId } = event;
    const about = { eventId, topic: brief(event.topic), eventType: brief(event.eventType), attempts };
    const outcome = await append(event, failure);
    if (outcome.status === 'appended') deps.onWritten?.(event);
    switch (outcome.status) {
      case 'appended':
      case 'already-appended':
        await markDead({ id: event.id, attempts, reason, entryId: outcome.entryId }, outcome.epoch, event);
        logger.warn(
          { ...about, reason, dlqEntryId: outcome.entryId },
          'event moved to the dead-letter stream',
        );
        onDead(event);
        return;
      case 'job-gone':
        logger.warn(
          about,
          'the failed job was removed before its dead letter was written; its row will be tried again',
        );
        return;
      case 'refused':
      case 'unavailable':
        logger.error(
          { ...about, reason: outcome.reason },
          'cannot write the dead-letter entry; the event stays in the outbox and this is tried again when its lease ends',
        );
        return;
    }
  };
}
