/** How values of the environment are read: each kind has a function that reads it, and words for what it takes. */
import { isIP } from 'node:net';
import { type BoardUser, parseBoardUsers } from './board-users.ts';
import { UrlError } from './connection-urls.ts';
import { nodeList, normaliseSentinels, type RedisNode } from './redis-urls.ts';
import { type keyRule, patternsOf, STREAM_NAME } from './topics.ts';

/** How one variable is read. */
export type Kind<T> = {
  /**
   * Of the trimmed, non-empty text of the environment.
   * @throws {ValueError} what was expected
   */
  read: (text: string) => T;
  expected: string;
  unit?: string;
  secret?: true;
};

/** A value of the environment is not what its variable takes. The message says what it takes. */
export class ValueError extends Error {
  override readonly name = 'ValueError';
}

/** A kind whose `read` answers undefined to a text that is not what is expected. */
const kind = <T>(
  expected: string,
  read: (text: string) => T | undefined,
  more: Pick<Kind<T>, 'unit' | 'secret'> = {},
): Kind<T> => ({
  read(text) {
    const value = read(text);
    if (value === undefined) throw new ValueError(expected);
    return value;
  },
  expected,
  ...more,
});

function numberIn(text: string, pattern: RegExp, min: number, max: number): number | undefined {
  const value = Number(text);
  return pattern.test(text) && min <= value && value <= max ? value : undefined;
}

export const wholeNumber = (min: number, max: number, unit?: string): Kind<number> =>
  kind(
    `a whole number ${unit === undefined ? '' : `of ${unit} `}from ${min} to ${max}`,
    (text) => numberIn(text, /^[+-]?\d{1,15}$/, min, max),
    unit === undefined ? {} : { unit },
  );

const SECONDS = /^[+-]?(?:\d{1,15}(?:\.\d*)?|\.\d+)$/;

/** Seconds in the environment, whole milliseconds in the configuration. */
export const seconds = (min: number, max: number): Kind<number> => {
  const read = (text: string) => {
    const value = numberIn(text, SECONDS, min, max);
    return value === undefined ? undefined : Math.round(value * 1000);
  };
  return kind(`a number of seconds from ${min} to ${max}`, read, { unit: 's' });
};

/** One of `names` in any case; `aliases` (in lower case) are accepted too. */
export const oneOf = <const N extends string>(
  names: readonly N[],
  aliases: Record<string, N> = {},
): Kind<N> => {
  const byText = new Map([...Object.entries(aliases), ...names.map((name): [string, N] => [name, name])]);
  return kind(`one of ${names.join(', ')}`, (text) => byText.get(text.toLowerCase()));
};

const FLAGS = new Map<string, boolean>([
  ...['true', '1', 'yes', 'on'].map((text): [string, boolean] => [text, true]),
  ...['false', '0', 'no', 'off'].map((text): [string, boolean] => [text, false]),
]);

export const flag = (): Kind<boolean> =>
  kind('true or false; also 1, yes, on, 0, no and off', (text) => FLAGS.get(text.toLowerCase()));

/** A text that is taken as it is if `isGood`. */
const textIf = (expected: string, isGood: (text: string) => boolean): Kind<string> =>
  kind(expected, (text) => (isGood(text) ? text : undefined));

export const text = (expected: string, pattern: RegExp): Kind<string> =>
  textIf(expected, (given) => pattern.test(given));

export const key = ({ expected, pattern }: ReturnType<typeof keyRule>): Kind<string> =>
  text(expected, pattern);

/** Patterns of topics, separated by commas. */
export const patterns = (): Kind<string> =>
  textIf('names of streams, separated by commas; * stands for anything, ? for one character', (list) =>
    patternsOf(list).every((name) => STREAM_NAME.pattern.test(name)),
  );

/** Reads a text by `read`, whose UrlError says what is wrong with it. */
const readBy =
  <T>(read: (text: string) => T, expected: string) =>
  (text: string): T => {
    try {
      return read(text);
    } catch (error) {
      if (!(error instanceof UrlError)) throw error;
      throw new ValueError(`${expected}, but ${error.message}`);
    }
  };

export const url = (expected: string, normalise: (text: string) => string): Kind<string> => ({
  read: readBy(normalise, expected),
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
    const isCluster = FLAGS.get(text.toLowerCase());
    if (isCluster === undefined) return Object.freeze(nodeList(text));
    return isCluster && Object.freeze([]);
  };
  return { read: readBy(read, expected), expected };
};

/** Log-ins of the dashboard; `none` is nobody. */
export const boardUsers = (): Kind<readonly BoardUser[]> => {
  const expected = 'none, or entries that "relay hash-password" prints, separated by spaces or commas';
  return {
    read(list) {
      const parsed = list === 'none' ? { users: [] } : parseBoardUsers(list);
      if ('users' in parsed) return Object.freeze(parsed.users);
      throw new ValueError(`${expected}, but ${parsed.problem}`);
    },
    expected,
    secret: true,
  };
};

/** A path as the browser sees it; in the configuration without the slash at its end. */
export const basePath = (): Kind<string> =>
  kind('a path like / or /ops/relay', (path) =>
    /^(?:\/|(?:\/(?!\.)[A-Za-z0-9._~-]{1,64}){1,8}\/?)$/.test(path) ? path.replace(/\/$/, '') : undefined,
  );

const PROXY_NAMES = ['loopback', 'linklocal', 'uniquelocal'];

/** Addresses of proxies; `none` is nobody. */
export const proxies = (): Kind<readonly string[]> =>
  kind(`none, or addresses like 10.0.0.0/8 and ${PROXY_NAMES.join(', ')}, separated by commas`, (list) => {
    const addresses = list === 'none' ? [] : list.split(',').map((it) => it.trim());
    const areGood = addresses.every((it) => PROXY_NAMES.includes(it) || isAddress(it));
    return areGood ? Object.freeze(addresses) : undefined;
  });

/** An IP address, or a block of them in CIDR notation. */
const isAddress = (text: string): boolean => {
  const [, address = '', bits = '1'] = /^([0-9A-Fa-f:.]+)(?:\/(\d{1,3}))?$/.exec(text) ?? [];
  return isIP(address) !== 0 && Number(bits) > 0 && Number(bits) <= (isIP(address) === 4 ? 32 : 128);
};
