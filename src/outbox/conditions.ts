import type { OutboxEvent } from '../event.ts';

/** What is asked of rows, in SQL: the states of table.ts as conditions. */

export const MS = `* interval '1 millisecond'`;
/**
 * Live, asked of a row that is looked up by its id. Put so that no partial index seems to answer it: by statistics
 * from before a backlog the planner takes such an index for empty and reads all of it.
 */
export const STILL_LIVE = (row: string) =>
  `CASE WHEN ${row}.published THEN false ELSE ${row}.dead_lettered_at IS NULL END`;
export const LIVE = (row: string) => `NOT ${row}.published AND ${row}.dead_lettered_at IS NULL`;
export const DEAD = (row: string) => `NOT ${row}.published AND ${row}.dead_lettered_at IS NOT NULL`;
export const FRESH = (row: string) => `${row}.next_attempt_at IS NULL`;
export const PARKED = (row: string) => `${row}.next_attempt_at = 'infinity'`;
/** A live row that has failed waits for a retry, whatever its time says. */
export const WAITS_FOR_RETRY = (row: string) => `${row}.attempts > 0`;

/**
 * The row's entry id, or null where what it has is none. A role that may write the column can put anything there, of any
 * length, and one such row must not fail a statement, a call of Redis or a comparison that names other rows as well.
 * Redis makes ids of 13 digits by its clock; 18 are what cursors take.
 */
export const ENTRY_ID = (row: string) =>
  `CASE WHEN octet_length(${row}.stream_entry_id) > 37 THEN NULL
        WHEN ${row}.stream_entry_id ~ '^[0-9]{1,18}-[0-9]{1,18}$' THEN ${row}.stream_entry_id END`;

/** The stream of a row, `otherwise` where it names none. Of a topic that is too long for a stream only the beginning. */
export const TOPIC = (row: string, otherwise: string) =>
  `CASE WHEN octet_length(${row}.topic) > 2048 THEN left(${row}.topic, 600) ELSE coalesce(${row}.topic, ${otherwise}) END`;

/** Failed attempts, within what the arithmetic of retries is meant for: no producer makes it overflow, or retry for ever. */
export const ATTEMPTS = (row: string) => `least(greatest(${row}.attempts, 0), 1000000)`;

/**
 * The rows of an aggregate in their order: condition and order.
 *
 * Not two equalities and an order by id: with those the planner may walk the primary key instead, when it takes one
 * aggregate for most of the table, and read every published row on its way (1,000 µs of PostgreSQL per event
 * instead of 60, seen in the benchmark). Equal is written as a range that begins and ends there: then the order
 * names the aggregate as well, and only the indexes by aggregate have it. An upper bound of the id would not end
 * the scan, and makes the planner read a hot aggregate from its end (1,100 -> 520 events/s).
 */
export const OF_AGGREGATE = (row: string, aggregate: string) =>
  `${row}.aggregate_type = ${aggregate}.aggregate_type
   AND ${row}.aggregate_id >= ${aggregate}.aggregate_id AND ${row}.aggregate_id <= ${aggregate}.aggregate_id`;
export const BY_ID = (row: string) => `ORDER BY ${row}.aggregate_id, ${row}.id`;
export const FIRST = (row: string) => `${BY_ID(row)} LIMIT 1`;

export const byId = (a: Pick<OutboxEvent, 'id'>, b: Pick<OutboxEvent, 'id'>): number =>
  a.id.length - b.id.length || (a.id < b.id ? -1 : 1);

export type OutboxOptions = Readonly<{
  ordering: 'aggregate' | 'none';
  /** Whether a dead row lets the rest of its aggregate go on. */
  deadLetterPolicy: 'continue' | 'hold';
  /** How long a leased row is left alone before the lease reaper asks what became of its job. */
  claimLeaseMs: number;
  /** Topic of rows that have none. */
  streamName: string;
  /** An event whose payload, types and topic are larger is withheld: it can only be dead-lettered. */
  maxEventBytes: number;
  /** Publish jobs in Redis at most; bounds the window of an aggregate. */
  maxInFlight: number;
  /** Deadline of one statement. */
  statementTimeoutMs: number;
}>;
