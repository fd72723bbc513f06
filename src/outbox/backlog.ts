import type pg from 'pg';
import { asking, type Pool, type Queryable } from '../connections/database.ts';
import type { OutboxEvent } from '../event.ts';
import {
  DEAD,
  FINALIZED_AT,
  FIRST,
  FRESH,
  LIVE,
  OF_AGGREGATE,
  type OutboxOptions,
  PARKED,
} from './conditions.ts';
import { printable, printableType } from './event-of-row.ts';
import { lacks, missingFromTable } from './required.ts';
import { notifyQueueUsage } from './wakeup.ts';

/** Figures about the table, for operators: how much waits, for how long, for what, and the rates. Changes nothing. */

/** Live rows by state, and dead ones; each counted up to `limit`, and the ages are of the rows counted. */
export type Backlog = Readonly<{
  fresh: number;
  /** In their first attempt, or about to begin it. */
  leased: number;
  /** Failed before, and wait for the next attempt. */
  retrying: number;
  due: number;
  parked: number;
  dead: number;
  oldestSeconds: Readonly<{
    /**
     * Of the row that should be out already for the longest time: fresh, due, or in its first attempt. From its
     * `created_at`; of a retry that is due, from the time for which it was scheduled. Null when there is none.
     */
    waiting: number | null;
    /** Of rows that wait for their next attempt, from `created_at`. */
    retrying: number | null;
    /** Of rows behind an earlier one, from `created_at`. */
    parked: number | null;
    /** Since the first of the dead rows was given up. */
    dead: number | null;
  }>;
  limit: number;
}>;

type WaitingState = 'fresh' | 'due' | 'leased' | 'retrying' | 'parked';

/** The oldest row of one state. */
export type OldestRow = Pick<
  OutboxEvent,
  'id' | 'eventId' | 'eventType' | 'aggregateType' | 'aggregateId' | 'topic' | 'attempts'
> &
  Readonly<{
    state: WaitingState;
    /** Null when `created_at` is infinite. */
    ageSeconds: number | null;
    error: string | null;
    /** Until the lease ends or the next attempt comes; negative when that has passed. Null for fresh and parked rows. */
    nextInSeconds: number | null;
    /** Of a parked row: the first of its aggregate that it waits for. */
    behind: { eventId: string; isDead: boolean } | null;
  }>;

/** Events per second by the times of their rows, over the last one and the last five minutes. */
export type Rates = Readonly<{
  published: { lastMinute: number; lastFiveMinutes: number };
  dead: { lastMinute: number; lastFiveMinutes: number };
}>;

/** SQLSTATEs of an undefined table, column and schema. */
const UNDEFINED: ReadonlySet<unknown> = new Set(['42P01', '42703', '3F000']);

/** Rows counted for one answer, of each state: 100,000 take the database about 50 ms. */
const LIMIT = 100_000;

const ROWS = 'identity.outbox o';
const IS_FRESH = `NOT o.published AND ${FRESH('o')}`;
/** Leased or expired. A dead row has a finite time too, while its dead letter is lost. */
const IS_LEASED = `NOT o.published AND o.next_attempt_at < 'infinity' AND o.dead_lettered_at IS NULL`;
const IS_PARKED = `${LIVE('o')} AND ${PARKED('o')}`;
/** Any order would do. With this one the planner takes an index of the relay, not one of the platform. */
const BY_AGGREGATE = 'ORDER BY o.aggregate_type, o.aggregate_id, o.id';
const AT = FINALIZED_AT('o');

/** Seconds since the earliest of `time`; rows may have infinite times, which cannot be subtracted. */
const age = (time: string, condition = 'true') =>
  `extract(epoch FROM now() - min(${time}) FILTER (WHERE isfinite(${time}) AND ${condition}))::float8`;

/** A producer's clock may be ahead. */
const positive = (seconds: number | null) => (seconds === null ? null : Math.max(0, seconds));

export type BacklogReader = ReturnType<typeof createBacklog>;

export function createBacklog(
  pool: Pool,
  options: Pick<OutboxOptions, 'streamName' | 'deadLetterPolicy' | 'statementTimeoutMs'>,
) {
  const { streamName, statementTimeoutMs } = options;
  const db = asking(pool, statementTimeoutMs);
  const query = (async (text: string, values?: unknown[]) => {
    try {
      return await db.query(text, values);
    } catch (error) {
      // An operator who has not migrated yet is told so, and not which relation or column a statement missed.
      const missing = UNDEFINED.has((error as pg.DatabaseError).code) ? await missingFromTable(db) : [];
      throw missing.length > 0 ? new Error(lacks(missing)) : error;
    }
  }) as Queryable['query'];

  return {
    async count(): Promise<Backlog> {
      const { rows } = await query(
        `SELECT fresh.n AS fresh, in_progress.leased, in_progress.retrying, in_progress.due, parked.n AS parked, dead.n AS dead,
                  greatest(fresh.age, in_progress.age) AS "waitingAge", in_progress."retryingAge",
                  parked.age AS "parkedAge", dead.age AS "deadAge"
           FROM
             -- Counted without reading the rows themselves; the first by id is as good as the oldest.
             (SELECT (SELECT count(*)::int FROM (SELECT FROM ${ROWS} WHERE ${IS_FRESH} ORDER BY o.id LIMIT ${LIMIT}) x) AS n,
                     (SELECT ${age('created_at')}
                      FROM (SELECT o.created_at FROM ${ROWS} WHERE ${IS_FRESH} ORDER BY o.id LIMIT 1) x) AS age) fresh,
             (SELECT count(*) FILTER (WHERE NOT due AND NOT again)::int AS leased,
                     count(*) FILTER (WHERE NOT due AND again)::int AS retrying,
                     count(*) FILTER (WHERE due)::int AS due,
                     greatest(${age('created_at', 'NOT again')}, ${age('next_attempt_at', 'due AND again')}) AS age,
                     ${age('created_at', 'NOT due AND again')} AS "retryingAge"
              FROM (SELECT o.created_at, o.next_attempt_at, o.next_attempt_at <= now() AS due, o.attempts > 0 AS again
                    FROM ${ROWS} WHERE ${IS_LEASED} ORDER BY o.next_attempt_at LIMIT ${LIMIT}) x) in_progress,
             (SELECT count(*)::int AS n, ${age('created_at')} AS age
              FROM (SELECT o.created_at FROM ${ROWS} WHERE ${IS_PARKED} ${BY_AGGREGATE} LIMIT ${LIMIT}) x) parked,
             (SELECT count(*)::int AS n, ${age('dead_lettered_at')} AS age
              FROM (SELECT o.dead_lettered_at FROM ${ROWS} WHERE ${DEAD('o')} ${BY_AGGREGATE} LIMIT ${LIMIT}) x) dead`,
      );
      const { waitingAge, retryingAge, parkedAge, deadAge, ...counts } = rows[0];
      return {
        ...counts,
        oldestSeconds: {
          waiting: positive(waitingAge),
          retrying: positive(retryingAge),
          parked: positive(parkedAge),
          dead: positive(deadAge),
        },
        limit: LIMIT,
      };
    },

    /** The database's clock, Unix time in ms. */
    async time(): Promise<number> {
      const { rows } = await query<{ ms: number }>(
        'SELECT (extract(epoch FROM clock_timestamp()) * 1000)::float8 AS ms',
      );
      return (rows[0] as { ms: number }).ms;
    },

    notifyQueueUsage: () => notifyQueueUsage(db),

    /** The oldest row of each state that has any, the oldest of all first. */
    async oldest(): Promise<OldestRow[]> {
      const first = (dead: boolean) => `
          (SELECT e.id, e.event_id, ${dead} AS is_dead FROM identity.outbox e
           WHERE ${dead ? DEAD('e') : LIVE('e')}
             AND ${OF_AGGREGATE('e', 'o')} ${FIRST('e')})`;
      const { rows } = await query<OldestRow & { behindId: string | null; behindIsDead: boolean }>(
        `WITH in_progress AS MATERIALIZED (
             SELECT o.id, o.next_attempt_at <= now() AS due, o.attempts > 0 AS again
             FROM ${ROWS} WHERE ${IS_LEASED} ORDER BY o.next_attempt_at LIMIT ${LIMIT}
           ), oldest (state, id) AS (
             (SELECT 'fresh', o.id FROM ${ROWS} WHERE ${IS_FRESH} ORDER BY o.id LIMIT 1)
             UNION ALL SELECT 'due', min(id) FROM in_progress WHERE due
             UNION ALL SELECT 'leased', min(id) FROM in_progress WHERE NOT due AND NOT again
             UNION ALL SELECT 'retrying', min(id) FROM in_progress WHERE NOT due AND again
             UNION ALL SELECT 'parked', min(id) FROM (SELECT o.id FROM ${ROWS} WHERE ${IS_PARKED} ${BY_AGGREGATE} LIMIT ${LIMIT}) x
           )
           SELECT oldest.state, o.id::text AS id, o.event_id AS "eventId",
                  ${printable('left(o.event_type, 200)')} AS "eventType",
                  ${printableType('left(o.aggregate_type, 200)')} AS "aggregateType", o.aggregate_id AS "aggregateId",
                  ${printable('left(coalesce(o.topic, $1), 512)')} AS topic, o.attempts,
                  left(o.error_message, 2000) AS error,
                  CASE WHEN isfinite(o.created_at) THEN extract(epoch FROM now() - o.created_at)::float8 END AS "ageSeconds",
                  CASE WHEN isfinite(o.next_attempt_at)
                    THEN extract(epoch FROM o.next_attempt_at - now())::float8 END AS "nextInSeconds",
                  ahead.event_id AS "behindId", ahead.is_dead AS "behindIsDead"
           FROM oldest
           -- Each by its id: a join of both in the order of their ids would walk along all published rows.
           CROSS JOIN LATERAL (SELECT * FROM identity.outbox r WHERE r.id = oldest.id LIMIT 1) o
           LEFT JOIN LATERAL (
             SELECT * FROM (${first(false)} ${options.deadLetterPolicy === 'hold' ? `UNION ALL ${first(true)}` : ''}) e
             WHERE oldest.state = 'parked' AND e.id < o.id ORDER BY e.id LIMIT 1
           ) ahead ON true`,
        [streamName],
      );
      const found = rows.map(({ behindId, behindIsDead, ...row }) => ({
        ...row,
        behind: behindId === null ? null : { eventId: behindId, isDead: behindIsDead },
      }));
      return found.toSorted((a, b) => (BigInt(a.id) < BigInt(b.id) ? -1 : 1));
    },

    /** Of the latest rows at most `LIMIT`: where there were more, the rates are those of the time that these took. */
    async rates(): Promise<Rates> {
      const { rows } = await query<{
        dead: boolean;
        minute: number;
        five: number;
        all: number;
        since: number;
      }>(
        `SELECT dead, count(*) FILTER (WHERE ago <= 60)::int AS minute, count(*)::int AS five,
                  (sum(count(*)) OVER ())::int AS "all", (max(max(ago)) OVER ())::float8 AS since
           FROM (SELECT extract(epoch FROM now() - ${AT}) AS ago, o.dead_lettered_at IS NOT NULL AS dead
                 FROM ${ROWS} WHERE o.stream_entry_id IS NOT NULL AND ${AT} > now() - interval '5 minutes'
                 ORDER BY ${AT} DESC, o.id DESC LIMIT ${LIMIT}) x
           GROUP BY dead`,
      );
      const rate = (dead: boolean) => {
        const found = rows.find((row) => row.dead === dead);
        const seconds = found?.all === LIMIT ? Math.max(found.since, 1) : Number.POSITIVE_INFINITY;
        return {
          lastMinute: (found?.minute ?? 0) / Math.min(60, seconds),
          lastFiveMinutes: (found?.five ?? 0) / Math.min(300, seconds),
        };
      };
      return { published: rate(false), dead: rate(true) };
    },
  };
}
