/**
 * Runs before each test file. Files of the quick part share the modules of their worker and what these remember: nothing
 * of one file may reach the next.
 */
import { afterAll, vi } from 'vitest';
import { cleanUp } from './cleanup.ts';

// Registered before the file's own hooks: it runs after them.
afterAll(async () => {
  vi.useRealTimers();
  vi.restoreAllMocks();
  await cleanUp();
});

// The hooks of the file before did not run if its tests were all skipped, or one of its hooks failed.
await cleanUp();
