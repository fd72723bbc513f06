import type pg from 'pg';

/**
 * Listens to `error` of a session, which one that breaks between two statements emits. Its next statement fails. Without a
 * listener the event would end the process.
 */
export const nextStatementFails = (): void => {};

/** Runs `work` on one session, outside of a transaction of ours. A session whose work failed leaves the pool. */
export async function withSession<T>(
  pool: Readonly<{ connect(): Promise<pg.PoolClient> }>,
  work: (client: pg.PoolClient) => Promise<T>,
): Promise<T> {
  const client = await pool.connect();
  client.on('error', nextStatementFails);
  try {
    const result = await work(client);
    client.release();
    client.off('error', nextStatementFails); // since the release the pool listens
    return result;
  } catch (error) {
    // It may emit one more error while it ends (57P01), so it keeps its listener.
    client.release(error as Error);
    throw error;
  }
}
