import { expect } from 'vitest';
import { gradeLedger, type LedgerGrade, type LedgerOptions, violationsOf } from '../demo/ledger.ts';

/** Fails the test, naming kinds, counts and sample ids, unless table and streams show that every promise held. */
export async function expectPromisesHeld(options: LedgerOptions): Promise<LedgerGrade> {
  const grade = await gradeLedger(options);
  expect(violationsOf(grade)).toEqual([]);
  return grade;
}
