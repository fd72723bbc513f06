import { setTimeout as delay } from 'node:timers/promises';
import type { Queryable } from '../../src/connections/database.ts';
import type { SampleEvent } from '../demo/sample.ts';
import { insertEvents, someEvents } from './events.ts';

const WRITERS = 4;
const MAX_EVENTS_IN_TRANSACTION = 12;
/** Between two transactions of one writer under load: about 200 events a second from all of them. */
const PAUSE_MS = 100;
/** A load that grows faster than a starved relay publishes would never let it catch up: then its writers wait. */
const MOST_UNPUBLISHED = 3_000;

/**
 * Writes `count` events over `aggregates` aggregates from several connections at once, in transactions of different
 * sizes. Each aggregate has one writer: transactions on one aggregate do not overlap.
 */
export async function writeEvents(
  pool: Queryable,
  { count, aggregates = count }: { count: number; aggregates?: number },
): Promise<void> {
  const shares: SampleEvent[][] = Array.from({ length: WRITERS }, () => []);
  const owner = new Map<string, number>();
  for (const event of someEvents(count, aggregates)) {
    const writer = owner.get(event.aggregateId) ?? owner.size % WRITERS;
    owner.set(event.aggregateId, writer);
    shares[writer]?.push(event);
  }
  await Promise.all(
    shares.map(async (events) => {
      for (let size = 1; events.length > 0; size = (size % MAX_EVENTS_IN_TRANSACTION) + 1) {
        await insertEvents(pool, events.splice(0, size));
      }
    }),
  );
}

export type Load = Readonly<{
  /** Events whose insert was answered so far. */
  written(): number;
  /** Ends the load, and waits until the last insert was answered. */
  stop(): Promise<void>;
}>;

/**
 * Writes without end, about 200 events a second, through outages of the database too, and waits while very many are not
 * published.
 */
export function startLoad(pool: Queryable, { aggregates = 40 }: { aggregates?: number } = {}): Load {
  let stopped = false;
  let written = 0;
  const isAhead = async () => {
    const { rows } = await pool.query<{ n: number }>(
      `SELECT count(*)::int AS n FROM (
         SELECT FROM identity.outbox WHERE NOT published AND dead_lettered_at IS NULL LIMIT ${MOST_UNPUBLISHED}) AS row`,
    );
    return rows[0]?.n === MOST_UNPUBLISHED;
  };
  const running = Promise.all(
    Array.from({ length: WRITERS }, async () => {
      const users = someEvents(aggregates / WRITERS).map((event) => event.aggregateId);
      for (let turn = 0; !stopped; turn++) {
        const events = someEvents(1 + (turn % 9), 1, { aggregateId: users[turn % users.length] as string });
        while (!stopped && (await isAhead().catch(() => false))) await delay(PAUSE_MS);
        await insertEvents(pool, events).then(
          (ids) => {
            written += ids.length;
          },
          () => {},
        );
        await delay(PAUSE_MS);
      }
    }),
  );
  return {
    written: () => written,
    async stop() {
      stopped = true;
      await running;
    },
  };
}
