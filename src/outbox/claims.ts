import { type Pool, type Queryable, transaction } from '../connections/database.ts';
import { isNoAnswer } from '../connections/pool-health.ts';
import { CLAIM_LOCK, LockHeldError } from '../connections/table-lock.ts';
import { type Aggregate, aggregateKey, byId, type OutboxEvent } from '../event.ts';
import { errorText } from '../telemetry/logger.ts';
import { ENTRY_ID, MS, type OutboxOptions, SAME_ID } from './conditions.ts';
import { eventsOf, payloadMayBeAtFault, printDeadlineMs, WEIGHT_COLUMNS, weighed } from './event-of-row.ts';
import { rowMayBeAtFault } from './finalize.ts';
import { orderOf } from './order.ts';

/** Fresh rows become leased, or parked behind an earlier one of their aggregate. */

/** A leased row: it needs its publish job. */
export type LeasedEvent = OutboxEvent &
  Readonly<{
    after: string | null;
    /** The event failed, was replayed or was published before: an earlier job of it may still be in Redis. */
    mayHaveJob: boolean;
    /** The entry, or dead letter, that its row names. */
    knownEntry: string | null;
  }>;

export type Claim = Readonly<{
  /** In order of id. */
  leased: LeasedEvent[];
  /** Aggregates of rows that were parked behind an earlier row. */
  parked: Aggregate[];
  /** Rows that changed. */
  rows: number;
  /** More rows may be fresh: this claim reached its limit of rows or bytes. */
  more: boolean;
}>;

/**
 * A claim job lasts 2 s and one more claim. When it lasts longer, it hangs, or its pod vanished without closing the
 * connection: the database ends its transaction, and another pod claims.
 */
const CLAIM_LOCK_LIMIT_MS = 8_000;

/** Entries of `unanswered`, and of `refused`, at most. */
const REMEMBERED_MAX = 1_000;
/** Interval at which some of the rows that the database refused to change are tried again, and how many. */
const REFUSED_MS = 60_000;
const TRIED_AGAIN = 16;

/** A constraint or a trigger refuses the change of this row, which is fresh. */
export class RowRefusedError extends Error {
  override readonly name = 'RowRefusedError';
  readonly eventId: string;
  override readonly cause: Error;
  constructor(eventId: string, cause: Error) {
    super(cause.message);
    this.eventId = eventId;
    this.cause = cause;
  }
}

type Only =
  | { kind: 'batch' }
  | { kind: 'alone'; id: string }
  /** Prints the payload without reading its numbers first, which may need too much stack in a deeply nested payload. */
  | { kind: 'unasked'; id: string }
  | { kind: 'withheld'; id: string; reason: string };

export function createClaims(pool: Pool, options: OutboxOptions) {
  const { streamName, claimLeaseMs, statementTimeoutMs, maxEventBytes } = options;
  const order = orderOf(options);
  /** Ids of rows that the database refused to change, since then. They stay fresh, and what is behind them waits. */
  const refused = new Set<string>();
  let refusedSince = 0;
  let isTryingAgain = false;

  async function claim(tx: Queryable, limit: number, only: Only): Promise<Claim> {
    const { kind } = only;
    const isBatch = kind === 'batch';
    const without = isBatch ? withoutRefused() : [];
    const ordered = `
      SELECT w.* FROM (SELECT aggregate_type, aggregate_id, array_agg(id ORDER BY id) AS taken FROM fresh GROUP BY 1, 2) a
      CROSS JOIN LATERAL (${order.leasable('a', 'a.taken', `, ${WEIGHT_COLUMNS('n')}`, isBatch)}) w`;
    const { rows } = await tx.query<
      LeasedEvent & { parked: boolean; seen: number; leasable: number; leasedRows: number }
    >({
      name: `relay-claim-${kind}${without.length > 0 ? '-without' : ''}-${options.ordering}-${options.deadLetterPolicy}-${order.window}-${maxEventBytes}`,
      text: `WITH fresh AS MATERIALIZED (
         SELECT o.id, o.aggregate_type, o.aggregate_id, NULL::uuid AS after, ${WEIGHT_COLUMNS('o')}
         FROM identity.outbox o
         WHERE NOT o.published AND o.next_attempt_at IS NULL ${isBatch ? '' : 'AND o.id = $4'}
           ${without.length > 0 ? 'AND o.id <> ALL ($4::bigint[])' : ''}
         ORDER BY o.id LIMIT $2 FOR UPDATE SKIP LOCKED
       ), leasable AS MATERIALIZED (
         ${order.ordered ? ordered : 'SELECT * FROM fresh'}
       ), leased AS MATERIALIZED (
         ${isBatch ? weighed(`(SELECT * FROM leasable ORDER BY ${order.leasing} LIMIT $2)`, maxEventBytes) : 'SELECT id, after FROM leasable'}
       ), locked AS MATERIALIZED (
         -- A parked row that another transaction has locked stops no claim; what comes behind it waits at the gate.
         -- IS TRUE, or IN becomes a join of each with each: 80 microseconds more for each event of a batch of 400.
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
         WHERE ${SAME_ID('o', 'c')} AND CASE WHEN o.published THEN false
           ELSE o.next_attempt_at IS NULL OR o.next_attempt_at = 'infinity' AND o.dead_lettered_at IS NULL END
         RETURNING c.parked AS relay_parked, c.after AS relay_after, o.*
       ) ${eventsOf('claimed', maxEventBytes, {
         columns: `o.relay_parked AS parked, o.relay_after AS after, (SELECT count(*) FROM fresh)::int AS seen,
           (SELECT count(*) FROM leasable)::int AS leasable, (SELECT count(*) FROM leased)::int AS "leasedRows",
           (o.attempts > 0 OR o.replayed_at IS NOT NULL OR o.published_at IS NOT NULL) AS "mayHaveJob",
           ${ENTRY_ID('o')} AS "knownEntry",`,
         ...(kind === 'withheld'
           ? { printed: 'false', otherwise: '$5::text' }
           : { printed: 'NOT o.relay_parked', unasked: kind === 'unasked' }),
       })}`,
      values: [
        ...[streamName, limit, claimLeaseMs],
        ...(isBatch ? [] : [only.id]),
        ...(without.length > 0 ? [without] : []),
        ...(kind === 'withheld' ? [only.reason] : []),
      ],
    });
    // The database refuses them no longer.
    if (isBatch && isTryingAgain) refused.clear();
    isTryingAgain = false;
    const leased: LeasedEvent[] = [];
    const parked = new Map<string, Aggregate>();
    for (const { parked: isParked, seen: _, leasable: __, leasedRows: ___, ...event } of rows) {
      if (isParked) parked.set(aggregateKey(event), event);
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

  function withoutRefused(): string[] {
    if (refused.size > 0 && performance.now() - refusedSince > REFUSED_MS) {
      for (const id of [...refused].slice(0, TRIED_AGAIN)) refused.delete(id);
      refusedSince = performance.now();
      isTryingAgain = true;
    }
    return [...refused];
  }

  /** How often the claim of a single row got no answer, by its id. */
  const unanswered = new Map<string, number>();

  async function claimLocked(tx: Queryable, id: string): Promise<Claim> {
    const withhold = (reason: string) => claim(tx, 1, { kind: 'withheld', id, reason });
    // Twice the server locked this row and then did not answer. A server or a network that hangs does not choose the row.
    if ((unanswered.get(id) ?? 0) >= 2) return withhold('PostgreSQL does not print the payload in time');
    // The row was locked before the savepoint, so a rollback to it keeps the lock.
    await tx.query('SAVEPOINT alone');
    const backFrom = async (error: unknown): Promise<string> => {
      if (!payloadMayBeAtFault(error) || isNoAnswer(error)) throw error;
      await tx.query('ROLLBACK TO SAVEPOINT alone');
      return `PostgreSQL cannot print the payload: ${errorText(error)}`;
    };
    // Two tries: the first may fail because the server is out of memory for a moment.
    return claim(tx, 1, { kind: 'alone', id })
      .catch((error) => backFrom(error).then(() => claim(tx, 1, { kind: 'unasked', id })))
      .catch(async (error) => withhold(await backFrom(error)));
  }

  return {
    /**
     * Runs `work` while no other pod claims. Answers `busy` when other pods held the lock one after the other for as long
     * as this one waited. A transaction that does nothing else holds the lock: when a pod dies, its connection ends, and
     * the lock with it.
     * @throws {LockHeldError} when one session held the lock all the time
     */
    async withClaimLock<T>(work: () => Promise<T>): Promise<T | 'busy'> {
      // The pod needs two sessions: this one holds the lock while `work` claims on the other.
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
     * Takes up to `limit` fresh rows by id, but none that another transaction has locked. Of each of their aggregates it
     * leases the rows that the window has room for, parked rows among them, `limit` rows at most in all. It parks the
     * fresh rows that are behind a retry or beyond the window. The caller adds the jobs before the transaction commits.
     */
    claimFresh: (tx: Queryable, limit: number): Promise<Claim> => claim(tx, limit, { kind: 'batch' }),

    /**
     * Takes the first fresh row alone. The claim calls this after a batch failed, maybe because PostgreSQL cannot print one
     * of its payloads. If it is this row's payload, the event is taken without it.
     * @throws {RowRefusedError} when a constraint or a trigger refuses the change of this row. It is left out of the next
     * claims, and tried again after a minute or some
     */
    async claimFirst(tx: Queryable): Promise<Claim> {
      const { rows } = await tx.query<{ id: string; eventId: string }>(
        `SELECT id::text AS "id", event_id AS "eventId" FROM identity.outbox WHERE NOT published AND next_attempt_at IS NULL
           AND id <> ALL ($1::bigint[]) ORDER BY outbox.id LIMIT 1 FOR UPDATE SKIP LOCKED`,
        [withoutRefused()],
      );
      const [first] = rows;
      if (first === undefined) return { leased: [], parked: [], rows: 0, more: false };
      const { id, eventId } = first;
      try {
        const claimed = await claimLocked(tx, id);
        // Runs what waits for the commit: a constraint that is deferred would not tell which row it refuses.
        await tx.query('SET CONSTRAINTS ALL IMMEDIATE');
        unanswered.delete(id);
        return claimed;
      } catch (error) {
        if (isNoAnswer(error)) {
          if (unanswered.size >= REMEMBERED_MAX) unanswered.clear();
          unanswered.set(id, (unanswered.get(id) ?? 0) + 1);
        }
        if (!rowMayBeAtFault(error)) throw error;
        if (refused.size === 0) refusedSince = performance.now();
        if (refused.size < REMEMBERED_MAX) refused.add(id);
        isTryingAgain = false;
        throw new RowRefusedError(eventId, error as Error);
      }
    },

    /** Deadline of the statements of `claimFirst`. */
    printDeadlineMs: printDeadlineMs(maxEventBytes),
  };
}
