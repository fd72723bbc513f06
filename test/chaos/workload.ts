/** What producers do: many transactions at once over hot and cold aggregates, some rolled back, some committing late. */
import { randomUUID } from 'node:crypto';
import { setTimeout as delay } from 'node:timers/promises';
import type { Redis } from 'ioredis';
import pg from 'pg';
import { type SampleEvent, sampleEvent } from '../demo/sample.ts';
import { insertEvents } from '../support/events.ts';
import { survive } from './patience.ts';
import { between, createRandom, pick, type Random } from './random.ts';
import { POISON_TOPIC, PROBE_TOPIC, TOPICS } from './topics.ts';

const WRITERS = 8;
const HOT_AGGREGATES = 10;
/** Cold aggregates that may get another event. */
const WARM_AGGREGATES = 400;
const EVENTS_PER_TRANSACTION_MAX = 8;
const ROLLED_BACK_SHARE = 0.08;
const LATE_SHARE = 0.04;
const LATE_MS = [200, 2_000] as const;
/** An outage is not caught up with at once in full: at most so many seconds' worth. */
const CATCH_UP_S = 10;
const IDLE_MS = 10;
const AFTER_ERROR_MS = 250;
const STATEMENT_DEADLINE_MS = 30_000;
const PROBE_POLL_MS = 10;
const PROBE_AGAIN_MS = 5_000;
const PROBE_ENTRIES = 50;

type Aggregate = Readonly<{ id: string; topic: string | null }>;

export type Workload = Readonly<{
  /** Events per second from now on; 0 pauses. */
  setRate(perSecond: number): void;
  /** Pauses, and resolves when no transaction is open any more. */
  quiet(): Promise<void>;
  /** Commits events that will be refused until their retries are spent, each of another aggregate. */
  poison(count: number): Promise<void>;
  /** One more such event of the one poisonous aggregate, and a healthy one that has to wait for it. */
  poisonOnce(): Promise<void>;
  /** Commits these events; tries again while the database is away. */
  write(events: readonly SampleEvent[]): Promise<void>;
  /**
   * Commits an event of a fresh aggregate, every few seconds another one, and waits until one is in its stream.
   * @returns milliseconds from the call, or undefined if it took longer than `timeoutMs`
   */
  probe(timeoutMs: number): Promise<number | undefined>;
  /** Events whose commit was answered. */
  committed(): ReadonlySet<string>;
  /** Events that were sent to the database, whatever became of them. */
  attempted(): ReadonlySet<string>;
  counts(): Readonly<{ committed: number; rolledBack: number; late: number; unknown: number }>;
  close(): Promise<void>;
}>;

export function createWorkload(options: { url: string; client: Redis; seed: number }): Workload {
  const { client } = options;
  const random = createRandom(options.seed);
  const pool = new pg.Pool({
    connectionString: options.url,
    max: WRITERS + 4,
    connectionTimeoutMillis: 5_000,
    query_timeout: STATEMENT_DEADLINE_MS,
    statement_timeout: STATEMENT_DEADLINE_MS,
    application_name: 'producer',
  });
  survive(pool);
  const committed = new Set<string>();
  const attempted = new Set<string>();
  const counts = { rolledBack: 0, late: 0, unknown: 0 };
  const hot = Array.from({ length: HOT_AGGREGATES }, () => newAggregate(random));
  const warm: Aggregate[] = [];
  const poisonous = randomUUID();
  let ratePerS = 0;
  let credit = 0;
  let creditAt = performance.now();
  let open = 0;
  let closed = false;
  const writers = Array.from({ length: WRITERS }, writeUntilClosed);

  async function writeUntilClosed(): Promise<void> {
    while (!closed) {
      const size = between(random, 1, EVENTS_PER_TRANSACTION_MAX);
      if (!spend(size)) {
        await delay(IDLE_MS);
        continue;
      }
      open++;
      const events = nextEvents(size);
      await transact(events, fateOf(random)).catch(() => delay(AFTER_ERROR_MS));
      open--;
    }
  }

  /** Whether the rate allows for so many events now. */
  function spend(events: number): boolean {
    const now = performance.now();
    credit = Math.min(credit + ((now - creditAt) / 1_000) * ratePerS, ratePerS * CATCH_UP_S);
    creditAt = now;
    if (ratePerS === 0 || credit < events) return false;
    credit -= events;
    return true;
  }

  function nextEvents(size: number): SampleEvent[] {
    if (random() < 0.25) {
      const aggregate = pick(random, hot);
      return Array.from({ length: size }, () => eventOf(aggregate));
    }
    return Array.from({ length: size }, () => {
      const aggregate = random() < 0.5 && warm.length > 0 ? pick(random, warm) : newAggregate(random);
      warm[between(random, 0, WARM_AGGREGATES - 1) % (warm.length + 1)] = aggregate;
      return eventOf(aggregate);
    });
  }

  type Fate = 'commit' | 'late' | 'roll back';

  function fateOf(dice: Random): Fate {
    const thrown = dice();
    if (thrown < ROLLED_BACK_SHARE) return 'roll back';
    return thrown < ROLLED_BACK_SHARE + LATE_SHARE ? 'late' : 'commit';
  }

  async function transact(events: readonly SampleEvent[], fate: Fate): Promise<void> {
    const connection = await pool.connect();
    for (const event of events) attempted.add(event.eventId);
    let committing = false;
    try {
      await connection.query('BEGIN');
      // As a producer locks the aggregate that it changes: ids are given out in the order of the commits.
      const locks = [...new Set(events.map((event) => lockOf(event.aggregateId)))].sort();
      await connection.query('SELECT pg_advisory_xact_lock(key) FROM unnest($1::bigint[]) AS key', [locks]);
      await insertEvents(connection, events);
      if (fate === 'late') await delay(between(random, ...LATE_MS));
      committing = fate !== 'roll back';
      await connection.query(committing ? 'COMMIT' : 'ROLLBACK');
      connection.release();
    } catch (error) {
      connection.release(true);
      // Whether such a transaction was committed is seen in the table, and nowhere else.
      if (committing) counts.unknown += events.length;
      throw error;
    }
    if (fate === 'roll back') counts.rolledBack += events.length;
    else for (const event of events) committed.add(event.eventId);
    if (fate === 'late') counts.late += events.length;
  }

  /** An insert of unknown fate is tried again under the same ids, which are unique. */
  async function write(events: readonly SampleEvent[], signal?: AbortSignal): Promise<void> {
    while (!closed && signal?.aborted !== true) {
      try {
        await transact(events, 'commit');
        return;
      } catch (error) {
        if ((error as pg.DatabaseError).code === '23505') return;
        await delay(IDLE_MS);
      }
    }
  }

  return {
    setRate(perSecond) {
      ratePerS = perSecond;
      credit = 0;
      creditAt = performance.now();
    },
    async quiet() {
      ratePerS = 0;
      while (open > 0) await delay(IDLE_MS);
    },
    write,
    poison: (count) =>
      write(Array.from({ length: count }, () => eventOf({ id: randomUUID(), topic: POISON_TOPIC }))),
    poisonOnce: () =>
      write([eventOf({ id: poisonous, topic: POISON_TOPIC }), eventOf({ id: poisonous, topic: null })]),
    async probe(timeoutMs) {
      const startedAt = performance.now();
      const signal = AbortSignal.timeout(timeoutMs);
      const arrived = async (): Promise<number | undefined> => {
        const ids = new Set<string>();
        let writtenAt = Number.NEGATIVE_INFINITY;
        while (!closed && !signal.aborted) {
          // Another fault may take an event away: by TRUNCATE, or by promoting a standby that never had it.
          if (performance.now() - writtenAt > PROBE_AGAIN_MS) {
            const event = eventOf({ id: randomUUID(), topic: PROBE_TOPIC });
            ids.add(event.eventId);
            writtenAt = performance.now();
            void write([event], signal);
          }
          const entries = await client.xrevrange(PROBE_TOPIC, '+', '-', 'COUNT', PROBE_ENTRIES);
          if (entries.some(([, fields]) => fields.some((field) => ids.has(field))))
            return performance.now() - startedAt;
          await delay(PROBE_POLL_MS);
        }
        return undefined;
      };
      const expired = delay(timeoutMs, undefined, { ref: false });
      return Promise.race([arrived(), expired]);
    },
    committed: () => committed,
    attempted: () => attempted,
    counts: () => ({ committed: committed.size, ...counts }),
    async close() {
      closed = true;
      await Promise.all(writers);
      await pool.end();
    },
  };
}

function newAggregate(random: Random): Aggregate {
  return { id: randomUUID(), topic: pick(random, TOPICS) };
}

function eventOf({ id, topic }: Aggregate): SampleEvent {
  return { ...sampleEvent('UserUpdated', id), topic };
}

/** Sixty bits of the aggregate's id are as good as all. */
function lockOf(aggregateId: string): string {
  return BigInt(`0x${aggregateId.replaceAll('-', '').slice(0, 15)}`)
    .toString()
    .padStart(19, '0');
}
