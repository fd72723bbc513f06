/** Where a list goes on: opaque to whoever hands it back. */

export class CursorError extends Error {
  override readonly name = 'CursorError';
  constructor() {
    super('the cursor is not one that was answered for this question');
  }
}

export const toCursor = (place: Readonly<Record<string, string>>): string =>
  Buffer.from(JSON.stringify(place)).toString('base64url');

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
  if (!members.every((member) => typeof found[member] === 'string')) throw new CursorError();
  return found as T;
}
