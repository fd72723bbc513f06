/** The states of a row (table.ts) as SQL conditions, and what else several statements share. */
import type { RelayConfig } from '../config/config.ts';

/** Makes an interval of a number of milliseconds. */
export const MS = `* interval '1 millisecond'`;
/**
 * Whether a row that is found by its id is live. Written so that the planner uses no partial index for it: with statistics
 * from before a backlog it takes such an index for empty, and reads all of it.
 */
export const STILL_LIVE = (row: string) =>
  `CASE WHEN ${row}.published THEN false ELSE ${row}.dead_lettered_at IS NULL END`;
export const LIVE = (row: string) => `NOT ${row}.published AND ${row}.dead_lettered_at IS NULL`;
export const DEAD = (row: string) => `NOT ${row}.published AND ${row}.dead_lettered_at IS NOT NULL`;
/** Of a live row. */
export const FRESH = (row: string) => `${row}.next_attempt_at IS NULL`;
/** Of a live row. */
export const PARKED = (row: string) => `${row}.next_attempt_at = 'infinity'`;
/** A live row whose event has failed waits for a retry, whatever its `next_attempt_at` says. */
export const WAITS_FOR_RETRY = (row: string) => `${row}.attempts > 0`;

/**
 * The row's entry id, or null where the column holds no entry id. A role that may write the column can put any text there,
 * and one such row must not fail a statement or a call of Redis for many rows. Redis makes ids of 13 digits by its clock;
 * cursor.ts accepts up to 18.
 */
export const ENTRY_ID = (row: string) =>
  `CASE WHEN octet_length(${row}.stream_entry_id) > 37 THEN NULL
        WHEN ${row}.stream_entry_id ~ '^[0-9]{1,18}-[0-9]{1,18}$' THEN ${row}.stream_entry_id END`;

/** The stream that a row names, or `otherwise`. A topic that is too long for a stream is cut. */
export const TOPIC = (row: string, otherwise: string) =>
  `CASE WHEN octet_length(${row}.topic) > 2048 THEN left(${row}.topic, 600) ELSE coalesce(${row}.topic, ${otherwise}) END`;

/** When a row was published or dead-lettered. The index relay_outbox_with_entry has this expression. */
export const FINALIZED_AT = (row: string) => `coalesce(${row}.dead_lettered_at, ${row}.published_at)`;

/** Failed attempts, limited: a producer that writes the column cannot make an event overflow, or be retried for ever. */
export const ATTEMPTS = (row: string) => `least(greatest(${row}.attempts, 0), 1000000)`;

/**
 * The rows of an aggregate in their order: the condition, and with BY_ID the order.
 *
 * The natural form, two equalities and ORDER BY id, has a risk: when the planner takes one aggregate for most of the table,
 * it walks the primary key instead, and reads every published row on its way (1,000 µs of PostgreSQL per event instead of
 * 60, seen in the benchmark). So `aggregate_id =` is written as a range of one value, and the order names the aggregate:
 * only the indexes by aggregate have that order. An upper bound of the id would not end the scan, and makes the planner
 * read a hot aggregate from its end (1,100 -> 520 events/s).
 */
export const OF_AGGREGATE = (row: string, aggregate: string) =>
  `${row}.aggregate_type = ${aggregate}.aggregate_type
   AND ${row}.aggregate_id >= ${aggregate}.aggregate_id AND ${row}.aggregate_id <= ${aggregate}.aggregate_id`;
export const BY_ID = (row: string) => `ORDER BY ${row}.aggregate_id, ${row}.id`;
export const FIRST = (row: string) => `${BY_ID(row)} LIMIT 1`;

/**
 * A row by the id that another row names, as a range of one value. A session keeps its plans. One made while the table had a few
 * rows joined by `=` from a scan of a whole index: each acknowledgement of 140 rows took 600 ms when the table had 10,000, for
 * up to a minute. A range leaves only the search row by row. The event id is compared so that no index is used for it.
 */
export const SAME_ID = (row: string, other: string) =>
  `${row}.id >= ${other}.id AND ${row}.id <= ${other}.id`;
export const SAME_EVENT = (row: string, other: string) =>
  `${SAME_ID(row, other)} AND (${row}.event_id = ${other}.event_id) IS TRUE`;

export type OutboxOptions = Pick<
  RelayConfig,
  'ordering' | 'deadLetterPolicy' | 'claimLeaseMs' | 'streamName' | 'maxEventBytes' | 'maxInFlight'
> &
  Readonly<{
    /** Deadline of one statement. */
    statementTimeoutMs: number;
  }>;
