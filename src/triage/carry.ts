import { type AppendOutcome, type Attempt, brief, type OutboxEvent } from '../event.ts';
import type { Logger } from '../logger.ts';
import { errorText } from '../logger.ts';
import { decide } from './decide.ts';

/** One attempt to bring one event from its job to its stream: check, append, decide, acknowledge. */
export function createCarry(deps: {
  /** Why the topic can never be the key of a stream, or null. */
  topicProblem: (topic: string) => string | null;
  /** How the payload breaks the schema of its event type, without quoting it. */
  violations: (eventType: string, payload: string) => string[];
  /** Whether a violation keeps the event out of the stream. */
  strict: boolean;
  /** How often Redis has lost its data so far: a receipt is good in its own generation only. */
  generation: () => number;
  publish: (event: OutboxEvent) => Promise<AppendOutcome>;
  acknowledge: (event: OutboxEvent, entryId: string, generation: number) => Promise<void>;
  logger: Logger;
}) {
  const { logger } = deps;

  function problemOf(event: OutboxEvent): string | null {
    if (event.withheld) return event.withheld;
    const topicProblem = deps.topicProblem(event.topic);
    if (topicProblem !== null) return topicProblem;
    const violations = deps.violations(event.eventType, event.payload);
    if (violations.length === 0) return null;
    const { eventId } = event;
    const eventType = brief(event.eventType);
    if (deps.strict) return `payload breaks the schema of ${eventType}: ${violations.join('; ')}`;
    logger.warn(
      { eventId, eventType, violations },
      'payload breaks the schema of its event type; published all the same',
    );
    return null;
  }

  return async function carry(event: OutboxEvent): Promise<Attempt> {
    const problem = problemOf(event);
    if (problem !== null) return { kind: 'give-up', reason: problem };
    const generation = deps.generation();
    const verdict = decide(await deps.publish(event));
    switch (verdict.kind) {
      case 'acknowledge':
        try {
          await deps.acknowledge(event, verdict.entryId, generation);
        } catch (error) {
          return {
            kind: 'postpone',
            reason: `appended, but its row could not be marked: ${errorText(error)}`,
          };
        }
        return { kind: 'done' };
      case 'let-go':
        logger.warn(
          { eventId: event.eventId, topic: brief(event.topic) },
          'the job vanished before its append; its row decides',
        );
        return { kind: 'done' };
      default:
        return verdict;
    }
  };
}
