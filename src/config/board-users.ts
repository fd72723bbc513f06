/** Who may use the dashboard, as RELAY_BOARD_USERS says. Imports nothing. */

/** A viewer may look, an operator may act as well. */
export const ROLES = ['viewer', 'operator'] as const;
export type Role = (typeof ROLES)[number];

export type BoardUser = Readonly<{ name: string; role: Role; hash: string }>;

/** What a name may be: nothing that would need quoting in a cookie, a log line or a page. */
export const USER_NAME = { expected: '1 to 64 of A-Z a-z 0-9 . _ @ -', pattern: /^[A-Za-z0-9._@-]{1,64}$/ };

/**
 * `scrypt.<log2 N>.<r>.<p>.<salt>.<key>`, both in base64url. No `$`, which docker compose would take for a variable,
 * nor anything else that means something in an .env file, a shell or YAML. The costs are bounded: 2^17 * 8 * 128
 * bytes are 128 MiB for one log-in.
 */
export const PASSWORD_HASH = /^scrypt\.(1[0-7])\.(8)\.([1-4])\.([A-Za-z0-9_-]{22,86})\.([A-Za-z0-9_-]{43})$/;

const MAX_USERS = 200;

/** The entry of a user; `relay hash-password` prints it. */
export const entryOf = ({ name, role, hash }: BoardUser): string => `${name}:${role}:${hash}`;

/**
 * Users from entries that are separated by white space or commas.
 * @returns them, or what is wrong, without quoting an entry
 */
export function parseBoardUsers(text: string): { users: BoardUser[] } | { problem: string } {
  const users: BoardUser[] = [];
  const entries = text.split(/[\s,]+/).filter((entry) => entry !== '');
  if (entries.length > MAX_USERS) return { problem: `has more than ${MAX_USERS} entries` };
  for (const [index, entry] of entries.entries()) {
    const [name = '', roleName = '', hash = '', ...rest] = entry.split(':');
    const wrong = (what: string) => ({ problem: `entry ${index + 1} ${what}` });
    const role = ROLES.find((it) => it === roleName);
    if (!USER_NAME.pattern.test(name)) return wrong(`has a name that is not ${USER_NAME.expected}`);
    if (users.some((user) => user.name === name)) return wrong('has a name that was there before');
    if (role === undefined) return wrong(`has a role that is none of ${ROLES.join(', ')}`);
    if (rest.length > 0 || !PASSWORD_HASH.test(hash)) return wrong('has no hash of "relay hash-password"');
    users.push({ name, role, hash });
  }
  return { users };
}
