import { afterAll } from 'vitest';

const tasks: (() => Promise<unknown>)[] = [];

/** Runs `task` when the test file has ended, after everything that was registered later. Callable from anywhere. */
export function atEndOfFile(task: () => Promise<unknown>): void {
  tasks.push(task);
}

// Registered on import, so before the file's own hooks: it runs after them.
afterAll(async () => {
  const errors: unknown[] = [];
  for (const task of tasks.splice(0).reverse()) await task().catch((error: unknown) => errors.push(error));
  if (errors.length > 0) throw new AggregateError(errors, 'Cleaning up after the test file failed');
});
