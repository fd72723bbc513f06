import { errorText, type Logger } from './logger.ts';

const COLLECT_MS = 3_000;
/** Events that a line names. */
const NAMED = 3;
/** Lines with the same text that say different things, at most: a reason may hold what differs from event to event. */
const MOST = 20;
/** Of what is beyond that. Its line says nothing but the number of events. */
const REST = '';

export type Tally = ReturnType<typeof createTally>;

/**
 * Collects log lines about single events: what happens to one often happens to hundreds at the same moment. Lines within 3 s
 * that have the same text and the same fields become one, with the number of events and the ids of the first three.
 */
export function createTally(logger: Logger) {
  type Line = {
    level: 'info' | 'warn' | 'error';
    eventIds: Set<string>;
    fields: Record<string, unknown>;
  };
  /** By their text, and by what they say. */
  const texts = new Map<string, Map<string, Line>>();
  let timer: NodeJS.Timeout | undefined;

  function flush(): void {
    clearTimeout(timer);
    timer = undefined;
    const all = [...texts];
    texts.clear();
    for (const [text, lines] of all)
      for (const { level, fields, eventIds } of lines.values())
        logger[level]({ events: eventIds.size, eventIds: [...eventIds].slice(0, NAMED), ...fields }, text);
  }

  const counting =
    (level: Line['level']) =>
    (eventId: string, fields: Record<string, unknown>, text: string): void => {
      logger.debug({ eventId, ...fields }, text);
      const lines = texts.get(text) ?? new Map<string, Line>();
      texts.set(text, lines);
      const said = JSON.stringify(fields, (_, value) => (value instanceof Error ? errorText(value) : value));
      const kind = lines.has(said) || lines.size < MOST ? said : REST;
      const line = lines.get(kind) ?? { level, eventIds: new Set(), fields: kind === REST ? {} : fields };
      line.eventIds.add(eventId);
      lines.set(kind, line);
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
      const isAbout = (line: Line) => line.eventIds.has(eventId);
      if ([...texts.values()].some((lines) => [...lines.values()].some(isAbout))) flush();
    },
  };
}
