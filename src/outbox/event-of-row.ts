import type pg from 'pg';
import { isNoAnswer } from '../connections/pool-health.ts';
import { ATTEMPTS } from './conditions.ts';

/**
 * Makes an OutboxEvent of a row, in SQL. A producer may write anything into the row, so the SQL measures a row before any
 * of it leaves PostgreSQL. It withholds what is too large, or cannot be printed, and the event says why (`withheld`).
 */

/** Bytes of text that one claim fetches; the pod needs a few times as much memory. One event is always taken. */
const CLAIM_BYTES = 8 * 1024 * 1024;
/** A payload with at most so many bytes in the table need not be unpacked to be weighed. */
const SMALL_BYTES = 1_000;
/** So many unpacked bytes print to 200 MB at most, within 2 s. Looking for long numbers takes as long as 30 prints. */
const HARMLESS_BYTES = 16_000;
/** Longer texts of an event whose payload is withheld are cut. */
const CUT_BYTES = 800;
const CUT_CHARACTERS = 200;
/** A tenant or a correlation is a uuid; what is longer than this is something else. */
const MAX_ID_CHARACTERS = 200;
/** Headers that take more in the table are not read. */
const MAX_HEADERS_BYTES = 8_192;
/** W3C Trace Context: vendors must pass on so much of a `tracestate`, and need not pass on more. */
const MAX_TRACESTATE_BYTES = 512;

/** Far longer than PostgreSQL takes to print what may be published (10 MB/s at least, even where it is busy). */
export const printDeadlineMs = (maxEventBytes: number) => 5_000 + Math.ceil(maxEventBytes / 10_000);

const ISO_8601 = `MM-DD"T"HH24:MI:SS.US"Z"`;

/** ISO 8601; years before 1 and after 9999 are expanded ones, with sign and six digits: 44 BC is -000043. */
const OCCURRED_AT = `
  CASE WHEN o.created_at >= '0001-01-01 00:00:00+00' AND o.created_at < '10000-01-01 00:00:00+00'
       THEN to_char(o.created_at AT TIME ZONE 'UTC', 'YYYY-${ISO_8601}')
       WHEN isfinite(o.created_at)
       THEN (SELECT CASE WHEN year < 0 THEN '-' ELSE '+' END || lpad(abs(year)::text, 6, '0')
             FROM (SELECT CASE WHEN y < 0 THEN y + 1 ELSE y END::int AS year
                   FROM extract(year FROM o.created_at AT TIME ZONE 'UTC') y) years)
            || to_char(o.created_at AT TIME ZONE 'UTC', '-${ISO_8601}')
       ELSE o.created_at::text END`;

/** Bytes of types and topic; PostgreSQL knows them without reading the texts. `$1` is the topic of rows that have none. */
const TEXT_BYTES = (row: string) =>
  `coalesce(octet_length(${row}.event_type), 0)::bigint + octet_length(${row}.aggregate_type)
   + octet_length(coalesce(${row}.topic, $1))`;

/**
 * Whether a text is UTF-8. A database in SQL_ASCII stores any bytes, and refuses to send those that are no UTF-8: one such
 * text would fail every statement that returns it. In any other encoding this costs nothing.
 */
const isUtf8 = (text: string) => `
  CASE WHEN current_setting('server_encoding') <> 'SQL_ASCII' THEN true ELSE ${text} ~ ${UTF8} END`;
/** Regular expression of UTF-8, over bytes: in SQL_ASCII each byte is a character. */
const UTF8 = `'^(${[
  String.raw`[\x01-\x7f]`,
  String.raw`[\xc2-\xdf][\x80-\xbf]`,
  String.raw`\xe0[\xa0-\xbf][\x80-\xbf]`,
  String.raw`[\xe1-\xec\xee\xef][\x80-\xbf]{2}`,
  String.raw`\xed[\x80-\x9f][\x80-\xbf]`,
  String.raw`\xf0[\x90-\xbf][\x80-\xbf]{2}`,
  String.raw`[\xf1-\xf3][\x80-\xbf]{3}`,
  String.raw`\xf4[\x80-\x8f][\x80-\xbf]{2}`,
].join('|')})*$'`;

/** The text as it is; one that is no UTF-8 with its bytes beyond ASCII as `\\nnn`. */
export const printable = (text: string) =>
  `CASE WHEN ${isUtf8(text)} THEN ${text} ELSE encode(convert_to(${text}, 'SQL_ASCII'), 'escape') END`;

/** The type of an aggregate, by which its rows are found again: `storedType` undoes it. */
export const printableType = (text: string) =>
  `CASE WHEN ${isUtf8(text)} THEN ${text} ELSE '\\x' || encode(convert_to(${text}, 'SQL_ASCII'), 'hex') END`;
/**
 * Of the name of an encoding `convert_from` takes the collation "C" as well, and so would a comparison with the column: then no
 * index has the order that is asked for, and where the database has another collation, pages do not follow one another.
 * What a subquery answers has the default collation only if the column has no other.
 */
export const storedType = (text: string) => `
  CASE WHEN current_setting('server_encoding') = 'SQL_ASCII' AND ${text} ~ '^\\\\x([0-9a-f]{2})+$'
       THEN (SELECT convert_from(decode(substr(${text}, 3), 'hex'), 'SQL_ASCII') COLLATE "default") ELSE ${text} END`;

const cut = (text: string) =>
  `CASE WHEN octet_length(${text}) > ${CUT_BYTES} THEN left(${text}, ${CUT_CHARACTERS}) || '...' ELSE ${text} END`;

/** Why a row cannot be published as it is, or null. `payload` is its text, null where it may be too long to print. */
const flaw = (row: string, payload: string) => {
  const isNull = (column: string) => `WHEN ${row}.${column} IS NULL THEN '${column} is null'`;
  const isForeign = (column: string, text = `${row}.${column}`) =>
    `WHEN NOT ${isUtf8(text)} THEN '${column} has bytes that are no UTF-8'`;
  return `CASE ${['event_type', 'payload', 'created_at'].map(isNull).join(' ')}
    ${isForeign('payload', payload)} ${['event_type', 'aggregate_type', 'topic'].map((it) => isForeign(it)).join(' ')} END`;
};

const idFrom = (member: string) =>
  `CASE WHEN jsonb_typeof(${member}) = 'string' AND length(${member} #>> '{}') BETWEEN 1 AND ${MAX_ID_CHARACTERS}
        THEN ${member} #>> '{}' END`;

const textOf = (member: string) =>
  `CASE WHEN jsonb_typeof(${member}) = 'string' THEN (${member}) #>> '{}' END`;

/**
 * `{traceparent, tracestate?}` of two texts, or null where the first is no valid traceparent. Without a regular
 * expression, which takes twice as long.
 */
const traceContext = (parent: string, state: string) => `
  CASE WHEN octet_length(${parent}) = 55 AND ${parent} LIKE '${[2, 32, 16, 2].map((n) => '_'.repeat(n)).join('-')}'
            AND translate(${parent}, '0123456789abcdef', '') = '---' AND left(${parent}, 2) <> 'ff'
            AND substr(${parent}, 4, 32) <> '${'0'.repeat(32)}' AND substr(${parent}, 37, 16) <> '${'0'.repeat(16)}'
       THEN jsonb_strip_nulls(jsonb_build_object('traceparent', ${parent}, 'tracestate',
         CASE WHEN octet_length(${state}) BETWEEN 1 AND ${MAX_TRACESTATE_BYTES}
              THEN CASE WHEN position('=' IN ${state}) > 1 AND ${state} !~ '[^ -~]' THEN ${state} END END)) END`;

/**
 * The row's `headers`, or null where the table has no such column: a name that the inner query does not know is that
 * of the outer one. A column of another type, or far too large, is none of ours.
 */
const HEADERS = `
  (SELECT CASE WHEN pg_typeof(headers) = 'jsonb'::regtype AND pg_column_size(headers) <= ${MAX_HEADERS_BYTES}
               THEN to_jsonb(headers) END FROM (SELECT o.*) own)`;

/**
 * Selects the rows of `source` as events; `$1` is the topic of rows that have none. Each payload is printed once.
 *
 * The aggregate's type is never cut, since it names the aggregate; the indexes that it is in bound it.
 *
 * @param printed condition of the rows whose payload is read
 * @param otherwise why the others are withheld, an expression
 * @param unasked print without asking first whether the text may be within the limit
 */
export const eventsOf = (
  source: string,
  maxEventBytes: number,
  { columns = '', printed = 'true', otherwise = 'NULL', unasked = false } = {},
) => {
  const whole = `json.bytes <= ${maxEventBytes} AND json.flaw IS NULL`;
  return `
  SELECT ${columns} o.id::text AS "id", o.event_id AS "eventId",
    CASE WHEN ${whole} THEN o.event_type ELSE ${printable(cut("coalesce(o.event_type, '')"))} END AS "eventType",
    ${printableType('o.aggregate_type')} AS "aggregateType", o.aggregate_id AS "aggregateId",
    CASE WHEN ${whole} THEN coalesce(o.topic, $1) ELSE ${printable(cut('coalesce(o.topic, $1)'))} END AS "topic",
    CASE WHEN ${whole} THEN json.text ELSE 'null' END AS "payload",
    CASE WHEN ${whole} THEN NULL ELSE coalesce(
      json.flaw, 'event has ' || coalesce(json.bytes::text, CASE WHEN NOT json.may_fit THEN 'far too many' END)
      || ' bytes; RELAY_MAX_EVENT_BYTES allows ${maxEventBytes}', ${otherwise}
    ) END AS "withheld",
    ${ATTEMPTS('o')} AS "attempts", coalesce(${OCCURRED_AT}, '') AS "occurredAt",
    ${printable(idFrom('json.tenant'))} AS "tenantId", ${printable(idFrom('json.correlation'))} AS "correlationId",
    coalesce(header.trace, json.trace) AS "trace"
  FROM ${source} o
  CROSS JOIN (SELECT NULL::jsonb AS headers) outer_headers
  LEFT JOIN LATERAL (
    SELECT ${traceContext('t.parent', 't.state')} AS trace
    FROM (SELECT ${textOf("h.members->'traceparent'")} AS parent, ${textOf("h.members->'tracestate'")} AS state
          FROM (SELECT ${HEADERS} AS members OFFSET 0) h OFFSET 0) t
    OFFSET 0
  ) header ON true
  LEFT JOIN LATERAL (
    SELECT p.*, octet_length(p.text) + ${TEXT_BYTES('o')} AS bytes, ${flaw('o', 'p.text')} AS flaw,
      ${traceContext('p.parent', `(${textOf("o.payload #> '{metadata,tracestate}'")})`)} AS trace
    FROM (SELECT f.may_fit, CASE WHEN f.may_fit THEN o.payload::text END AS text,
                 CASE WHEN f.may_fit THEN ${textOf("o.payload #> '{metadata,traceparent}'")} END AS parent,
                 o.payload->'tenant_id' AS tenant, o.payload->'correlation_id' AS correlation
          FROM (SELECT ${unasked ? 'true' : mayFit('o.payload', maxEventBytes)} AS may_fit OFFSET 0) f
          WHERE ${printed} OFFSET 0) p
    OFFSET 0
  ) json ON true`;
};

/** Size of a payload without its compression; nothing is printed. */
const unpacked = (payload: string) => `pg_column_size(${payload} #> '{}')`;

/** Numbers that are short in jsonb and long in print: beyond 10^50, or within 10^-50 of zero. */
const LONG_NUMBERS = `'strict $.** ? (@.type() == "number" && (@ > 1e50 || @ < -1e50 || (@ < 1e-50 && @ > -1e-50 && @ != 0)))'`;

/**
 * Whether a payload may be within the limit as text, asked before it is printed: 100 kB of jsonb, 2 kB in the table,
 * may hold 9,000 numbers like 1e131071, and PostgreSQL prints 1 GB of digits before it gives up, for 5 to 25 s in
 * which it heeds no deadline. A payload within the limit always passes: its text has at least an eighth of its bytes, and a
 * long number counts for at most 16 times its digits.
 */
const mayFit = (payload: string, maxEventBytes: number) => `
  CASE WHEN ${unpacked(payload)} <= ${HARMLESS_BYTES} THEN true
       WHEN ${unpacked(payload)} > ${8 * maxEventBytes} THEN false
       ELSE (SELECT coalesce(sum(scale(n) + CASE WHEN n < 1e50 THEN 50 WHEN n < 1e200 THEN 200 WHEN n < 1e1000 THEN 1000
                                                 WHEN n < 1e10000 THEN 10000 ELSE 131072 END), 0) <= ${16 * maxEventBytes}
             FROM (SELECT abs(number::numeric) AS n FROM jsonb_path_query(${payload}, ${LONG_NUMBERS}) number) numbers) END`;

/** What `weighed` needs of a row. */
export const WEIGHT_COLUMNS = (row: string) =>
  `${row}.payload, coalesce(pg_column_size(${row}.payload), 0) AS stored_bytes, ${TEXT_BYTES(row)} AS text_bytes`;

/**
 * The first rows of `source`, by id, that together are no more than a claim may fetch; one at least. First by what they
 * take in the table, which needs no unpacking; of those only, by what they are unpacked: a payload of 10 MB may take
 * 100 kB in the table.
 */
export const weighed = (source: string, maxEventBytes: number) => {
  const within = (rows: string) =>
    `SELECT * FROM (SELECT r.*, sum(bytes) OVER (ORDER BY id ROWS UNBOUNDED PRECEDING) - bytes AS bytes_before
                    FROM (${rows}) r) ranked WHERE bytes_before < ${CLAIM_BYTES}`;
  const weights = (payloadBytes: string) =>
    `CASE WHEN text_bytes > ${maxEventBytes} THEN 0 ELSE text_bytes + ${payloadBytes} END AS bytes`;
  const stored = `SELECT s.*, ${weights('stored_bytes')} FROM ${source} s`;
  return within(`
    SELECT id, after,
      ${weights(`CASE WHEN stored_bytes <= ${SMALL_BYTES} THEN stored_bytes ELSE ${unpacked('payload')} END`)}
    FROM (${within(stored)}) s`);
};

/**
 * - `22021`, `22P05`: it has characters that UTF-8 does not have (see isUtf8 for the common case)
 * - `54000`: the text is longer than PostgreSQL's 1 GB
 * - `54001`: it is nested deeper than PostgreSQL's stack allows
 * - `53200`: there is no memory for it
 * - `57014`: printing takes longer than a statement may
 * - `XX000`, `XX001`: the row is damaged
 */
const AT_FAULT = new Set(['22021', '22P05', '54000', '54001', '53200', '57014', 'XX000', 'XX001']);

/**
 * Whether a statement may have failed by the payload of a row that it was to print. One that printed for longer than
 * its answer was waited for has no code: PostgreSQL heeds no deadline while it prints.
 */
export const payloadMayBeAtFault = (error: unknown): boolean =>
  AT_FAULT.has((error as pg.DatabaseError | null)?.code ?? '') || isNoAnswer(error);
