import { isIP, isIPv6 } from 'node:net';

/** Counts wrong passwords. */

/** Most keys that are remembered. The oldest are forgotten first. */
const MAX_KEYS = 10_000;

/** At most `max` tries per key in a window. The window begins with the first try. */
export function createTries({ max, windowMs }: Readonly<{ max: number; windowMs: number }>) {
  const tries = new Map<string, { count: number; until: number }>();
  return {
    /** Counts a try and returns 0, or returns in how many seconds the next one is allowed. */
    take(key: string): number {
      const now = Date.now();
      const found = tries.get(key);
      if (found !== undefined && now < found.until) {
        if (found.count >= max) return Math.max(1, Math.ceil((found.until - now) / 1_000));
        found.count++;
        return 0;
      }
      tries.delete(key);
      if (tries.size >= MAX_KEYS) tries.delete(tries.keys().next().value as string);
      tries.set(key, { count: 1, until: now + windowMs });
      return 0;
    },
    /** Takes a try back: the password was right, or not compared. */
    giveBack(key: string): void {
      const found = tries.get(key);
      if (found !== undefined) found.count = Math.max(0, found.count - 1);
    },
  };
}

/**
 * The key for an address: an IPv4 address, or the /64 of an IPv6 address, which is what one customer has. Proxies also
 * write `address:port`, `[address]:port` and `::ffff:192.0.2.1`. Texts that are no address share one key.
 */
export function addressOf(text: string): string {
  const bare = text
    .trim()
    .replace(/^\[(.*)\](:\d+)?$/, '$1')
    .replace(/^(\d+\.\d+\.\d+\.\d+):\d+$/, '$1')
    .replace(/%.*$/, '')
    .replace(/^::ffff:(\d+\.\d+\.\d+\.\d+)$/i, '$1');
  if (!isIPv6(bare)) return isIP(bare) > 0 ? bare : 'no address';
  // The URL parser normalises it: lower case, no leading zeros, no dots.
  const [head = '', tail] = new URL(`http://[${bare}]`).hostname.slice(1, -1).split('::');
  const groups = (part: string) => (part === '' ? [] : part.split(':'));
  const after = groups(tail ?? '');
  const zeros = tail === undefined ? 0 : 8 - groups(head).length - after.length;
  return `${[...groups(head), ...Array<string>(zeros).fill('0'), ...after].slice(0, 4).join(':')}::/64`;
}
