/**
 * Which names may be streams: the rule for the names in the configuration, and for the topics of rows, which
 * anybody who may write the table can choose. Imports nothing.
 */

/** A Redis key, or part of one. White space and control characters are never meant. */
export const keyRule = (max: number) => ({
  expected: `1 to ${max} printable characters without white space`,
  pattern: new RegExp(`^[^\\s\\p{C}]{1,${max}}$`, 'u'),
});

export const STREAM_NAME = keyRule(512);

/**
 * Why this topic can never be the key of a stream, or null. A topic may be of any length and hold anything, so at
 * most a short escaped piece of it is quoted.
 */
export function createTopicCheck(rules: {
  dlqStreamName: string;
  /** Keys that begin with this belong to BullMQ. */
  queueKeyPrefix: string;
  /** Patterns, separated by commas. */
  allowedTopics: string;
  /** A key in the one slot of a cluster where every stream has to be; left out where there is no cluster. */
  neighbour?: string | undefined;
}): (topic: string) => string | null {
  const { dlqStreamName, queueKeyPrefix, neighbour } = rules;
  const slot = neighbour === undefined ? undefined : slotOf(neighbour);
  const isAllowed = allowing(rules.allowedTopics);
  return (topic) => {
    if (topic === '') return 'topic is empty';
    if (topic === dlqStreamName) return 'topic is the dead-letter stream';
    if (topic.startsWith(queueKeyPrefix))
      return `topic begins with ${queueKeyPrefix}, where BullMQ keeps its keys`;
    if (!STREAM_NAME.pattern.test(topic))
      return `topic is not ${STREAM_NAME.expected}; it has ${[...topic].length}: ${quoted(topic)}`;
    if (!isAllowed(topic)) return `topic is none that RELAY_ALLOWED_TOPICS allows: ${quoted(topic)}`;
    if (slot !== undefined && slotOf(topic) !== slot) {
      const tag = hashTagOf(neighbour ?? '') ?? neighbour;
      return `topic is in slot ${slotOf(topic)} of the cluster, this relay in ${slot}: put {${tag}} into its name, or run another relay for it; it is ${quoted(topic)}`;
    }
    return null;
  };
}

/** Patterns, separated by commas: `*` is any number of characters, `?` is one, of the whole topic. */
export const patternsOf = (list: string): string[] => list.split(',').map((pattern) => pattern.trim());

/** Whether one of the patterns in `list` matches. */
export function allowing(list: string): (topic: string) => boolean {
  const patterns = patternsOf(list).map((pattern) => [...pattern]);
  return (topic) => patterns.some((pattern) => matches([...topic], pattern));
}

/**
 * By hand and not as a regular expression: a pattern like `*a*a*a*b` makes those take time that grows with a power
 * of the topic's length, this at most with the product of the two lengths.
 */
function matches(topic: readonly string[], pattern: readonly string[]): boolean {
  let at = 0;
  let inPattern = 0;
  /** The last star, and what it covers so far: where it may give way. */
  let star = -1;
  let covered = 0;
  while (at < topic.length) {
    if (pattern[inPattern] === '*') {
      star = inPattern++;
      covered = at;
    } else if (pattern[inPattern] === '?' || pattern[inPattern] === topic[at]) {
      at++;
      inPattern++;
    } else if (star >= 0) {
      inPattern = star + 1;
      at = ++covered;
    } else {
      return false;
    }
  }
  return pattern.slice(inPattern).every((rest) => rest === '*');
}

/** The part of a key that decides where in a Redis Cluster it is, if it has one: between the first `{` and the next `}`. */
export function hashTagOf(key: string): string | undefined {
  const begin = key.indexOf('{');
  const end = begin < 0 ? -1 : key.indexOf('}', begin + 1);
  return end > begin + 1 ? key.slice(begin + 1, end) : undefined;
}

/** The slot of a key, of the 16384 that the nodes of a Redis Cluster share: CRC-16/XMODEM of its hash tag, or of itself. */
export function slotOf(key: string): number {
  let crc = 0;
  for (const byte of new TextEncoder().encode(hashTagOf(key) ?? key)) {
    crc ^= byte << 8;
    for (let bit = 0; bit < 8; bit++) crc = ((crc << 1) ^ (crc & 0x8000 ? 0x1021 : 0)) & 0xffff;
  }
  return crc % 16_384;
}

/** `text` as one short line: escaped, and cut after 60 characters. */
export function quoted(text: string): string {
  const cut = text.length > 60 ? `${text.slice(0, 60)}...` : text;
  return JSON.stringify(cut).replace(
    /[^\x20-\x7e]/g,
    (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, '0')}`,
  );
}
