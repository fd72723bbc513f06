import { brief, type OutboxEvent } from '../event.ts';
import { errorText, type Logger } from '../telemetry/logger.ts';

/** How Redis says that the user may not: for the call itself, and from within a script. */
const NO_PERMISSION = /NOPERM|ACL failure/;

export type EventCheck = ReturnType<typeof createEventCheck>;

/** What can be wrong with an event before it is appended, and when Redis refuses it. */
export function createEventCheck(deps: {
  /** Why the topic can never be the key of a stream, or null. */
  topicProblem: (topic: string) => string | null;
  /** How the payload breaks the schema of its event type, without quoting it. */
  violations: (eventType: string, payload: string) => string[];
  /** Whether a violation keeps the event out of the stream. */
  strict: boolean;
  /** Rejects with the reason when Redis refuses the relay everything, also what is not the event's stream. */
  assertPermitted: (event: OutboxEvent) => Promise<unknown>;
  logger: Logger;
}) {
  return {
    /** Why the event can never be published, or null. */
    problemOf(event: OutboxEvent): string | null {
      if (event.withheld) return event.withheld;
      const topicProblem = deps.topicProblem(event.topic);
      if (topicProblem !== null) return topicProblem;
      const violations = deps.violations(event.eventType, event.payload);
      if (violations.length === 0) return null;
      const { eventId } = event;
      const eventType = brief(event.eventType);
      if (deps.strict) return `payload breaks the schema of ${eventType}: ${violations.join('; ')}`;
      deps.logger.warn(
        { eventId, eventType, violations },
        'payload breaks the schema of its event type; published all the same',
      );
      return null;
    },

    /** Of a refusal: why Redis refuses the relay everything, or null when it is this event's stream. */
    async refusedEverything(event: OutboxEvent, reason: string): Promise<string | null> {
      if (!NO_PERMISSION.test(reason)) return null;
      return deps.assertPermitted(event).then(
        () => null,
        (error) => errorText(error),
      );
    },
  };
}
