import { sql } from 'drizzle-orm';
import {
  bigserial,
  boolean,
  check,
  index,
  integer,
  jsonb,
  pgSchema,
  text,
  timestamp,
  uuid,
} from 'drizzle-orm/pg-core';

const identity = pgSchema('identity');
const instant = (name: string) => timestamp(name, { withTimezone: true });

/**
 * `identity.outbox`, as the backend's own migrations made it, plus five columns of the relay.
 *
 * | state     | condition                                                                        |
 * |-----------|----------------------------------------------------------------------------------|
 * | fresh     | not published, `next_attempt_at` null                                            |
 * | leased    | not published, `next_attempt_at` in the future: its job is in BullMQ             |
 * | expired   | not published, `next_attempt_at` has passed: the lease reaper asks what became of its job |
 * | parked    | neither published nor dead, `next_attempt_at` infinity: behind an earlier row of its aggregate, without a job |
 * | published | `published`, with `published_at` and `stream_entry_id`                           |
 * | dead      | not published, `dead_lettered_at` set, `next_attempt_at` infinity; the entry id is its dead letter's |
 * | discarded | `published` and `dead_lettered_at` set: an operator gave it up for good; it never was in its stream |
 *
 * The relay's indexes have unpublished rows only, so that published rows cost nothing. There are two exceptions.
 * `relay_outbox_with_entry` finds rows with an entry by their time, to compare them when Redis has lost data.
 * `relay_outbox_without_entry` finds published rows without an entry. Retention uses both to find old rows.
 */
export const outbox = identity.table(
  'outbox',
  {
    id: bigserial('id', { mode: 'bigint' }).primaryKey(),
    eventId: uuid('event_id').notNull().unique().defaultRandom(),
    eventType: text('event_type').notNull(),
    aggregateType: text('aggregate_type').notNull().default('user'),
    aggregateId: uuid('aggregate_id').notNull(),
    payload: jsonb('payload').notNull(),
    createdAt: instant('created_at').notNull().defaultNow(),
    published: boolean('published').notNull().default(false),
    /** Failed attempts so far. */
    attempts: integer('attempts').notNull().default(0),
    nextAttemptAt: instant('next_attempt_at'),
    publishedAt: instant('published_at'),
    errorMessage: text('error_message'),
    topic: text('topic').default('identity.user.v1'),
    deadLetteredAt: instant('dead_lettered_at'),
    /** The id that Redis answered to the append (of a dead row: to that of its dead letter). */
    streamEntryId: text('stream_entry_id'),
    /** When an operator last replayed it. */
    replayedAt: instant('replayed_at'),
    /** Of a discarded row: why, and by whom. */
    discardReason: text('discard_reason'),
    discardedBy: text('discarded_by'),
  },
  (row) => [
    index('relay_outbox_fresh').on(row.id).where(sql`not published and next_attempt_at is null`),
    index('relay_outbox_due')
      .on(row.nextAttemptAt)
      .where(sql`not published and next_attempt_at < 'infinity'::timestamptz`),
    index('relay_outbox_live')
      .on(row.aggregateType, row.aggregateId, row.id)
      .where(sql`not published and dead_lettered_at is null`),
    index('relay_outbox_parked')
      .on(row.aggregateType, row.aggregateId, row.id)
      .where(sql`not published and dead_lettered_at is null and next_attempt_at = 'infinity'::timestamptz`),
    index('relay_outbox_dead')
      .on(row.aggregateType, row.aggregateId, row.id)
      .where(sql`not published and dead_lettered_at is not null`),
    index('relay_outbox_dead_at')
      .on(row.deadLetteredAt, row.id)
      .where(sql`not published and dead_lettered_at is not null`),
    index('relay_outbox_with_entry')
      .on(sql`coalesce(dead_lettered_at, published_at)`, row.id)
      .where(sql`stream_entry_id is not null`),
    // Rows that another system published, and discarded rows. Rows that the relay publishes get their entry id in the same
    // statement and never enter this index, so it costs an event nothing.
    index('relay_outbox_without_entry')
      .on(sql`coalesce(published_at, created_at)`, row.id)
      .where(sql`published and stream_entry_id is null`),
  ],
);

/**
 * Has one row. Its token names the database as the owner of its queues in Redis (connections/ownership.ts), wherever the
 * database is restored or copied to. The token is no secret.
 */
export const relayOwner = identity.table(
  'relay_owner',
  {
    isOnly: boolean('is_only').primaryKey().default(true),
    token: uuid('token').notNull().defaultRandom(),
  },
  (row) => [check('relay_owner_is_only', sql`${row.isOnly}`)],
);

/** Tables without rows: pods lock them (connections/table-lock.ts). */
const lockTable = (name: string) => identity.table(name, { unused: boolean('unused') });
export const relayClaimLock = lockTable('relay_claim_lock');
export const relayEpochLock = lockTable('relay_epoch_lock');
export const relayPruneLock = lockTable('relay_prune_lock');
