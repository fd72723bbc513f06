import type pg from 'pg';

/**
 * How a row becomes an OutboxEvent, in SQL. Anybody who may write the table chooses what is in it, so nothing of a
 * row leaves PostgreSQL before its size is known: what is too large, or cannot be printed at all, is withheld, and
 * the event says why.
 */

/** Events of one claim, as text: a few times as much in the pod, in each of its lanes. The first is always taken. */
const CLAIM_BYTES = 8 * 1024 * 1024;
/** A payload of so few bytes in the table is no text worth weighing. */
const SMALL_BYTES = 1_000;
/** Texts that are withheld leave so much behind. */
const CUT_BYTES = 800;
const CUT_CHARACTERS = 200;
/** A tenant or a correlation is a uuid; what is longer than this is something else. */
const MAX_ID_CHARACTERS = 200;

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

/** The sizes of these are known without reading them. `$1` is the topic of rows that have none. */
const TEXT_BYTES = (row: string) =>
  `octet_length(${row}.event_type)::bigint + octet_length(${row}.aggregate_type)
   + octet_length(coalesce(${row}.topic, $1))`;

const cut = (text: string) =>
  `CASE WHEN octet_length(${text}) > ${CUT_BYTES} THEN left(${text}, ${CUT_CHARACTERS}) || '...' ELSE ${text} END`;

const idFrom = (member: string) =>
  `CASE WHEN jsonb_typeof(${member}) = 'string' AND length(${member} #>> '{}') BETWEEN 1 AND ${MAX_ID_CHARACTERS}
        THEN ${member} #>> '{}' END`;

/**
 * Selects the rows of `source` as events; `$1` is the topic of rows that have none. Each payload is printed once.
 *
 * The aggregate's type is never cut, since it names the aggregate; the indexes that it is in bound it.
 *
 * @param printed condition of the rows whose payload is looked at
 * @param otherwise why the others are withheld, an expression
 */
export const eventsOf = (
  source: string,
  maxEventBytes: number,
  { columns = '', printed = 'true', otherwise = 'NULL' } = {},
) => `
  SELECT ${columns} o.id::text AS "id", o.event_id AS "eventId",
    CASE WHEN size.fits THEN o.event_type ELSE ${cut('o.event_type')} END AS "eventType",
    o.aggregate_type AS "aggregateType", o.aggregate_id AS "aggregateId",
    CASE WHEN size.fits THEN coalesce(o.topic, $1) ELSE ${cut('coalesce(o.topic, $1)')} END AS "topic",
    CASE WHEN size.fits THEN json.text ELSE 'null' END AS "payload",
    CASE WHEN size.fits THEN NULL ELSE coalesce(
      'event has ' || size.bytes || ' bytes; RELAY_MAX_EVENT_BYTES allows ${maxEventBytes}', ${otherwise}
    ) END AS "withheld",
    o.attempts AS "attempts", ${OCCURRED_AT} AS "occurredAt",
    ${idFrom('json.tenant')} AS "tenantId", ${idFrom('json.correlation')} AS "correlationId"
  FROM ${source} o
  LEFT JOIN LATERAL (
    SELECT o.payload::text AS text, o.payload->'tenant_id' AS tenant, o.payload->'correlation_id' AS correlation
    WHERE ${printed} OFFSET 0
  ) json ON true
  CROSS JOIN LATERAL (
    SELECT bytes, bytes <= ${maxEventBytes} AS fits
    FROM (SELECT octet_length(json.text) + ${TEXT_BYTES('o')} AS bytes OFFSET 0) b OFFSET 0
  ) size`;

/** What `weighed` needs of a row. */
export const WEIGHT_COLUMNS = (row: string) =>
  `${row}.payload, pg_column_size(${row}.payload) AS stored_bytes, ${TEXT_BYTES(row)} AS text_bytes`;

/**
 * The first rows of `source`, by id, that together are no more than a claim may fetch; one at least. Parked rows
 * weigh nothing, they are not fetched. First by what they take in the table, which needs no unpacking; of those
 * only, by their text: a payload of 10 MB may take 100 kB in the table.
 */
export const weighed = (source: string, maxEventBytes: number) => {
  const within = (rows: string) =>
    `SELECT * FROM (SELECT r.*, sum(bytes) OVER (ORDER BY id ROWS UNBOUNDED PRECEDING) - bytes AS bytes_before
                    FROM (${rows}) r) ranked WHERE bytes_before < ${CLAIM_BYTES}`;
  const stored = `SELECT s.*, CASE WHEN parked THEN 0 ELSE stored_bytes + text_bytes END AS bytes FROM ${source} s`;
  const text = `
    SELECT id, parked, CASE WHEN printed_bytes <= ${maxEventBytes} THEN printed_bytes ELSE 0 END AS bytes
    FROM (SELECT id, parked, text_bytes + CASE WHEN parked OR stored_bytes <= ${SMALL_BYTES} THEN stored_bytes
                 ELSE octet_length(payload::text) END AS printed_bytes
          FROM (${within(stored)}) s OFFSET 0) p`;
  return within(text);
};

/**
 * - `54000`: the text is longer than PostgreSQL's 1 GB; 100 kB of numbers like 1e131071 are
 * - `53200`: there is no memory for it
 * - `57014`: printing takes longer than a statement may
 * - `XX000`, `XX001`: the row is damaged
 */
const AT_FAULT = new Set(['54000', '53200', '57014', 'XX000', 'XX001']);

/** Whether a statement may have failed by the payload of a row that it was to print. */
export const payloadMayBeAtFault = (error: unknown): boolean =>
  AT_FAULT.has((error as pg.DatabaseError | null)?.code ?? '');
