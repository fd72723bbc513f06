import { expect } from 'vitest';
import { insertEvents, someEvents } from './events.ts';
import type { Stage } from './flow.ts';
import { startLoad } from './load.ts';
import { waitFor } from './wait.ts';

const FLOWING = 150;
const BURST = 400;

/** As many events flow before and after `disturb`, whatever it does; then every event is in its stream, once, in order. */
export async function underTraffic(
  stage: Omit<Stage, 'server'>,
  disturb: (flows: (events: number, what?: string) => Promise<void>) => Promise<void>,
): Promise<void> {
  const load = startLoad(stage.pool);
  const flows = async (events: number, what = 'the load to flow') => {
    const before = await stage.count('published');
    await waitFor(async () => (await stage.count('published')) > before + events, {
      what,
    });
  };
  await flows(FLOWING);
  // So that many are on their way when it begins.
  const burst = await insertEvents(stage.pool, someEvents(BURST, BURST / 5));
  await disturb(flows);
  await flows(FLOWING, 'the load to flow again');
  await load.stop();
  await stage.rested();
  const grade = await stage.expectPromisesHeld();
  expect(grade).toMatchObject({ deadLetters: 0, entries: load.written() + burst.length });
  // None of it was an event's fault.
  expect(await stage.count('attempts > 0')).toBe(0);
}
