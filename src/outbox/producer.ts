import { drizzle } from 'drizzle-orm/node-postgres';
import type { PgDatabase, PgQueryResultHKT } from 'drizzle-orm/pg-core';
import type pg from 'pg';
import { outbox } from './table.ts';

/** A domain event as its producer knows it. */
export type NewEvent = {
  /** e.g. `UserCreated` */
  eventType: string;
  /** Default: `user`. */
  aggregateType?: string;
  /** uuid. Events of one aggregate are published in the order of their rows. */
  aggregateId: string;
  /** Anything that JSON can say. `tenant_id` and `correlation_id`, when present, go into the envelope. */
  payload: unknown;
  /** Key of the Redis stream. Default: `identity.user.v1`. */
  topic?: string;
  /** uuid; consumers deduplicate on it. Default: made by the database. */
  eventId?: string;
};

/** A node-postgres client inside BEGIN … COMMIT, or a drizzle transaction. */
// biome-ignore lint/suspicious/noExplicitAny: drizzle's schema parameters are invariant; ours are irrelevant here
export type Transaction = pg.ClientBase | PgDatabase<PgQueryResultHKT, any, any>;

/**
 * Writes an event into the outbox, within the caller's own transaction: it exists if and only if that commits.
 *
 * Order within an aggregate is the order of the rows' ids. Ids are given out at insert, so transactions on one
 * aggregate must not overlap (lock or update the aggregate's own row first, as most do anyway).
 *
 * @returns the row's id (the position in its aggregate's order) and its event id
 */
export async function appendEvent(
  tx: Transaction,
  event: NewEvent,
): Promise<{ id: bigint; eventId: string }> {
  const db = 'insert' in tx ? tx : drizzle(tx as pg.Client);
  const { eventType, aggregateType, aggregateId, payload, topic, eventId } = event;
  const [row] = await db
    .insert(outbox)
    .values({
      eventType,
      aggregateId,
      payload,
      ...(aggregateType !== undefined && { aggregateType }),
      ...(topic !== undefined && { topic }),
      ...(eventId !== undefined && { eventId }),
    })
    .returning({ id: outbox.id, eventId: outbox.eventId });
  if (!row) throw new Error('the insert into identity.outbox returned no row');
  return row;
}
