/** From the commit of an event to its entry in the stream, as a consumer sees it. */
import { randomUUID } from 'node:crypto';
import type { Relay } from './contenders/relay.ts';
import { pause } from './servers.ts';

export type Latencies = Readonly<{
  events: number;
  /** Milliseconds. */
  p50: number;
  p95: number;
  p99: number;
  max: number;
  /** Events that had no entry yet when the last was written. */
  behind: number;
  /** Events that were written in a second: less than was asked for if the producer could not keep up. */
  rate: number;
}>;

const INSERT = (topic: string) => `
  INSERT INTO identity.outbox (event_id, event_type, aggregate_id, payload, topic)
  SELECT id, 'UserCreated', id, jsonb_build_object(
    'user_id', id, 'tenant_id', '11111111-1111-1111-1111-111111111111', 'email', 'user@example.com',
    'status', 'active', 'created_at', '2026-01-01T00:00:00Z', 'display_name', 'User of the benchmark'), '${topic}'
  FROM unnest($1::uuid[]) id`;

/**
 * Writes events at a steady rate, so many in a transaction, and reads the stream meanwhile. An event's time begins when
 * its COMMIT has been answered, and ends when a consumer that waits in XREAD has its entry: both by one clock.
 */
export async function measureLatency(
  relay: Relay,
  load: Readonly<{ rate: number; batch: number; seconds: number; jitterMs?: number }>,
): Promise<Latencies> {
  const { pool, stream } = relay;
  const { rate, batch, seconds, jitterMs = 0 } = load;
  const reader = relay.redis.duplicate();
  const committedAt = new Map<string, number>();
  const readAt = new Map<string, number>();
  const [last] = await relay.redis.xrevrange(stream, '+', '-', 'COUNT', 1);
  let writing = true;
  const reading = read(last?.[0] ?? '0').finally(() => reader.disconnect());
  const beginsAt = performance.now();
  const writes: Promise<void>[] = [];
  let written = 0;
  for (; performance.now() - beginsAt < seconds * 1_000; written += batch) {
    await pause(beginsAt + (written / rate) * 1_000 - performance.now() + Math.random() * jitterMs);
    writes.push(write());
  }
  await Promise.all(writes);
  const tookSeconds = (performance.now() - beginsAt) / 1_000;
  const behind = written - readAt.size;
  writing = false;
  await reading;
  const latencies = [...committedAt].map(([id, at]) => Math.max(0, (readAt.get(id) as number) - at));
  latencies.sort((a, b) => a - b);
  const at = (share: number) => latencies[Math.ceil(share * latencies.length) - 1] as number;
  return {
    ...{ events: written, behind, rate: written / tookSeconds },
    ...{ p50: at(0.5), p95: at(0.95), p99: at(0.99), max: at(1) },
  };

  async function write(): Promise<void> {
    const ids = Array.from({ length: batch }, () => randomUUID());
    await pool.query({ name: 'insert', text: INSERT(stream), values: [ids] });
    const now = performance.now();
    for (const id of ids) committedAt.set(id, now);
  }

  /** Until everything that was written has been read. */
  async function read(from: string): Promise<void> {
    const deadline = performance.now() + seconds * 1_000 + 60_000;
    for (let after = from; writing || readAt.size < committedAt.size; ) {
      if (performance.now() > deadline)
        throw new Error(`${committedAt.size - readAt.size} events have no entry`);
      const reply = await reader.xread('COUNT', 1_000, 'BLOCK', 200, 'STREAMS', stream, after);
      const now = performance.now();
      for (const [entryId, fields] of reply?.[0]?.[1] ?? []) {
        readAt.set(fields[fields.indexOf('event_id') + 1] as string, now);
        after = entryId;
      }
    }
  }
}
