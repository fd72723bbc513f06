import type { OutboxEvent } from '../event.ts';

/** What is asked of rows, in SQL: the states of table.ts as conditions, and the order within an aggregate. */

export type Aggregate = Readonly<{ aggregateType: string; aggregateId: string }>;

export const MS = `* interval '1 millisecond'`;
/**
 * Live, asked of a row that is looked up by its id. Put so that no partial index seems to answer it: by statistics
 * from before a backlog the planner takes such an index for empty and reads all of it.
 */
export const STILL_LIVE = (row: string) =>
  `CASE WHEN ${row}.published THEN false ELSE ${row}.dead_lettered_at IS NULL END`;
/** Nobody has it in hand: fresh, or parked. */
export const IS_FREE = (row: string) =>
  `(${row}.next_attempt_at IS NULL OR ${row}.next_attempt_at = 'infinity')`;
export const LIVE = (row: string) => `NOT ${row}.published AND ${row}.dead_lettered_at IS NULL`;

/**
 * The first row of an aggregate: condition and order.
 *
 * Not two equalities and an order by id: with those the planner may walk the primary key instead, when it takes one
 * aggregate for most of the table, and read every published row on its way (1,000 µs of PostgreSQL per event
 * instead of 60, seen in the benchmark). Equal is written as a range that begins and ends there: then the order
 * names the aggregate as well, and only the indexes by aggregate have it. An upper bound of the id would not end
 * the scan, so it is compared with what was found.
 */
export const OF_AGGREGATE = (a: string, b: string) =>
  `${a}.aggregate_type = ${b}.aggregate_type
   AND ${a}.aggregate_id >= ${b}.aggregate_id AND ${a}.aggregate_id <= ${b}.aggregate_id`;
export const FIRST = (a: string) => `ORDER BY ${a}.aggregate_id, ${a}.id LIMIT 1`;

/** Questions whose answer depends on how the relay is configured. */
export function orderOf({
  ordering,
  deadLetterPolicy,
}: Pick<OutboxOptions, 'ordering' | 'deadLetterPolicy'>) {
  const ordered = ordering === 'aggregate';
  const held = deadLetterPolicy === 'hold';
  /** Is there an earlier row of the aggregate that `row` has to wait for? Two index probes at most. */
  const behind = (row: string) => {
    if (!ordered) return 'false';
    return held ? `(${earlier(row, 'live')} OR ${earlier(row, 'dead')})` : earlier(row, 'live');
  };
  const earlier = (row: string, state: 'live' | 'dead') => `coalesce((SELECT e.id FROM identity.outbox e
      WHERE NOT e.published AND e.dead_lettered_at ${state === 'live' ? 'IS NULL' : 'IS NOT NULL'}
        AND ${OF_AGGREGATE('e', row)} ${FIRST('e')}) < ${row}.id, false)`;
  return { ordered, held, earlier, behind };
}

export const byId = (a: OutboxEvent, b: OutboxEvent): number => (BigInt(a.id) < BigInt(b.id) ? -1 : 1);

export type OutboxOptions = Readonly<{
  ordering: 'aggregate' | 'none';
  /** Whether a dead row lets the rest of its aggregate go on. */
  deadLetterPolicy: 'continue' | 'hold';
  /** How long a leased row is left alone before somebody asks what became of its job. */
  claimLeaseMs: number;
  /** Topic of rows that have none. */
  streamName: string;
  /** An event whose payload, types and topic are larger is withheld: it can only be dead-lettered. */
  maxEventBytes: number;
  /** Deadline of one statement. */
  statementTimeoutMs: number;
}>;
