import { fileURLToPath } from 'node:url';
import { configDefaults, defineConfig } from 'vitest/config';

/**
 * What takes its time, `npm run test:slow`: outages that last, clusters, other programs, large tables, random walks. The
 * others, `npm test`, take less than five minutes on two cores.
 */
const SLOW = [
  'test/{chaos,model,package}/*.test.ts',
  'test/docs/{consumers,nestjs}.test.ts',
  'test/flow/!(configuration|costs|health|killing|metrics|order|payload|redis-loss|retries|status|stopping|wakeup).test.ts',
  'test/demo/main.test.ts',
  'test/outbox/held-snapshot.test.ts',
];

/** Without a mode: all. */
export default defineConfig(({ mode }) => ({
  root: fileURLToPath(new URL('..', import.meta.url)),
  test: {
    include: mode === 'slow' ? SLOW : ['test/**/*.test.ts'],
    exclude: [...configDefaults.exclude, ...(mode === 'quick' ? SLOW : [])],
    globalSetup: ['test/support/global-setup.ts'],
    pool: 'forks',
    // More than the two cores of a small CI machine: the tests mostly wait for servers.
    maxWorkers: 4,
    // Of the tests in one file that ask for it.
    maxConcurrency: 3,
    testTimeout: 30_000,
    hookTimeout: 60_000,
    // A machine that is shared may starve a pod for seconds; twice in a row is a finding.
    retry: process.env.CI ? 1 : 0,
  },
}));
