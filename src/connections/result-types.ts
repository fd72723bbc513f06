import type { CustomTypesConfig } from 'pg';

/**
 * How the relay reads what PostgreSQL answers. The program that embeds it may have changed node-postgres' parsers for the whole
 * process (bigint as number, times as strings), and its statements rely on these; whatever is not named stays text.
 */
const asNumber = (text: string) => Number(text);
const asIs = (text: string) => text;

/** Items of a one-dimensional array, as PostgreSQL prints it; none of ours has nulls. */
function arrayItems(text: string): string[] {
  const items: string[] = [];
  for (const [, quoted, plain] of text.slice(1, -1).matchAll(/"((?:[^"\\]|\\.)*)"|([^,]+)/gs))
    items.push(quoted === undefined ? (plain as string) : quoted.replace(/\\(.)/gs, '$1'));
  return items;
}

const asArrayOf = (parse: (text: string) => unknown) => (text: string) => arrayItems(text).map(parse);
const asBoolean = (text: string) => text === 't';
const asDate = (text: string) => new Date(text);

/** Types by their OID (see pg_type), those of arrays beside those of their items. */
const PARSERS = new Map<number, (text: string) => unknown>();
for (const [parse, types, arrays] of [
  [asBoolean, [16], [1000]],
  [asNumber, [21, 23, 26, 700, 701], [1005, 1007, 1028, 1021, 1022]], // int2, int4, oid, float4, float8
  [JSON.parse, [114, 3802], [199, 3807]], // json, jsonb
  [asDate, [1082, 1114, 1184], [1182, 1115, 1185]], // date, timestamp, timestamptz
  [asIs, [], [1002, 1003, 1009, 1015, 1016, 2951]], // "char", name, text, varchar, int8, uuid
] as const) {
  for (const type of types) PARSERS.set(type, parse);
  for (const type of arrays) PARSERS.set(type, asArrayOf(parse));
}

export const RESULT_TYPES = { getTypeParser: (oid: number) => PARSERS.get(oid) ?? asIs } as CustomTypesConfig;
