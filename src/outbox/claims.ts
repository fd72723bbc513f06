import { GENERIC, type Pool, type Queryable, transaction } from '../connections/database.ts';
import { isNoAnswer } from '../connections/pool-health.ts';
import { CLAIM_LOCK, LockHeldError } from '../connections/table-lock.ts';
import type { Aggregate, OutboxEvent } from '../event.ts';
import { errorText } from '../telemetry/logger.ts';
import { byId, MS, type OutboxOptions } from './conditions.ts';
import { eventsOf, payloadMayBeAtFault, printDeadlineMs, WEIGHT_COLUMNS, weighed } from './event-of-row.ts';
import { orderOf } from './order.ts';

/** Fresh rows become leased, or parked behind an earlier one of their aggregate. */

/** A leased row: it needs its publish job. */
export type LeasedEvent = OutboxEvent &
  Readonly<{
    after: string | null;
    /** It failed, was replayed or published before: a job of an earlier time may still be there. */
    mayHaveJob: boolean;
  }>;

export type Claim = Readonly<{
  /** In order of id. */
  leased: LeasedEvent[];
  /** Aggregates of rows that were parked behind an earlier row. */
  parked: Aggregate[];
  /** Rows that changed. */
  rows: number;
  /** There may be more: this claim had as many rows as it may, or as many bytes. */
  more: boolean;
}>;

/**
 * A claim job lasts 2 s and a round. One that lasts longer hangs, or its pod is gone without a word: the database ends
 * its transaction, and another pod claims.
 */
const CLAIM_LOCK_LIMIT_MS = 8_000;

/** Rows that are remembered to have been printed in vain, at most. */
const UNANSWERED_KEPT = 1_000;

type Only =
  | { kind: 'batch' }
  | { kind: 'alone'; id: string }
  /** Printed without its numbers being read, for which a deeply nested payload may need too much stack. */
  | { kind: 'unasked'; id: string }
  | { kind: 'withheld'; id: string; reason: string };

export function createClaims(pool: Pool, options: OutboxOptions) {
  const { streamName, claimLeaseMs, statementTimeoutMs, maxEventBytes } = options;
  const order = orderOf(options);

  async function claim(tx: Queryable, limit: number, only: Only): Promise<Claim> {
    const { kind } = only;
    const isBatch = kind === 'batch';
    const ordered = `
      SELECT w.* FROM (SELECT aggregate_type, aggregate_id, array_agg(id ORDER BY id) AS taken FROM fresh GROUP BY 1, 2) a
      CROSS JOIN LATERAL (${order.leasable('a', 'a.taken', `, ${WEIGHT_COLUMNS('n')}`, isBatch)}) w`;
    const { rows } = await tx.query<
      LeasedEvent & { parked: boolean; seen: number; leasable: number; leasedRows: number }
    >({
      name: `relay-claim-${kind}-${options.ordering}-${options.deadLetterPolicy}-${order.window}-${maxEventBytes}`,
      text: `WITH fresh AS MATERIALIZED (
         SELECT o.id, o.aggregate_type, o.aggregate_id, NULL::uuid AS after, ${WEIGHT_COLUMNS('o')}
         FROM identity.outbox o
         WHERE NOT o.published AND o.next_attempt_at IS NULL ${isBatch ? '' : 'AND o.id = $4'}
         ORDER BY o.id LIMIT $2 FOR UPDATE SKIP LOCKED
       ), leasable AS MATERIALIZED (
         ${order.ordered ? ordered : 'SELECT * FROM fresh'}
       ), leased AS MATERIALIZED (
         ${isBatch ? weighed(`(SELECT * FROM leasable ORDER BY ${order.leasing} LIMIT $2)`, maxEventBytes) : 'SELECT id, after FROM leasable'}
       ), locked AS MATERIALIZED (
         -- A parked row that another transaction has locked stops no claim; what comes behind it waits at the gate.
         -- IS TRUE, or IN becomes a join of each with each: 80 µs more for each event of a batch of 400.
         SELECT id, after FROM leased WHERE (id IN (SELECT id FROM fresh)) IS TRUE
         UNION ALL SELECT l.id, l.after FROM leased l CROSS JOIN LATERAL (
           SELECT p.id FROM identity.outbox p WHERE p.id = l.id FOR UPDATE SKIP LOCKED
         ) p WHERE (l.id IN (SELECT id FROM fresh)) IS NOT TRUE
       ), claimed AS (
         UPDATE identity.outbox o
         SET next_attempt_at = CASE WHEN c.parked THEN 'infinity' ELSE now() + $3 ${MS} END, dead_lettered_at = NULL
         FROM (
           SELECT id, after, false AS parked FROM locked
           UNION ALL SELECT id, NULL, true FROM fresh WHERE id NOT IN (SELECT id FROM leasable)
         ) c
         WHERE o.id = c.id AND CASE WHEN o.published THEN false
           ELSE o.next_attempt_at IS NULL OR o.next_attempt_at = 'infinity' AND o.dead_lettered_at IS NULL END
         RETURNING c.parked, c.after, o.*
       ) ${eventsOf('claimed', maxEventBytes, {
         columns: `o.parked, o.after, (SELECT count(*) FROM fresh)::int AS seen,
           (SELECT count(*) FROM leasable)::int AS leasable, (SELECT count(*) FROM leased)::int AS "leasedRows",
           (o.attempts > 0 OR o.replayed_at IS NOT NULL OR o.published_at IS NOT NULL) AS "mayHaveJob",`,
         ...(kind === 'withheld'
           ? { printed: 'false', otherwise: '$5::text' }
           : { printed: 'NOT o.parked', unasked: kind === 'unasked' }),
       })}`,
      values: [
        ...[streamName, limit, claimLeaseMs],
        ...(isBatch ? [] : [only.id]),
        ...(kind === 'withheld' ? [only.reason] : []),
      ],
    });
    const leased: LeasedEvent[] = [];
    const parked = new Map<string, Aggregate>();
    for (const { parked: isParked, seen: _, leasable: __, leasedRows: ___, ...event } of rows) {
      if (isParked) parked.set(`${event.aggregateId} ${event.aggregateType}`, event);
      else leased.push(event);
    }
    const [first] = rows;
    return {
      leased: leased.sort(byId),
      parked: [...parked.values()],
      rows: rows.length,
      more: first !== undefined && (first.seen === limit || first.leasable > first.leasedRows),
    };
  }

  /** Rows whose claim alone got no answer, and how often. */
  const unanswered = new Map<string, number>();

  async function claimLocked(tx: Queryable, id: string): Promise<Claim> {
    const withhold = (reason: string) => claim(tx, 1, { kind: 'withheld', id, reason });
    // Twice, each time right after the lock was answered: a server or a network that hangs does not hang by the row.
    if ((unanswered.get(id) ?? 0) >= 2) return withhold('PostgreSQL does not print the payload in time');
    // The lock on the row is older than the savepoint and outlives the way back to it.
    await tx.query('SAVEPOINT alone');
    const backFrom = async (error: unknown): Promise<string> => {
      if (!payloadMayBeAtFault(error) || isNoAnswer(error)) throw error;
      await tx.query('ROLLBACK TO SAVEPOINT alone');
      return `PostgreSQL cannot print the payload: ${errorText(error)}`;
    };
    // Twice in a row: a server that hung, or was out of memory, for a moment must not cost an event.
    return claim(tx, 1, { kind: 'alone', id })
      .catch((error) => backFrom(error).then(() => claim(tx, 1, { kind: 'unasked', id })))
      .catch(async (error) => withhold(await backFrom(error)));
  }

  return {
    /**
     * Runs `work` while no other pod claims; `busy` when other pods have claimed for so long that a claim
     * is to be asked for again. The lock is that of a transaction which does nothing else: it ends with its connection, so a
     * pod that dies holds up nobody.
     * @throws {LockHeldError} when one session has kept it all the time
     */
    async withClaimLock<T>(work: () => Promise<T>): Promise<T | 'busy'> {
      // It holds this session while it claims by another.
      const ofTwo = pool.leaving?.(1) ?? pool;
      return transaction(ofTwo, statementTimeoutMs, 'repeatable', work, {
        idleMs: CLAIM_LOCK_LIMIT_MS,
        locks: [CLAIM_LOCK],
      }).catch((error) => {
        if (error instanceof LockHeldError && !error.isHeldThroughout) return 'busy';
        throw error;
      });
    },

    /**
     * Takes up to `limit` fresh rows by id, skipping those that another transaction has locked, and leases as many
     * rows at most: of each aggregate those that its window has room for, parked ones among them. It parks the
     * other rows that it took. The caller adds the jobs before the transaction commits.
     */
    claimFresh: (tx: Queryable, limit: number): Promise<Claim> => claim(tx, limit, { kind: 'batch' }),

    /**
     * Takes the first fresh row alone, after a claim failed by what may be a payload that PostgreSQL cannot print:
     * if it is this one's, the row is taken all the same, its payload withheld.
     */
    async claimFirst(tx: Queryable): Promise<Claim> {
      const { rows } = await tx.query<{ id: string }>(
        `SELECT id FROM identity.outbox WHERE NOT published AND next_attempt_at IS NULL
         ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED`,
      );
      const id = rows[0]?.id;
      if (id === undefined) return { leased: [], parked: [], rows: 0, more: false };
      try {
        const claimed = await claimLocked(tx, id);
        unanswered.delete(id);
        return claimed;
      } catch (error) {
        if (isNoAnswer(error)) {
          if (unanswered.size >= UNANSWERED_KEPT) unanswered.clear();
          unanswered.set(id, (unanswered.get(id) ?? 0) + 1);
        }
        throw error;
      }
    },

    /** Deadline of the statements of `claimFirst`. */
    printDeadlineMs: printDeadlineMs(maxEventBytes),
    claimOptions: GENERIC,
  };
}
