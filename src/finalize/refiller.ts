import { levelOf } from '../connections/outage.ts';
import { type Aggregate, aggregateKey } from '../event.ts';
import { byHalves } from '../outbox/by-halves.ts';
import type { Outbox } from '../outbox/outbox.ts';
import type { Scheduler } from '../queue/scheduler.ts';
import { createSpacedWarnings, type Logger } from '../telemetry/logger.ts';

/** Aggregates in one statement, at most. */
const BATCH_MAX = 1_000;
/** Delay of a refill while aggregates have parked rows: their speed depends on it. */
const PROMPT_MS = 2;
/** Delay while none has parked rows: long enough to ask about many aggregates in one statement. */
const CALM_MS = 20;
/** The same under load, which is when more than one aggregate is requested per millisecond: fewer statements. */
const CALM_UNDER_LOAD_MS = 200;
/** So many aggregates in a row whose rows the database refuses to change mean that it refuses all. */
const REFUSALS_MAX = 8;
/** Interval at which that is logged. */
const REPEAT_AFTER_MS = 60_000;

export type Refiller = ReturnType<typeof createRefiller>;

/**
 * Frees parked rows when their window has room, and asks for a claim. One statement runs at a time, for all aggregates
 * that were requested since the last one.
 */
export function createRefiller(deps: {
  outbox: Pick<Outbox, 'refill' | 'parkedAggregates' | 'unparkAll'>;
  scheduler: Pick<Scheduler, 'wake'>;
  options: Readonly<{ ordering: 'aggregate' | 'none'; maxInFlight: number }>;
  logger: Logger;
}) {
  const { outbox, scheduler, options, logger } = deps;
  const ordered = options.ordering === 'aggregate';
  const warn = createSpacedWarnings(logger, REPEAT_AFTER_MS);
  let requested = new Map<string, Aggregate>();
  let timer: NodeJS.Timeout | undefined;
  let running: Promise<void> | undefined;
  let stopped = false;
  let isPrompt = false;
  let isUnderLoad = false;
  let sweptTo: Aggregate | null = null;

  async function refill(aggregates: readonly Aggregate[]): Promise<void> {
    let [freed, parked] = [0, 0];
    try {
      await byHalves(
        aggregates,
        async (some) => {
          const { fresh, waiting } = await outbox.refill(some);
          freed += fresh;
          parked += waiting;
        },
        ({ aggregateType, aggregateId }, err) =>
          warn(
            { err, aggregateType, aggregateId },
            'the database refuses to change parked rows; a later tick tries again',
          ),
        REFUSALS_MAX,
      );
    } finally {
      isPrompt = parked > 0;
      if (freed > 0) await scheduler.wake();
    }
  }

  async function refillRequested(): Promise<void> {
    const aggregates = [...requested.values()];
    requested = new Map();
    isUnderLoad = aggregates.length > CALM_MS;
    for (let i = 0; i < aggregates.length; i += BATCH_MAX) {
      const some = aggregates.slice(i, i + BATCH_MAX);
      try {
        await refill(some);
      } catch (error) {
        logger[levelOf(error as Error)](
          { err: error, aggregates: some.length },
          'cannot refill aggregates; their parked rows are freed by the sweep of a later tick',
        );
      }
    }
  }

  function schedule(): void {
    if (stopped || timer || running || requested.size === 0) return;
    const ms = isPrompt ? PROMPT_MS : isUnderLoad ? CALM_UNDER_LOAD_MS : CALM_MS;
    timer = setTimeout(() => {
      timer = undefined;
      running = refillRequested().finally(() => {
        running = undefined;
        schedule();
      });
    }, ms);
  }

  return {
    /** Called after a commit that parked a row of these aggregates, or finished one that others waited for. */
    request(aggregates: readonly Aggregate[]): void {
      if (!ordered || stopped) return;
      for (const { aggregateType, aggregateId } of aggregates) {
        const aggregate = { aggregateType, aggregateId };
        requested.set(aggregateKey(aggregate), aggregate);
      }
      schedule();
    },

    /** Refills the next aggregates that have parked rows, some in each tick: a pod may have died before its refill. */
    async sweep(): Promise<void> {
      if (!ordered) {
        if ((await outbox.unparkAll(options.maxInFlight)) > 0) await scheduler.wake();
        return;
      }
      const aggregates = await outbox.parkedAggregates(sweptTo, BATCH_MAX);
      sweptTo = aggregates.length < BATCH_MAX ? null : (aggregates.at(-1) ?? null);
      if (aggregates.length > 0) await refill(aggregates);
    },

    /** Refills what was requested by now: no other pod knows of it, and the sweep may come much later. */
    async stop(): Promise<void> {
      stopped = true;
      clearTimeout(timer);
      await running;
      await refillRequested();
    },
  };
}
