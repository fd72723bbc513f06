/** A consumer that reads a stream along, where it is trimmed before it could be read as a whole. */
import type { Redis } from 'ioredis';
import type pg from 'pg';

const PAGE_ROWS = 10_000;

export type Recorder = Readonly<{
  count(): number;
  stop(): void;
  /** @throws unless every row is published and has exactly one entry, in the order of its aggregate */
  audit(pool: pg.Pool, events: number): Promise<void>;
}>;

/** Begins with what is appended after now. */
export function createRecorder(redis: Redis, stream: string): Recorder {
  const reader = redis.duplicate();
  const placeOf = new Map<string, number>();
  let doubled: string | undefined;
  let on = true;
  const reading = read().finally(() => reader.disconnect());
  reading.catch(() => {});

  async function read(): Promise<void> {
    let after = (await redis.xrevrange(stream, '+', '-', 'COUNT', 1))[0]?.[0] ?? '0';
    while (on) {
      const reply = await reader.xread('COUNT', 5_000, 'BLOCK', 200, 'STREAMS', stream, after);
      for (const [entryId, fields] of reply?.[0]?.[1] ?? []) {
        const eventId = fields[fields.indexOf('event_id') + 1] as string;
        if (placeOf.has(eventId)) doubled ??= eventId;
        placeOf.set(eventId, placeOf.size);
        after = entryId;
      }
    }
  }

  return {
    count: () => placeOf.size,
    stop() {
      on = false;
    },
    async audit(pool, events) {
      const deadline = Date.now() + 30_000;
      while (placeOf.size < events && Date.now() < deadline)
        await new Promise((done) => setTimeout(done, 50));
      on = false;
      await reading;
      if (doubled !== undefined) throw new Error(`doubled: ${doubled}`);
      if (placeOf.size !== events) throw new Error(`${placeOf.size} entries instead of ${events}`);
      const latest = new Map<string, number>();
      for (let after = '0'; ; ) {
        const { rows } = await pool.query<{
          id: string;
          event_id: string;
          aggregate_id: string;
          published: boolean;
        }>(
          `SELECT id::text, event_id, aggregate_id, published FROM identity.outbox
            WHERE id > $1::bigint ORDER BY outbox.id LIMIT ${PAGE_ROWS}`,
          [after],
        );
        for (const row of rows) {
          const place = placeOf.get(row.event_id);
          if (place === undefined || !row.published) throw new Error(`lost: ${row.event_id}`);
          if ((latest.get(row.aggregate_id) ?? -1) > place) throw new Error(`out of order: ${row.event_id}`);
          latest.set(row.aggregate_id, place);
        }
        if (rows.length < PAGE_ROWS) return;
        after = rows.at(-1)?.id as string;
      }
    },
  };
}
