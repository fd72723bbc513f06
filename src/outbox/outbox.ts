import { createClaims } from './claims.ts';
import type { OutboxOptions } from './conditions.ts';
import { type Durability, GENERIC, type Pool, type Queryable, transaction } from './database.ts';
import { createLeases } from './leases.ts';
import { createParked } from './parked.ts';
import { createSettlement } from './settlement.ts';

export type { Claim } from './claims.ts';
export type { Aggregate, OutboxOptions } from './conditions.ts';

export type Outbox = ReturnType<typeof createOutbox>;

/**
 * Every statement that takes events through `identity.outbox`. A state change is a named function with its precondition in the
 * WHERE; the states are described in table.ts. The database clock (`now()`) alone decides leases.
 */
export const createOutbox = (pool: Pool, options: OutboxOptions) => ({
  // biome-ignore lint/nursery/noMisusedPromises: it is no promise
  ...createClaims(pool, options),
  ...createSettlement(pool, options),
  ...createLeases(pool, options),
  // biome-ignore lint/nursery/noMisusedPromises: it is no promise
  ...createParked(pool, options),

  transaction: <T>(durability: Durability, work: (tx: Queryable) => Promise<T>) =>
    transaction(pool, options.statementTimeoutMs, durability, work, GENERIC),
});
