/** What tests of single stages share: clients that close by themselves, a silent logger, rows and events at hand. */
import { Redis, type RedisOptions } from 'ioredis';
import pg from 'pg';
import { redisOptions } from '../../src/config/redis-urls.ts';
import type { Queryable } from '../../src/connections/database.ts';
import type { OutboxEvent } from '../../src/event.ts';
import type { Logger } from '../../src/telemetry/logger.ts';
import type { SampleEvent } from '../demo/sample.ts';
import { atEndOfFile } from './cleanup.ts';
import { anEvent } from './events.ts';

/** A pool for code under test, closed after the test file. */
export function openPool(url: string, options: pg.PoolConfig = {}): pg.Pool {
  refuseAdmin(url);
  return poolOf(url, options);
}

/** A superuser's, to prepare, to break and to look. Its type is such that no code of the relay takes it. */
export type AdminPool = Omit<pg.Pool, 'connect'> & Readonly<{ connect(): Promise<AdminClient> }>;
export type AdminClient = Omit<pg.PoolClient, 'escapeLiteral'>;
export const openAdminPool = (adminUrl: string): AdminPool => poolOf(adminUrl, {});

function poolOf(url: string, options: pg.PoolConfig): pg.Pool {
  const pool = new pg.Pool({ connectionString: url, ...options });
  // Some tests kill its connections.
  pool.on('error', () => {});
  // A test that failed may not have given its clients back, and the pool would wait for them.
  const inUse = new Set<pg.PoolClient>();
  pool.on('acquire', (client) => inUse.add(client));
  pool.on('release', (_error, client) => inUse.delete(client));
  atEndOfFile(() => {
    for (const client of inUse) client.release(true);
    return pool.end();
  });
  return pool;
}

/** A client for code under test, disconnected after the test file. */
export function openRedis(url: string, options: RedisOptions = {}): Redis {
  refuseAdmin(url);
  return clientOf(url, options);
}

/** Of the user that may do everything, as `AdminPool` is. BullMQ would take it for options, were it not for the `url`. */
export type AdminRedis = Omit<Redis, 'duplicate'> & Readonly<{ url?: 0 }>;
export const openAdminRedis = (adminUrl: string, options: RedisOptions = {}): AdminRedis =>
  clientOf(adminUrl, options);

/** So that tests of one module run it with the rights that `relay grants` gives, as pods have them. */
function refuseAdmin(url: string): void {
  if (['', 'default', 'postgres'].includes(new URL(url).username))
    throw new Error(
      'Code under test is no admin. To prepare and to look there are openAdminPool and openAdminRedis',
    );
}

function clientOf(url: string, options: RedisOptions): Redis {
  const redis = new Redis({ ...redisOptions(url), ...options } as RedisOptions & { replyMapping?: 'legacy' });
  redis.on('error', () => {});
  atEndOfFile(async () => redis.disconnect());
  return redis;
}

export const silent: Logger = {
  trace: () => {},
  debug: () => {},
  info: () => {},
  warn: () => {},
  error: () => {},
  fatal: () => {},
};

/** An event as the claim hands it on, without a row. Its job was made in no epoch: give it one where the gate asks. */
export function aClaimedEvent(overrides: Partial<OutboxEvent> = {}): OutboxEvent {
  const { eventId, eventType, aggregateType, aggregateId, topic, payload, createdAt }: SampleEvent =
    anEvent();
  return {
    ...{ id: '1', eventId, eventType, aggregateType, aggregateId, topic: topic ?? 'identity.user.v1' },
    payload: JSON.stringify(payload),
    occurredAt: createdAt.toISOString().replace('Z', '000Z'),
    ...{ tenantId: null, correlationId: null, attempts: 0, after: null },
    ...overrides,
  };
}

export type RowState = 'fresh' | 'leased' | 'due' | 'parked' | 'published' | 'dead';

/** A row as the next reader of the table sees it. */
export type Row = Readonly<{
  id: string;
  eventId: string;
  state: RowState | 'contradictory';
  attempts: number;
  errorMessage: string | null;
  streamEntryId: string | null;
  publishedAt: Date | null;
  deadLetteredAt: Date | null;
  /** Until the row's lease ends, by the database's clock; null unless it is leased or due, or its dead letter is lost. */
  msLeft: number | null;
}>;

/** Every row, in order of id. */
export async function readRows(db: Queryable): Promise<Row[]> {
  const { rows } = await db.query<Row>(`
    SELECT id::text AS "id", event_id AS "eventId", attempts AS "attempts", error_message AS "errorMessage",
           stream_entry_id AS "streamEntryId", published_at AS "publishedAt", dead_lettered_at AS "deadLetteredAt",
           CASE WHEN isfinite(next_attempt_at)
                THEN (extract(epoch FROM next_attempt_at - clock_timestamp()) * 1000)::float8 END AS "msLeft",
           CASE
             WHEN published AND published_at IS NOT NULL AND next_attempt_at IS NULL AND dead_lettered_at IS NULL
               THEN 'published'
             WHEN published THEN 'contradictory'
             WHEN dead_lettered_at IS NOT NULL AND next_attempt_at = 'infinity' THEN 'dead'
             -- Its dead letter is lost: it expires, and the lease reaper writes another.
             WHEN dead_lettered_at IS NOT NULL AND isfinite(next_attempt_at) AND stream_entry_id IS NULL THEN 'dead'
             WHEN dead_lettered_at IS NOT NULL THEN 'contradictory'
             WHEN next_attempt_at IS NULL THEN 'fresh'
             WHEN next_attempt_at = 'infinity' THEN 'parked'
             WHEN next_attempt_at <= clock_timestamp() THEN 'due'
             ELSE 'leased'
           END AS "state"
      FROM identity.outbox o ORDER BY o.id`);
  return rows;
}

/** The states of all rows, in order of id. */
export async function readStates(db: Queryable): Promise<Row['state'][]> {
  return (await readRows(db)).map((row) => row.state);
}

/** A promise and the functions that settle it. */
export function deferred<T = void>() {
  let resolve: (value: T) => void = () => {};
  let reject: (error: Error) => void = () => {};
  const promise = new Promise<T>((whenResolved, whenRejected) => {
    resolve = whenResolved;
    reject = whenRejected;
  });
  return { promise, resolve, reject };
}

/** The entries of a stream, each as an object of its fields, in the order of the stream. */
export async function readStream(
  redis: Pick<Redis, 'xrange'>,
  stream: string,
): Promise<Record<string, string>[]> {
  const entries = await redis.xrange(stream, '-', '+');
  return entries.map(([, fields]) =>
    Object.fromEntries(
      Array.from({ length: fields.length / 2 }, (_, i) => [fields[2 * i] ?? '', fields[2 * i + 1] ?? '']),
    ),
  );
}
