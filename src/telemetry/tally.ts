import type { Logger } from './logger.ts';

const COLLECT_MS = 3_000;
/** Events that a line names. */
const NAMED = 3;

export type Tally = ReturnType<typeof createTally>;

/**
 * Collects log lines about single events: what happens to one often happens to hundreds at the same moment. Lines with the
 * same text within 3 s become one, with the number of events, the ids of the first three, and the fields of the first.
 */
export function createTally(logger: Logger) {
  type Line = {
    level: 'info' | 'warn' | 'error';
    eventIds: Set<string>;
    fields: Record<string, unknown>;
  };
  const lines = new Map<string, Line>();
  let timer: NodeJS.Timeout | undefined;

  function flush(): void {
    clearTimeout(timer);
    timer = undefined;
    const all = [...lines];
    lines.clear();
    for (const [text, { level, fields, eventIds }] of all)
      logger[level]({ events: eventIds.size, eventIds: [...eventIds].slice(0, NAMED), ...fields }, text);
  }

  const counting =
    (level: Line['level']) =>
    (eventId: string, fields: Record<string, unknown>, text: string): void => {
      logger.debug({ eventId, ...fields }, text);
      const line = lines.get(text) ?? { level, eventIds: new Set(), fields };
      line.eventIds.add(eventId);
      lines.set(text, line);
      timer ??= setTimeout(flush, COLLECT_MS);
    };

  return {
    info: counting('info'),
    warn: counting('warn'),
    error: counting('error'),
    /** Writes the lines that wait, at the end. */
    flush,
    /** The same, if one of them is about this event: before a line of its own. */
    flushFor(eventId: string): void {
      if ([...lines.values()].some((line) => line.eventIds.has(eventId))) flush();
    },
  };
}
