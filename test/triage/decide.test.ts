import { expect, test } from 'vitest';
import { decide } from '../../src/triage/decide.ts';

test('only an append that Redis answered with an id is acknowledged', () => {
  const preceding = [{ id: '1', entryId: '1699999999999-0' }];
  const entry = { entryId: '1700000000000-0', epoch: 'epoch', preceding };
  const acknowledge = { kind: 'acknowledge', ...entry };
  expect(decide({ status: 'appended', ...entry })).toEqual({ ...acknowledge, before: false });
  expect(decide({ status: 'already-appended', ...entry })).toEqual({ ...acknowledge, before: true });
});

test('an event whose job is gone, or has nothing to do for long, is let go: its row decides', () => {
  expect(decide({ status: 'job-gone' })).toEqual({ kind: 'let-go', isGone: true });
  expect(decide({ status: 'behind-retry' })).toEqual({ kind: 'let-go', isGone: false });
});

test('an event whose turn has not come waits', () => {
  expect(decide({ status: 'early' })).toEqual({ kind: 'wait' });
});

test('a refusal costs an attempt, an outage does not', () => {
  expect(decide({ status: 'refused', reason: 'WRONGTYPE' })).toEqual({ kind: 'retry', reason: 'WRONGTYPE' });
  expect(decide({ status: 'unavailable', reason: 'OOM' })).toEqual({ kind: 'postpone', reason: 'OOM' });
});
