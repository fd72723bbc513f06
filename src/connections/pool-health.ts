import type pg from 'pg';
import type { Pool } from './database.ts';

/**
 * When a network breaks without a word, every connection of a pool is dead and none says so. Each would cost its user
 * the whole time that an answer is waited for, ten in a row; so the first one that gets no answer puts all others
 * under suspicion: those not heard of since then are not handed out any more.
 */

/** node-postgres has no code for it. */
export const isNoAnswer = (error: unknown): error is Error =>
  error instanceof Error && error.message === 'Query read timeout';

/** A sign of life of a connection that others have used. */
const VERIFY_TIMEOUT_MS = 1_000;
/** More than any pool has. */
const MAX_TRIES = 1_000;

/**
 * `pool`, but a connection that is likely to be dead is thrown away instead of handed out. To tell, it must be given
 * back with the error that it failed with.
 *
 * @param queryTimeoutMs how long `query` waits for an answer
 */
export function distrustful(pool: Pool, queryTimeoutMs: number): Pool {
  const heardAt = new WeakMap<pg.PoolClient, number>();
  /** When a connection last got no answer. */
  let doubtedAt = Number.NEGATIVE_INFINITY;

  async function connect(): Promise<pg.PoolClient> {
    for (let i = 0; ; i++) {
      const client = await pool.connect();
      // In the case of a connection that breaks meanwhile; its user brings a listener of his own.
      client.on('error', nextStatementFails);
      const sound = (await isSound(client)) || i >= MAX_TRIES;
      if (sound) {
        watchRelease(client);
        client.off('error', nextStatementFails);
        return client;
      }
      discard(client);
    }
  }

  async function isSound(client: pg.PoolClient): Promise<boolean> {
    const heard = heardAt.get(client);
    if (heard !== undefined) return heard > doubtedAt;
    // New, or somebody else's so far.
    if (doubtedAt === Number.NEGATIVE_INFINITY) return true;
    try {
      await client.query({ text: 'SELECT 1', query_timeout: VERIFY_TIMEOUT_MS } as pg.QueryConfig);
      return true;
    } catch {
      return false;
    }
  }

  function watchRelease(client: pg.PoolClient): void {
    // Ours until then: the pool puts a new one there each time.
    const release = client.release;
    client.release = (error) => {
      if (isNoAnswer(error)) {
        doubtedAt = performance.now();
        discard(client, release);
        return;
      }
      if (!error) heardAt.set(client, performance.now());
      release.call(client, error);
    };
  }

  return {
    connect: connect as Pool['connect'],
    query: (async (statement: string | pg.QueryConfig, values?: unknown[]) => {
      const query =
        typeof statement === 'string' ? { text: statement, ...(values && { values }) } : statement;
      const client = await connect();
      client.on('error', nextStatementFails);
      try {
        const result = await client.query({ query_timeout: queryTimeoutMs, ...query } as pg.QueryConfig);
        client.release();
        client.off('error', nextStatementFails);
        return result;
      } catch (error) {
        client.release(error as Error);
        throw error;
      }
    }) as Pool['query'],
  };
}

/** Not by saying goodbye: a dead connection would wait for the answer to that, and its place in the pool with it. */
function discard(client: pg.PoolClient, release = client.release): void {
  (client as unknown as { connection?: { stream?: { destroy(): void } } }).connection?.stream?.destroy();
  release.call(client, true);
}

const nextStatementFails = (): void => {};
