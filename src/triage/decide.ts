import type { AppendOutcome, Attempt, Receipt } from '../event.ts';

/** What is to become of an event after one append: its row is to be acknowledged, or let go, or the attempt failed. */
export type Verdict =
  | { kind: 'acknowledge'; entryId: string; epoch: string; before: boolean; preceding: readonly Receipt[] }
  /** The job is no longer ours, or not needed: touch nothing, the row's state decides. */
  | { kind: 'let-go'; isGone: boolean }
  | Exclude<Attempt, { kind: 'done' }>;

export function decide(outcome: AppendOutcome): Verdict {
  switch (outcome.status) {
    case 'appended':
    case 'already-appended':
      return {
        kind: 'acknowledge',
        ...{ entryId: outcome.entryId, epoch: outcome.epoch, preceding: outcome.preceding },
        before: outcome.status === 'already-appended',
      };
    case 'job-gone':
      return { kind: 'let-go', isGone: true };
    case 'behind-retry':
      return { kind: 'let-go', isGone: false };
    case 'refused':
      return { kind: 'retry', reason: outcome.reason };
    case 'early':
      return { kind: 'wait' };
    case 'unavailable':
      return { kind: 'postpone', reason: outcome.reason };
  }
}
