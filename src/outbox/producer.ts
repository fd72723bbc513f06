import { sql } from 'drizzle-orm';
import { drizzle } from 'drizzle-orm/node-postgres';
import {
  bigint,
  jsonb,
  type PgDatabase,
  type PgQueryResultHKT,
  pgSchema,
  text,
  uuid,
} from 'drizzle-orm/pg-core';
import type pg from 'pg';

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
  /**
   * For the column `headers`, which the table must have then; `traceparent` and `tracestate` of W3C Trace Context go
   * on into the stream entry. At most 8 kB.
   */
  headers?: Readonly<Record<string, string>>;
};

/** A node-postgres client inside BEGIN … COMMIT, or a drizzle transaction. */
// biome-ignore lint/suspicious/noExplicitAny: drizzle's schema parameters are invariant; ours are irrelevant here
export type Transaction = pg.ClientBase | PgDatabase<PgQueryResultHKT, any, any>;

/**
 * What a producer fills. drizzle names every column of a table in an INSERT, and PostgreSQL asks for the right to each
 * that is named: so no others, and `id` as one that drizzle leaves out.
 */
const columns = {
  id: bigint('id', { mode: 'bigint' }).notNull().generatedAlwaysAs(sql`nextval`),
  eventId: uuid('event_id').notNull().defaultRandom(),
  eventType: text('event_type').notNull(),
  aggregateType: text('aggregate_type').notNull().default('user'),
  aggregateId: uuid('aggregate_id').notNull(),
  payload: jsonb('payload').notNull(),
  topic: text('topic').default('identity.user.v1'),
};
const events = pgSchema('identity').table('outbox', columns);
/** The same with the column that a team may have added. It is not ours: no migration makes it. */
const eventsWithHeaders = pgSchema('identity').table('outbox', { ...columns, headers: jsonb('headers') });

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
  const { eventType, aggregateType, aggregateId, payload, topic, eventId, headers } = event;
  const values = {
    eventType,
    aggregateId,
    payload,
    ...(aggregateType !== undefined && { aggregateType }),
    ...(topic !== undefined && { topic }),
    ...(eventId !== undefined && { eventId }),
  };
  const [row] =
    headers === undefined
      ? await db.insert(events).values(values).returning({ id: events.id, eventId: events.eventId })
      : await db
          .insert(eventsWithHeaders)
          .values({ ...values, headers })
          .returning({ id: eventsWithHeaders.id, eventId: eventsWithHeaders.eventId });
  if (!row) throw new Error('the insert into identity.outbox returned no row');
  return row;
}
