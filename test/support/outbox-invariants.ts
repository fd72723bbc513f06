/** What has to be true of the table, the jobs and the stream at any time, and at each append. */
import { expect } from 'vitest';
import type { Job, Known } from './jobs-model.ts';
import { type AdminPool, type Row, readRows } from './stages.ts';

export const name = (event: { id: string }) => `e${event.id}`;
export const names = (events: readonly { id: string }[]) => events.map(name).join(' ') || 'nothing';

export function createInvariants(
  admin: AdminPool,
  policy: 'continue' | 'hold',
  known: ReadonlyMap<string, Known>,
  jobs: () => readonly Job[],
) {
  async function assertInOrder(event: Known): Promise<void> {
    expect(event.entries, `${name(event)} is appended again`).toEqual([]);
    const before = (it: Known) => it.aggregateId === event.aggregateId && BigInt(it.id) < BigInt(event.id);
    const overtaken = [...known.values()].filter(
      (it) =>
        it.aggregateId === event.aggregateId &&
        it.replay === event.replay &&
        !before(it) &&
        it.entries.length > 0,
    );
    expect(names(overtaken), `appended before ${name(event)}, of the same aggregate`).toBe('nothing');
    if (policy === 'continue') return;
    const dead = (await readRows(admin)).filter(
      (row) => row.state === 'dead' && before(known.get(row.eventId) as Known),
    );
    expect(names(dead), `dead, and holding ${name(event)}, which is appended`).toBe('nothing');
  }

  /** To be called after each step. */
  async function assertInvariants(): Promise<void> {
    const now = await readRows(admin);
    const seen = new Map(now.map((row) => [row.eventId, row]));
    for (const row of now) {
      const event = known.get(row.eventId);
      expect(event?.committed, `${name(row)} is there without having been committed`).toBe(true);
      if (event) assertRow(row, event);
    }
    for (const event of known.values())
      if (event.committed) expect(seen.has(event.eventId), `${name(event)} is gone`).toBe(true);
    for (const [place, able] of ableToAppend(seen))
      expect(able.length, `jobs able to append in aggregate ${place}: ${names(able)}`).toBeLessThanOrEqual(1);
  }

  function assertRow(row: Row, event: Known): void {
    if (!event.skipped) expect(row.state, name(row)).not.toBe('contradictory');
    if (row.publishedAt !== null && !event.skipped)
      expect(event.entries, `${name(row)} is published without its entry`).toContain(row.streamEntryId);
    expect(row.attempts, `attempts of ${name(row)}`).toBeGreaterThanOrEqual(event.attempts);
    event.attempts = row.attempts;
    if (row.state === 'dead')
      expect(event.deadLetters, `${name(row)} is dead without a dead letter`).toBeGreaterThan(0);
  }

  /** Events of each aggregate that somebody may append next, those of different replays apart. */
  function ableToAppend(seen: ReadonlyMap<string, Row>): Map<string, Known[]> {
    const able = new Map<string, Known[]>();
    for (const job of jobs()) {
      const { eventId } = job.event;
      const row = seen.get(eventId);
      const settled = row === undefined || row.publishedAt !== null || row.state === 'dead';
      const event = known.get(eventId) as Known;
      if (settled || job.state === 'failed' || job.entryId) continue;
      const place = `${event.aggregateId}, replay ${event.replay}`;
      able.set(place, [...(able.get(place) ?? []), event]);
    }
    return able;
  }

  return { assertInOrder, assertInvariants };
}
