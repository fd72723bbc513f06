/** What tests of the outbox's statements share: an empty table, rows in any state, the statements by name. */
import { randomUUID } from 'node:crypto';
import type pg from 'pg';
import { beforeEach, expect } from 'vitest';
import type { Claim } from '../../src/outbox/claims.ts';
import type { DeadEvent, PublishedEvent, RowName } from '../../src/outbox/finalize.ts';
import { createOutbox, type Outbox, type OutboxOptions } from '../../src/outbox/outbox.ts';
import type { SampleEvent } from '../demo/sample.ts';
import { anEvent, insertEvents } from './events.ts';
import { createDatabase } from './servers.ts';
import { type AdminPool, openAdminPool, openPool, type Row, readRows, readStates } from './stages.ts';
import { waitFor } from './wait.ts';

export const OUTBOX_OPTIONS: OutboxOptions = {
  ordering: 'aggregate',
  deadLetterPolicy: 'continue',
  claimLeaseMs: 60_000,
  maxEventBytes: 1_048_576,
  maxInFlight: 5_000,
  streamName: 'default.stream',
  statementTimeoutMs: 10_000,
};

/** Assignments that give a live row its state. */
export const FRESH = 'next_attempt_at = NULL';
export const LEASED = `next_attempt_at = now() + interval '1 minute'`;
export const EXPIRED = `next_attempt_at = now() - interval '1 minute'`;
export const PARKED = `next_attempt_at = 'infinity'`;
export const RETRYING = `${LEASED}, attempts = 1`;
export const PUBLISHED = `published = true, published_at = now(), next_attempt_at = NULL, stream_entry_id = '1-1'`;
export const DEAD = `dead_lettered_at = now(), next_attempt_at = 'infinity', stream_entry_id = '2-2'`;
export const DISCARDED = `published = true, published_at = now(), next_attempt_at = NULL, dead_lettered_at = now()`;

export type OutboxTable = Awaited<ReturnType<typeof openOutboxTable>>;

/** A database of the test file's own; its table is empty when a test begins, and its ids begin at 1. */
export async function openOutboxTable() {
  const { url, adminUrl } = await createDatabase();
  const admin: AdminPool = openAdminPool(adminUrl);
  const relay: pg.Pool = openPool(url);
  const outboxOf = (options: Partial<OutboxOptions> = {}): Outbox =>
    createOutbox(relay, { ...OUTBOX_OPTIONS, ...options });
  const outbox = outboxOf();

  const empty = () => admin.query('TRUNCATE identity.outbox RESTART IDENTITY');
  beforeEach(async () => {
    await empty();
  });

  const insert = (...events: Partial<SampleEvent>[]) => insertEvents(admin, events.map(anEvent));
  const set = (id: number | string, assignments: string) =>
    admin.query(`UPDATE identity.outbox SET ${assignments} WHERE id = $1`, [id]);
  const rows = (): Promise<Row[]> => readRows(admin);
  const row = async (id: number | string) => (await rows()).find((it) => it.id === String(id)) as Row;
  const eventIds = async (...ids: number[]) => {
    const byId = new Map((await rows()).map((it) => [it.id, it.eventId]));
    return ids.map((id) => byId.get(String(id)) ?? randomUUID());
  };
  /** The rows' names; of a row that is not there, one that nobody has. */
  const names = async (...ids: number[]): Promise<RowName[]> =>
    (await eventIds(...ids)).map((eventId, i) => ({ id: String(ids[i]), eventId }));

  /** Resolves when a transaction waits for a lock. */
  const aTransactionWaits = () =>
    waitFor(
      async () =>
        (
          await admin.query(
            `SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`,
          )
        ).rowCount,
      { what: 'a transaction to wait for a lock' },
    );

  return {
    ...{ url, admin, relay, outbox, outboxOf, insert, set, rows, row, eventIds, names },
    empty,
    states: () => readStates(admin),
    /** Rows of one aggregate, one for each state, in this order. */
    async insertOf(aggregateId: string, ...assignments: string[]): Promise<void> {
      const ids = await insert(...assignments.map(() => ({ aggregateId })));
      for (const [i, id] of ids.entries()) await set(id, assignments[i] as string);
    },
    claim: (limit = 1_000, by = outbox): Promise<Claim> =>
      by.inEpoch((tx) => by.claimFresh(tx, limit), { generic: true }),
    /** Marks these rows published, each with an entry of its id. */
    async publish(...ids: number[]): Promise<void> {
      const published = (await names(...ids)).map(publishedAs);
      await outbox.inEpoch((tx) => outbox.markPublished(tx, published));
    },
    /** Marks the row dead. */
    async bury(id: number, overrides: Partial<DeadEvent> = {}): Promise<void> {
      const [name] = await names(id);
      await outbox.inEpoch((tx) => outbox.markDead(tx, deadAs(name as RowName, overrides)));
    },
    aTransactionWaits,
    /** Runs `work`, which waits for this row until `seen` has looked at what it has locked by then. */
    async whileLocked(id: number, work: () => Promise<unknown>, seen: () => Promise<void>): Promise<void> {
      const other = await admin.connect();
      await other.query('BEGIN');
      await other.query('SELECT FROM identity.outbox WHERE id = $1 FOR UPDATE', [id]);
      const working = work();
      try {
        await aTransactionWaits();
        await seen();
      } finally {
        await other.query('ROLLBACK');
        other.release();
      }
      await working;
    },
    async expectUnlocked(...ids: number[]): Promise<void> {
      const { rows: unlocked } = await admin.query<{ id: number }>(
        'SELECT id::int FROM identity.outbox WHERE id = ANY ($1) ORDER BY id FOR UPDATE SKIP LOCKED',
        [ids],
      );
      expect(unlocked.map((it) => it.id)).toEqual(ids);
    },
  };
}

export const entryIdOf = (id: number | string): string => `1700000000000-${id}`;
export const publishedAs = (name: RowName): PublishedEvent => ({ ...name, entryId: entryIdOf(name.id) });
export const deadAs = (name: RowName, overrides: Partial<DeadEvent> = {}): DeadEvent => ({
  ...publishedAs(name),
  ...{ attempts: 6, reason: 'no permission' },
  ...overrides,
});
export const idsOf = (events: readonly { id: string }[]): string[] => events.map((event) => event.id);
/** Once for each: a list of as many times. */
export const times = <T>(count: number, what: T): T[] => Array.from({ length: count }, () => what);
