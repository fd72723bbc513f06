import { levelOf } from '../connections/outage.ts';
import { byId, type OutboxEvent } from '../event.ts';
import { pause } from '../lifecycle.ts';
import { rowMayBeAtFault } from '../outbox/finalize.ts';
import type { Outbox } from '../outbox/outbox.ts';
import { type Epoch, EpochOverError } from '../streams/epoch.ts';
import type { Memory } from '../streams/memory.ts';
import type { Logger } from '../telemetry/logger.ts';
import type { Refiller } from './refiller.ts';

/** Rows in one transaction at most. */
const BATCH_MAX = 500;
/** Transactions at once: one commits while the next is being collected and planned. */
const CONCURRENT_BATCHES = 2;
/**
 * Under load a batch waits this time for more rows: fewer, larger transactions cost the database and this process less
 * (0.045 -> 0.02 transactions per event, measured).
 */
const COLLECT_MS = 10;
/** A batch of so many rows means load. */
const UNDER_LOAD = 24;
/** So many appends are forgotten together: see memory.ts. */
const FORGOTTEN_MAX = 500;
/** Delays before the second and later tries of one batch. After the last try its jobs are postponed, and run again. */
const RETRY_DELAYS_MS = [100, 400, 1_600, 3_000, 3_000];

/** A batch is split to find the rows that are refused, until so many in a row were. */
const REFUSALS_MAX = 8;
/** Events whose rows were refused that are remembered, at most. */
const REFUSED_KEPT = 1_000;

/** An event that was appended in that epoch. */
export type Appended = Readonly<{ event: OutboxEvent; entryId: string; epoch: string }>;

export type Acknowledger = ReturnType<typeof createAcknowledger>;

/**
 * Marks rows published, in batches: events that arrive while transactions run go into the next one. So an idle relay
 * acknowledges each event at once, and a busy one hundreds together.
 */
export function createAcknowledger(deps: {
  outbox: Pick<Outbox, 'inEpoch' | 'markPublished'>;
  epoch: Pick<Epoch, 'confirm'>;
  memory: Pick<Memory, 'forget'>;
  refiller: Pick<Refiller, 'request'>;
  logger: Logger;
}) {
  const { outbox, epoch: epochs, memory, refiller, logger } = deps;
  type Pending = Appended & { resolve: () => void; reject: (error: Error) => void };
  let pending: Pending[] = [];
  let running = 0;
  let lastSize = 0;
  let timer: NodeJS.Timeout | NodeJS.Immediate | undefined;
  const onIdle: (() => void)[] = [];
  /** Events whose rows are marked, and whose appends Redis still remembers. */
  const marked: string[] = [];
  /** Events whose rows the database refused to change. */
  const refused = new Set<string>();

  const isIdle = () => running === 0 && pending.length === 0;

  function schedule(): void {
    if (pending.length === 0 || running >= CONCURRENT_BATCHES || timer !== undefined) return;
    // Without load, after the I/O of this iteration of the event loop: one read from Redis often answers many appends.
    timer = lastSize >= UNDER_LOAD ? setTimeout(flush, COLLECT_MS) : setImmediate(flush);
  }

  function flush(): void {
    timer = undefined;
    const batch = nextBatch();
    lastSize = batch.length;
    running++;
    void acknowledge(batch).finally(() => {
      running--;
      schedule();
      if (isIdle() || marked.length >= FORGOTTEN_MAX) memory.forget(marked.splice(0));
      if (isIdle()) for (const idle of onIdle.splice(0)) idle();
    });
    schedule();
  }

  /**
   * A batch has events of one epoch: if that epoch is over, the batch fails, and events of other epochs must not. Rows that
   * were refused come last, in batches of their own.
   */
  function nextBatch(): Pending[] {
    const wasRefused = (it: Pending) => refused.size > 0 && refused.has(it.event.eventId);
    const first = pending.find((it) => !wasRefused(it)) ?? pending[0];
    const isRefused = first !== undefined && wasRefused(first);
    const batch: Pending[] = [];
    const later: Pending[] = [];
    for (const it of pending) {
      const fits = batch.length < BATCH_MAX && it.epoch === first?.epoch && wasRefused(it) === isRefused;
      (fits ? batch : later).push(it);
    }
    pending = later;
    return batch;
  }

  /** @param refusals rows in a row that were refused by themselves: after a few, the database refuses all */
  async function acknowledge(batch: Pending[], refusals = { inARow: 0 }): Promise<void> {
    try {
      await persist(batch);
      refusals.inARow = 0;
      for (const it of batch) it.resolve();
      for (const { event } of batch) refused.delete(event.eventId);
      marked.push(...batch.map((it) => it.event.eventId));
      refiller.request(batch.map((it) => it.event));
    } catch (error) {
      if (batch.length > 1 && rowMayBeAtFault(error) && refusals.inARow < REFUSALS_MAX) {
        const half = Math.ceil(batch.length / 2);
        await acknowledge(batch.slice(0, half), refusals);
        await acknowledge(batch.slice(half), refusals);
        return;
      }
      if (batch.length === 1 && rowMayBeAtFault(error)) {
        refusals.inARow++;
        if (refused.size >= REFUSED_KEPT) refused.clear();
        refused.add((batch[0] as Pending).event.eventId);
      }
      for (const it of batch) it.reject(error as Error);
    }
  }

  async function persist(batch: readonly Pending[]): Promise<void> {
    const { epoch } = batch[0] as Pending;
    const published = batch
      .map(({ event: { id, eventId }, entryId }) => ({ id, eventId, entryId }))
      .sort(byId);
    for (let attempt = 0; ; attempt++) {
      try {
        await outbox.inEpoch(async (tx) => {
          await outbox.markPublished(tx, published);
          await epochs.confirm(epoch);
        });
        return;
      } catch (error) {
        const delay = RETRY_DELAYS_MS[attempt];
        // A row that refuses to be changed is left to its job, which is postponed: others must not wait for it.
        if (delay === undefined || error instanceof EpochOverError || rowMayBeAtFault(error)) throw error;
        logger[levelOf(error as Error)](
          { err: error, events: batch.length, retryInMs: delay },
          'cannot mark events published; again',
        );
        await pause(delay);
      }
    }
  }

  return {
    /**
     * Resolves when the event's row is marked published.
     * @throws {EpochOverError} when the entry may be lost since
     * @throws when the database did not take it; the append is remembered, so the job may simply run again
     */
    acknowledge: (appended: Appended): Promise<void> =>
      new Promise((resolve, reject) => {
        pending.push({ ...appended, resolve, reject });
        schedule();
      }),

    /** Resolves when nothing is left to write. */
    drain: (): Promise<void> =>
      isIdle() ? Promise.resolve() : new Promise((resolve) => onIdle.push(resolve)),
  };
}
