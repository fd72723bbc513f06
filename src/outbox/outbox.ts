import type { OutboxEvent, Receipt } from '../event.ts';
import { errorText } from '../logger.ts';
import { type Durability, type Pool, type Queryable, transaction } from './database.ts';
import { isNoAnswer } from './distrust.ts';
import { eventsOf, payloadMayBeAtFault, printDeadlineMs, WEIGHT_COLUMNS, weighed } from './event-of-row.ts';

/**
 * Every statement that takes events through `identity.outbox`. A state change is a named function with its precondition in the
 * WHERE; the states are described in table.ts. The database clock (`now()`) alone decides leases.
 */

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

export type Aggregate = Readonly<{ aggregateType: string; aggregateId: string }>;

export type Claim = Readonly<{
  /** Leased rows, in order of id: each needs its publish job. */
  leased: OutboxEvent[];
  /** Aggregates of rows that were parked behind an earlier row. */
  parked: Aggregate[];
  /** There may be more: this claim had as many rows as it may, or as many bytes. */
  more: boolean;
}>;

/** A due row: nothing was heard of its job until its lease ended. A replayed one has its dead letter's receipt yet. */
export type DueRow = Readonly<{ id: string; eventId: string; topic: string; entryId: string | null }>;

export type Outbox = ReturnType<typeof createOutbox>;

/** Spells "rlay", "clai". */
const CLAIMING = '1919705465, 1668047209';
/**
 * A turn lasts 2 s and a round. One that lasts longer hangs, or its pod is gone without a word: the database ends its
 * transaction, and somebody else claims.
 */
const CLAIM_TURN_LIMIT_MS = 8_000;

/** Rows that are remembered to have been printed in vain, at most. */
const UNANSWERED_KEPT = 1_000;

const MS = `* interval '1 millisecond'`;
/**
 * Live, asked of a row that is looked up by its id. Put so that no partial index seems to answer it: by statistics
 * from before a backlog the planner takes such an index for empty and reads all of it.
 */
const STILL_LIVE = (row: string) =>
  `CASE WHEN ${row}.published THEN false ELSE ${row}.dead_lettered_at IS NULL END`;
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

export function createOutbox(pool: Pool, options: OutboxOptions) {
  const { streamName, claimLeaseMs, statementTimeoutMs, maxEventBytes } = options;
  const printMs = printDeadlineMs(maxEventBytes);
  const ordered = options.ordering === 'aggregate';
  const held = options.deadLetterPolicy === 'hold';

  /** Is there an earlier row of the aggregate that `row` has to wait for? Two index probes at most. */
  const behind = (row: string) => {
    if (!ordered) return 'false';
    return held ? `(${earlier(row, 'live')} OR ${earlier(row, 'dead')})` : earlier(row, 'live');
  };
  const earlier = (row: string, state: 'live' | 'dead') => `coalesce((SELECT e.id FROM identity.outbox e
      WHERE NOT e.published AND e.dead_lettered_at ${state === 'live' ? 'IS NULL' : 'IS NOT NULL'}
        AND ${OF_AGGREGATE('e', row)} ${FIRST('e')}) < ${row}.id, false)`;

  /**
   * Its turn has come, or is over. A transaction that leases a successor adds its job before it commits; should it
   * fail, the job is there and runs all the same, and its row is as it was before. A lease says at once that it is not so.
   */
  const inTurn = (row: string) =>
    `(${row}.published OR ${row}.dead_lettered_at IS NOT NULL OR ${row}.next_attempt_at < 'infinity'
      OR NOT ${earlier(row, 'live')})`;

  /**
   * Leases the first live row of each aggregate in `leaving`, once those rows have left it. A row that
   * is leased already keeps its place: the aggregate flows on when that one is acknowledged.
   * Fails when the payload of one of them cannot be printed; then it is done without, and the claim finds out which.
   */
  const promote = `
    heads AS (
      SELECT head.id
      FROM (SELECT DISTINCT aggregate_type, aggregate_id FROM leaving) a
      CROSS JOIN LATERAL (
        SELECT n.id, n.aggregate_type, n.aggregate_id, n.next_attempt_at FROM identity.outbox n
        WHERE ${LIVE('n')} AND ${OF_AGGREGATE('n', 'a')} AND n.id <> ALL (ARRAY(SELECT id FROM leaving))
        ${FIRST('n')}
      ) head
      WHERE (head.next_attempt_at IS NULL OR head.next_attempt_at = 'infinity')
      ${held ? `AND NOT ${earlier('head', 'dead')}` : ''}
    ), promoted AS (
      UPDATE identity.outbox o SET next_attempt_at = now() + $3 ${MS}
      FROM heads WHERE o.id = heads.id
        AND ${STILL_LIVE('o')} AND (o.next_attempt_at IS NULL OR o.next_attempt_at = 'infinity')
      RETURNING o.*
    ) SELECT * FROM (SELECT count(*)::int AS "left" FROM leaving) leavers
      LEFT JOIN (${eventsOf('promoted', maxEventBytes)}) successors ON true`;

  /** What `promote` selects: how many rows have left, and their successors. */
  type Promoted = Partial<OutboxEvent> & { left: number };
  const successorsIn = (rows: readonly Promoted[]): OutboxEvent[] =>
    rows.flatMap(({ left: _, ...event }) => (event.id ? [event as OutboxEvent] : []));

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
    leased.sort((a, b) => (BigInt(a.id) < BigInt(b.id) ? -1 : 1));
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

  /** Gives their receipts to the rows whose turn has come; how many there were, and what was leased then. */
  async function publish(tx: Queryable, receipts: readonly Receipt[], promoting: boolean) {
    const ids = receipts.map((it) => it.id);
    const entryIds = receipts.map((it) => it.entryId);
    // The clock's time, not the transaction's: one that began early may have waited for the row before.
    const update = (idParam: string, entryParam: string) => `
      UPDATE identity.outbox o
      SET published = true, published_at = coalesce(CASE WHEN o.published THEN o.published_at END, clock_timestamp()),
          next_attempt_at = NULL, stream_entry_id = r.entry_id, dead_lettered_at = NULL
      FROM unnest(${idParam}::bigint[], ${entryParam}::text[]) AS r (id, entry_id)
      WHERE o.id = r.id ${ordered ? `AND ${inTurn('o')}` : ''}`;
    if (!ordered || !promoting) {
      const { rowCount } = await tx.query(update('$1', '$2'), [ids, entryIds]);
      return { left: rowCount ?? 0, successors: [] };
    }
    const { rows } = await tx.query<Promoted>({
      name: `relay-publish-${options.deadLetterPolicy}-${maxEventBytes}`,
      text: `WITH leaving AS (${update('$2', '$4')} RETURNING o.id, o.aggregate_type, o.aggregate_id), ${promote}`,
      values: [streamName, ids, claimLeaseMs, entryIds],
    });
    return { left: rows[0]?.left ?? ids.length, successors: successorsIn(rows) };
  }

  async function liveOf(tx: Queryable, receipts: readonly Receipt[], lock = ''): Promise<Receipt[]> {
    const { rows } = await tx.query<{ id: string }>(
      `SELECT o.id::text AS "id" FROM identity.outbox o WHERE o.id = ANY ($1::bigint[]) AND ${STILL_LIVE('o')} ${lock}`,
      [receipts.map((it) => it.id)],
    );
    const live = new Set(rows.map((row) => row.id));
    return receipts.filter((it) => live.has(it.id));
  }

  return {
    /** PostgreSQL would plan each claim anew, 900 µs, since its LIMIT is a parameter. */
    transaction: <T>(durability: Durability, work: (tx: Queryable) => Promise<T>) =>
      transaction(pool, statementTimeoutMs, durability, work, { generic: true }),

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

    /**
     * Takes the first fresh row alone, after a claim failed by what may be a payload that PostgreSQL cannot print:
     * if it is this one's, the row is taken all the same, its payload withheld. The caller adds its job meanwhile.
     */
    async claimAlone(add: (leased: OutboxEvent[]) => Promise<void>): Promise<Claim> {
      let id: string | undefined;
      try {
        return await transaction(pool, printMs, 'repeatable', async (tx) => {
          const { rows } = await tx.query<{ id: string }>(
            `SELECT id FROM identity.outbox WHERE NOT published AND next_attempt_at IS NULL
             ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED`,
          );
          if (rows[0] === undefined) return { leased: [], parked: [], more: false };
          id = rows[0].id;
          const claimed = await claimLocked(tx, id);
          if (claimed.leased.length > 0) await add(claimed.leased);
          unanswered.delete(id);
          return claimed;
        });
      } catch (error) {
        if (id !== undefined && isNoAnswer(error)) {
          if (unanswered.size >= UNANSWERED_KEPT) unanswered.clear();
          unanswered.set(id, (unanswered.get(id) ?? 0) + 1);
        }
        throw error;
      }
    },

    /**
     * Acknowledges appended events and leases the next row of each of their aggregates, whose jobs the
     * caller adds before the commit. A row that was already published gets its receipt renewed. One that was dead is
     * so no more: an operator had its job retried.
     *
     * In order, receipts are given in the order of the entries: should Redis lose some, those with receipts are
     * appended again first. So a row gets none yet while an earlier one of its aggregate has none: `onEarly` is told
     * its id.
     */
    async markPublished(
      tx: Queryable,
      receipts: readonly Receipt[],
      promoting = true,
      onEarly: (ids: readonly string[]) => void = () => {},
    ): Promise<OutboxEvent[]> {
      const first = await publish(tx, receipts, promoting);
      if (!ordered || first.left >= receipts.length) return first.successors;
      // Whoever leases one of them just now is waited for.
      const rest = await liveOf(tx, receipts, 'FOR UPDATE');
      if (rest.length === 0) return first.successors;
      const second = await publish(tx, rest, promoting);
      if (second.left < rest.length) onEarly((await liveOf(tx, rest)).map((it) => it.id));
      const marked = new Set(rest.map((it) => it.id));
      return [...first.successors.filter((it) => !marked.has(it.id)), ...second.successors];
    },

    /**
     * Marks a row dead and, unless dead rows hold their aggregate, leases its successor. Nothing happens
     * to a row that is published or dead already.
     */
    async markDead(
      tx: Queryable,
      dead: { id: string; attempts: number; reason: string; entryId: string },
      promoting = true,
    ): Promise<OutboxEvent[]> {
      const bury = (id: string, attempts: string, reason: string, entryId: string) => `
        UPDATE identity.outbox o
        SET dead_lettered_at = now(), next_attempt_at = 'infinity', attempts = ${attempts}, error_message = ${reason},
            stream_entry_id = ${entryId}
        WHERE o.id = ${id} AND ${STILL_LIVE('o')}`;
      if (!ordered || held || !promoting) {
        await tx.query(bury('$1', '$2', '$3', '$4'), [dead.id, dead.attempts, dead.reason, dead.entryId]);
        return [];
      }
      const { rows } = await tx.query<Promoted>(
        `WITH leaving AS (${bury('ANY ($2::bigint[])', '$4', '$5', '$6')} RETURNING o.id, o.aggregate_type, o.aggregate_id),
         ${promote}`,
        [streamName, [dead.id], claimLeaseMs, dead.attempts, dead.reason, dead.entryId],
      );
      return successorsIn(rows);
    },

    /** Mirrors a failed attempt on its row: how many there were, why, and when the next one comes. */
    async recordFailure(failure: {
      id: string;
      attempts: number;
      reason: string;
      retryInMs: number;
    }): Promise<void> {
      await pool.query(
        `UPDATE identity.outbox o
         SET attempts = $2, error_message = $3, next_attempt_at = now() + $4 ${MS}
         -- Not "and leased": an attempt may fail before the lease that started it is committed.
         WHERE o.id = $1 AND ${STILL_LIVE('o')} AND o.attempts < $2`,
        [failure.id, failure.attempts, failure.reason, failure.retryInMs],
      );
    },

    /** Rows whose lease has ended, the longest overdue first; locked until the transaction ends. */
    async lockDue(tx: Queryable, limit: number): Promise<DueRow[]> {
      const { rows } = await tx.query<DueRow>(
        `SELECT id::text AS "id", event_id AS "eventId", coalesce(topic, $1) AS "topic",
                stream_entry_id AS "entryId" FROM identity.outbox
         WHERE NOT published AND next_attempt_at < 'infinity' AND next_attempt_at <= now()
         ORDER BY next_attempt_at LIMIT $2 FOR UPDATE SKIP LOCKED`,
        [streamName, limit],
      );
      return rows;
    },

    /** The job of each of these rows is gone: the next claim takes them again, in their order. */
    async returnToFresh(tx: Queryable, ids: readonly string[]): Promise<void> {
      await tx.query(
        `UPDATE identity.outbox o SET next_attempt_at = NULL WHERE o.id = ANY ($1::bigint[]) AND ${STILL_LIVE('o')}`,
        [ids],
      );
    },

    /** The job of each of these rows is alive: look again after another lease. */
    async extendLease(tx: Queryable, ids: readonly string[]): Promise<void> {
      await tx.query(
        `UPDATE identity.outbox o SET next_attempt_at = now() + $2 ${MS}
         WHERE o.id = ANY ($1::bigint[]) AND ${STILL_LIVE('o')}`,
        [ids, claimLeaseMs],
      );
    },

    /** The job of this row is gone: its lease ends now, so that somebody looks. */
    async endLease(id: string): Promise<void> {
      await pool.query(
        `UPDATE identity.outbox o SET next_attempt_at = now()
         WHERE o.id = $1 AND ${STILL_LIVE('o')} AND o.next_attempt_at > now() AND o.next_attempt_at < 'infinity'`,
        [id],
      );
    },

    /** Of these events, those whose row waits for something yet: neither published, nor dead, nor gone. */
    async unsettled(eventIds: readonly string[]): Promise<string[]> {
      const { rows } = await pool.query<{ eventId: string }>(
        `SELECT o.event_id AS "eventId" FROM identity.outbox o WHERE o.event_id = ANY ($1::uuid[]) AND ${STILL_LIVE('o')}`,
        [eventIds],
      );
      return rows.map((row) => row.eventId);
    },

    /**
     * Redis may have lost jobs: every lease ends now, so that somebody looks. What waits for a retry goes on waiting:
     * its time comes. Returns how many leases ended.
     */
    async endLeases(): Promise<number> {
      const { rowCount } = await pool.query(
        `UPDATE identity.outbox SET next_attempt_at = now()
         WHERE NOT published AND next_attempt_at < 'infinity' AND next_attempt_at > now() AND attempts = 0`,
      );
      return rowCount ?? 0;
    },

    /**
     * Un-parks the first row of each given aggregate where nothing is left for it to wait for. Needed since
     * a row may be parked behind another at the very moment when that one is acknowledged, each transaction
     * blind to the other: whichever commits second finds it here. Returns how many rows became fresh.
     */
    async releaseOrphans(aggregates: readonly Aggregate[]): Promise<number> {
      return transaction(pool, statementTimeoutMs, 'repeatable', async (tx) => {
        const { rowCount } = await tx.query({
          name: `relay-release-${options.ordering}-${options.deadLetterPolicy}`,
          // Most aggregates have no parked row, which their own index says at once.
          text: `UPDATE identity.outbox o SET next_attempt_at = NULL
           FROM (
             SELECT parked.id
             FROM unnest($1::text[], $2::uuid[]) AS a (aggregate_type, aggregate_id)
             CROSS JOIN LATERAL (
               SELECT n.id, n.aggregate_type, n.aggregate_id FROM identity.outbox n
               WHERE ${LIVE('n')} AND n.next_attempt_at = 'infinity' AND ${OF_AGGREGATE('n', 'a')} ${FIRST('n')}
             ) parked
             WHERE NOT (${behind('parked')})
           ) orphan
           WHERE o.id = orphan.id AND ${STILL_LIVE('o')} AND o.next_attempt_at = 'infinity'`,
          values: [aggregates.map((it) => it.aggregateType), aggregates.map((it) => it.aggregateId)],
        });
        return rowCount ?? 0;
      });
    },

    /**
     * The next aggregates, by key, that have parked rows: steps from one to the next in the index, however
     * many rows each has parked.
     */
    async parkedAggregates(after: Aggregate | null, limit: number): Promise<Aggregate[]> {
      return transaction(pool, statementTimeoutMs, 'repeatable', async (tx) => {
        const next = (from: string) => `
          SELECT p.aggregate_type, p.aggregate_id FROM identity.outbox p
          WHERE ${LIVE('p')} AND p.next_attempt_at = 'infinity' AND (p.aggregate_type, p.aggregate_id) > ${from}
          ORDER BY p.aggregate_type, p.aggregate_id LIMIT 1`;
        const { rows } = await tx.query<Aggregate>(
          `WITH RECURSIVE walk AS (
             (${next('($1::text, $2::uuid)')})
             UNION ALL
             SELECT step.* FROM walk w CROSS JOIN LATERAL (${next('(w.aggregate_type, w.aggregate_id)')}) step
           )
           SELECT aggregate_type AS "aggregateType", aggregate_id AS "aggregateId" FROM walk LIMIT $3`,
          [after?.aggregateType ?? '', after?.aggregateId ?? '00000000-0000-0000-0000-000000000000', limit],
        );
        return rows;
      });
    },

    /** Without ordering nothing waits for anything: un-parks rows that an earlier configuration parked. */
    async unparkAll(limit: number): Promise<number> {
      const { rowCount } = await pool.query(
        `UPDATE identity.outbox o SET next_attempt_at = NULL
         FROM (SELECT p.id FROM identity.outbox p WHERE ${LIVE('p')} AND p.next_attempt_at = 'infinity'
               LIMIT $1 FOR UPDATE SKIP LOCKED) parked
         WHERE o.id = parked.id`,
        [limit],
      );
      return rowCount ?? 0;
    },
  };
}
