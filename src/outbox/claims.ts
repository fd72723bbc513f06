import type { OutboxEvent } from '../event.ts';
import { errorText } from '../logger.ts';
import { type Aggregate, byId, MS, type OutboxOptions, orderOf } from './conditions.ts';
import { GENERIC, type Pool, type Queryable, transaction } from './database.ts';
import { isNoAnswer } from './distrust.ts';
import { eventsOf, payloadMayBeAtFault, printDeadlineMs, WEIGHT_COLUMNS, weighed } from './event-of-row.ts';

/** Fresh rows become leased, or parked behind an earlier one of their aggregate. */

export type Claim = Readonly<{
  /** Leased rows, in order of id: each needs its publish job. */
  leased: OutboxEvent[];
  /** Aggregates of rows that were parked behind an earlier row. */
  parked: Aggregate[];
  /** There may be more: this claim had as many rows as it may, or as many bytes. */
  more: boolean;
}>;

type AddJobs = (leased: OutboxEvent[]) => Promise<void>;

/** Spells "rlay", "clai". */
const CLAIMING = '1919705465, 1668047209';
/**
 * A turn lasts 2 s and a round. One that lasts longer hangs, or its pod is gone without a word: the database ends its
 * transaction, and somebody else claims.
 */
const CLAIM_TURN_LIMIT_MS = 8_000;

/** Waits before the tries to have the rows of a failed claim looked at. */
const LOOK_RETRY_DELAYS_MS = [0, 100, 400, 1_000, 2_000];

/** Rows that are remembered to have been printed in vain, at most. */
const UNANSWERED_KEPT = 1_000;

export function createClaims(pool: Pool, options: OutboxOptions) {
  const { streamName, claimLeaseMs, statementTimeoutMs, maxEventBytes } = options;
  const printMs = printDeadlineMs(maxEventBytes);
  const { behind } = orderOf(options);

  async function claim(
    tx: Queryable,
    limit: number,
    only: { kind: 'batch' | 'alone' | 'unasked' | 'withheld'; values: string[] } = {
      kind: 'batch',
      values: [],
    },
  ): Promise<Claim> {
    const { kind } = only;
    const { rows } = await tx.query<OutboxEvent & { parked: boolean; seen: number }>({
      name: `relay-claim-${kind}-${options.ordering}-${options.deadLetterPolicy}-${maxEventBytes}`,
      text: `WITH fresh AS MATERIALIZED (
         SELECT o.id, o.aggregate_type, o.aggregate_id, ${WEIGHT_COLUMNS('o')} FROM identity.outbox o
         WHERE NOT o.published AND o.next_attempt_at IS NULL ${kind === 'batch' ? '' : 'AND o.id = $4'}
         ORDER BY o.id LIMIT $2 FOR UPDATE SKIP LOCKED
       ), judged AS MATERIALIZED (
         SELECT fresh.*, ${behind('fresh')} AS parked FROM fresh
       ), taken AS MATERIALIZED (
         ${kind === 'batch' ? weighed('judged', maxEventBytes) : 'SELECT id, parked FROM judged'}
       ), claimed AS (
         UPDATE identity.outbox o
         SET next_attempt_at = CASE WHEN taken.parked THEN 'infinity' ELSE now() + $3 ${MS} END,
             dead_lettered_at = NULL
         FROM taken WHERE o.id = taken.id
         RETURNING taken.parked, o.*
       ) ${eventsOf('claimed', maxEventBytes, {
         columns: 'o.parked, (SELECT count(*) FROM fresh)::int AS seen,',
         ...(kind === 'withheld'
           ? { printed: 'false', otherwise: '$5::text' }
           : { printed: 'NOT o.parked', unasked: kind === 'unasked' }),
       })}`,
      values: [streamName, limit, claimLeaseMs, ...only.values],
    });
    const leased = rows
      .filter((row) => !row.parked)
      .map(({ parked: _, seen: __, ...event }): OutboxEvent => event);
    leased.sort(byId);
    const seen = rows[0]?.seen ?? 0;
    return {
      leased,
      parked: rows.filter((row) => row.parked),
      more: seen === limit || seen > rows.length,
    };
  }

  /** Rows whose claim alone got no answer, and how often. */
  const unanswered = new Map<string, number>();

  async function claimLocked(tx: Queryable, id: string): Promise<Claim> {
    const withhold = (reason: string) => claim(tx, 1, { kind: 'withheld', values: [id, reason] });
    // Twice, each time right after the lock was answered: a server or a network that hangs does not hang by the row.
    if ((unanswered.get(id) ?? 0) >= 2) return withhold('PostgreSQL does not print the payload in time');
    // The lock on the row is older than the savepoint and outlives the way back to it.
    await tx.query('SAVEPOINT alone');
    const backFrom = async (error: unknown): Promise<string> => {
      if (!payloadMayBeAtFault(error) || isNoAnswer(error)) throw error;
      await tx.query('ROLLBACK TO SAVEPOINT alone');
      return `PostgreSQL cannot print the payload: ${errorText(error)}`;
    };
    // Twice in a row: a server that hung, or was out of memory, for a moment must not cost an event. The second
    // time without the look at its numbers, for which a deeply nested payload may need too much stack.
    return claim(tx, 1, { kind: 'alone', values: [id] })
      .catch((error) => backFrom(error).then(() => claim(tx, 1, { kind: 'unasked', values: [id] })))
      .catch(async (error) => withhold(await backFrom(error)));
  }

  /**
   * Takes rows and adds their jobs, in one transaction. If it fails after that, their events may be in the stream all the
   * same, and a claim would not know: the rows become due instead of fresh, so that somebody looks.
   */
  async function claimAndAdd(
    deadlineMs: number,
    take: (tx: Queryable) => Promise<Claim>,
    add: AddJobs,
    options: Parameters<typeof transaction>[4] = {},
  ): Promise<Claim> {
    let withJobs: OutboxEvent[] = [];
    const work = async (tx: Queryable) => {
      const claimed = await take(tx);
      if (claimed.leased.length > 0) await add(claimed.leased);
      withJobs = claimed.leased;
      return claimed;
    };
    try {
      return await transaction(pool, deadlineMs, 'durable', work, options);
    } catch (error) {
      if (withJobs.length > 0) await haveLookedAt(withJobs.map((it) => it.id));
      throw error;
    }
  }

  /**
   * Fresh rows become due. Whatever made the claim fail may be over in a moment; this pod claims nothing meanwhile. If it
   * is not, they stay fresh.
   */
  async function haveLookedAt(ids: readonly string[]): Promise<void> {
    for (const delay of LOOK_RETRY_DELAYS_MS) {
      await new Promise((resolve) => setTimeout(resolve, delay));
      const isDone = await pool
        .query(
          `UPDATE identity.outbox SET next_attempt_at = now(), dead_lettered_at = NULL
           WHERE id = ANY ($1::bigint[]) AND NOT published AND next_attempt_at IS NULL`,
          [ids],
        )
        .then(
          () => true,
          () => false,
        );
      if (isDone) return;
    }
  }

  return {
    /**
     * Runs `turn` while no other pod is claiming, or says so. The turn is a lock in a transaction of its own that
     * does nothing else: it ends with its connection, so a pod that dies holds up nobody.
     */
    async inClaimTurn<T>(turn: () => Promise<T>): Promise<T | 'busy'> {
      const take = async (tx: Queryable): Promise<T | 'busy'> => {
        const { rows } = await tx.query(`SELECT pg_try_advisory_xact_lock(${CLAIMING}) AS mine`);
        return rows[0].mine ? turn() : 'busy';
      };
      return transaction(pool, statementTimeoutMs, 'repeatable', take, { idleMs: CLAIM_TURN_LIMIT_MS });
    },

    /**
     * Takes up to `limit` fresh rows by id, skipping those another pod has in hand: leases each that is
     * first in its aggregate, parks every other. The caller adds the jobs before the transaction commits.
     */
    claimFresh: (tx: Queryable, limit: number): Promise<Claim> => claim(tx, limit),

    /** The same in a transaction of its own, which adds the jobs. */
    claimBatch: (limit: number, add: AddJobs): Promise<Claim> =>
      claimAndAdd(statementTimeoutMs, (tx) => claim(tx, limit), add, GENERIC),

    /**
     * Takes the first fresh row alone, after a claim failed by what may be a payload that PostgreSQL cannot print:
     * if it is this one's, the row is taken all the same, its payload withheld.
     */
    async claimAlone(add: AddJobs): Promise<Claim> {
      let id: string | undefined;
      const takeFirst = async (tx: Queryable): Promise<Claim> => {
        const { rows } = await tx.query<{ id: string }>(
          `SELECT id FROM identity.outbox WHERE NOT published AND next_attempt_at IS NULL
           ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED`,
        );
        if (rows[0] === undefined) return { leased: [], parked: [], more: false };
        id = rows[0].id;
        return claimLocked(tx, id);
      };
      try {
        const claimed = await claimAndAdd(printMs, takeFirst, add);
        if (id !== undefined) unanswered.delete(id);
        return claimed;
      } catch (error) {
        if (id !== undefined && isNoAnswer(error)) {
          if (unanswered.size >= UNANSWERED_KEPT) unanswered.clear();
          unanswered.set(id, (unanswered.get(id) ?? 0) + 1);
        }
        throw error;
      }
    },
  };
}
