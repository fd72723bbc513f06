/** What Redis answers to an append, as an outcome. */
import { isRefusal, reasonOf } from '../connections/refusals.ts';
import type { AppendOutcome } from '../event.ts';
import type { Epoch } from './epoch.ts';

export const NOT_KNOWN = {
  status: 'unavailable',
  reason:
    'Redis may have lost entries, or PostgreSQL rows; nothing is appended until table and streams were compared',
} satisfies AppendOutcome;

/** The entry id in an answer of success. A reply that holds no entry id must never pass for success. */
export const entryIdOf = (answer: string): string | undefined => /^[+=^](\d+-\d+)$/.exec(answer)?.[1];

/** The outcome of an answer that is no success; gate-script.ts lists the answers. */
export function outcomeOf(answer: string, epoch: string, epochs: Epochs): AppendOutcome {
  switch (answer) {
    case '':
      return { status: 'gone' };
    case '*':
      return { status: 'ask-rows' };
    case '~':
      return { status: 'early' };
    case '<':
    case '<!':
      return { status: 'behind', failedBefore: answer === '<!' };
    case '?':
      epochs.endFor(epoch);
      return NOT_KNOWN;
    case '!':
      epochs.invalidate();
      return NOT_KNOWN;
    default:
      if (answer.startsWith('-')) return outcomeOfFailure(refusal(answer.slice(1)), epochs);
      return { status: 'refused', reason: 'Redis gave no stream id in answer to the append' };
  }
}

type Epochs = Pick<Epoch, 'endFor' | 'invalidate'>;

/** The outcome of an append that failed. */
export function outcomeOfFailure(error: Error, epochs: Epochs): AppendOutcome {
  if (DEMOTED.test(error.message)) epochs.invalidate();
  return outcomeOfError(error);
}

export function outcomeOfError(error: Error): AppendOutcome & { status: 'refused' | 'unavailable' } {
  return { status: isRefusal(error) ? 'refused' : 'unavailable', reason: reasonOf(error) };
}

/** The reply, or why Redis refuses this request. Rejects when Redis takes no request now, or does not answer. */
export async function orRefusal<T>(reply: Promise<T>): Promise<T | { status: 'refused'; reason: string }> {
  try {
    return await reply;
  } catch (error) {
    const outcome = outcomeOfError(error as Error);
    if (outcome.status === 'refused') return outcome;
    throw error;
  }
}

/** The error that ioredis makes of an answer in which Redis refuses. */
export const refusal = (message: string) => Object.assign(new Error(message), { name: 'ReplyError' });

/** The server is no master any more: it may come back with another one's data. */
const DEMOTED = /\b(READONLY|MASTERDOWN)\b/;
