import type { RelayConfig } from '../config/config.ts';
import { brief, type OutboxEvent } from '../event.ts';
import { streamOptionsOf } from '../stream-options.ts';
import { createValidator } from '../streams/validate.ts';
import { errorText } from '../telemetry/logger.ts';
import type { Tally } from '../telemetry/tally.ts';

/** What Redis answers to a user without the right: to a command, and from within a script. */
const NO_PERMISSION = /NOPERM|ACL failure/;
/** The event's topic is no stream, or a key of the relay is not what it should be: Redis does not say which. */
const WRONG_TYPE = /WRONGTYPE/;

export type EventCheck = ReturnType<typeof createEventCheck>;

type Rules = Readonly<{
  /** Why the topic can never be the key of a stream, or null. */
  topicProblem: (topic: string) => string | null;
  /** How the payload breaks the schema of its event type, without quoting it. */
  violations: (eventType: string, payload: string) => string[];
  /** Whether a violation keeps the event out of the stream. */
  strict: boolean;
  /** Told of a violation that keeps nothing out. */
  tally: Pick<Tally, 'warn'>;
}>;

export const rulesOf = (config: RelayConfig, tally: Rules['tally']): Rules => ({
  topicProblem: streamOptionsOf(config).topicProblem,
  violations: config.validation === 'off' ? () => [] : createValidator(),
  strict: config.validation === 'strict',
  tally,
});

/**
 * Checks an event before it is appended. Both callers that append events use it: the publish job, and `relay republish`,
 * which may meet rows that were inserted as published and never checked.
 * @returns why the event can never be appended, or null
 */
export const createProblemOf =
  (rules: Rules) =>
  (event: OutboxEvent): string | null => {
    if (event.withheld) return event.withheld;
    const topicProblem = rules.topicProblem(event.topic);
    if (topicProblem !== null) return topicProblem;
    const violations = rules.violations(event.eventType, event.payload);
    if (violations.length === 0) return null;
    const eventType = brief(event.eventType);
    if (rules.strict) return `payload breaks the schema of ${eventType}: ${violations.join('; ')}`;
    rules.tally.warn(
      event.eventId,
      { eventType, violations },
      'payloads break the schemas of their event types; published all the same',
    );
    return null;
  };

/** Checks an event, and finds out what a refusal by Redis means. */
export function createEventCheck(
  deps: Rules & {
    /** Rejects with the reason when Redis refuses the relay other keys too, not only the event's stream. */
    assertPermitted: (event: OutboxEvent) => Promise<unknown>;
    /** Names a key of the relay's that has another type. */
    keyTypeProblem: () => Promise<string | undefined>;
  },
) {
  return {
    problemOf: createProblemOf(deps),

    /** Why Redis refuses every event, or null when it refuses only this event's stream. */
    async refusedEverything(event: OutboxEvent, reason: string): Promise<string | null> {
      try {
        if (NO_PERMISSION.test(reason)) await deps.assertPermitted(event);
        else if (WRONG_TYPE.test(reason)) return (await deps.keyTypeProblem()) ?? null;
        return null;
      } catch (error) {
        return errorText(error);
      }
    },
  };
}
