/** Streams that a pod knows to be there, at most; then it learns them anew. */
const KNOWN_STREAMS_MAX = 10_000;
/** Events that a pod knows to be in their stream: the latest so many at least, and twice as many at most. */
const KNOWN_EVENTS = 4_000;

/**
 * What this pod has appended, or seen appended, in the current epoch: it is there as long as the epoch lasts. An event
 * whose predecessor is among it passes the gate without a question, and an early event is told when its predecessor
 * arrives.
 */
export function createKnownAppends() {
  let known = {
    epoch: '',
    streams: new Set<string>(),
    events: new Set<string>(),
    olderEvents: new Set<string>(),
  };
  /** Who waits for the append of an event, by its id. */
  const waiting = new Map<string, (() => void)[]>();

  function knownIn(epoch: string): typeof known {
    if (known.epoch !== epoch || known.streams.size >= KNOWN_STREAMS_MAX)
      known = { epoch, streams: new Set(), events: new Set(), olderEvents: new Set() };
    return known;
  }

  function wakeUp(eventId: string): void {
    const callbacks = waiting.get(eventId);
    if (callbacks === undefined) return;
    waiting.delete(eventId);
    for (const resume of callbacks) resume();
  }

  return {
    /** The event is in its stream: the one behind it may be appended. */
    addEvent(epoch: string, eventId: string): void {
      const now = knownIn(epoch);
      now.events.add(eventId);
      if (now.events.size >= KNOWN_EVENTS) {
        now.olderEvents = now.events;
        now.events = new Set();
      }
      wakeUp(eventId);
    },

    /** @returns whether this is the first entry that the pod knows of in this stream */
    addStream(epoch: string, stream: string): boolean {
      const { streams } = knownIn(epoch);
      const isFirst = !streams.has(stream);
      streams.add(stream);
      return isFirst;
    },

    /** Whether this pod knows that the event was appended in this epoch. */
    hasEvent: (eventId: string, epoch: string): boolean =>
      known.epoch === epoch && (known.events.has(eventId) || known.olderEvents.has(eventId)),

    /** Resolves when this pod learns that one of these events was appended, or after `ms`. */
    untilAppended(eventIds: readonly string[], ms: number): Promise<void> {
      return new Promise((resolve) => {
        const resume = () => {
          clearTimeout(timer);
          resolve();
        };
        const timer = setTimeout(() => {
          for (const eventId of eventIds) {
            const left = waiting.get(eventId)?.filter((it) => it !== resume) ?? [];
            if (left.length === 0) waiting.delete(eventId);
            else waiting.set(eventId, left);
          }
          resolve();
        }, ms);
        for (const eventId of eventIds) {
          const others = waiting.get(eventId);
          if (others) others.push(resume);
          else waiting.set(eventId, [resume]);
        }
      });
    },
  };
}
