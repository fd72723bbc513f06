import { expect, test } from 'vitest';
import { insertEvents, someEvents } from '../support/events.ts';
import { setStage } from '../support/flow.ts';
import { writeEvents } from '../support/load.ts';

const COUNT = 1_500;

for (const [count, aggregates] of [
  [COUNT, COUNT],
  [COUNT, 100],
  [COUNT, 10],
  [400, 1],
] as const) {
  test(`two pods publish events of ${aggregates} aggregates once and in order while they are written`, async () => {
    const stage = await setStage();
    await Promise.all([stage.pod(), stage.pod()]);
    await writeEvents(stage.pool, { count, aggregates });
    await stage.rested();
    const grade = await stage.expectPromisesHeld();
    expect(grade).toMatchObject({ events: count, entries: count, deadLetters: 0 });
  });
}

test('a backlog that was there before the pods is published once and in order', async () => {
  const stage = await setStage();
  await insertEvents(stage.pool, someEvents(COUNT, 30));
  await Promise.all([stage.pod(), stage.pod()]);
  await stage.rested();
  const grade = await stage.expectPromisesHeld();
  expect(grade).toMatchObject({ events: COUNT, entries: COUNT, deadLetters: 0 });
});

test('one aggregate goes on over two pods without a tick', async () => {
  const stage = await setStage({ env: { RELAY_POLL_INTERVAL: '3600' } });
  await insertEvents(stage.pool, someEvents(COUNT, 1));
  await Promise.all([stage.pod(), stage.pod()]);
  await stage.rested();
  const grade = await stage.expectPromisesHeld();
  expect(grade).toMatchObject({ events: COUNT, entries: COUNT, deadLetters: 0 });
});

test('without ordering every event is published once', async () => {
  const stage = await setStage({ env: { RELAY_ORDERING: 'none' } });
  await Promise.all([stage.pod(), stage.pod()]);
  await writeEvents(stage.pool, { count: COUNT, aggregates: 10 });
  await stage.rested();
  const published = (await stage.entries()).map((entry) => entry.fields.event_id);
  expect(published.length).toBe(COUNT);
  expect(new Set(published)).toEqual(new Set((await stage.rows()).map((row) => row.event_id)));
});

test('a row is marked with the id of its own entry in the stream', async () => {
  const stage = await setStage();
  await stage.pod();
  await insertEvents(stage.pool, someEvents(100, 10));
  await stage.rested();
  const entries = new Map((await stage.entries()).map((entry) => [entry.fields.event_id, entry.entryId]));
  for (const row of await stage.rows()) {
    expect(row).toMatchObject({ published: true, attempts: 0, next_attempt_at: null, error_message: null });
    expect(row.published_at).toBeInstanceOf(Date);
    expect(row.stream_entry_id).toBe(entries.get(row.event_id));
  }
});
