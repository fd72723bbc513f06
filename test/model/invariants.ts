/** What must be true of streams and rows, whatever happened. */
import { expect } from 'vitest';
import type { AdminPool, AdminRedis } from '../support/stages.ts';

/** An event, and what a walk did to it. */
export type Known = {
  readonly id: string;
  readonly eventId: string;
  readonly aggregate: number;
  readonly topic: string;
  /** An operator replayed it: events behind it may have gone before. */
  isReplayed: boolean;
  /** Every attempt ends for good before it asks Redis. */
  isDoomed: boolean;
  /** Redis lost its entry with the stream, which nobody has compared since. */
  isMissed: boolean;
};

export type RowState = 'live' | 'parked' | 'published' | 'dead' | 'discarded';
type Row = Readonly<{ eventId: string; state: RowState; entryId: string | null; isDue: boolean }>;

/** An entry that was trimmed on purpose. */
export type Trimmed = Readonly<{ stream: string; entryId: string; eventId: string }>;

export const nameOf = (event: Known) => `e${event.id}`;
const names = (events: readonly Known[]) => events.map(nameOf).join(' ') || 'nothing';

export function createInvariants(deps: {
  admin: AdminPool;
  redis: AdminRedis;
  dlqStreamName: string;
  holds: boolean;
  events: ReadonlyMap<string, Known>;
  /** Those that Redis has not forgotten since. */
  trimmed: () => readonly Trimmed[];
}) {
  const { admin, redis, dlqStreamName, holds, events } = deps;
  /** Ids of all entries ever. */
  const seen = new Set<string>();

  async function readRows(): Promise<Map<string, Row>> {
    const { rows } = await admin.query<Row>(`
      SELECT event_id AS "eventId", stream_entry_id AS "entryId",
             CASE WHEN published AND dead_lettered_at IS NOT NULL THEN 'discarded'
                  WHEN published THEN 'published' WHEN dead_lettered_at IS NOT NULL THEN 'dead'
                  WHEN next_attempt_at = 'infinity' THEN 'parked' ELSE 'live' END AS state,
             NOT published AND (next_attempt_at < 'infinity') IS NOT FALSE AS "isDue"
      FROM identity.outbox`);
    return new Map(rows.map((row) => [row.eventId, row]));
  }

  /** The entries of a stream, or none where its key holds something else: entry id and event id. */
  async function readEntries(stream: string): Promise<[string, string][]> {
    const entries = await redis.xrange(stream, '-', '+').catch(() => []);
    return entries.map(([entryId, [, eventId = '']]) => [entryId, eventId]);
  }

  async function readStreams(): Promise<{ event: Known; entry: string }[]> {
    const streams = [...new Set([...events.values()].map((it) => it.topic))];
    const found = await Promise.all(
      streams.map(async (stream) =>
        (await readEntries(stream)).map(([entryId, eventId]) => ({
          event: events.get(eventId) as Known,
          entry: `${stream} ${entryId}`,
        })),
      ),
    );
    return found.flat();
  }

  /** To be called after each step that may have appended. Answers what was. */
  async function assertAppendedInOrder(): Promise<Known[]> {
    const entries = await readStreams();
    const isNew = ({ entry }: { entry: string }) => !seen.has(entry);
    const appended = entries.filter(isNew);
    if (appended.length === 0) return [];
    const there = new Map(deps.trimmed().map((it) => [it.eventId, 'trimmed']));
    for (const { event, entry } of entries) if (seen.has(entry)) there.set(event.eventId, entry);
    const rows = await readRows();
    // Of one call of the script, which appends in the order of the ids.
    appended.sort(({ event: a }, { event: b }) => Number(a.id) - Number(b.id));
    for (const { event, entry } of appended) {
      const other = there.get(event.eventId);
      expect(other, `${nameOf(event)} is appended again, though its entry is there`).toBeUndefined();
      assertInOrder(event, new Set(there.keys()), rows);
      seen.add(entry);
      there.set(event.eventId, entry);
    }
    return appended.map(({ event }) => event);
  }

  function assertInOrder(event: Known, there: ReadonlySet<string>, rows: ReadonlyMap<string, Row>): void {
    const stateOf = (it: Known) => rows.get(it.eventId)?.state ?? 'live';
    const before = [...events.values()].filter(
      (it) => it.aggregate === event.aggregate && Number(it.id) < Number(event.id) && !there.has(it.eventId),
    );
    const overtaken = before.filter(
      (it) =>
        !it.isReplayed &&
        !(it.isMissed && it.topic !== event.topic) &&
        !['dead', 'discarded'].includes(stateOf(it)),
    );
    expect(names(overtaken), `not in the stream when ${nameOf(event)} of their aggregate is appended`).toBe(
      'nothing',
    );
    expect(stateOf(event), `${nameOf(event)} is appended`).not.toBe('discarded');
    if (!holds || stateOf(event) === 'dead') return;
    const dead = before.filter((it) => stateOf(it) === 'dead');
    expect(names(dead), `dead, and holding ${nameOf(event)}, which is appended`).toBe('nothing');
  }

  /** The rows that have not come to rest: live ones, but for those that a dead row holds, and dead ones without a letter. */
  async function restless(): Promise<Known[]> {
    const rows = await readRows();
    const dead = [...events.values()].filter((it) => rows.get(it.eventId)?.state === 'dead');
    return [...events.values()].filter((event) => {
      const { state, isDue } = rows.get(event.eventId) as Row;
      const isHeld =
        holds && dead.some((it) => it.aggregate === event.aggregate && Number(it.id) < Number(event.id));
      return isDue || (state === 'parked' && !isHeld);
    });
  }

  /** To be called at rest. */
  async function assertAllArrived(): Promise<void> {
    const rows = await readRows();
    const entries = await readStreams();
    const letters = new Set((await readEntries(dlqStreamName)).map(([, eventId]) => eventId));
    const trimmed = deps.trimmed();
    for (const event of events.values()) {
      const { state, entryId } = rows.get(event.eventId) as Row;
      const own = entries.filter((it) => it.event === event).map(({ entry }) => entry.split(' ')[1]);
      const gone = trimmed.filter((it) => it.eventId === event.eventId).map((it) => it.entryId);
      if (state === 'published')
        expect([...own, ...gone], `entries of ${nameOf(event)}, which is published`).toContain(entryId);
      else expect([...own, ...gone], `entries of ${nameOf(event)}, which is ${state}`).toEqual([]);
      if (state === 'dead')
        expect(letters, `dead letters, of which ${nameOf(event)} has one`).toContain(event.eventId);
    }
  }

  return { assertAppendedInOrder, restless, assertAllArrived };
}
