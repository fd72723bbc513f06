const tasks: (() => Promise<unknown>)[] = [];

/** Runs `task` when the test file has ended, after everything that was registered later. Callable from anywhere. */
export function atEndOfFile(task: () => Promise<unknown>): void {
  tasks.push(task);
}

/** Runs the tasks, the latest first, each of them whether or not others fail. */
export async function cleanUp(): Promise<void> {
  const errors: unknown[] = [];
  for (const task of tasks.splice(0).reverse()) await task().catch((error: unknown) => errors.push(error));
  if (errors.length > 0) throw new AggregateError(errors, 'Cleaning up after the test file failed');
}
