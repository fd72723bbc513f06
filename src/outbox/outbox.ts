import { type Pool, type Queryable, transaction } from '../connections/database.ts';
import { createGeneration } from '../connections/generation.ts';
import { epochLock, outboxLock } from '../connections/table-lock.ts';
import type { DatabaseState } from '../event.ts';
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
   * A transaction that rests on entries or jobs in Redis. `work` confirms the epoch before it returns. A comparison of table
   * and streams first waits until all of these transactions have ended (`epochsEnded`).
   */
  inEpoch: <T>(
    work: (tx: Queryable) => Promise<T>,
    { deadlineMs = options.statementTimeoutMs, generic = false } = {},
  ): Promise<T> =>
    transaction(pool, deadlineMs, 'durable', work, {
      locks: [epochLock('ROW SHARE', deadlineMs), outboxLock(deadlineMs)],
      generic,
    }),

  /** Resolves when every transaction of `inEpoch` that has begun is committed or rolled back. */
  async epochsEnded(): Promise<void> {
    const { statementTimeoutMs: waitMs } = options;
    await transaction(pool, waitMs, 'repeatable', async () => {}, {
      locks: [epochLock('EXCLUSIVE', waitMs)],
    });
  },

  /**
   * What the database says of itself; see Generation.read.
   * @throws when it does not answer, or is not the primary
   */
  databaseState: (known?: string | null): Promise<DatabaseState> =>
    (pool.generation ?? createGeneration()).read(pool, options.statementTimeoutMs, known),
});
