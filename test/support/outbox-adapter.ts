/** All that the model-based tests know of the outbox's functions: each in its transaction, up to before the commit. */
import type { OutboxEvent, Receipt } from '../../src/event.ts';
import type { Pool, Queryable } from '../../src/outbox/database.ts';
import { type Claim, createOutbox } from '../../src/outbox/outbox.ts';

export type Policy = 'continue' | 'hold';

export const STATEMENT_TIMEOUT_MS = 20_000;

export function outboxOf(pool: Pool, deadLetterPolicy: Policy) {
  const outbox = createOutbox(pool, {
    ...{ ordering: 'aggregate', deadLetterPolicy, claimLeaseMs: 60_000 },
    ...{ streamName: 'default.stream', maxEventBytes: 1 << 20, statementTimeoutMs: STATEMENT_TIMEOUT_MS },
  });
  type Then<T> = (result: T) => Promise<void>;
  return {
    claim: (limit: number, beforeCommit: Then<Claim>) =>
      outbox.transaction('repeatable', async (tx) => beforeCommit(await outbox.claimFresh(tx, limit))),
    acknowledge: (receipts: Receipt[], beforeCommit: Then<OutboxEvent[]>) =>
      outbox.transaction('durable', async (tx) => beforeCommit(await outbox.markPublished(tx, receipts))),
    bury: (
      dead: { id: string; attempts: number; reason: string; entryId: string },
      beforeCommit: Then<OutboxEvent[]>,
    ) => outbox.transaction('durable', async (tx) => beforeCommit(await outbox.markDead(tx, dead))),
    due: {
      lockDue: outbox.lockDue,
      returnToFresh: outbox.returnToFresh,
      extendLease: outbox.extendLease,
      transaction: <T>(work: (tx: Queryable) => Promise<T>) => outbox.transaction('repeatable', work),
    },
    recordFailure: outbox.recordFailure,
    release: outbox.releaseOrphans,
    async sweep() {
      const aggregates = await outbox.parkedAggregates(null, 100);
      if (aggregates.length > 0) await outbox.releaseOrphans(aggregates);
    },
    jobsAreLost: outbox.endLeases,
  };
}
