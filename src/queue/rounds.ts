import type { OutboxEvent } from '../event.ts';
import type { Logger } from '../logger.ts';
import { type ClaimRound, claimable } from './claim.ts';
import type { InFlight } from './queues.ts';

type Aggregate = Readonly<{ aggregateType: string; aggregateId: string }>;
type Claim = Readonly<{ leased: OutboxEvent[]; parked: Aggregate[]; more: boolean }>;

/**
 * One round of claiming: as many rows as there is room for jobs in Redis. Rounds may overlap; what each is about to
 * add is reserved, so that together they keep to the cap.
 */
export function createClaimRounds(deps: {
  inFlight: () => Promise<InFlight>;
  /** `batchSize` rows to begin with; while there are more, twice as many each time, up to `maxBatchSize`. */
  options: Parameters<typeof claimable>[2] & Readonly<{ maxBatchSize: number }>;
  /** Takes up to `limit` fresh rows; their jobs are there when it resolves. */
  claimBatch: (limit: number) => Promise<Claim>;
  /** Takes the first fresh row, even if its payload cannot be printed. */
  claimAlone: () => Promise<Claim>;
  payloadMayBeAtFault: (error: unknown) => boolean;
  /** Told how many events a transaction has claimed, if any. */
  onClaimed?: (events: number) => void;
  onParked: (aggregates: readonly Aggregate[]) => void;
  logger: Logger;
}): () => Promise<ClaimRound> {
  const { inFlight, options, claimBatch, claimAlone, payloadMayBeAtFault, onParked, logger } = deps;
  /** Jobs that rounds are about to add; and of these, the ones that were added since the last count. */
  let reserved = 0;
  let added = 0;
  let counting: Promise<unknown> = Promise.resolve();
  // No more than there is soon room for: a large batch that waits for room leaves the workers without jobs.
  const largest = Math.max(
    options.batchSize,
    Math.min(options.maxBatchSize, Math.floor(options.maxInFlight / 4)),
  );
  let batchSize = options.batchSize;

  /** How many jobs a round may add; 0 when too few to be worth it. One count at a time, so that none is missed. */
  function reserve(): Promise<number> {
    const counted = counting.then(async () => {
      reserved -= added;
      added = 0;
      const limit = claimable(await inFlight(), reserved, { ...options, batchSize });
      reserved += limit;
      return limit;
    });
    counting = counted.catch(() => {});
    return counted;
  }

  /** Until the event is found that cannot be printed: its job exists then, and the next round is as any other. */
  async function claimOneByOne(limit: number): Promise<Claim> {
    const leased: OutboxEvent[] = [];
    const parked: Aggregate[] = [];
    for (let more = true; more && leased.length + parked.length < limit; ) {
      const one = await claimAlone();
      leased.push(...one.leased);
      parked.push(...one.parked);
      more = one.more && !one.leased[0]?.withheld;
    }
    return { leased, parked, more: true };
  }

  return async function claim() {
    const limit = await reserve();
    if (limit === 0) return { kind: 'no-room' };
    try {
      const { leased, parked, more } = await claimBatch(limit).catch((error) => {
        if (!payloadMayBeAtFault(error)) throw error;
        logger.warn({ err: error }, 'the payload of an event may be unprintable; claiming one by one');
        return claimOneByOne(limit);
      });
      onParked(parked);
      const events = leased.length + parked.length;
      if (events > 0) deps.onClaimed?.(events);
      batchSize = more ? Math.min(2 * batchSize, largest) : options.batchSize;
      return { kind: more ? 'more' : 'all', events: leased.length };
    } finally {
      added += limit;
    }
  };
}
