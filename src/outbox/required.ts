import type { Queryable } from '../connections/database.ts';
import { FRESH, LIVE, PARKED } from './conditions.ts';

/**
 * What table.ts describes, by name (a test compares the two), and what an adopted table must be like. A pod looks for it
 * at start and needs drizzle for nothing else, which would take 5 MiB of its memory for as long as it lives.
 */

type Column = Readonly<{
  types: readonly string[];
  /** A row with a null there is never published, or no statement finds it. */
  isFilled?: true;
  /** Reasons and names are written there: a limit would refuse some. */
  isWritten?: true;
  /** By the relay's migrations. */
  isAdded?: true;
}>;

const TEXT = ['text', 'character varying'];
const INSTANT = ['timestamp with time zone'];

/** In the order of table.ts. */
const COLUMNS: Readonly<Record<string, Column>> = {
  id: { types: ['bigint', 'integer'], isFilled: true },
  event_id: { types: ['uuid'], isFilled: true },
  event_type: { types: TEXT, isFilled: true },
  aggregate_type: { types: TEXT, isFilled: true },
  aggregate_id: { types: ['uuid'], isFilled: true },
  payload: { types: ['jsonb'], isFilled: true },
  created_at: { types: INSTANT, isFilled: true },
  published: { types: ['boolean'], isFilled: true },
  attempts: { types: ['integer', 'smallint'], isFilled: true },
  next_attempt_at: { types: INSTANT },
  published_at: { types: INSTANT },
  error_message: { types: TEXT, isWritten: true },
  topic: { types: TEXT },
  dead_lettered_at: { types: INSTANT, isAdded: true },
  stream_entry_id: { types: TEXT, isWritten: true, isAdded: true },
  replayed_at: { types: INSTANT, isAdded: true },
  discard_reason: { types: TEXT, isWritten: true, isAdded: true },
  discarded_by: { types: TEXT, isWritten: true, isAdded: true },
};

export const REQUIRED = {
  columns: Object.keys(COLUMNS),
  indexes: [
    'relay_outbox_fresh',
    'relay_outbox_due',
    'relay_outbox_live',
    'relay_outbox_parked',
    'relay_outbox_dead',
    'relay_outbox_dead_at',
    'relay_outbox_with_entry',
    'relay_outbox_without_entry',
  ],
  tables: ['relay_owner', 'relay_claim_lock', 'relay_epoch_lock', 'relay_prune_lock'],
} as const;

export const NO_TABLE = 'table identity.outbox';

/** What is missing before the relay can work with this table; empty when nothing is. */
export async function missingFromTable(client: Queryable): Promise<string[]> {
  const { rows } = await client.query<{ columns: string[]; indexes: string[]; tables: string[] }>(
    `SELECT array(SELECT attname::text FROM pg_attribute WHERE attrelid = to_regclass('identity.outbox')
              AND attnum > 0 AND NOT attisdropped) AS columns,
            array(SELECT c.relname::text FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
              WHERE i.indrelid = to_regclass('identity.outbox') AND i.indisvalid) AS indexes,
            array(SELECT relname::text FROM pg_class WHERE relnamespace = to_regnamespace('identity')) AS tables`,
  );
  const { columns = [], indexes = [], tables = [] } = rows[0] ?? {};
  if (columns.length === 0) return [NO_TABLE];
  return [
    ...REQUIRED.columns.filter((it) => !columns.includes(it)).map((it) => `column ${it}`),
    ...REQUIRED.indexes.filter((it) => !indexes.includes(it)).map((it) => `index ${it}`),
    ...REQUIRED.tables.filter((it) => !tables.includes(it)).map((it) => `table identity.${it}`),
  ];
}

export const lacks = (missing: readonly string[]): string =>
  `${missing.includes(NO_TABLE) ? 'this database' : 'the outbox'} lacks ${missing.join(', ')}: run "relay migrate" on this database first`;

/** By `relkind`, what is no table of rows that can be locked and kept unique. */
const KINDS: Readonly<Record<string, string>> = {
  v: 'a view',
  m: 'a materialized view',
  f: 'a foreign table',
  p: 'a partitioned table, where neither ids nor event ids are unique',
};

type Found = Readonly<{
  kind: string;
  children: number;
  /** Catalogs of extensions that have rows elsewhere, where there are such. */
  timescale: string | null;
  citus: string | null;
  rules: string[];
  columns: { name: string; type: string; length: number | null; isNullable: boolean; isGenerated: boolean }[];
  unique: string[];
  /** Indexes of the relay's that are another table's, as where a copy has taken the place of the outbox. */
  elsewhere: { index: string; owner: string }[];
}>;

/**
 * What has to be changed by hand before the relay can work with the table, or adopt it; empty when nothing has to be, or
 * there is no table. Each names what it is about, and what to do.
 */
export async function unsuitableInTable(client: Queryable): Promise<string[]> {
  const found = await readTable(client);
  if (found === undefined) return [];
  const { kind, children, rules, columns, unique, elsewhere } = found;
  const extension = await extensionOf(client, found);
  if (extension !== undefined)
    return [
      `identity.outbox belongs to ${extension}, which has its rows elsewhere: the relay needs an ordinary table`,
    ];
  if (kind !== 'r')
    return [`identity.outbox is ${KINDS[kind] ?? `of kind ${kind}`}: the relay needs an ordinary table`];
  if (children > 0)
    return [
      'identity.outbox has tables that inherit from it, so that its ids are not unique: the relay needs one table',
    ];
  const problems = rules.map(
    (rule) => `rule ${rule} rewrites the statements on identity.outbox: drop it, or make it a trigger`,
  );
  for (const [name, { types, isWritten, isAdded }] of Object.entries(COLUMNS)) {
    const column = columns.find((it) => it.name === name);
    if (column === undefined) {
      if (!isAdded) problems.push(`identity.outbox has no column ${name} (${types[0]}): add it`);
      continue;
    }
    const { type, length, isGenerated } = column;
    const expected = `the relay needs ${types.join(' or ')}`;
    if (isGenerated) problems.push(`column ${name} is generated: the relay has to write it`);
    else if (!types.includes(type))
      problems.push(`column ${name} is ${type}, ${expected}: ${remedyFor(name, type)}`);
    else if (isWritten && length !== null)
      problems.push(
        `column ${name} has a limit of ${length} characters, and reasons may be longer: ${alter(name, 'text')}`,
      );
  }
  for (const { index, owner } of elsewhere)
    problems.push(
      `index ${index} belongs to table ${owner}: ALTER INDEX identity.${index} RENAME TO former_${index}`,
    );
  for (const name of ['id', 'event_id']) {
    if (columns.some((it) => it.name === name) && !unique.includes(name))
      problems.push(
        `column ${name} has no unique index of its own: CREATE UNIQUE INDEX CONCURRENTLY ON identity.outbox (${name})`,
      );
  }
  return problems;
}

const alter = (name: string, type: string, using = '') =>
  `ALTER TABLE identity.outbox ALTER COLUMN ${name} TYPE ${type}${using && ` USING ${using}`}`;

function remedyFor(name: string, type: string): string {
  const [wanted = 'text'] = COLUMNS[name]?.types ?? [];
  // It is for the author of the times to say what they mean.
  if (type === 'timestamp without time zone' && wanted === INSTANT[0])
    return alter(name, 'timestamptz', `${name} AT TIME ZONE 'UTC'`);
  return alter(name, wanted, wanted === 'text' ? `${name}::text` : `${name}::text::${wanted}`);
}

async function readTable(client: Queryable): Promise<Found | undefined> {
  const { rows } = await client.query<Found>(`
    SELECT c.relkind::text AS kind,
      (SELECT count(*)::int FROM pg_inherits WHERE inhparent = c.oid) AS children,
      to_regclass('_timescaledb_catalog.hypertable')::text AS timescale, to_regclass('pg_dist_partition')::text AS citus,
      array(SELECT rulename::text FROM pg_rewrite WHERE ev_class = c.oid AND ev_type <> '1' ORDER BY 1) AS rules,
      array(SELECT json_build_object('name', a.attname, 'isNullable', NOT a.attnotnull,
              'isGenerated', a.attgenerated <> '', 'type', CASE t.typtype WHEN 'e' THEN 'enum' ELSE format_type(t.oid, NULL) END,
              'length', CASE WHEN t.typname = 'varchar' AND coalesce(nullif(a.atttypmod, -1), own.typtypmod) > 4
                             THEN coalesce(nullif(a.atttypmod, -1), own.typtypmod) - 4 END)
            FROM pg_attribute a JOIN pg_type own ON own.oid = a.atttypid
            -- A domain is as good as what it is made of.
            JOIN pg_type t ON t.oid = CASE own.typtype WHEN 'd' THEN own.typbasetype ELSE own.oid END
            WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) AS columns,
      array(SELECT a.attname::text FROM pg_index i JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = i.indkey[0]
            WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid AND i.indnkeyatts = 1 AND i.indpred IS NULL) AS unique,
      array(SELECT json_build_object('index', o.relname, 'owner', i.indrelid::regclass)
            FROM pg_index i JOIN pg_class o ON o.oid = i.indexrelid
            WHERE o.relnamespace = c.relnamespace AND i.indrelid <> c.oid
              AND o.relname = ANY (ARRAY[${REQUIRED.indexes.map((it) => `'${it}'`).join()}])) AS elsewhere
    FROM pg_class c WHERE c.oid = to_regclass('identity.outbox')`);
  return rows[0];
}

/** An extension to which the table belongs. */
async function extensionOf(client: Queryable, { timescale, citus }: Found): Promise<string | undefined> {
  const isThere = async (query: string) => (await client.query(query)).rowCount === 1;
  if (timescale !== null) {
    const hypertable = `SELECT FROM ${timescale} WHERE schema_name = 'identity' AND table_name = 'outbox'`;
    if (await isThere(hypertable)) return 'TimescaleDB';
  }
  if (citus !== null) {
    if (await isThere(`SELECT FROM ${citus} WHERE logicalrelid = 'identity.outbox'::regclass`))
      return 'Citus';
  }
  return undefined;
}

/** Columns that must have a value in every row, and may be null by the table's definition. */
export async function nullableColumns(client: Queryable): Promise<string[]> {
  const found = await readTable(client);
  return (found?.columns ?? [])
    .filter(({ name, isNullable }) => isNullable && COLUMNS[name]?.isFilled)
    .map(({ name }) => name);
}

/** Of these columns, those that are null in some row. It may have to read the whole table. */
export async function columnsWithNulls(client: Queryable, columns: readonly string[]): Promise<string[]> {
  const { rows } = await client.query<Record<string, boolean>>(
    `SELECT ${columns.map((it) => `EXISTS (SELECT FROM identity.outbox WHERE "${it}" IS NULL) AS "${it}"`).join(', ')}`,
  );
  return columns.filter((it) => rows[0]?.[it]);
}

export const nullsIn = (columns: readonly string[]): string =>
  `${columns.join(', ')} of identity.outbox ${columns.length > 1 ? 'are' : 'is'} null in some rows, which would never be published: give them a value, and SET NOT NULL`;

/**
 * Of the rows that no pod has and that have waited for a minute, those that a session of another role keeps locked.
 *
 * The order names the index: without it the planner took the platform's index on `next_attempt_at`, and read all dead rows.
 */
export async function lockedRows(
  client: Queryable,
): Promise<Readonly<{ rows: number; pid: number; role: string }> | undefined> {
  const { rows } = await client.query<{ rows: number; pid: number; role: string }>(`
    WITH waiting AS MATERIALIZED (
      (SELECT o.xmax, o.created_at FROM identity.outbox o WHERE NOT o.published AND ${FRESH('o')} ORDER BY o.id LIMIT 100)
      UNION ALL
      (SELECT o.xmax, o.created_at FROM identity.outbox o WHERE ${LIVE('o')} AND ${PARKED('o')}
       ORDER BY o.aggregate_type, o.aggregate_id, o.id LIMIT 100)
    )
    SELECT count(*)::int AS rows, a.pid, a.usename AS role
    FROM waiting o
    JOIN pg_locks l ON l.locktype = 'transactionid' AND l.granted AND l.transactionid = o.xmax
    JOIN pg_stat_activity a ON a.pid = l.pid AND a.usename <> current_user
    WHERE o.created_at < now() - interval '1 minute' GROUP BY a.pid, a.usename ORDER BY 1 DESC LIMIT 1`);
  return rows[0];
}

/** Why the order of ids may not be the order in which rows are written; undefined where nothing is known. */
export async function idsOutOfOrder(client: Queryable): Promise<string | undefined> {
  const { rows } = await client.query<{
    sequence: string | null;
    cache: number;
    increment: number;
    cycles: boolean;
  }>(`
    SELECT s.seqrelid::regclass::text AS sequence, s.seqcache::float8 AS cache, s.seqincrement::float8 AS increment,
           s.seqcycle AS cycles
    FROM pg_attribute a
    LEFT JOIN pg_attrdef f ON f.adrelid = a.attrelid AND f.adnum = a.attnum
    -- The sequence that a default names, or that an identity column owns.
    LEFT JOIN pg_depend d ON d.classid = 'pg_attrdef'::regclass AND d.objid = f.oid AND d.deptype = 'n'
      AND d.refclassid = 'pg_class'::regclass AND EXISTS (SELECT FROM pg_sequence WHERE seqrelid = d.refobjid)
    LEFT JOIN pg_depend i ON a.attidentity <> '' AND i.refclassid = 'pg_class'::regclass AND i.refobjid = a.attrelid
      AND i.refobjsubid = a.attnum AND i.deptype = 'i' AND i.classid = 'pg_class'::regclass
    LEFT JOIN pg_sequence s ON s.seqrelid = coalesce(d.refobjid, i.objid)
    WHERE a.attrelid = 'identity.outbox'::regclass AND a.attname = 'id'`);
  const { sequence = null, cache = 1, increment = 1, cycles = false } = rows[0] ?? {};
  if (sequence === null)
    return 'the column id has no sequence: events are published in the order of ids, wherever these come from';
  const alterTo = (what: string) => `ALTER SEQUENCE ${sequence} ${what}`;
  if (increment < 0)
    return `${sequence} counts down: later events are published first; ${alterTo('INCREMENT BY 1')}`;
  if (cache > 1)
    return `${sequence} hands out ids in blocks (CACHE ${cache}): their order is not that of the inserts; ${alterTo('CACHE 1')}`;
  if (cycles) return `${sequence} begins again when it has ended (CYCLE): ${alterTo('NO CYCLE')}`;
  return undefined;
}

/** The topic of rows that name none, where the column's default is a plain text. */
export async function topicByDefault(client: Queryable): Promise<string | undefined> {
  const expression = (await defaultsOf(client)).get('topic') ?? '';
  return /^'((?:[^']|'')*)'::/.exec(expression)?.[1]?.replaceAll("''", "'");
}

/** The columns' defaults, as expressions. */
async function defaultsOf(client: Queryable): Promise<ReadonlyMap<string, string>> {
  const { rows } = await client.query<{ name: string; expression: string }>(
    `SELECT a.attname::text AS name, pg_get_expr(f.adbin, f.adrelid) AS expression FROM pg_attrdef f
     JOIN pg_attribute a ON a.attrelid = f.adrelid AND a.attnum = f.adnum
     WHERE f.adrelid = 'identity.outbox'::regclass ORDER BY a.attnum`,
  );
  return new Map(rows.map(({ name, expression }) => [name, expression]));
}

/** The value that a new row must have in columns of the relay, where it names none. */
const EXPECTED_DEFAULTS: Readonly<Record<string, RegExp>> = {
  published: /^false$/,
  attempts: /^0$/,
  next_attempt_at: /^NULL/,
  dead_lettered_at: /^NULL/,
};

/** Columns whose default makes a new row look as if the relay had been at it. */
export async function misleadingDefaults(client: Queryable): Promise<string[]> {
  const defaults = [...(await defaultsOf(client))];
  return defaults.filter(([name, it]) => EXPECTED_DEFAULTS[name]?.test(it) === false).map(([name]) => name);
}

/**
 * Roles beside the owner that may insert every column, also those that say what became of an event: an entry id that
 * never was, or who discarded it.
 */
export async function rolesThatInsertAll(client: Queryable): Promise<string[]> {
  const { rows } = await client.query<{ role: string }>(
    `SELECT DISTINCT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE pg_get_userbyid(a.grantee)::text END AS role
     FROM pg_class c, aclexplode(c.relacl) a
     WHERE c.oid = to_regclass('identity.outbox') AND a.privilege_type = 'INSERT' AND a.grantee <> c.relowner
     ORDER BY 1 LIMIT 10`,
  );
  return rows.map(({ role }) => role);
}
