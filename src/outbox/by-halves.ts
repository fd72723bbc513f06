import { rowMayBeAtFault } from './finalize.ts';

/**
 * Runs `work` on all items together. Where a constraint or trigger refuses to have a row changed, it runs on each half, until
 * the rows at fault are found.
 *
 * @param refused told of each item that is left out
 * @param refusalsMax after so many in a row the database refuses all: then the rest of that part is left out untried
 */
export async function byHalves<T>(
  items: readonly T[],
  work: (some: readonly T[]) => Promise<void>,
  refused: (item: T, error: Error) => void,
  refusalsMax = Number.POSITIVE_INFINITY,
): Promise<void> {
  let inARow = 0;
  async function part(some: readonly T[]): Promise<void> {
    try {
      await work(some);
      inARow = 0;
    } catch (error) {
      if (!rowMayBeAtFault(error)) throw error;
      if (some.length === 1 || inARow >= refusalsMax) {
        inARow++;
        for (const item of some) refused(item, error as Error);
        return;
      }
      const half = Math.ceil(some.length / 2);
      await part(some.slice(0, half));
      await part(some.slice(half));
    }
  }
  await part(items);
}
