/**
 * A model of BullMQ's publish jobs and of what Redis appends for them, by the rules of queues.ts and append.ts: an id
 * is given once, the memory of an append lives and dies with its job.
 */
import type { AppendOutcome, OutboxEvent } from '../../src/event.ts';

/** In this model Redis loses jobs, never entries: its epoch does not end. */
const EPOCH = 'epoch';

/** An event, and what became of it outside its row. */
export type Known = {
  readonly id: string;
  readonly eventId: string;
  readonly aggregateId: string;
  /** Every attempt to append it is refused. */
  readonly poisonous: boolean;
  committed: boolean;
  /** Ids of its entries. */
  entries: string[];
  deadLetters: number;
  /** Number of its replay: it takes its place among those that were replayed with it. */
  replay: number;
  skipped: boolean;
  attempts: number;
};

export type Job = {
  readonly event: OutboxEvent;
  state: 'waiting' | 'active' | 'delayed' | 'failed';
  attemptsMade: number;
  /** Of the worker that has it in hand. */
  token: number;
  entryId: string | undefined;
  deadLetterId: string | undefined;
  reason: string;
};

export type Jobs = ReturnType<typeof createJobs>;

/** @param beforeAppend told of each entry before it is written */
export function createJobs(of: (eventId: string) => Known, beforeAppend: (event: Known) => Promise<void>) {
  const jobs = new Map<string, Job>();
  let entries = 0;

  function add(events: readonly OutboxEvent[]): void {
    for (const event of events) {
      if (event.attempts > 0 && jobs.get(event.eventId)?.state === 'failed') forget(event.eventId);
      if (jobs.has(event.eventId)) continue;
      const unborn = { entryId: undefined, deadLetterId: undefined, reason: '' };
      jobs.set(event.eventId, { event, state: 'waiting', attemptsMade: 0, token: 0, ...unborn });
    }
  }

  function forget(eventId: string): void {
    jobs.delete(eventId);
  }

  async function appendOnce(event: OutboxEvent): Promise<AppendOutcome> {
    const job = jobs.get(event.eventId);
    if (!job) return { status: 'job-gone' };
    if (job.entryId) return { status: 'already-appended', entryId: job.entryId, epoch: EPOCH, preceding: [] };
    if (job.state === 'failed') return { status: 'job-gone' };
    if (of(event.eventId).poisonous) return { status: 'refused', reason: 'poisonous' };
    const entryId = `${++entries}-0`;
    await beforeAppend(of(event.eventId));
    job.entryId = entryId;
    of(event.eventId).entries.push(entryId);
    return { status: 'appended', entryId, epoch: EPOCH, preceding: [] };
  }

  async function appendDeadLetter(event: OutboxEvent): Promise<AppendOutcome> {
    const job = jobs.get(event.eventId);
    if (!job) return { status: 'job-gone' };
    if (job.deadLetterId)
      return { status: 'already-appended', entryId: job.deadLetterId, epoch: EPOCH, preceding: [] };
    if (job.state !== 'failed') return { status: 'job-gone' };
    job.deadLetterId = `${++entries}-0`;
    of(event.eventId).deadLetters++;
    return { status: 'appended', entryId: job.deadLetterId, epoch: EPOCH, preceding: [] };
  }

  return {
    ...{ add, forget, appendOnce, appendDeadLetter },
    get: (eventId: string) => jobs.get(eventId),
    all: () => [...jobs.values()],
    inState: (state: Job['state']) => [...jobs.values()].filter((job) => job.state === state),
    /** Done: removed, and nothing is left to remember. */
    complete: (eventId: string) => jobs.delete(eventId),
  };
}
