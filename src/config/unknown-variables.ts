/** Finds the typing errors in names of variables. */
import { VARIABLES } from './config.ts';

/** Read by the demo and the tests, not by the service. */
const KNOWN_ELSEWHERE = ['RELAY_REDIS_SERVER_BIN', 'RELAY_CHROMIUM_BIN'];

/** What Kubernetes sets for a Service whose name begins with `relay`. */
const KUBERNETES_VARIABLE = /_SERVICE_(?:HOST|PORT)(?:_|$)|_PORT_\d+_(?:TCP|UDP)(?:_|$)/;

/**
 * Variables of `env` that begin with RELAY_ and mean nothing: most likely typing errors. `nearest` is the known name
 * that was probably meant.
 */
export function unknownVariables(
  env: Record<string, string | undefined>,
): { name: string; nearest?: string }[] {
  const known = [...VARIABLES.map(({ name }) => name), ...KNOWN_ELSEWHERE];
  return Object.entries(env)
    .filter(([name]) => /^relay_/i.test(name) && !known.includes(name))
    .filter(([name, value]) => !KUBERNETES_VARIABLE.test(name) && !/^(?:tcp|udp):\/\//.test(value ?? ''))
    .map(([name]) => {
      const nearest = nearestName(name.toUpperCase(), known);
      return { name, ...(nearest !== undefined && { nearest }) };
    });
}

/** The entry of `known` that is fewest edits away from `name`, if these are at most a third of its length. */
function nearestName(name: string, known: readonly string[]): string | undefined {
  const withoutPrefix = (full: string) => full.slice('RELAY_'.length, 100);
  const [best] = known
    .map((candidate) => ({ candidate, edits: editDistance(withoutPrefix(name), withoutPrefix(candidate)) }))
    .sort((a, b) => a.edits - b.edits);
  return best !== undefined && best.edits <= Math.max(2, withoutPrefix(best.candidate).length / 3)
    ? best.candidate
    : undefined;
}

/** Levenshtein distance. */
function editDistance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      const substituted = (row[j - 1] ?? 0) + (a[i - 1] === b[j - 1] ? 0 : 1);
      next.push(Math.min(substituted, (row[j] ?? 0) + 1, (next[j - 1] ?? 0) + 1));
    }
    row = next;
  }
  return row[b.length] ?? 0;
}
