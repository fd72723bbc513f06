/**
 * Cost: what a statement touches does not grow with the table, the backlog, or one aggregate's queue, whatever the
 * statistics say and whatever other indexes there are.
 */
import { randomUUID } from 'node:crypto';
import pg from 'pg';
import { beforeAll, describe, expect, test } from 'vitest';
import type { Pool, Queryable } from '../../src/connections/database.ts';
import { type BacklogReader, createBacklog } from '../../src/outbox/backlog.ts';
import { tryClaim } from '../../src/outbox/claim-trial.ts';
import { createDeadRows } from '../../src/outbox/dead-rows.ts';
import { createOutbox, type Outbox } from '../../src/outbox/outbox.ts';
import { createPruner, FIRST_PLACE, PRUNABLE_KINDS } from '../../src/outbox/pruner.ts';
import { asRelay, OPERATOR_ROLE } from '../support/least-privilege.ts';
import { OUTBOX_OPTIONS } from '../support/outbox-table.ts';
import { createDatabase } from '../support/servers.ts';
import { type AdminPool, openAdminPool, openPool } from '../support/stages.ts';

const PUBLISHED_ROWS = 1_000_000;
/** From here on published rows have an entry: before, another system published them. */
const FIRST_WITH_ENTRY = 900_001;
const PARKED_ROWS = 100_000;
const EXPIRED_ROWS = 2_000;
const FRESH_ROWS = 20_000;
const BATCH = 100;
const HOT = { aggregateType: 'user', aggregateId: randomUUID() };
/** Of the hot aggregate: its first row, leased; the others are parked behind it, but for the last, which is fresh. */
const HOT_HEAD = PUBLISHED_ROWS + 1;
const HOT_FRESH = HOT_HEAD + PARKED_ROWS;
const FIRST_EXPIRED = HOT_FRESH + 1;
/** One of the platform's is as good as ours for rows that are expired. */
const GOOD_INDEX = /^(relay_outbox_\w+|outbox_pkey|outbox_event_id_unique|ix_outbox_next_attempt_at)$/;
/** An update of a row writes to a dozen indexes, three levels each. All rows that are published fill 15,000. */
const MOST_BUFFERS_PER_ROW = 100;
/** The rows of a window are weighed in the order of their ids. */
const MOST_ROWS_SORTED = 400;

/** Each row's event id is its id: that index is filled in a third of the time, and rows are named without a question. */
const eventIdOf = (id: number): string => {
  const hex = id.toString(16).padStart(32, '0');
  return [hex.slice(0, 8), hex.slice(8, 12), hex.slice(12, 16), hex.slice(16, 20), hex.slice(20)].join('-');
};
const nameOf = (id: number) => ({ id: String(id), eventId: eventIdOf(id) });
const namesFrom = (id: number) => Array.from({ length: BATCH }, (_, i) => nameOf(id + i));
const eventIdsFrom = (id: number) => namesFrom(id).map((it) => it.eventId);

/** One step of a plan, as EXPLAIN tells it. */
type Step = {
  'Node Type': string;
  'Relation Name'?: string;
  'Index Name'?: string;
  'Actual Rows': number;
  'Actual Loops': number;
  'Rows Removed by Filter'?: number;
  'Rows Removed by Index Recheck'?: number;
  'Shared Hit Blocks': number;
  'Shared Read Blocks': number;
  Plans?: Step[];
};

type Cost = {
  rowsTouched: number;
  buffers: number;
  indexes: string[];
  scans: string[];
  mostRowsSorted: number;
};

let pool: AdminPool;
let relay: pg.Pool;
let operators: pg.Pool;

beforeAll(async () => {
  const { url, adminUrl } = await createDatabase();
  pool = openAdminPool(adminUrl);
  relay = openPool(url);
  operators = openPool(asRelay(url, OPERATOR_ROLE));
  const eventId = (id: string) => `lpad(to_hex(${id}), 32, '0')::uuid`;
  await pool.query(`
    ALTER TABLE identity.outbox SET (autovacuum_enabled = off);
    INSERT INTO identity.outbox (event_type, event_id, aggregate_id, payload, published, published_at)
    SELECT 'UserCreated', ${eventId('n')}, ${eventId('n')}, '{"tenant_id": "x"}', true, now() - interval '2 hours'
      FROM generate_series(1, ${FIRST_WITH_ENTRY - 1}) n;
    ANALYZE identity.outbox;
    INSERT INTO identity.outbox (event_type, event_id, aggregate_id, payload, published, published_at, stream_entry_id)
    SELECT 'UserCreated', ${eventId('n')}, ${eventId('n')}, '{"tenant_id": "x"}', true, now() - interval '1 hour', '1-' || n
      FROM generate_series(${FIRST_WITH_ENTRY}, ${PUBLISHED_ROWS}) n;
    INSERT INTO identity.outbox (event_type, event_id, aggregate_id, payload, next_attempt_at)
    SELECT 'UserUpdated', ${eventId(`n + ${HOT_HEAD}`)}, '${HOT.aggregateId}', '{}',
           CASE n WHEN 0 THEN now() + interval '1 minute' WHEN ${PARKED_ROWS} THEN NULL ELSE 'infinity' END
      FROM generate_series(0, ${PARKED_ROWS}) n;
    INSERT INTO identity.outbox (event_type, event_id, aggregate_id, payload, next_attempt_at)
    SELECT 'UserUpdated', ${eventId(`n + ${FIRST_EXPIRED}`)}, gen_random_uuid(), '{}', now() - n * interval '1 second'
      FROM generate_series(0, ${EXPIRED_ROWS - 1}) n;
    INSERT INTO identity.outbox (event_type, aggregate_id, payload)
    SELECT 'UserUpdated', gen_random_uuid(), '{}' FROM generate_series(1, ${FRESH_ROWS - 1});
  `);
});

/** With the operators' pool, for statements of theirs, and the relay's. */
type Run = (outbox: Outbox, operators: Pool, relay: Pool) => Promise<unknown>;

const deadRows = (pool: Pool) =>
  createDeadRows(pool, {
    ...{ streamName: 'identity.user.v1', maxEventBytes: 1_048_576, statementTimeoutMs: 20_000 },
  });
const FILTER = { eventType: 'UserUpdated', topic: 'x', aggregateId: HOT.aggregateId, error: 'x' };
const SOME_TIME = '2026-01-31T12:00:00Z';
const BEGINNING = { finalizedAt: '-infinity', id: '-1' };
const IN_EPOCH =
  (work: (outbox: Outbox, tx: Queryable) => Promise<unknown>): Run =>
  (outbox) =>
    outbox.inEpoch((tx) => work(outbox, tx));
/** The hot aggregate among others that have no parked rows: an aggregate is named once in a statement. */
const SOME_AGGREGATES = [
  HOT,
  ...Array.from({ length: BATCH - 1 }, () => ({ aggregateType: 'user', aggregateId: randomUUID() })),
];
const LETTERS = eventIdsFrom(HOT_HEAD).map((eventId) => ({ eventId, entryId: '1-1' }));
/** Events of the hot aggregate, and some that are published. */
const SOME_QUESTIONS = [
  ...eventIdsFrom(HOT_HEAD).slice(BATCH / 2),
  ...eventIdsFrom(FIRST_WITH_ENTRY).slice(BATCH / 2),
].map((eventId, i) => ({ eventId, before: i % 3 === 0 ? eventIdOf(FIRST_WITH_ENTRY) : null }));

const statements: [string, Run, number][] = [
  [
    'a claim, also of an aggregate with 100,000 parked rows',
    (it) => it.inEpoch((tx) => it.claimFresh(tx, BATCH), { generic: true }),
    10 * BATCH,
  ],
  ['a claim of the first row alone', (it) => it.inEpoch((tx) => it.claimFirst(tx)), 10 * BATCH],
  ['expired rows', (it) => it.expired(BATCH), 3 * BATCH],
  [
    'the locks on expired rows',
    async (it) => {
      const rows = namesFrom(FIRST_EXPIRED).map((name) => ({
        ...{ ...name, ...HOT, topic: 'x', isDead: false, knownLetter: null, attempts: 0 },
        endedAt: '2026-01-01 00:00:00.000000',
      }));
      await it.inEpoch((tx) => it.lockExpired(tx, rows), { generic: true });
    },
    3 * BATCH,
  ],
  [
    'an acknowledgement, with 100,000 rows waiting behind it',
    IN_EPOCH((it, tx) =>
      it.markPublished(
        tx,
        namesFrom(HOT_HEAD).map((name) => ({ ...name, entryId: '1-1' })),
      ),
    ),
    3 * BATCH,
  ],
  [
    'a dead letter, with 100,000 rows waiting behind it',
    IN_EPOCH((it, tx) => it.markDead(tx, { ...nameOf(HOT_HEAD), attempts: 6, reason: 'x', entryId: '1-1' })),
    20,
  ],
  ['refill of an aggregate with 100,000 parked rows', (it) => it.refill(SOME_AGGREGATES), 10 * BATCH],
  ['the question where events stand', (it) => it.standingOf(SOME_QUESTIONS), 10 * BATCH],
  [
    'the release of jobs',
    (it) => it.park(eventIdsFrom(HOT_HEAD), eventIdsFrom(FIRST_EXPIRED).slice(BATCH / 2)),
    5 * BATCH,
  ],
  [
    'a failed attempt',
    (it) => it.recordFailure({ ...nameOf(HOT_HEAD), attempts: 1, reason: 'x', retryInMs: 1_000 }),
    10,
  ],
  [
    'the return of expired rows',
    IN_EPOCH((it, tx) => it.returnToFresh(tx, eventIdsFrom(FIRST_EXPIRED))),
    3 * BATCH,
  ],
  [
    'the extension of leases',
    IN_EPOCH((it, tx) =>
      it.extendLeases(
        tx,
        eventIdsFrom(FIRST_EXPIRED).map((eventId) => ({ eventId, attempts: 1, reason: 'x' })),
      ),
    ),
    3 * BATCH,
  ],
  ['the end of leases', (it) => it.expireLeasesOf(eventIdsFrom(HOT_HEAD)), 3 * BATCH],
  ['the end of all leases', (it) => it.expireAllLeases(), 10],
  ['the question which events are live', (it) => it.liveOf(eventIdsFrom(HOT_HEAD)), 3 * BATCH],
  [
    'the loss of entries',
    (it) =>
      it.unpublish(
        namesFrom(FIRST_WITH_ENTRY).map((name) => ({
          ...{ ...name, topic: 'x', entryId: `1-${name.id}`, finalizedAt: SOME_TIME },
        })),
      ),
    3 * BATCH,
  ],
  ['a page of rows with entries', (it) => it.finalizedRows(BEGINNING, 'infinity', BATCH), 3 * BATCH],
  [
    'a page of rows with entries, by filter',
    (it) => it.publishedRows({ topic: 'identity.user.v1' }, BEGINNING, 'infinity', BATCH),
    3 * BATCH,
  ],
  [
    'the events of rows with entries',
    (it) => it.finalizedEvents(namesFrom(FIRST_WITH_ENTRY).map((name) => name.id)),
    3 * BATCH,
  ],
  [
    'the events of rows that are not finished',
    (it) => it.unfinishedEvents(namesFrom(HOT_HEAD).map((name) => name.id)),
    3 * BATCH,
  ],
  ['the list of aggregates with parked rows', (it) => it.parkedAggregates(null, BATCH), 3 * BATCH],
  [
    'the same list, from the aggregate with 100,000 of them on',
    (it) => it.parkedAggregates(HOT, BATCH),
    3 * BATCH,
  ],
  [
    'the events that are found in their stream',
    IN_EPOCH((it, tx) => it.markFound(tx, 'identity.user.v1', LETTERS)),
    5 * BATCH,
  ],
  ['the events that have dead letters', IN_EPOCH((it, tx) => it.lockUngiven(tx, LETTERS)), 3 * BATCH],
  ['the trial of a claim', (_, __, pool) => tryClaim(pool, OUTBOX_OPTIONS, 0), 3 * BATCH],
  ['the end of parking, where order does not matter', (it) => it.unparkAll(BATCH), 3 * BATCH],
  ['a page of dead letters', (_, it) => deadRows(it).page({}, { at: SOME_TIME, id: '1' }, BATCH), 3 * BATCH],
  [
    'dead letters by filter',
    (_, it) => deadRows(it).page({ ...FILTER, since: SOME_TIME, until: SOME_TIME }, null, BATCH),
    3 * BATCH,
  ],
  ['dead letters by error', (_, it) => deadRows(it).groups({}, BATCH), 3 * BATCH],
  ['dead letters counted', (_, it) => deadRows(it).count(FILTER), 3 * BATCH],
  ['dead rows in order', (_, it) => deadRows(it).inOrder({}, { ...HOT, id: '1' }, BATCH), 3 * BATCH],
  ['dead rows of some events', (_, it) => deadRows(it).ofEvents([randomUUID(), randomUUID()]), 10],
  ...PRUNABLE_KINDS.map((kind): [string, Run, number] => [
    `the deletion of old rows (${kind})`,
    (_, them) => {
      const step = { kind, after: FIRST_PLACE, before: '2100-01-01', limit: BATCH };
      // It misses the answer that EXPLAIN does not give.
      return expect(createPruner(them, { statementTimeoutMs: 20_000 }).step(step)).rejects.toThrow(TypeError);
    },
    3 * BATCH,
  ]),
];

/** PostgreSQL may keep a plan that fits any parameters, of a statement that comes again and again. */
type PlanKind = 'custom' | 'generic';

const variants = statements.flatMap(([name, run, limit]) =>
  (['continue', 'hold'] as const).flatMap((policy) =>
    (['custom', 'generic'] as const).map((plan) => [name, policy, plan, run, limit] as const),
  ),
);

describe.each([
  ['the relay’s own indexes, and statistics from before the backlog', ''],
  [
    'the platform’s indexes as well',
    `CREATE INDEX ix_outbox_published ON identity.outbox (published);
     CREATE INDEX ix_outbox_event_type ON identity.outbox (event_type);
     CREATE INDEX ix_outbox_aggregate_id ON identity.outbox (aggregate_id);
     CREATE INDEX ix_outbox_next_attempt_at ON identity.outbox (next_attempt_at) WHERE NOT published;
     CREATE INDEX ix_outbox_created_at ON identity.outbox (created_at);
     CREATE INDEX ix_outbox_topic ON identity.outbox (topic);`,
  ],
  ['these, and fresh statistics', 'ANALYZE identity.outbox'],
])('with %s,', (_, ddl) => {
  beforeAll(async () => {
    if (ddl !== '') await pool.query(ddl);
  });

  test.each(variants)(
    '%s touches few rows, by index (%s, %s plan)',
    async (_name, deadLetterPolicy, plan, run, limit) => {
      const costs: Cost[] = [];
      const pool = explaining(relay, plan, costs);
      const outbox = createOutbox(pool, {
        ...{ ...OUTBOX_OPTIONS, deadLetterPolicy, statementTimeoutMs: 20_000 },
      });
      await run(outbox, explaining(operators, plan, costs), pool);
      expect(costs.length).toBeGreaterThan(0);
      for (const { rowsTouched, buffers, indexes, scans, mostRowsSorted } of costs) {
        expect(rowsTouched).toBeLessThanOrEqual(limit);
        expect(buffers).toBeLessThanOrEqual(MOST_BUFFERS_PER_ROW * (limit < BATCH ? 1 : BATCH));
        expect(scans).toEqual([]);
        expect(indexes.filter((name) => !GOOD_INDEX.test(name))).toEqual([]);
        expect(mostRowsSorted).toBeLessThanOrEqual(MOST_ROWS_SORTED);
      }
    },
  );

  test.each<[string, (backlog: BacklogReader) => Promise<unknown>]>([
    ['the backlog is counted', (it) => it.count()],
    ['the oldest events are found', (it) => it.oldest()],
    ['rates are taken', (it) => it.rates()],
  ])('%s without a look at published rows', async (_name, run) => {
    const costs: Cost[] = [];
    const backlog = createBacklog(explaining(relay, 'custom', costs), {
      deadLetterPolicy: 'hold',
      streamName: 'identity.user.v1',
      statementTimeoutMs: 20_000,
    });
    // Its answer is an explanation, of which nothing can be made.
    await run(backlog).catch(() => {});
    expect(costs).toHaveLength(1);
    const [{ rowsTouched, indexes, scans }] = costs as [Cost];
    expect(rowsTouched).toBeLessThanOrEqual(PARKED_ROWS + FRESH_ROWS + 3_000);
    expect(scans).toEqual([]);
    expect(indexes.filter((name) => !GOOD_INDEX.test(name))).toEqual([]);
  });
});

/**
 * The pool, where each statement on the table is explained, executed, and rolled back in the end: the plan is the one
 * that the statement has in its own transaction, with its own settings and parameters.
 */
function explaining(real: pg.Pool, plan: PlanKind, costs: Cost[]): Pool {
  async function explain(client: pg.PoolClient, { text, values = [] }: { text: string; values?: unknown[] }) {
    const query = pg.Client.prototype.query.bind(client) as pg.Client['query'];
    if (text === 'COMMIT') return query('ROLLBACK');
    if (!text.includes('identity.outbox') || text.startsWith('BEGIN')) return query(text, values);
    const explained =
      plan === 'custom'
        ? await query(`EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) ${text}`, values)
        : await explainGeneric(query, text, values);
    costs.push(costOf(explained.rows[0]['QUERY PLAN'][0].Plan));
    // What a statement tells the next one: the id of the first fresh row, the row for a trial.
    if (text.startsWith('SELECT id FROM')) return { rows: [{ id: String(HOT_FRESH) }], rowCount: 1 };
    if (text.includes('"isFresh"')) return { rows: [{ ...nameOf(HOT_FRESH), isFresh: true }], rowCount: 1 };
    return { rows: [], rowCount: 0 };
  }
  return {
    connect: (async () => {
      const client = await real.connect();
      const query = (config: pg.QueryConfig) => explain(client, config);
      return Object.create(client, { query: { value: query } });
    }) as pg.Pool['connect'],
  };
}

async function explainGeneric(query: pg.Client['query'], text: string, values: unknown[]) {
  const literal = (value: unknown): string =>
    pg.escapeLiteral(
      Array.isArray(value) ? `{${value.map((it) => JSON.stringify(it ?? null)).join(',')}}` : String(value),
    );
  await query(`PREPARE statement AS ${text}`);
  try {
    await query('SET LOCAL plan_cache_mode = force_generic_plan');
    const parameters = values
      .map((it) => (it === null || it === undefined ? 'NULL' : literal(it)))
      .join(', ');
    return await query(
      `EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE statement${parameters === '' ? '' : `(${parameters})`}`,
    );
  } finally {
    // Where the statement failed its transaction is aborted, and the session goes on.
    await query('DEALLOCATE statement').catch(() =>
      query('ROLLBACK').then(() => query('DEALLOCATE statement')),
    );
  }
}

function costOf(plan: Step): Cost {
  const steps = (function all(step: Step): Step[] {
    return [step, ...(step.Plans ?? []).flatMap(all)];
  })(plan);
  const onTable = steps.filter(
    (step) => step['Relation Name'] === 'outbox' && /Scan$/.test(step['Node Type']),
  );
  const rowsOf = (step: Step) =>
    (step['Actual Rows'] +
      (step['Rows Removed by Filter'] ?? 0) +
      (step['Rows Removed by Index Recheck'] ?? 0)) *
    step['Actual Loops'];
  return {
    buffers: plan['Shared Hit Blocks'] + plan['Shared Read Blocks'],
    rowsTouched: Math.round(onTable.reduce((sum, step) => sum + rowsOf(step), 0)),
    indexes: steps.flatMap((step) => step['Index Name'] ?? []),
    scans: onTable.map((step) => step['Node Type']).filter((type) => type.includes('Seq Scan')),
    mostRowsSorted: Math.max(0, ...steps.filter((step) => step['Node Type'].includes('Sort')).map(rowsOf)),
  };
}
