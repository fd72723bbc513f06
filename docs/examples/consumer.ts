/**
 * Reads a stream of the relay as a member of a consumer group, and handles each event once:
 *
 * - It records its group and `event_id` in the transaction that handles the event, so an event that arrives twice is
 *   handled once by each group.
 * - It acknowledges after the commit. What it had not acknowledged when it died is handled by its next start (same
 *   CONSUMER) or by another member of the group, after CLAIM_IDLE_MS.
 * - It makes its group again when Redis has lost it. The stream is then read from its first entry; the recorded ids
 *   keep that from doing anything twice.
 *
 * Needs ioredis, pg and tsx, and "type": "module" in package.json.
 *
 *     npm install ioredis pg tsx
 *     REDIS_URL=redis://localhost:6379 DATABASE_URL=postgresql://localhost/app node --import tsx consumer.ts
 *
 * Without REDIS_URL it reads redis://localhost:6379. Without DATABASE_URL the variables of libpq count (PGHOST and so on).
 */
import { hostname } from 'node:os';
import { setTimeout as delay } from 'node:timers/promises';
import { Redis } from 'ioredis';
import pg from 'pg';

const STREAM = process.env.STREAM ?? 'identity.user.v1';
const GROUP = process.env.GROUP ?? 'mailer';
/** Unique among the running members of the group. */
const CONSUMER = process.env.CONSUMER ?? hostname();
/** An entry that was delivered so long ago and is not acknowledged is taken over from its consumer. */
const CLAIM_IDLE_MS = Number(process.env.CLAIM_IDLE_MS ?? 60_000);
const BLOCK_MS = 2_000;
const BATCH = 100;

type Entry = [entryId: string, fields: string[] | null];
type Event = Readonly<{ eventId: string; eventType: string; aggregateId: string; payload: unknown }>;

const redis = new Redis(process.env.REDIS_URL ?? 'redis://localhost:6379');
const pool = new pg.Pool({ connectionString: process.env.DATABASE_URL, max: 2 });
// Both reconnect by themselves; what fails meanwhile is tried again below.
redis.on('error', (error) => console.error(`Redis: ${error.message}`));
pool.on('error', (error) => console.error(`PostgreSQL: ${error.message}`));

let isStopping = false;
for (const signal of ['SIGTERM', 'SIGINT'] as const)
  process.once(signal, () => {
    isStopping = true;
  });

async function createTables(): Promise<void> {
  await pool.query(`
    CREATE SCHEMA IF NOT EXISTS mailer;
    CREATE TABLE IF NOT EXISTS mailer.handled_events (
      consumer_group text, event_id uuid, handled_at timestamptz NOT NULL DEFAULT now(),
      PRIMARY KEY (consumer_group, event_id));
    CREATE TABLE IF NOT EXISTS mailer.mails (
      id bigserial PRIMARY KEY, event_id uuid NOT NULL, user_id text NOT NULL, subject text NOT NULL)`);
}

/** What this consumer is for. It runs in the transaction that records the event: both are committed, or neither. */
async function handle(tx: pg.ClientBase, event: Event): Promise<void> {
  await tx.query('INSERT INTO mailer.mails (event_id, user_id, subject) VALUES ($1, $2, $3)', [
    event.eventId,
    event.aggregateId,
    `About ${event.eventType}`,
  ]);
}

function eventOf(flat: string[]): Event {
  const fields = new Map<string, string>();
  for (let i = 0; i < flat.length; i += 2) fields.set(flat[i] as string, flat[i + 1] as string);
  const field = (name: string) => fields.get(name) ?? '';
  return {
    eventId: field('event_id'),
    eventType: field('event_type'),
    aggregateId: field('aggregate_id'),
    payload: JSON.parse(field('payload')),
  };
}

/** @returns whether the event was new */
async function handleOnce(tx: pg.ClientBase, event: Event): Promise<boolean> {
  await tx.query('BEGIN');
  // Waits while another consumer of the group handles the same event, and then finds it handled.
  const { rowCount } = await tx.query(
    'INSERT INTO mailer.handled_events (consumer_group, event_id) VALUES ($1, $2) ON CONFLICT DO NOTHING',
    [GROUP, event.eventId],
  );
  if (rowCount === 1) await handle(tx, event);
  await tx.query('COMMIT');
  return rowCount === 1;
}

/**
 * Handles entries one by one. One that fails stays pending: it is claimed again after CLAIM_IDLE_MS.
 * @throws when PostgreSQL or Redis is away
 */
async function handleEntries(entries: readonly (Entry | null)[]): Promise<void> {
  // Redis 6.2 answers null for an entry that was trimmed.
  for (const [entryId, fields] of entries.filter((entry) => entry !== null)) {
    if (isStopping) return;
    if (fields === null) {
      console.error(`${entryId} was trimmed before it was handled`);
    } else {
      const tx = await pool.connect();
      try {
        const event = eventOf(fields);
        const isNew = await handleOnce(tx, event);
        tx.release();
        console.log(`${entryId} ${event.eventType} ${event.eventId}${isNew ? '' : ' was handled before'}`);
      } catch (error) {
        tx.release(true); // ends the connection, and with it the transaction
        console.error(`${entryId} failed: ${error instanceof Error ? error.message : error}`);
        continue;
      }
    }
    await redis.xack(STREAM, GROUP, entryId);
  }
}

async function createGroup(): Promise<void> {
  await redis.xgroup('CREATE', STREAM, GROUP, '0', 'MKSTREAM').catch((error: Error) => {
    if (!error.message.startsWith('BUSYGROUP')) throw error;
  });
}

/** @param after an entry id: what this consumer was given and has not acknowledged; `>`: what nobody was given yet */
async function read(after: string): Promise<Entry[]> {
  const reply = await redis.xreadgroup(
    ...(['GROUP', GROUP, CONSUMER, 'COUNT', BATCH, 'BLOCK', BLOCK_MS, 'STREAMS', STREAM, after] as const),
  );
  return reply?.[0]?.[1] ?? [];
}

/** Takes over all entries that any consumer of the group, a dead one too, left for CLAIM_IDLE_MS. */
async function claimAbandoned(): Promise<void> {
  let cursor = '0-0';
  do {
    const reply = await redis.xautoclaim(STREAM, GROUP, CONSUMER, CLAIM_IDLE_MS, cursor, 'COUNT', BATCH);
    const [next, entries] = reply as [string, (Entry | null)[]];
    await handleEntries(entries);
    cursor = next;
  } while (cursor !== '0-0' && !isStopping);
}

async function consume(): Promise<void> {
  await createGroup();
  let after = '0';
  for (let own = await read(after); own.length > 0 && !isStopping; own = await read(after)) {
    await handleEntries(own);
    after = own.at(-1)?.[0] as string;
  }
  let claimedAt = 0;
  while (!isStopping) {
    if (Date.now() - claimedAt > CLAIM_IDLE_MS / 2) {
      await claimAbandoned();
      claimedAt = Date.now();
    }
    await handleEntries(await read('>'));
  }
}

console.log(`reading ${STREAM} as ${GROUP}/${CONSUMER}`);
while (!isStopping) {
  try {
    await createTables();
    await consume();
  } catch (error) {
    // A server is away, or the group is gone (NOGROUP): begin again.
    console.error(error instanceof Error ? error.message : error);
    await delay(1_000);
  }
}
redis.disconnect();
await pool.end();
