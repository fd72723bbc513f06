import {
  type AppendOutcome,
  type Attempt,
  brief,
  type Chain,
  type InTurn,
  type OutboxEvent,
  type Run,
} from '../event.ts';
import type { Logger } from '../logger.ts';
import { errorText } from '../logger.ts';
import type { Appended } from './acknowledge.ts';
import { decide, type Verdict } from './decide.ts';
import type { Following, JustAppended } from './hand-over.ts';

/** How Redis says that the user may not: for the call itself, and from within a script. */
const NO_PERMISSION = /NOPERM|ACL failure/;

/** An earlier run of the job appended it, and may have brought along what comes next. */
const BROUGHT_BEFORE: Following = { followers: [], mayHaveMore: true };

/** Its job was added without any others. */
const ALONE: Following = { followers: [], mayHaveMore: false };

/** One attempt to bring one event from its job to its stream: check, append, decide, acknowledge. */
export function createCarry(deps: {
  /** Why the topic can never be the key of a stream, or null. */
  topicProblem: (topic: string) => string | null;
  /** How the payload breaks the schema of its event type, without quoting it. */
  violations: (eventType: string, payload: string) => string[];
  /** Whether a violation keeps the event out of the stream. */
  strict: boolean;
  /** Resolves when Redis may be appended to, or after a moment all the same: a turn is no time to wait for that. */
  ready: () => Promise<unknown>;
  publish: (event: OutboxEvent) => Promise<AppendOutcome>;
  /** Asked when permission was refused: why Redis refuses the relay everything, or null when it is this stream. */
  refusedEverything: (event: OutboxEvent) => Promise<string | null>;
  acknowledge: (event: OutboxEvent, appended: Appended) => Promise<void>;
  /** An event of a chain was appended just now: the next ones get their jobs, if they are known. */
  bringAlong: (event: OutboxEvent, chain: Chain, appended: JustAppended) => Promise<Following>;
  /** The event has no job, or has none in a moment: a lease that its row has ends, so that somebody looks. */
  letGo: (event: OutboxEvent) => Promise<void>;
  /** Told when the row is marked. */
  onPublished?: (event: OutboxEvent, entryId: string) => void;
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

  async function append(event: OutboxEvent): Promise<Verdict> {
    const problem = problemOf(event);
    if (problem !== null) return { kind: 'give-up', reason: problem };
    const verdict = decide(await deps.publish(event));
    if (verdict.kind !== 'retry' || !NO_PERMISSION.test(verdict.reason)) return verdict;
    const reason = await deps.refusedEverything(event);
    return reason === null ? verdict : { kind: 'postpone', reason };
  }

  /**
   * @param inTurn runs the part in which an event can harm its pod: from its check to the answer to its append
   */
  return async function carry(event: OutboxEvent, run: Run, inTurn: InTurn): Promise<Attempt> {
    const beganAt = performance.now();
    await deps.ready();
    const verdict = await inTurn(() => append(event));
    switch (verdict.kind) {
      case 'acknowledge':
        try {
          const { entryId, epoch, before, preceding } = verdict;
          const appended = { entryId, epoch, preceding };
          let following = before ? BROUGHT_BEFORE : ALONE;
          if (!before && event.chain !== undefined)
            following = await deps.bringAlong(event, event.chain, { ...appended, ...run, beganAt });
          await deps.acknowledge(event, { ...appended, before, ...following });
        } catch (error) {
          return {
            kind: 'postpone',
            reason: `appended, but its row could not be marked: ${errorText(error)}`,
          };
        }
        deps.onPublished?.(event, verdict.entryId);
        return { kind: 'done' };
      case 'let-go': {
        const about = { eventId: event.eventId, topic: brief(event.topic) };
        if (verdict.isGone) logger.warn(about, 'the job vanished before its append; its row decides');
        else
          logger.debug(
            about,
            'an earlier event of the aggregate waits for a retry; this one waits on its row',
          );
        await deps.letGo(event).catch((error) => {
          logger.debug({ err: error, eventId: event.eventId }, 'the row is looked at when its lease ends');
        });
        return { kind: 'done' };
      }
      default:
        return verdict;
    }
  };
}
