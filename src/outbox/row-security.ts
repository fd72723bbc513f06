import type { Queryable } from '../connections/database.ts';

/** Rows that row level security hides from the relay are events that it never sees: an empty backlog, and no error. */

type Policy = Readonly<{
  name: string;
  permissive: boolean;
  command: string;
  condition: string | null;
  check: string | null;
}>;

/** pg_policy's letters; `*` is all of them. */
const COMMANDS = { r: 'SELECT', w: 'UPDATE', d: 'DELETE' } as const;

/**
 * How row level security hides rows from this session's role, or keeps it from changing them; undefined where it does
 * not. A condition that depends on the row counts as hiding some, since the relay cannot know
 * beforehand which.
 */
export async function hiddenRows(
  client: Queryable,
  { deletes }: { deletes: boolean },
): Promise<string | undefined> {
  const { rows } = await client.query<{ active: boolean; policies: Policy[] }>(
    `SELECT row_security_active('identity.outbox') AS active, coalesce((
       SELECT json_agg(json_build_object('name', p.polname, 'permissive', p.polpermissive, 'command', p.polcmd,
         'condition', pg_get_expr(p.polqual, p.polrelid), 'check', pg_get_expr(p.polwithcheck, p.polrelid)))
       FROM pg_policy p WHERE p.polrelid = 'identity.outbox'::regclass
         AND (0 = ANY (p.polroles) OR EXISTS (SELECT FROM unnest(p.polroles) r WHERE pg_has_role(current_user, r, 'USAGE')))
     ), '[]') AS policies`,
  );
  const { active = false, policies = [] } = rows[0] ?? {};
  if (!active) return undefined;
  const letters: (keyof typeof COMMANDS)[] = deletes ? ['r', 'w', 'd'] : ['r', 'w'];
  for (const letter of letters) {
    const those = policies.filter(({ command }) => command === '*' || command === letter);
    if (!those.some(({ permissive }) => permissive)) return `no policy lets it ${COMMANDS[letter]} any`;
    const good = new Map<Policy, boolean>();
    for (const policy of those) {
      const conditions = letter === 'w' ? [policy.condition, policy.check] : [policy.condition];
      const answers = await Promise.all(conditions.map((it) => it === null || isTrueForAll(client, it)));
      good.set(policy, answers.every(Boolean));
    }
    const restricting = those.find((it) => !it.permissive && !good.get(it));
    if (restricting !== undefined) return `policy ${restricting.name} hides rows from ${COMMANDS[letter]}`;
    const permissive = those.filter((it) => it.permissive);
    if (!permissive.some((it) => good.get(it)))
      return `${permissive.map(({ name }) => `policy ${name}`).join(', ')} may hide rows from ${COMMANDS[letter]}`;
  }
  return undefined;
}

/** Asked without a row: a condition that needs one fails. It is what PostgreSQL evaluates for this role anyway. */
async function isTrueForAll(client: Queryable, condition: string): Promise<boolean> {
  try {
    const { rows } = await client.query(`SELECT (${condition}) AS good`);
    return rows[0]?.good === true;
  } catch {
    return false;
  }
}
