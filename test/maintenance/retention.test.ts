import { expect, onTestFinished, test, vi } from 'vitest';
import { withDeadline } from '../../src/lifecycle.ts';
import { createRetention } from '../../src/maintenance/retention.ts';
import { FIRST_PLACE } from '../../src/outbox/pruner.ts';

const HOUR_MS = 3_600_000;

/** A clock that can be set ahead, by an hour each time. */
function clockOf(owner: { now: () => number }) {
  let aheadMs = 0;
  const now = owner.now.bind(owner);
  const spy = vi.spyOn(owner, 'now').mockImplementation(() => now() + aheadMs);
  onTestFinished(() => spy.mockRestore());
  return {
    setAhead(): void {
      aheadMs += HOUR_MS;
    },
  };
}

/** By a timer, whatever the clocks say. */
const within20s = <T>(work: Promise<T>) => withDeadline(20_000, work);

/** Each step finds that there is more to delete; `during` is called in its middle. */
function startRetention(during: () => void) {
  const seen = { steps: 0, goesOn: true };
  const retention = createRetention({
    async step() {
      during();
      seen.steps++;
      return { deleted: 1, kept: [], next: FIRST_PLACE };
    },
    ago: async () => '2026-01-01',
    comparing: async () => false,
    onKept() {},
    resyncWindowMs: HOUR_MS,
  });
  const run = retention.run(HOUR_MS, () => seen.goesOn);
  return { seen, run };
}

test('a stop does not wait for the pause after a step that took long', async () => {
  const clocks = [clockOf(performance), clockOf(Date)];
  const { seen, run } = startRetention(() => {
    for (const { setAhead } of clocks) setAhead();
    seen.goesOn = false;
  });
  expect(await within20s(run)).toBe(1);
});

test('a clock that is set ahead during a step makes no pause of it', async () => {
  const { setAhead } = clockOf(Date);
  const { seen, run } = startRetention(() => {
    if (seen.steps === 0) setAhead();
    seen.goesOn = seen.steps < 3;
  });
  expect(await within20s(run)).toBe(4);
});
