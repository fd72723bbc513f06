/**
 * The demo's traffic: a sample producer that commits users' events, one of which is made to fail, and a sample
 * consumer that reads what the relay makes of them and takes the time.
 */
import { setTimeout as delay } from 'node:timers/promises';
import type { Redis } from 'ioredis';
import type { Pool, PoolClient } from 'pg';
import { appendEvent } from '../../src/outbox/producer.ts';
import { type SampleEvent, sampleEvent, TOPIC } from './sample.ts';
import type { Screen, Shown } from './screen.ts';

/** The first event that fails; the next one is of the same user and has to wait for it. */
export const FIRST_FAILING = 8;
/** One of its own for each event that fails: whoever tries the relay may have mended the one before. */
export const brokenTopic = (number: number): string => `demo.broken-${number}.v1`;
/** So long after an event was given up another one fails. */
const FAILS_AGAIN_MS = 15_000;
/** So many events have lines of their own; after that, what was lately is summed up. */
const SHOWN_EVENTS = 40;
const TRANSACTION_EVENTS_MAX = 200;
const USERS_MAX = 200;
const TICK_MS = 5;
const WATCH_MS = 40;
const PULSE_MS = 500;
/** Where few events come, and there is something else to read. */
const SLOW_PULSE_MS = 10_000;
const READ_COUNT = 1_000;
const READ_BLOCK_MS = 250;
/** Above this rate, a line for every row and entry is no longer readable. */
const READABLE_RATE_PER_S = 20;
const STALLED_MS = 30_000;
const LATENCIES_KEPT = 200_000;

type Part = 'plain' | 'fails' | 'waits';
type Tracked = Shown & { event: SampleEvent; part: Part; committedAt?: number; readAt?: number };

export type TrafficOptions = {
  pool: Pool;
  redis: Redis;
  screen: Screen;
  dlqStream: string;
  /** Events to write; Infinity: until `stop`. */
  events: number;
  ratePerSecond: number;
  /** Called when single events are not shown any more. */
  onQuiet(): void;
};

export type Traffic = Readonly<{
  /** Commits events at the given rate, until there are enough or `stop` is aborted. */
  produce(stop: AbortSignal): Promise<void>;
  /** Reads the streams and watches the failing row, until `stop` is aborted. Throws when nothing moves any more. */
  observe(stop: AbortSignal): Promise<void>;
  /** Events that are committed, and neither read from their stream nor dead. */
  onTheirWay(): number;
  /** Shows what was collected since the last pulse. */
  pulse(): void;
  latenciesMs: readonly number[];
  heldBack(): number;
  /** What should not have been. */
  complaints(): string[];
}>;

export function createTraffic(options: TrafficOptions): Traffic {
  const { pool, redis, screen, dlqStream, events, ratePerSecond, onQuiet } = options;
  const isReadable = ratePerSecond <= READABLE_RATE_PER_S;
  const isShown = ({ number }: Shown) => isReadable && number <= SHOWN_EVENTS;
  const tracked = new Map<string, Tracked>();
  const onTheirWay = new Map<string, Tracked>();
  const dead = new Map<string, Tracked>();
  const latenciesMs: number[] = [];
  const users = createUsers();
  let written = 0;
  let heldBack = 0;
  let isQuiet = false;
  /** The latest of those that are made to fail. */
  let failing: Tracked | undefined;
  let failingEndedAt: number | undefined;
  const wronglyDead: string[] = [];
  let lastProgressAt = performance.now();
  let isFirstPulse = true;
  let sincePulse = { rowsIn: 0, entriesOut: 0, latenciesMs: [] as number[] };

  async function produce(stop: AbortSignal): Promise<void> {
    const startedAt = performance.now();
    while (written < events && !stop.aborted) {
      const dueByNow = 1 + Math.floor(((performance.now() - startedAt) / 1_000) * ratePerSecond);
      const due = Math.min(dueByNow, events) - written;
      if (due <= 0) await delay(TICK_MS);
      else await commit(Array.from({ length: Math.min(due, TRANSACTION_EVENTS_MAX) }, nextEvent));
    }
  }

  function nextEvent(): Tracked {
    const number = ++written;
    const isAnother = failingEndedAt !== undefined && performance.now() - failingEndedAt > FAILS_AGAIN_MS;
    const part: Part =
      number === FIRST_FAILING || isAnother ? 'fails' : failing?.number === number - 1 ? 'waits' : 'plain';
    const event = part === 'plain' ? users.next() : users.nextOfUnlucky();
    const tracked = { number, part, event, eventType: event.eventType, who: whoIs(event) };
    if (part === 'fails') {
      event.topic = brokenTopic(number);
      failing = tracked;
      failingEndedAt = undefined;
    }
    return tracked;
  }

  /** As a producer does: the change of the user and its event in one transaction. */
  async function commit(batch: Tracked[]): Promise<void> {
    for (const item of batch) {
      tracked.set(item.event.eventId, item);
      onTheirWay.set(item.event.eventId, item);
      // What a broken deployment may look like: somebody wrote another type under the stream's key.
      if (item.part === 'fails') await redis.set(item.event.topic ?? '', 'not a stream');
    }
    await inTransaction(pool, async (client) => {
      for (const { event } of batch) {
        await client.query(
          `INSERT INTO identity.users (id, display_name, active) VALUES ($1, $2, $3)
           ON CONFLICT (id) DO UPDATE SET display_name = excluded.display_name, active = excluded.active`,
          [event.aggregateId, whoIs(event), event.eventType !== 'UserDisabled'],
        );
        const { eventId, eventType, aggregateId, payload, topic } = event;
        await appendEvent(client, { eventId, eventType, aggregateId, payload, topic: topic ?? TOPIC });
      }
    });
    const committedAt = performance.now();
    for (const item of batch) {
      item.committedAt = committedAt;
      if (item.part === 'fails') screen.failing(item, 'fails: its topic is no stream');
      else if (item.part === 'waits') screen.failing(item, `same user: waits for #${item.number - 1}`);
      else if (isShown(item)) screen.rowIn(item);
      else {
        if (!isQuiet) onQuiet();
        isQuiet = true;
        sincePulse.rowsIn++;
      }
      // The entry may be read before the answer to our COMMIT is.
      if (item.readAt !== undefined) arrived(item);
    }
  }

  async function observe(stop: AbortSignal): Promise<void> {
    await Promise.all([consume(stop), watchFailingRow(stop), watchReplays(stop), watchProgress(stop)]);
  }

  async function consume(stop: AbortSignal): Promise<void> {
    // A blocking read keeps its connection busy, so it has one of its own.
    const reader = redis.duplicate({ maxRetriesPerRequest: null });
    reader.on('error', () => {});
    let afterEntry = '0';
    let afterDeadLetter = '0';
    try {
      while (!stop.aborted) {
        const answer = await reader.xread(
          ...(['COUNT', READ_COUNT, 'BLOCK', READ_BLOCK_MS] as const),
          ...(['STREAMS', TOPIC, dlqStream, afterEntry, afterDeadLetter] as const),
        );
        const readAt = performance.now();
        for (const [stream, entries] of answer ?? []) {
          for (const [entryId, fields] of entries) {
            if (stream === TOPIC) {
              afterEntry = entryId;
              readEntry(field(fields, 'event_id'), readAt);
            } else {
              afterDeadLetter = entryId;
              readDeadLetter(fields);
            }
          }
        }
      }
    } finally {
      reader.disconnect();
    }
  }

  function readEntry(eventId: string, readAt: number): void {
    const item = tracked.get(eventId);
    // An entry that is not ours is found by the audit at the end.
    if (item === undefined) return;
    if (item.readAt !== undefined) {
      screen.doubled(item);
      return;
    }
    item.readAt = readAt;
    if (item.committedAt !== undefined) arrived(item);
  }

  function arrived(item: Tracked): void {
    const latencyMs = Math.max(0, (item.readAt ?? 0) - (item.committedAt ?? 0));
    onTheirWay.delete(item.event.eventId);
    lastProgressAt = performance.now();
    if (item.part === 'waits') {
      heldBack++;
      screen.entryOut(item, latencyMs, `waited for #${item.number - 1}`);
      return;
    }
    latenciesMs.push(latencyMs);
    if (latenciesMs.length > LATENCIES_KEPT) latenciesMs.splice(0, LATENCIES_KEPT / 10);
    if (isShown(item)) screen.entryOut(item, latencyMs);
    else {
      sincePulse.entriesOut++;
      sincePulse.latenciesMs.push(latencyMs);
    }
  }

  function readDeadLetter(fields: readonly string[]): void {
    const item = tracked.get(field(fields, 'original_event_id'));
    if (item === undefined) return;
    onTheirWay.delete(item.event.eventId);
    lastProgressAt = performance.now();
    if (item === failing) failingEndedAt = performance.now();
    if (item.part !== 'fails') wronglyDead.push(`#${item.number} is a dead letter`);
    const attempts = field(fields, 'attempts');
    // The last failure and the dead letter come too close together to be seen on the row one after the other.
    screen.attemptFailed(item, Number(attempts), field(fields, 'error_message'), undefined);
    screen.deadLetter(item, dlqStream, attempts);
    dead.set(item.event.eventId, item);
  }

  /** Whoever tries the relay may mend and replay what is dead. */
  async function watchReplays(stop: AbortSignal): Promise<void> {
    while (!stop.aborted) {
      const { rows } = await pool.query<{ event_id: string }>(
        `SELECT event_id FROM identity.outbox
          WHERE event_id = ANY ($1) AND published AND dead_lettered_at IS NULL`,
        [[...dead.keys()]],
      );
      for (const { event_id: eventId } of rows) {
        const item = dead.get(eventId);
        if (item !== undefined) screen.replayed(item, item.event.topic ?? TOPIC);
        dead.delete(eventId);
      }
      await delay(WATCH_MS);
    }
  }

  /** Shows each failed attempt as the row tells it, as any operator could read it. */
  async function watchFailingRow(stop: AbortSignal): Promise<void> {
    const shownAttempts = new Map<Tracked, number>();
    while (!stop.aborted) {
      const item = failing;
      if (item !== undefined && failingEndedAt === undefined) {
        const { rows } = await pool.query<{
          attempts: number;
          error_message: string | null;
          seconds: number | null;
        }>(
          `SELECT attempts, error_message,
                  CASE WHEN isfinite(next_attempt_at)
                       THEN greatest(0, extract(epoch FROM next_attempt_at - now()))::float8 END AS seconds
             FROM identity.outbox WHERE event_id = $1`,
          [item.event.eventId],
        );
        const row = rows[0];
        if (
          row !== undefined &&
          // What waits behind it may have the row say that it failed before the reason is there.
          row.error_message !== null &&
          row.attempts > (shownAttempts.get(item) ?? 0) &&
          failingEndedAt === undefined
        ) {
          shownAttempts.set(item, row.attempts);
          lastProgressAt = performance.now();
          screen.attemptFailed(item, row.attempts, row.error_message, row.seconds ?? undefined);
        }
      }
      await delay(WATCH_MS);
    }
  }

  async function watchProgress(stop: AbortSignal): Promise<void> {
    const everyMs = isReadable ? SLOW_PULSE_MS : PULSE_MS;
    let pulseAt = performance.now() + everyMs;
    while (!stop.aborted) {
      const now = performance.now();
      if (now >= pulseAt) {
        pulseAt = now + everyMs;
        pulse();
      }
      const [oldest] = onTheirWay.values();
      const since = Math.max(lastProgressAt, oldest?.committedAt ?? now);
      if (now - since > STALLED_MS) {
        throw new Error(
          `Nothing moved for ${STALLED_MS / 1_000} s: ${onTheirWay.size} events are still on their way`,
        );
      }
      await delay(WATCH_MS);
    }
  }

  function pulse(): void {
    if (sincePulse.rowsIn === 0 && sincePulse.entriesOut === 0) return;
    if (isFirstPulse) screen.note('From here on, each line sums up what came since the line before.');
    isFirstPulse = false;
    screen.pulse({ ...sincePulse, onTheirWay: onTheirWay.size });
    sincePulse = { rowsIn: 0, entriesOut: 0, latenciesMs: [] };
  }

  return {
    produce,
    observe,
    onTheirWay: () => onTheirWay.size,
    pulse,
    latenciesMs,
    heldBack: () => heldBack,
    complaints: () => wronglyDead,
  };
}

async function inTransaction(pool: Pool, work: (client: PoolClient) => Promise<void>): Promise<void> {
  const client = await pool.connect();
  try {
    await client.query('BEGIN');
    await work(client);
    await client.query('COMMIT');
    client.release();
  } catch (error) {
    // Closing the connection rolls back.
    client.release(true);
    throw error;
  }
}

/** Users who come, change and go. The first one is kept apart: the unlucky one, whose event will fail. */
function createUsers(): { next(): SampleEvent; nextOfUnlucky(): SampleEvent } {
  const unlucky = sampleEvent('UserCreated');
  const active: SampleEvent[] = [];
  let greeted = false;
  const again = (eventType: 'UserUpdated' | 'UserDisabled', created: SampleEvent): SampleEvent =>
    sampleEvent(eventType, created.aggregateId, whoIs(created));
  return {
    next() {
      if (!greeted) {
        greeted = true;
        return unlucky;
      }
      const dice = Math.random();
      const index = Math.floor(Math.random() * active.length);
      const user = active[index];
      if (user === undefined || (dice < 0.4 && active.length < USERS_MAX)) {
        const created = sampleEvent('UserCreated');
        active.push(created);
        return created;
      }
      if (dice < 0.85) return again('UserUpdated', user);
      active.splice(index, 1);
      return again('UserDisabled', user);
    },
    nextOfUnlucky: () => again('UserUpdated', unlucky),
  };
}

function whoIs({ payload }: SampleEvent): string {
  return typeof payload === 'string' ? '' : String(payload.display_name ?? '');
}

function field(fields: readonly string[], name: string): string {
  const at = fields.findIndex((text, index) => index % 2 === 0 && text === name);
  return at === -1 ? '' : (fields[at + 1] ?? '');
}
