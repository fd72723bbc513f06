import type { CustomTypesConfig } from 'pg';

/**
 * How the relay reads what PostgreSQL answers. Whoever embeds it may have changed node-postgres' parsers for the whole
 * process (bigint as number, times as strings), and its statements rely on these; whatever is not named stays text.
 */
const asNumber = (text: string) => Number(text);
const asIs = (text: string) => text;

/** Items of a one-dimensional array, as PostgreSQL prints it; none of ours has nulls. */
export function arrayItems(text: string): string[] {
  const items: string[] = [];
  for (const [, quoted, plain] of text.slice(1, -1).matchAll(/"((?:[^"\\]|\\.)*)"|([^,]+)/gs))
    items.push(quoted === undefined ? (plain as string) : quoted.replace(/\\(.)/gs, '$1'));
  return items;
}

/** By the type's OID, see pg_type. */
const PARSERS = new Map<number, (text: string) => unknown>([
  [16, (text) => text === 't'],
  ...[21, 23, 26, 700, 701].map((oid) => [oid, asNumber] as const), // int2, int4, oid, float4, float8
  ...[114, 3802].map((oid) => [oid, JSON.parse] as const), // json, jsonb
  ...[1082, 1114, 1184].map((oid) => [oid, (text: string) => new Date(text)] as const), // date, timestamp, timestamptz
  ...[1002, 1003, 1009, 1015, 2951].map((oid) => [oid, arrayItems] as const), // char[], name[], text[], varchar[], uuid[]
]);

export const RESULT_TYPES = {
  getTypeParser: (oid: number) => PARSERS.get(oid) ?? asIs,
} as CustomTypesConfig;
