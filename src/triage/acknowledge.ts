import type { OutboxEvent, Receipt } from '../event.ts';
import type { Logger } from '../logger.ts';
import type { Follower, Following } from './hand-over.ts';

/** Rows in one transaction at most. */
const BATCH_LIMIT = 500;
/** Transactions at once: one commits while the next is being gathered and planned. */
const CONCURRENT_BATCHES = 2;
/**
 * Under load a batch waits so long for company: fewer, larger transactions cost the database and this process
 * less (0.045 -> 0.02 transactions per event, measured). A small batch does not wait, unless nobody waits for it: the
 * next events of its aggregates are on their way already.
 */
const GATHER_MS = 10;
const UNDER_LOAD = 24;
const PATIENT_MS = 25;
/** Waits before the tries of one batch after the first; then its jobs try again by themselves. */
const RETRY_DELAYS_MS = [100, 400, 1_600, 3_000, 3_000];

/**
 * An event whose predecessor is not marked yet is asked for again here, so often: its job could be removed meanwhile,
 * and with it the memory of its append.
 */
const EARLY_RETRY_MS = 150;
const EARLY_RETRIES = 40;

export type Acknowledger = Readonly<{
  /**
   * Resolves when the event's row is marked published.
   * @throws when the database did not take it; the append is remembered, so the job may simply run again
   */
  acknowledge(event: OutboxEvent, appended: Appended): Promise<void>;
  /** Resolves when nothing is left to write. */
  drain(): Promise<void>;
}>;

/** One append, as far as it concerns the row. */
export type Appended = Readonly<{
  entryId: string;
  /** In which it was made: what was appended in an epoch that is over may be lost. */
  epoch: string;
  /** It was made by an earlier run of the job, whose acknowledgement may have been committed without our knowing. */
  before: boolean;
  /** What comes before it in its aggregate and was appended; the rows may not say so yet. */
  preceding: readonly Receipt[];
}> &
  Following;

type Pending = {
  event: OutboxEvent;
  appended: Appended;
  earlyTries: number;
  resolve: () => void;
  reject: (error: Error) => void;
};

/**
 * Gathers acknowledgements into batches that size themselves: what arrives while the running transactions
 * are busy goes into the next one. So an idle relay acknowledges at once, a busy one hundreds together.
 */
export function createAcknowledger(deps: {
  /**
   * Marks the rows published and sees to their successors; rejects when the epoch of their appends is over. `early` are
   * the ids of rows that were not marked, since an earlier one of their aggregate is not; `followers` are those that have
   * their jobs already, `unclear` the events of whom nobody here knows what they brought along; `inChains`: whether any
   * belongs to a chain.
   */
  markPublished: (
    receipts: Receipt[],
    epoch: string,
    of: Readonly<{ followers: Follower[]; unclear: OutboxEvent[]; inChains: boolean }>,
  ) => Promise<Readonly<{ successors: readonly OutboxEvent[]; early: readonly string[] }>>;
  /** Whether an event waits for the one before it in its aggregate. */
  ordered: boolean;
  /** Events whose aggregate had no row to go on with, as far as that transaction could see. */
  onNoSuccessor: (events: OutboxEvent[]) => void;
  /** The same, of those that may have been marked before: what was leased then may have no job. */
  onMarkedBefore: (events: OutboxEvent[]) => void;
  /** Whether trying the same write again is of no use. */
  isFinal: (error: unknown) => boolean;
  logger: Logger;
}): Acknowledger {
  const { markPublished, ordered, onNoSuccessor, onMarkedBefore, isFinal, logger } = deps;
  let pending: Pending[] = [];
  /** Aggregates in running transactions. */
  const busy = new Set<string>();
  let running = 0;
  let resting = 0;
  let lastSize = 0;
  /** Whether somebody waits for one of those that are pending. */
  let urgent = false;
  /** When the next batch is gathered, by the clock of `performance.now`. */
  let gatherAt = Number.POSITIVE_INFINITY;
  let timer: NodeJS.Timeout | undefined;
  const onIdle: (() => void)[] = [];

  function schedule(): void {
    if (pending.length === 0 || running >= CONCURRENT_BATCHES) return;
    const isLarge = pending.length >= UNDER_LOAD;
    const waitMs = urgent || isLarge ? (lastSize >= UNDER_LOAD ? GATHER_MS : 0) : PATIENT_MS;
    const at = performance.now() + waitMs;
    if (gatherAt <= at) return;
    gatherAt = at;
    clearTimeout(timer);
    if (waitMs > 0) timer = setTimeout(gather, waitMs);
    // After the I/O of this turn of the loop: one read from Redis often answers many appends.
    else setImmediate(gather);
  }

  function gather(): void {
    gatherAt = Number.POSITIVE_INFINITY;
    const batch = nextBatch();
    // All that is pending waits for what is running; then it is looked at again.
    if (batch.length === 0) return;
    lastSize = batch.length;
    running++;
    const aggregates = ordered ? batch.map((it) => aggregateKey(it.event)) : [];
    for (const key of aggregates) busy.add(key);
    void flush(batch).finally(() => {
      for (const key of aggregates) busy.delete(key);
      running--;
      schedule();
      if (isIdle()) for (const idle of onIdle.splice(0)) idle();
    });
    schedule();
  }

  function wait(it: Pending): void {
    pending.push(it);
    urgent ||= it.appended.followers.length === 0;
    schedule();
  }

  /**
   * Of one epoch: an epoch that is over must not take others' receipts with it. An event may be appended while the
   * transaction that acknowledges the one before is yet to commit: it would only wait for that in the database.
   */
  function nextBatch(): Pending[] {
    const batch: Pending[] = [];
    const later: Pending[] = [];
    const epoch = pending[0]?.appended.epoch;
    for (const it of pending) {
      const isNow =
        batch.length < BATCH_LIMIT && it.appended.epoch === epoch && !busy.has(aggregateKey(it.event));
      (isNow ? batch : later).push(it);
    }
    pending = later;
    urgent = later.some((it) => it.appended.followers.length === 0);
    return batch;
  }

  async function flush(batch: Pending[]): Promise<void> {
    try {
      const { successors, early, tries } = await persist(batch);
      const continued = new Set(successors.map(aggregateKey));
      const last: Pending[] = [];
      for (const it of batch) {
        if (early.includes(it.event.id)) tryAgain(it);
        else {
          it.resolve();
          if (it.appended.followers.length === 0 && !continued.has(aggregateKey(it.event))) last.push(it);
        }
      }
      const before = last.filter((it) => tries > 1 || it.appended.before);
      if (last.length > 0) onNoSuccessor(last.map((it) => it.event));
      if (before.length > 0) onMarkedBefore(before.map((it) => it.event));
    } catch (error) {
      for (const it of batch) it.reject(error as Error);
    }
  }

  const isIdle = () => running === 0 && pending.length === 0 && resting === 0;

  function tryAgain(it: Pending): void {
    if (it.earlyTries++ >= EARLY_RETRIES) {
      it.reject(new Error('an earlier event of its aggregate is not marked'));
      return;
    }
    resting++;
    setTimeout(() => {
      resting--;
      wait(it);
    }, EARLY_RETRY_MS);
  }

  async function persist(batch: Pending[]) {
    const { epoch } = (batch[0] as Pending).appended;
    const receipts = receiptsOf(batch);
    const unclear = batch.filter((it) => it.appended.mayHaveMore).map((it) => it.event);
    const inChains = batch.some((it) => it.event.chain !== undefined);
    const followers = batch.flatMap((it) => it.appended.followers);
    for (let attempt = 0; ; attempt++) {
      try {
        return {
          ...(await markPublished(receipts, epoch, { followers, unclear, inChains })),
          tries: attempt + 1,
        };
      } catch (error) {
        const delay = RETRY_DELAYS_MS[attempt];
        if (delay === undefined || isFinal(error)) throw error;
        logger.warn(
          { err: error, events: batch.length, retryInMs: delay },
          'cannot mark events published; again',
        );
        await new Promise((resolve) => setTimeout(resolve, delay));
      }
    }
  }

  return {
    acknowledge: (event, appended) =>
      new Promise((resolve, reject) => {
        wait({ event, appended, earlyTries: 0, resolve, reject });
      }),
    drain: () => (isIdle() ? Promise.resolve() : new Promise((resolve) => onIdle.push(resolve))),
  };
}

const aggregateKey = (event: OutboxEvent) => `${event.aggregateId} ${event.aggregateType}`;

/** Of the batch, and of those that its events follow and that are not in it. */
function receiptsOf(batch: readonly Pending[]): Receipt[] {
  const receipts = new Map<string, Receipt>();
  for (const { event, appended } of batch) {
    const { entryId, preceding } = appended;
    for (const it of preceding) {
      if (!receipts.has(it.id)) receipts.set(it.id, { ...it, chained: 'before' });
    }
    receipts.set(event.id, {
      ...{ id: event.id, entryId },
      ...(preceding.length > 0 && { chained: 'after' }),
    });
  }
  return [...receipts.values()];
}
