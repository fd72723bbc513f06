import type { Logger } from '../logger.ts';

type Aggregate = Readonly<{ aggregateType: string; aggregateId: string }>;

/** Long enough to look at many aggregates in one statement, short enough to be no pause. */
const GATHER_MS = 20;
/** The same under load, where each statement counts: when more than one aggregate a millisecond has been left. */
const GATHER_UNDER_LOAD_MS = 200;
const BATCH_LIMIT = 1_000;

export type OrphanWatch = Readonly<{
  /** To be called after the commit of whatever parked a row, or left an aggregate without a successor. */
  watch(aggregates: readonly Aggregate[]): void;
  /** Steps through the aggregates with parked rows, some at a time: the safety net for what a dead pod missed. */
  sweep(): Promise<void>;
  stop(): Promise<void>;
}>;

/**
 * Finds rows that are parked behind nobody. A claim may park a row behind another just while that one is
 * being acknowledged, neither transaction seeing the other; both look here after their commit, so the one
 * that commits last sees everything.
 */
export function createOrphanWatch(deps: {
  release: (aggregates: Aggregate[]) => Promise<number>;
  parkedAggregates: (after: Aggregate | null, limit: number) => Promise<Aggregate[]>;
  onReleased: () => void;
  logger: Logger;
}): OrphanWatch {
  const { release, parkedAggregates, onReleased, logger } = deps;
  const watched = new Map<string, Aggregate>();
  let timer: NodeJS.Timeout | undefined;
  let running: Promise<void> | undefined;
  let gatherMs = GATHER_MS;
  let sweptTo: Aggregate | null = null;

  async function look(): Promise<void> {
    while (watched.size > 0) {
      const some = [...watched].slice(0, BATCH_LIMIT);
      for (const [key] of some) watched.delete(key);
      try {
        if ((await release(some.map(([, aggregate]) => aggregate))) > 0) onReleased();
      } catch (error) {
        logger.warn(
          { err: error, aggregates: some.length },
          'cannot look for rows parked behind nobody; the sweep will',
        );
      }
    }
  }

  return {
    watch(aggregates) {
      for (const { aggregateType, aggregateId } of aggregates) {
        watched.set(`${aggregateId} ${aggregateType}`, { aggregateType, aggregateId });
      }
      if (timer || running || watched.size === 0) return;
      timer = setTimeout(() => {
        timer = undefined;
        gatherMs = watched.size > gatherMs ? GATHER_UNDER_LOAD_MS : GATHER_MS;
        running = look().finally(() => {
          running = undefined;
        });
      }, gatherMs);
    },

    async sweep() {
      const aggregates = await parkedAggregates(sweptTo, BATCH_LIMIT);
      sweptTo = aggregates.length < BATCH_LIMIT ? null : (aggregates.at(-1) ?? null);
      if (aggregates.length > 0 && (await release(aggregates)) > 0) onReleased();
    },

    async stop() {
      clearTimeout(timer);
      timer = undefined;
      await running;
    },
  };
}
