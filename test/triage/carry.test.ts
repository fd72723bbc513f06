import { describe, expect, test } from 'vitest';
import type { AppendOutcome } from '../../src/event.ts';
import { createCarry } from '../../src/triage/carry.ts';
import { aChain, aClaimedEvent, silent } from '../support/stages.ts';

const ENTRY_ID = '1700000000000-0';
const EPOCH = 'epoch';
const CHAIN = aChain();
const RUN = { isFirst: false, isLate: true };
const BEFORE = { id: '1', entryId: '1699999999999-0' };
const APPENDED: AppendOutcome = {
  ...{ status: 'appended', entryId: ENTRY_ID, epoch: EPOCH },
  preceding: [BEFORE],
};

/** One attempt with the given findings; `done` tells what it brought about. */
async function attempt(
  findings: {
    outcome?: AppendOutcome;
    topicProblem?: string;
    withheld?: string;
    violations?: string[];
    strict?: boolean;
    refusedEverything?: string;
    acknowledge?: () => Promise<void>;
    isAlone?: boolean;
    isFollowed?: boolean;
  } = {},
) {
  const done: string[] = [];
  const carry = createCarry({
    topicProblem: () => findings.topicProblem ?? null,
    violations: () => findings.violations ?? [],
    strict: findings.strict ?? false,
    ready: async () => {},
    publish: async () => {
      done.push('appended');
      return findings.outcome ?? APPENDED;
    },
    refusedEverything: async () => findings.refusedEverything ?? null,
    bringAlong: async (_, chain, { entryId, epoch, preceding, isFirst, isLate }) => {
      expect([preceding, isFirst, isLate, chain]).toEqual([[BEFORE], RUN.isFirst, RUN.isLate, CHAIN]);
      done.push(`next ones brought along after ${entryId} of ${epoch}`);
      const followers = findings.isFollowed ? [{ id: '2', hasJob: true }] : [];
      return { followers, mayHaveMore: false };
    },
    acknowledge: async (_, { entryId, epoch, before, preceding, followers, mayHaveMore }) => {
      await findings.acknowledge?.();
      expect([preceding, mayHaveMore]).toEqual([[BEFORE], before]);
      done.push(
        `acknowledged ${entryId} of ${epoch}${before ? ', again' : ''}${followers.map((it) => `, followed by ${it.id}`).join('')}`,
      );
    },
    letGo: async () => void done.push('row looked at'),
    logger: silent,
  });
  const event = aClaimedEvent({
    withheld: findings.withheld ?? null,
    ...(findings.isAlone ? {} : { chain: CHAIN }),
  });
  return { attempt: await carry(event, RUN, (run) => run()), done };
}

describe('an attempt', () => {
  test('appends, acknowledges with what Redis answered, and is done', async () => {
    expect(await attempt()).toEqual({
      attempt: { kind: 'done' },
      done: [
        'appended',
        `next ones brought along after ${ENTRY_ID} of ${EPOCH}`,
        `acknowledged ${ENTRY_ID} of ${EPOCH}`,
      ],
    });
  });

  test('brings nothing along for an event that belongs to no chain', async () => {
    expect((await attempt({ isAlone: true })).done).toEqual([
      'appended',
      `acknowledged ${ENTRY_ID} of ${EPOCH}`,
    ]);
  });

  test('says so when the next event has its job already', async () => {
    expect((await attempt({ isFollowed: true })).done.at(-1)).toBe(
      `acknowledged ${ENTRY_ID} of ${EPOCH}, followed by 2`,
    );
  });

  test('whose turn has not come waits', async () => {
    expect(await attempt({ outcome: { status: 'early' } })).toEqual({
      attempt: { kind: 'wait' },
      done: ['appended'],
    });
  });

  test('that had appended before brings nothing along: the next event may be far ahead', async () => {
    const before = {
      status: 'already-appended',
      entryId: ENTRY_ID,
      epoch: EPOCH,
      preceding: [BEFORE],
    } as const;
    expect(await attempt({ outcome: before, isFollowed: true })).toEqual({
      attempt: { kind: 'done' },
      done: ['appended', `acknowledged ${ENTRY_ID} of ${EPOCH}, again`],
    });
  });

  test('whose job is gone acknowledges nothing, and has somebody look at the row', async () => {
    expect(await attempt({ outcome: { status: 'job-gone' } })).toEqual({
      attempt: { kind: 'done' },
      done: ['appended', 'row looked at'],
    });
  });

  test('that comes after one that waits for a retry leaves its job: it waits on its row', async () => {
    expect(await attempt({ outcome: { status: 'behind-retry' } })).toEqual({
      attempt: { kind: 'done' },
      done: ['appended', 'row looked at'],
    });
  });

  test('that was refused is retried, one that found nobody there is postponed', async () => {
    expect(await attempt({ outcome: { status: 'refused', reason: 'WRONGTYPE' } })).toEqual({
      attempt: { kind: 'retry', reason: 'WRONGTYPE' },
      done: ['appended'],
    });
    expect(await attempt({ outcome: { status: 'unavailable', reason: 'OOM' } })).toEqual({
      attempt: { kind: 'postpone', reason: 'OOM' },
      done: ['appended'],
    });
  });

  test('that has no permission is retried if that is about its stream, and postponed if it is about everything', async () => {
    const outcome: AppendOutcome = { status: 'refused', reason: 'NOPERM this stream' };
    const refusedEverything = 'NOPERM everything';
    expect((await attempt({ outcome })).attempt).toEqual({ kind: 'retry', reason: outcome.reason });
    const { attempt: postponed } = await attempt({ outcome, refusedEverything });
    expect(postponed).toEqual({ kind: 'postpone', reason: refusedEverything });
    const wrongType: AppendOutcome = { status: 'refused', reason: 'WRONGTYPE' };
    expect((await attempt({ outcome: wrongType, refusedEverything })).attempt.kind).toBe('retry');
  });

  test('that must wait for its turn does nothing before, and acknowledges after it', async () => {
    const done: string[] = [];
    const carry = createCarry({
      topicProblem: () => null,
      violations: () => {
        done.push('checked');
        return [];
      },
      strict: true,
      ready: async () => {},
      publish: async () => {
        done.push('appended');
        return APPENDED;
      },
      refusedEverything: async () => null,
      bringAlong: async () => ({ followers: [], mayHaveMore: false }),
      acknowledge: async () => void done.push('acknowledged'),
      letGo: async () => {},
      logger: silent,
    });
    await carry(aClaimedEvent(), RUN, async (work) => {
      done.push('turn begins');
      const result = await work();
      done.push('turn ends');
      return result;
    });
    expect(done).toEqual(['turn begins', 'checked', 'appended', 'turn ends', 'acknowledged']);
  });

  test('whose row could not be marked is made again, at no cost', async () => {
    const { attempt: outcome } = await attempt({
      acknowledge: () => Promise.reject(new Error('no database')),
    });
    expect(outcome).toEqual({ kind: 'postpone', reason: expect.stringContaining('no database') });
  });

  test('with an impossible topic is given up before anything is written', async () => {
    expect(await attempt({ topicProblem: 'topic is empty' })).toEqual({
      attempt: { kind: 'give-up', reason: 'topic is empty' },
      done: [],
    });
  });

  test('of an event whose payload was withheld is given up with the reason, before anything is written', async () => {
    expect(await attempt({ withheld: 'event has 9 bytes' })).toEqual({
      attempt: { kind: 'give-up', reason: 'event has 9 bytes' },
      done: [],
    });
  });

  test('with a payload that breaks its schema is given up in strict mode, with every violation named', async () => {
    expect(await attempt({ violations: ['email: is missing', 'x: is not allowed'], strict: true })).toEqual({
      attempt: {
        kind: 'give-up',
        reason: 'payload breaks the schema of UserCreated: email: is missing; x: is not allowed',
      },
      done: [],
    });
    expect((await attempt({ violations: ['email: is missing'] })).attempt).toEqual({ kind: 'done' });
  });
});
