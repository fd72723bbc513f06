/** How values of the environment are read: each kind has a schema, and words for what it takes. */
import { isIP } from 'node:net';
import { z } from 'zod';
import { type BoardUser, parseBoardUsers } from './board-users.ts';
import { UrlError } from './connection-urls.ts';
import { nodeList, normaliseSentinels, type RedisNode } from './redis-urls.ts';
import { type keyRule, patternsOf, STREAM_NAME } from './topics.ts';

/** How one variable is read. `schema` takes the trimmed, non-empty text of the environment. */
export type Kind<T> = { schema: z.ZodType<T, string>; expected: string; unit?: string; secret?: true };

export const wholeNumber = (min: number, max: number, unit?: string): Kind<number> => {
  const expected = `a whole number ${unit === undefined ? '' : `of ${unit} `}from ${min} to ${max}`;
  return {
    schema: z
      .string()
      .regex(/^[+-]?\d{1,15}$/, expected)
      .transform(Number)
      .pipe(z.number().min(min, expected).max(max, expected)),
    expected,
    ...(unit !== undefined && { unit }),
  };
};

/** Seconds in the environment, whole milliseconds in the configuration. */
export const seconds = (min: number, max: number): Kind<number> => {
  const expected = `a number of seconds from ${min} to ${max}`;
  return {
    schema: z
      .string()
      .regex(/^[+-]?(?:\d{1,15}(?:\.\d*)?|\.\d+)$/, expected)
      .transform(Number)
      .pipe(z.number().min(min, expected).max(max, expected))
      .transform((value) => Math.round(value * 1000)),
    expected,
    unit: 's',
  };
};

/** One of `names` in any case; `aliases` (in lower case) are accepted too. */
export const oneOf = <const N extends string>(
  names: readonly N[],
  aliases: Record<string, N> = {},
): Kind<N> => {
  const byText = new Map<string, N>([
    ...Object.entries(aliases),
    ...names.map((name): [string, N] => [name, name]),
  ]);
  const expected = `one of ${names.join(', ')}`;
  return {
    schema: z.string().transform((text, context): N => {
      const name = byText.get(text.toLowerCase());
      if (name !== undefined) return name;
      context.addIssue({ code: 'custom', message: expected });
      return z.NEVER;
    }),
    expected,
  };
};

export const flag = (): Kind<boolean> => {
  const expected = 'true or false; also 1, yes, on, 0, no and off';
  return {
    schema: z.stringbool({
      truthy: ['true', '1', 'yes', 'on'],
      falsy: ['false', '0', 'no', 'off'],
      case: 'insensitive',
      error: expected,
    }) as z.ZodType<boolean, string>,
    expected,
  };
};

export const text = (expected: string, pattern: RegExp): Kind<string> => ({
  schema: z.string().regex(pattern, expected),
  expected,
});

export const key = ({ expected, pattern }: ReturnType<typeof keyRule>): Kind<string> =>
  text(expected, pattern);

/** Patterns of topics, separated by commas. */
export const patterns = (): Kind<string> => {
  const expected = 'names of streams, separated by commas; * stands for anything, ? for one character';
  const areNames = (list: string) => patternsOf(list).every((name) => STREAM_NAME.pattern.test(name));
  return { schema: z.string().refine(areNames, expected), expected };
};

/** Reads a text by `read`, whose UrlError says what is wrong with it. */
const readBy = <T>(read: (text: string) => T, expected: string): z.ZodType<T, string> =>
  z.string().transform((value, context) => {
    try {
      return read(value);
    } catch (error) {
      if (!(error instanceof UrlError)) throw error;
      context.addIssue({ code: 'custom', message: `${expected}, but ${error.message}` });
      return z.NEVER;
    }
  });

export const url = (expected: string, normalise: (text: string) => string): Kind<string> => ({
  schema: readBy(normalise, expected),
  expected,
  secret: true,
});

/** The same, or a word that stands for none. */
export const urlOr = <const N extends string>(
  none: N,
  expected: string,
  normalise: (text: string) => string,
): Kind<string> => url(`${none}, or ${expected}`, (text) => (text === none ? none : normalise(text)));

/** Sentinels; `none` where Redis has none. */
export const sentinels = (): Kind<string> =>
  urlOr(
    'none',
    'sentinels like host:26379,host:26379 or redis+sentinel://user:password@host:26379,host:26379',
    normaliseSentinels,
  );

/** Whether Redis is a cluster, and nodes of it that RELAY_REDIS_URL does not name. */
export const cluster = (): Kind<false | readonly RedisNode[]> => {
  const expected = 'true, false, or nodes like host:6379,host:6379';
  const read = (text: string): false | readonly RedisNode[] => {
    const isCluster = flag().schema.safeParse(text);
    return Object.freeze(isCluster.success ? isCluster.data && [] : nodeList(text));
  };
  return { schema: readBy(read, expected), expected };
};

/** Log-ins of the dashboard; `none` is nobody. */
export const boardUsers = (): Kind<readonly BoardUser[]> => {
  const expected = 'none, or entries that "relay hash-password" prints, separated by spaces or commas';
  return {
    schema: z.string().transform((list, context) => {
      const parsed = list === 'none' ? { users: [] } : parseBoardUsers(list);
      if ('users' in parsed) return Object.freeze(parsed.users);
      context.addIssue({ code: 'custom', message: `${expected}, but ${parsed.problem}` });
      return z.NEVER;
    }),
    expected,
    secret: true,
  };
};

/** A path as the browser sees it; in the configuration without the slash at its end. */
export const basePath = (): Kind<string> => {
  const expected = 'a path like / or /ops/relay';
  return {
    schema: z
      .string()
      .regex(/^(?:\/|(?:\/(?!\.)[A-Za-z0-9._~-]{1,64}){1,8}\/?)$/, expected)
      .transform((path) => path.replace(/\/$/, '')),
    expected,
  };
};

const PROXY_NAMES = ['loopback', 'linklocal', 'uniquelocal'];

/** Addresses of proxies; `none` is nobody. */
export const proxies = (): Kind<readonly string[]> => {
  const expected = `none, or addresses like 10.0.0.0/8 and ${PROXY_NAMES.join(', ')}, separated by commas`;
  const listed = (list: string) => (list === 'none' ? [] : list.split(',').map((it) => it.trim()));
  return {
    schema: z
      .string()
      .transform(listed)
      .refine((list) => list.every((it) => PROXY_NAMES.includes(it) || isAddress(it)), expected)
      .transform((list) => Object.freeze(list)),
    expected,
  };
};

/** An IP address, or a block of them in CIDR notation. */
const isAddress = (text: string): boolean => {
  const [, address = '', bits = '1'] = /^([0-9A-Fa-f:.]+)(?:\/(\d{1,3}))?$/.exec(text) ?? [];
  return isIP(address) !== 0 && Number(bits) > 0 && Number(bits) <= (isIP(address) === 4 ? 32 : 128);
};
