/** Where a list goes on: opaque to the caller, who hands it back. */

export class CursorError extends Error {
  override readonly name = 'CursorError';
  constructor() {
    super('the cursor is not one that was answered for this question');
  }
}

export const toCursor = (place: Readonly<Record<string, string>>): string =>
  Buffer.from(JSON.stringify(place)).toString('base64url');

/**
 * Formats of a cursor's members. A value that PostgreSQL or Redis could not read was never in a cursor of ours. Other
 * members may be any text.
 */
const NUMBER = /^-?\d{1,18}$/;
const ENTRY_ID = /^\d{1,18}-\d{1,18}$/;
const TIME = /^\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d+)?(Z|[+-](0\d|1[0-5])(:?[0-5]\d){0,2})$/i;
const FORMATS: Readonly<Record<string, RegExp>> = {
  ...{ id: NUMBER, readUs: NUMBER, readId: NUMBER, entryId: ENTRY_ID, entryRow: NUMBER },
  ...{ lateUs: NUMBER, lateId: NUMBER, lateEntryId: ENTRY_ID, lateEntryRow: NUMBER },
  ...{ at: TIME, finalizedAt: TIME },
  aggregateId: /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i,
};

function isReadable(member: string, value: unknown): boolean {
  if (typeof value !== 'string' || value.includes('\u0000')) return false;
  const format = FORMATS[member];
  if (format === undefined) return true;
  return format.test(value) && (format !== TIME || isOnCalendar(value));
}

/** No 30th of February, no 25 o'clock. */
function isOnCalendar(time: string): boolean {
  const utc = new Date(`${time.slice(0, 10)}T${time.slice(11, 19)}Z`);
  return !Number.isNaN(utc.getTime()) && utc.toISOString().slice(0, 10) === time.slice(0, 10);
}

/** @throws {CursorError} when `cursor` is not a place with these members */
export function fromCursor<T>(cursor: string, members: readonly (keyof T & string)[]): T {
  let place: unknown;
  try {
    place = JSON.parse(Buffer.from(cursor, 'base64url').toString());
  } catch {
    throw new CursorError();
  }
  if (typeof place !== 'object' || place === null) throw new CursorError();
  const found = place as Record<string, unknown>;
  if (!members.every((member) => isReadable(member, found[member]))) throw new CursorError();
  return found as T;
}
