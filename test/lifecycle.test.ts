import { expect, onTestFinished, test, vi } from 'vitest';
import { createLifecycle } from '../src/lifecycle.ts';

test('a clock that is set back while the parts stop gives none of them more time', async () => {
  const given: number[] = [];
  const now = Date.now();
  const clock = vi.spyOn(Date, 'now').mockReturnValue(now);
  onTestFinished(() => clock.mockRestore());
  const lifecycle = createLifecycle([
    { name: 'stopped last', stop: (remainingMs) => void given.push(remainingMs) },
    {
      name: 'stopped first',
      stop(remainingMs) {
        given.push(remainingMs);
        clock.mockReturnValue(now - 3_600_000);
      },
    },
  ]);
  await lifecycle.start();
  await lifecycle.stop(10_000);
  expect(given).toHaveLength(2);
  for (const ms of given) expect(ms).toBeLessThanOrEqual(10_000);
});
