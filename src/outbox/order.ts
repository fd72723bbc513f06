import {
  BY_ID,
  DEAD,
  FIRST,
  FRESH,
  LIVE,
  OF_AGGREGATE,
  type OutboxOptions,
  PARKED,
  WAITS_FOR_RETRY,
} from './conditions.ts';

/**
 * The order within an aggregate, in SQL. Claim, refill and gate share it: refill frees only rows that the claim would
 * lease, and the gate lets an event pass when no earlier row holds it back.
 */

/**
 * Window: rows of one aggregate that may have jobs at the same time, at most. It is enough for full speed (under load a
 * job takes about 80 ms from claim to acknowledgement). It is also at most a quarter of RELAY_MAX_IN_FLIGHT, so that one
 * aggregate leaves room for others.
 */
const WINDOW_MAX = 256;
/** Refill frees a row when this share of the window is free, so that one claim leases many rows. */
const FREE_SHARE = 0.25;

/**
 * A claim that cannot lease every leasable row leases the first 32 of each aggregate, then the next 32, and so on: a hot
 * aggregate with a full window does not slow down the others.
 */
const FAIR_STEP = 32;

export function orderOf(options: Pick<OutboxOptions, 'ordering' | 'deadLetterPolicy' | 'maxInFlight'>) {
  const ordered = options.ordering === 'aggregate';
  const holds = options.deadLetterPolicy === 'hold';
  const window = Math.max(1, Math.min(WINDOW_MAX, Math.floor(options.maxInFlight / 4)));
  /** The last place in the window at which refill frees a row. */
  const refillPlace = Math.max(1, Math.ceil(window * (1 - FREE_SHARE)));

  const firstDead = (aggregate: string) => `
    (SELECT d.id FROM identity.outbox d WHERE ${DEAD('d')} AND ${OF_AGGREGATE('d', aggregate)} ${FIRST('d')})`;

  /**
   * The live rows of `aggregate` in its window, in order, with these columns besides those of the row:
   * `after`, the `event_id` of the live row right before; `place`, from 1; `blocked`, whether one of those before it
   * `blocks`, or is dead where dead rows hold their aggregate.
   *
   * It reads one index range from its beginning. The row right before is found on the way: to look for it by
   * `(type, aggregate, id) < (...)` from the other end walks over dead index entries of other aggregates (805 ms for
   * 100 rows after 200,000 publishes under a snapshot that was held open).
   */
  const walk = (aggregate: string, blocks: (row: string) => string, columns = '') => `
    SELECT w.*, lag(w.event_id) OVER earlier AS after, row_number() OVER earlier AS place,
      coalesce(bool_or(${blocks('w')}) OVER (earlier ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), false)
      ${holds ? `OR coalesce(w.id > ${firstDead(aggregate)}, false)` : ''} AS blocked
    FROM (
      SELECT n.id, n.event_id, n.aggregate_id, n.attempts, n.next_attempt_at ${columns} FROM identity.outbox n
      WHERE ${LIVE('n')} AND ${OF_AGGREGATE('n', aggregate)} ${BY_ID('n')} LIMIT ${window}
    ) w WINDOW earlier AS (${BY_ID('w')})`;

  return {
    ordered,
    window,

    /** Order in which the claim leases what it may: by the place of each row in its window, then by id. */
    leasing: ordered ? `place / ${FAIR_STEP}, id` : 'id',

    /** What the claim may lease of `aggregate`, whose fresh rows in the array `taken` are its own. */
    leasable: (aggregate: string, taken: string, columns: string, withParked: boolean) => {
      const isTaken = (row: string) => `${row}.id = ANY (${taken})`;
      const blocks = (row: string) =>
        `(${WAITS_FOR_RETRY(row)} OR CASE WHEN ${FRESH(row)} THEN NOT ${isTaken(row)}
          ELSE ${withParked ? 'false' : PARKED(row)} END)`;
      return `
        SELECT * FROM (${walk(aggregate, blocks, columns)}) w
        WHERE NOT w.blocked AND CASE WHEN ${FRESH('w')} THEN ${isTaken('w')} ELSE ${withParked ? PARKED('w') : 'false'} END`;
    },

    /** The parked row of `aggregate` that is to be fresh, since the claim would lease it: one row or none. */
    refillable: (aggregate: string) => `
      SELECT w.id FROM (${walk(aggregate, (row) => `(${WAITS_FOR_RETRY(row)} OR ${FRESH(row)})`)}) w
      WHERE ${PARKED('w')} AND NOT w.blocked AND w.place <= ${refillPlace} ORDER BY w.place LIMIT 1`,

    /**
     * Of `aggregate`: `live`, the event ids of the live rows in its window, in order; the first of these rows, `first_id`;
     * `unclaimed_id`, the first that has no job; and `failed_id`, the first that waits for a retry, or is dead where dead
     * rows hold their aggregate. Each null where there is none.
     */
    heads: (aggregate: string) => `
      SELECT array_agg(w.event_id ${BY_ID('w')}) AS live,
        min(w.id) AS first_id, min(w.id) FILTER (WHERE ${FRESH('w')} OR ${PARKED('w')}) AS unclaimed_id,
        ${holds ? `least(${firstDead(aggregate)}, ` : ''}min(w.id) FILTER (WHERE ${WAITS_FOR_RETRY('w')})${holds ? ')' : ''}
          AS failed_id
      FROM (${walk(aggregate, () => 'false')}) w`,
  };
}
