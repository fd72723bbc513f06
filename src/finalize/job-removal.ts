import type { Queues } from '../queue/queues.ts';
import type { Memory } from '../streams/memory.ts';

/** Why a job was not removed: a worker has it, or it remembers an append of the event, or its dead letter. */
type JobLeft = 'busy' | 'remembers';

export type RemoveJobs = ReturnType<typeof createJobRemoval>;

/**
 * Removes the jobs of events that are to get new jobs, or none: BullMQ adds no job whose id is taken. A job that remembers
 * an append stays. Its caller ends the row's lease, and the lease reaper asks what became of the event.
 */
export function createJobRemoval(deps: {
  queues: Pick<Queues, 'withJobs' | 'remove'>;
  memory: Pick<Memory, 'appendedOf' | 'unknownLettersOf'>;
}) {
  /**
   * @param events with `knownEntry` where a dead letter that the row does not name keeps the job
   * @returns the events whose jobs were left, and why
   * @throws when Redis does not answer
   */
  return async (
    events: readonly Readonly<{ eventId: string; topic: string; knownEntry?: string | null }>[],
  ): Promise<ReadonlyMap<string, JobLeft>> => {
    // Most events have no job: after Redis lost data, this runs for each event that is published again.
    const there = await deps.queues.withJobs(events.map((it) => it.eventId));
    const withJobs = events.filter((it) => there.has(it.eventId));
    const [appended, lettered] = await Promise.all([
      deps.memory.appendedOf(withJobs),
      deps.memory.unknownLettersOf(
        withJobs.flatMap(({ eventId, knownEntry }) =>
          knownEntry === undefined ? [] : [{ eventId, knownEntry }],
        ),
      ),
    ]);
    const left = await Promise.all(
      withJobs.map(async ({ eventId }): Promise<[string, JobLeft][]> => {
        if (appended.has(eventId) || lettered.has(eventId)) return [[eventId, 'remembers']];
        return (await deps.queues.remove(eventId)) ? [] : [[eventId, 'busy']];
      }),
    );
    return new Map(left.flat());
  };
}
