import { expect, test } from 'vitest';
import { gathered } from '../src/lifecycle.ts';
import { deferred } from './support/stages.ts';
import { waitFor } from './support/wait.ts';

test('wishes are gathered for one run; a wish during a run is for one more, which does not overlap', async () => {
  const runs: { promise: Promise<void>; resolve: () => void }[] = [];
  const { soon } = gathered(5, () => {
    const run = deferred();
    runs.push(run);
    return run.promise;
  });
  soon();
  soon();
  expect(runs).toHaveLength(0);
  await waitFor(() => runs.length === 1, { what: 'the first run' });
  soon();
  soon();
  await new Promise((resolve) => setTimeout(resolve, 20));
  expect(runs).toHaveLength(1);
  runs[0]?.resolve();
  await waitFor(() => runs.length === 2, { what: 'one more' });
  runs[1]?.resolve();
  await new Promise((resolve) => setTimeout(resolve, 20));
  expect(runs).toHaveLength(2);
});
