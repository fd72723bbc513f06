import type { OutboxEvent, Receipt } from '../event.ts';
import type { Logger } from '../logger.ts';

/**
 * An attempt that began longer ago may be taken for that of a dead pod, and the aggregate have gone on elsewhere: what it
 * brings along comes too late. Others wait for its lock to end first, which takes longer.
 */
const IN_TIME_MS = 3_000;
/** Aggregates that go on at once, at most, for it to be worth reading ahead: more have work for everybody. */
const FEW = 16;
/** Events of one aggregate that are read ahead, and appended before the first of them is acknowledged; and their bytes. */
const AHEAD = 64;
const AHEAD_BYTES = 64 * 1024;
/** What was read is good for so long. */
const FRESH_MS = 5_000;
/** Longer than an acknowledgement is tried, whose lease the job of what was brought along has yet to get. */
const REMEMBERED_MS = 30_000;
/** Waits before the tries after the first to have rows looked at; then their leases end. */
const LOOK_RETRY_DELAYS_MS = [1_000, 2_000, 4_000, 8_000, 16_000];
/** Events that are kept in mind at most, of each kind; the oldest go first. */
const KEPT = 4_000;

/** One event was appended just now, in an attempt that began at that `performance.now()`. */
type Appended = Readonly<{ entryId: string; epoch: string; beganAt: number }>;

/**
 * Carries an aggregate on from one event to the next.
 *
 * The job of a successor is added when the lease of its row is committed, not before: it may run at once, and if a
 * crash of PostgreSQL undid the lease, nobody would know what it had appended. Should this pod die in between, the job
 * of the event before runs again elsewhere, and ends the lease of what has no job.
 *
 * An aggregate with much to do does not wait for that. What comes next is read ahead, and each event brings the next
 * one's job along as soon as it is appended: that job carries the receipts of those before it, so that rows get theirs
 * in order whoever acknowledges first. The rows are parked meanwhile, as they would be without; all else is as it is
 * where nothing was read ahead: each acknowledgement leases the row that is first then, and sees that it has its job.
 */
export function createHandOver<Tx>(deps: {
  /** Runs a transaction that gives receipts. */
  giving: <T>(work: (tx: Tx) => Promise<T>) => Promise<T>;
  epoch: Readonly<{ confirm: (epoch: string) => Promise<void>; current: () => string | undefined }>;
  addJobs: (events: readonly OutboxEvent[]) => Promise<void>;
  /** Adds those of whom no other pod has published the row by now, nor does meanwhile. */
  whileLive: (events: readonly OutboxEvent[], add: (live: OutboxEvent[]) => Promise<void>) => Promise<void>;
  /** These events have no job, for all we know. */
  endLeases: (events: readonly OutboxEvent[]) => Promise<void>;
  /** What comes after each of these in its aggregate, in order. Absent where dead rows hold their aggregate, or there is no order. */
  readAhead?:
    | ((after: readonly OutboxEvent[], limit: number, maxBytes: number) => Promise<OutboxEvent[]>)
    | undefined;
  payloadMayBeAtFault: (error: unknown) => boolean;
  logger: Logger;
}) {
  const { giving, epoch, addJobs, whileLive, endLeases, readAhead, payloadMayBeAtFault, logger } = deps;
  /** What was read ahead, by the id of the event that comes before. */
  const next = new Map<string, Readonly<{ event: OutboxEvent; until: number; epoch: string }>>();
  /** Events that were brought along, and whose rows may not be leased yet. */
  const broughtAlong = new Map<string, Readonly<{ until: number; epoch: string }>>();
  /** Events that have their receipts. */
  const settled = new Map<string, true>();

  /** Adds jobs in that epoch, or not at all. Never throws. */
  async function add(
    events: readonly OutboxEvent[],
    of: string,
    adding: (jobs: (some: readonly OutboxEvent[]) => Promise<void>) => Promise<void>,
  ): Promise<void> {
    try {
      await adding((some) => {
        if (epoch.current() !== of) throw new Error('Redis may have lost entries');
        return addJobs(some);
      });
    } catch (error) {
      for (const { id } of events) broughtAlong.delete(id);
      logger.warn(
        { err: error, events: events.length },
        'cannot add the next jobs of aggregates; their rows are looked at with the next tick',
      );
      await haveLookedAt(events);
    }
  }

  /** Resolves after the first try: whatever took the job away may have taken the database as well. */
  const haveLookedAt = (events: readonly OutboxEvent[], tries = 0): Promise<void> =>
    endLeases(events).catch((error) => {
      logger.debug({ err: error }, 'the rows are looked at when their leases end, or earlier');
      const delay = LOOK_RETRY_DELAYS_MS[tries];
      if (delay !== undefined) setTimeout(() => void haveLookedAt(events, tries + 1), delay).unref();
    });

  async function lookAhead(heads: readonly OutboxEvent[], of: string): Promise<void> {
    const until = performance.now() + FRESH_MS;
    try {
      const before = new Map(heads.map((it) => [aggregateKey(it), it.id]));
      for (const event of (await readAhead?.(heads, AHEAD, AHEAD_BYTES)) ?? []) {
        const key = aggregateKey(event);
        keep(next, before.get(key) as string, { event, until, epoch: of });
        before.set(key, event.id);
      }
    } catch (error) {
      logger.debug({ err: error }, 'cannot read ahead; events go on one by one');
    }
  }

  /** Asked once: later on, in another epoch, or after it was given up and replayed, it needs another job. */
  function wasBroughtAlong({ id, attempts }: OutboxEvent, of: string): boolean {
    const it = broughtAlong.get(id);
    broughtAlong.delete(id);
    return it !== undefined && it.epoch === of && it.until >= performance.now() && attempts === 0;
  }

  /** The jobs of rows that were leased just now. */
  async function addNext(
    successors: readonly OutboxEvent[],
    again: readonly OutboxEvent[] | 'all',
    of: string,
  ): Promise<void> {
    const ranBefore = again === 'all' ? null : new Set(again.map(aggregateKey));
    const unclear = successors.filter((it) => ranBefore?.has(aggregateKey(it)) ?? true);
    // A job that is gone by now may have been run: whoever looks for it, looks in the stream as well.
    const jobless = successors.filter((it) => !wasBroughtAlong(it, of) && !unclear.includes(it));
    if (readAhead && jobless.length > 0 && jobless.length <= FEW) void lookAhead(jobless, of);
    if (jobless.length > 0) await add(jobless, of, (jobs) => whileLive(jobless, jobs));
    if (unclear.length > 0) await haveLookedAt(unclear);
  }

  return {
    /**
     * Rows get their receipts by `change`, and what it leased the jobs that follow. An entry that Redis may have lost
     * gives no receipt. Returns what was leased.
     * @param of epoch in which the entries were appended
     * @param again events that an earlier run of their job had appended: it may have brought the next one along, whose
     * job may be gone again
     */
    async giveReceipts(
      of: string,
      change: (tx: Tx, promoting: boolean) => Promise<OutboxEvent[]>,
      again: readonly OutboxEvent[] | 'all' = [],
    ): Promise<OutboxEvent[]> {
      const write = async (promoting: boolean) => {
        const successors = await giving(async (tx) => {
          const changed = await change(tx, promoting);
          await epoch.confirm(of);
          return changed;
        });
        await addNext(successors, again, of);
        return successors;
      };
      try {
        return await write(true);
      } catch (error) {
        // The change must not wait for a successor that cannot be printed: the orphan watch makes it fresh, and the
        // claim deals with it.
        if (!payloadMayBeAtFault(error)) throw error;
        return write(false);
      }
    },

    /** These rows have their receipts. */
    settle(ids: readonly string[]): void {
      if (readAhead) for (const id of ids) keep(settled, id, true);
    },

    /**
     * The event was appended just now, in its own attempt: the next one of its aggregate gets its job, if it was read
     * ahead. Returns whether it was.
     */
    bringAlong(event: OutboxEvent, { entryId, epoch: of, beganAt }: Appended): boolean {
      const now = performance.now();
      const known = next.get(event.id);
      next.delete(event.id);
      if (known === undefined || known.until < now || known.epoch !== of) return false;
      if (now - beganAt > IN_TIME_MS) return false;
      const before = precedingOf(event, of).filter((it) => !settled.has(it.id));
      if (before.length >= AHEAD) return false;
      keep(broughtAlong, known.event.id, { until: now + REMEMBERED_MS, epoch: of });
      const follows = { epoch: of, receipts: [...before, { id: event.id, entryId }] };
      const job = { ...known.event, follows };
      void add([job], of, (jobs) => jobs([job]));
      return true;
    },
  };
}

/** What came before the event and was appended in this epoch; what was in another one is settled by now. */
export const precedingOf = ({ follows }: OutboxEvent, epoch: string): readonly Receipt[] =>
  follows?.epoch === epoch ? follows.receipts : [];

function keep<T>(map: Map<string, T>, key: string, value: T): void {
  map.delete(key);
  map.set(key, value);
  if (map.size <= KEPT) return;
  for (const oldest of map.keys()) {
    map.delete(oldest);
    return;
  }
}

const aggregateKey = (it: Readonly<{ aggregateType: string; aggregateId: string }>) =>
  `${it.aggregateId} ${it.aggregateType}`;
