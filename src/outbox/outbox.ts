import { type Durability, GENERIC, type Pool, type Queryable, transaction } from '../connections/database.ts';
import { createGeneration } from '../connections/generation.ts';
import { epochLock, outboxLock } from '../connections/table-lock.ts';
import { createClaims } from './claims.ts';
import type { OutboxOptions } from './conditions.ts';
import { createFinalize } from './finalize.ts';
import { createForgotten } from './forgotten.ts';
import { createLeases } from './leases.ts';
import { createParked } from './parked.ts';
import { createPublished } from './published.ts';

export type { Claim, LeasedEvent } from './claims.ts';
export type { OutboxOptions } from './conditions.ts';

export type Outbox = ReturnType<typeof createOutbox>;

/**
 * Every statement that takes events through `identity.outbox`. A state change is a named function with its precondition
 * in the WHERE; the states are described in table.ts. The database clock (`now()`) alone decides leases.
 */
export const createOutbox = (pool: Pool, options: OutboxOptions) => ({
  ...createClaims(pool, options),
  ...createFinalize(pool, options),
  ...createForgotten(pool, options),
  ...createLeases(pool, options),
  ...createParked(pool, options),
  ...createPublished(pool, options),

  /**
   * A transaction that rests on entries or jobs in Redis: its owner confirms the epoch before it returns. A comparison
   * of table and streams waits until all of these have ended.
   */
  inEpoch: <T>(
    work: (tx: Queryable) => Promise<T>,
    { deadlineMs = options.statementTimeoutMs, generic = false } = {},
  ): Promise<T> =>
    transaction(pool, deadlineMs, 'durable', work, {
      locks: [epochLock('ROW SHARE', deadlineMs), outboxLock(deadlineMs)],
      generic,
    }),

  /** Resolves when every transaction of `inEpoch` that has begun is committed, and can be seen, or undone. */
  async epochsEnded(): Promise<void> {
    const { statementTimeoutMs: waitMs } = options;
    await transaction(pool, waitMs, 'repeatable', async () => {}, {
      locks: [epochLock('EXCLUSIVE', waitMs)],
    });
  },

  /**
   * Which generation of the database this is, and its time to the microsecond; see Generation.look.
   * @throws when it does not answer, or is not the primary
   */
  look: (known?: string | null): Promise<Readonly<{ now: string; generation: string }>> =>
    (pool.generation ?? createGeneration()).look(pool, options.statementTimeoutMs, known),

  /** From now on transactions of any other generation fail. */
  accept: (generation: string): void => pool.generation?.accept(generation),

  transaction: <T>(durability: Durability, work: (tx: Queryable) => Promise<T>) =>
    transaction(pool, options.statementTimeoutMs, durability, work, GENERIC),
});
