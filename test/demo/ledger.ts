/**
 * The audit: what the promises come to, computed from nothing but the table and the streams.
 */
import type { Redis } from 'ioredis';
import type { Pool } from 'pg';

const PAGE_ROWS = 5_000;
const SAMPLES = 5;

type Table = Pick<Pool, 'query'>;
type Streams = Pick<Redis, 'type' | 'xrange'>;

export type LedgerOptions = {
  pool: Table;
  redis: Streams;
  /** RELAY_STREAM_NAME: the stream of rows without a topic. */
  defaultStream: string;
  dlqStream: string;
  /** Ids of events to leave out, e.g. those that the old system had published. */
  ignore?: ReadonlySet<string>;
  /** An operator may have had events republished: entries that are marked so are counted as copies, not as doubled. */
  mayHaveCopies?: boolean;
  /** How many event ids of each kind of violation are named. Default: 5. */
  samples?: number;
};

const VIOLATIONS = {
  lost: 'events with neither a stream entry nor a dead letter',
  doubled: 'events with more than one stream entry',
  outOfOrder: 'stream entries behind a later event of their aggregate',
  publishedWithoutEntry: 'rows marked published without a stream entry',
  deadWithoutDlq: 'rows marked dead without a dead letter',
  doubledDeadLetters: 'events with more than one dead letter',
  leftBehind: 'rows neither published nor dead',
  unknown: 'stream entries of events that are not in the table',
} as const;

export type Violation = keyof typeof VIOLATIONS;

export type LedgerGrade = Readonly<
  Record<Violation, number> & {
    /** Event ids, a few of each. */
    samples: Readonly<Record<Violation, readonly string[]>>;
    events: number;
    entries: number;
    deadLetters: number;
    /** Marked entries of events that had one already; 0 unless `mayHaveCopies`. */
    copies: number;
  }
>;

type Row = {
  id: string;
  event_id: string;
  stream: string;
  aggregate: string;
  published: boolean;
  dead: boolean;
  /** Given up by an operator: nothing of it has to be anywhere. */
  discarded: boolean;
};

/** Reads the whole table and every stream; meant for up to some 100,000 events, after the relay came to rest. */
export async function gradeLedger(options: LedgerOptions): Promise<LedgerGrade> {
  const { pool, redis, defaultStream, dlqStream, ignore = new Set(), samples = SAMPLES } = options;
  const { mayHaveCopies = false } = options;
  const found: Record<Violation, string[]> = {
    ...{ lost: [], doubled: [], outOfOrder: [], publishedWithoutEntry: [] },
    ...{ deadWithoutDlq: [], doubledDeadLetters: [], leftBehind: [], unknown: [] },
  };
  // Streams first: an event that is published between the two reads must not look like one that came from nowhere.
  const streams = await streamNames(pool, defaultStream);
  const entriesOf = new Map<string, Entry[]>();
  for (const stream of streams) entriesOf.set(stream, await readEntries(redis, stream, 'event_id'));
  const deadLetters = await readEntries(redis, dlqStream, 'original_event_id');
  const rows = await readRows(pool, defaultStream);

  const entryCount = new Map<string, number>();
  let copies = 0;
  for (const [stream, entries] of entriesOf) {
    const latest = new Map<string, bigint>();
    for (const { eventId, isMarked } of entries) {
      const seen = entryCount.get(eventId) ?? 0;
      if (mayHaveCopies && isMarked && seen > 0) {
        copies++;
        continue;
      }
      entryCount.set(eventId, seen + 1);
      const row = rows.get(eventId);
      if (row === undefined || row.stream !== stream) found.unknown.push(eventId);
      // A second entry is counted as doubled, not as out of order too.
      if (row === undefined || seen > 0 || ignore.has(eventId)) continue;
      const id = BigInt(row.id);
      const before = latest.get(row.aggregate);
      if (before !== undefined && id < before) found.outOfOrder.push(eventId);
      else latest.set(row.aggregate, id);
    }
  }
  const deadCount = new Map<string, number>();
  for (const { eventId } of deadLetters) deadCount.set(eventId, (deadCount.get(eventId) ?? 0) + 1);

  for (const [eventId, row] of rows) {
    if (ignore.has(eventId) || row.discarded) continue;
    const entries = entryCount.get(eventId) ?? 0;
    const dead = deadCount.get(eventId) ?? 0;
    if (entries === 0 && dead === 0) found.lost.push(eventId);
    if (entries > 1) found.doubled.push(eventId);
    if (row.published && entries === 0) found.publishedWithoutEntry.push(eventId);
    if (row.dead && dead === 0) found.deadWithoutDlq.push(eventId);
    if (dead > 1) found.doubledDeadLetters.push(eventId);
    if (!row.published && !row.dead) found.leftBehind.push(eventId);
  }

  const violations = Object.keys(VIOLATIONS) as Violation[];
  const pairs = <T>(value: (violation: Violation) => T) =>
    Object.fromEntries(violations.map((violation) => [violation, value(violation)])) as Record<Violation, T>;
  return {
    ...pairs((violation) => found[violation].length),
    samples: pairs((violation) => found[violation].slice(0, samples)),
    events: rows.size,
    entries: [...entriesOf.values()].reduce((sum, entries) => sum + entries.length, 0) - copies,
    deadLetters: deadLetters.length,
    copies,
  };
}

/** One line for each kind of violation that occurred; empty when every promise held. */
export function violationsOf(grade: LedgerGrade): string[] {
  return (Object.keys(VIOLATIONS) as Violation[])
    .filter((violation) => grade[violation] > 0)
    .map((violation) => {
      const samples = grade.samples[violation].join(', ');
      return `${violation}: ${grade[violation]} ${VIOLATIONS[violation]} (${samples})`;
    });
}

async function streamNames(pool: Table, defaultStream: string): Promise<string[]> {
  const { rows } = await pool.query<{ stream: string }>(
    'SELECT DISTINCT coalesce(topic, $1) AS stream FROM identity.outbox',
    [defaultStream],
  );
  return [...new Set([defaultStream, ...rows.map((row) => row.stream)])];
}

async function readRows(pool: Table, defaultStream: string): Promise<Map<string, Row>> {
  const all = new Map<string, Row>();
  for (let after = '-9223372036854775808'; ; ) {
    const { rows } = await pool.query<Row>(
      `SELECT id::text, event_id::text, coalesce(topic, $1) AS stream, published,
              aggregate_type || ' ' || aggregate_id AS aggregate, dead_lettered_at IS NOT NULL AS dead,
              published AND dead_lettered_at IS NOT NULL AS discarded
         FROM identity.outbox WHERE id > $2::bigint ORDER BY outbox.id LIMIT $3`,
      [defaultStream, after, PAGE_ROWS],
    );
    for (const row of rows) all.set(row.event_id, row);
    const last = rows.at(-1);
    if (last === undefined || rows.length < PAGE_ROWS) return all;
    after = last.id;
  }
}

/** `isMarked`: an operator had the event replayed or republished. */
type Entry = Readonly<{ eventId: string; isMarked: boolean }>;

/** A stream's entries, in its order. A key that is missing or no stream has none. */
async function readEntries(redis: Streams, stream: string, field: string): Promise<Entry[]> {
  if ((await redis.type(stream)) !== 'stream') return [];
  const all: Entry[] = [];
  for (let start = '-'; ; ) {
    const entries = await redis.xrange(stream, start, '+', 'COUNT', PAGE_ROWS);
    for (const [entryId, fields] of entries) {
      const fieldOf = (wanted: string) => {
        const at = fields.findIndex((name, index) => index % 2 === 0 && name === wanted);
        return at === -1 ? undefined : fields[at + 1];
      };
      all.push({
        eventId: fieldOf(field) ?? `entry ${entryId} without ${field}`,
        isMarked: fieldOf('replayed_at') !== undefined,
      });
    }
    const last = entries.at(-1);
    if (last === undefined || entries.length < PAGE_ROWS) return all;
    start = `(${last[0]}`;
  }
}
