/** PostgreSQL gives ids out twice (TRUNCATE ... RESTART IDENTITY, a failover): an event is named by its event id. */
import { expect, test } from 'vitest';
import { insertEvents, someEvents } from '../support/events.ts';
import { DLQ, STREAM, setStage } from '../support/flow.ts';
import { waitFor } from '../support/wait.ts';

const BROKEN = 'identity.broken.v1';

test('jobs of a table that was truncated mark no row of the new one, whose events are all published', async () => {
  const stage = await setStage({
    env: {
      ...{ RELAY_RETRY_BASE_DELAY: '0.2', RELAY_MAX_RETRY_ATTEMPTS: '1', RELAY_POLL_INTERVAL: '1' },
      ...{ RELAY_CLAIM_LEASE: '3', RELAY_PUBLISH_TIMEOUT: '2' },
    },
  });
  await stage.redis.set(BROKEN, 'a string');
  await Promise.all([stage.pod(), stage.pod()]);
  const publish = stage.queue('publish');
  await publish.pause();
  // Of the old ones, some are appended, some fail, some wait behind these.
  const old = someEvents(60, 12).map((event, i) => (i % 12 === 3 ? { ...event, topic: BROKEN } : event));
  await insertEvents(stage.pool, old);
  await waitFor(async () => (await publish.getWaitingCount()) === 60, { what: 'the jobs of the old events' });
  await stage.pool.query('TRUNCATE identity.outbox RESTART IDENTITY');
  const events = someEvents(60, 12);
  expect(await insertEvents(stage.pool, events)).toEqual(Array.from({ length: 60 }, (_, i) => String(i + 1)));
  await publish.resume();

  await stage.rested();
  await waitFor(async () => (await publish.getJobCountByTypes('waiting', 'active', 'delayed')) === 0, {
    what: 'every job to end',
  });
  const entries = new Map(
    (await stage.entries(STREAM)).map(({ entryId, fields }) => [entryId, fields.event_id]),
  );
  const rows = await stage.rows();
  expect(rows.map((row) => row.event_id)).toEqual(events.map((event) => event.eventId));
  // Each row has its own event's entry, though an old one of the same id was appended, or failed.
  for (const { event_id, published, attempts, dead_lettered_at, stream_entry_id } of rows) {
    expect({ published, attempts, dead_lettered_at }).toEqual({
      ...{ published: true, attempts: 0, dead_lettered_at: null },
    });
    expect(entries.get(stream_entry_id ?? '')).toBe(event_id);
  }
  // Once each, in order; what was committed and taken back may be there or not.
  const isNew = new Set(rows.map((row) => row.event_id));
  const places = new Map(rows.map((row) => [row.event_id, Number(row.id)]));
  const seen = [...entries.values()].filter((eventId) => isNew.has(eventId ?? '')) as string[];
  expect(seen).toHaveLength(60);
  expect(new Set(seen).size).toBe(60);
  const aggregates = new Map(events.map(({ eventId, aggregateId }) => [eventId, aggregateId]));
  for (const aggregateId of new Set(aggregates.values())) {
    const order = seen
      .filter((eventId) => aggregates.get(eventId) === aggregateId)
      .map((it) => places.get(it));
    expect(order).toEqual(order.toSorted((a = 0, b = 0) => a - b));
  }
  for (const { fields } of await stage.entries(DLQ)) expect(isNew.has(fields.event_id ?? '')).toBe(false);
});
