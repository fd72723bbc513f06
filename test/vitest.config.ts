import { fileURLToPath } from 'node:url';
import { defineConfig } from 'vitest/config';

export default defineConfig({
  root: fileURLToPath(new URL('..', import.meta.url)),
  test: {
    include: ['test/**/*.test.ts'],
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
});
