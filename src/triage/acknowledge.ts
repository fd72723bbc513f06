import type { OutboxEvent, Receipt } from '../event.ts';
import type { Logger } from '../logger.ts';

/** Rows in one transaction at most. */
const BATCH_LIMIT = 500;
/** Transactions at once: one commits while the next is being gathered and planned. */
const CONCURRENT_BATCHES = 2;
/**
 * Under load a batch waits so long for company: fewer, larger transactions cost the database and this process
 * less (0.045 -> 0.02 transactions per event, measured). A small batch never waits: a hot aggregate flows from
 * acknowledgement to acknowledgement.
 */
const GATHER_MS = 10;
const UNDER_LOAD = 24;
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
   * @param epoch in which the append was made: what was appended in an epoch that is over may be lost
   * @throws when the database did not take it; the append is remembered, so the job may simply run again
   */
  acknowledge(event: OutboxEvent, entryId: string, epoch: string): Promise<void>;
  /** Resolves when nothing is left to write. */
  drain(): Promise<void>;
}>;

type Pending = {
  event: OutboxEvent;
  receipt: Receipt;
  epoch: string;
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
   * the ids of rows that were not marked, since an earlier one of their aggregate is not.
   */
  markPublished: (
    receipts: Receipt[],
    epoch: string,
  ) => Promise<Readonly<{ successors: readonly OutboxEvent[]; early: readonly string[] }>>;
  /** Whether an event waits for the one before it in its aggregate. */
  ordered: boolean;
  /** Events whose aggregate had no row to go on with, as far as that transaction could see. */
  onNoSuccessor: (events: OutboxEvent[]) => void;
  /** Whether trying the same write again is of no use. */
  isFinal: (error: unknown) => boolean;
  logger: Logger;
}): Acknowledger {
  const { markPublished, ordered, onNoSuccessor, isFinal, logger } = deps;
  let pending: Pending[] = [];
  /** Aggregates in running transactions. */
  const busy = new Set<string>();
  let running = 0;
  let resting = 0;
  let scheduled = false;
  let lastSize = 0;
  const onIdle: (() => void)[] = [];

  function schedule(): void {
    if (scheduled || pending.length === 0 || running >= CONCURRENT_BATCHES) return;
    scheduled = true;
    const gather = () => {
      scheduled = false;
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
    };
    if (lastSize >= UNDER_LOAD) setTimeout(gather, GATHER_MS);
    // After the I/O of this turn of the loop: one read from Redis often answers many appends.
    else setImmediate(gather);
  }

  /**
   * Of one epoch: an epoch that is over must not take others' receipts with it. An event may be appended while the
   * transaction that acknowledges the one before is yet to commit: it would only wait for that in the database.
   */
  function nextBatch(): Pending[] {
    const batch: Pending[] = [];
    const later: Pending[] = [];
    const epoch = pending[0]?.epoch;
    for (const it of pending) {
      const isNow = batch.length < BATCH_LIMIT && it.epoch === epoch && !busy.has(aggregateKey(it.event));
      (isNow ? batch : later).push(it);
    }
    pending = later;
    return batch;
  }

  async function flush(batch: Pending[]): Promise<void> {
    try {
      const { successors, early } = await persist(batch);
      const left: OutboxEvent[] = [];
      for (const it of batch) {
        if (early.includes(it.event.id)) tryAgain(it);
        else {
          it.resolve();
          left.push(it.event);
        }
      }
      const continued = new Set(successors.map(aggregateKey));
      const last = left.filter((event) => !continued.has(aggregateKey(event)));
      if (last.length > 0) onNoSuccessor(last);
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
      pending.push(it);
      schedule();
    }, EARLY_RETRY_MS);
  }

  async function persist(batch: Pending[]) {
    const receipts = batch.map((it) => it.receipt);
    const { epoch } = batch[0] as Pending;
    for (let attempt = 0; ; attempt++) {
      try {
        return await markPublished(receipts, epoch);
      } catch (error) {
        const delay = RETRY_DELAYS_MS[attempt];
        if (delay === undefined || isFinal(error)) throw error;
        logger.warn(
          { err: error, events: receipts.length, retryInMs: delay },
          'cannot mark events published; again',
        );
        await new Promise((resolve) => setTimeout(resolve, delay));
      }
    }
  }

  return {
    acknowledge: (event, entryId, epoch) =>
      new Promise((resolve, reject) => {
        pending.push({ event, receipt: { id: event.id, entryId }, epoch, earlyTries: 0, resolve, reject });
        schedule();
      }),
    drain: () => (isIdle() ? Promise.resolve() : new Promise((resolve) => onIdle.push(resolve))),
  };
}

const aggregateKey = (event: OutboxEvent) => `${event.aggregateId} ${event.aggregateType}`;
