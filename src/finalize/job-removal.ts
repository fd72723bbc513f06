import type { Queues } from '../queue/queues.ts';
import type { Memory } from '../streams/memory.ts';

/** Why an event's job was left: a worker has it, or it remembers that the event was appended. */
export type JobLeft = 'busy' | 'appended';

export type RemoveJobs = ReturnType<typeof createJobRemoval>;

/**
 * Removes the jobs of events whose rows are to get new ones, or none: the ids of the old jobs would shadow the new
 * ones. A job that remembers an append stays: its row is to expire, and the lease reaper asks what became of it.
 */
export function createJobRemoval(deps: {
  queues: Pick<Queues, 'withJobs' | 'remove'>;
  memory: Pick<Memory, 'appendedOf'>;
}) {
  /**
   * @returns the events whose jobs were left, and why
   * @throws when Redis does not answer
   */
  return async (
    events: readonly Readonly<{ eventId: string; topic: string }>[],
  ): Promise<ReadonlyMap<string, JobLeft>> => {
    // Most have none: after a loss of Redis this is asked of each event that is published again.
    const there = await deps.queues.withJobs(events.map((it) => it.eventId));
    const withJobs = events.filter((it) => there.has(it.eventId));
    const appended = await deps.memory.appendedOf(withJobs);
    const left = await Promise.all(
      withJobs.map(async ({ eventId }): Promise<[string, JobLeft][]> => {
        if (appended.has(eventId)) return [[eventId, 'appended']];
        return (await deps.queues.remove(eventId)) ? [] : [[eventId, 'busy']];
      }),
    );
    return new Map(left.flat());
  };
}
