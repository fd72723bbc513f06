import { expect, test } from 'vitest';
import type { Standing } from '../../src/outbox/parked.ts';
import { createRowQuestions } from '../../src/publish/row-questions.ts';
import { deferred } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const FIRST: Standing = { kind: 'first', after: null };
const OVER: Standing = { kind: 'over', after: null };

type Question = Readonly<{ eventId: string; before: string | null }>;

/** Statements that end when the test says so. */
function createRows() {
  const asked: {
    questions: readonly Question[];
    answer: ReturnType<typeof deferred<Map<string, Standing>>>;
  }[] = [];
  const rows = createRowQuestions({
    standingOf(questions) {
      const answer = deferred<Map<string, Standing>>();
      asked.push({ questions, answer });
      return answer.promise;
    },
  });
  const statement = (n: number) => waitFor(() => asked[n - 1], { what: `statement ${n}` });
  return { rows, asked, statement };
}

test('what is asked in one turn of the loop is one statement, and each asker gets its own answer', async () => {
  const { rows, asked, statement } = createRows();
  const standings = [rows.standingOf('a', null), rows.standingOf('b', 'a'), rows.standingOf('c', null)];
  const { questions, answer } = await statement(1);
  expect(questions).toEqual([
    { eventId: 'a', before: null, resolve: expect.any(Function), reject: expect.any(Function) },
    { eventId: 'b', before: 'a', resolve: expect.any(Function), reject: expect.any(Function) },
    { eventId: 'c', before: null, resolve: expect.any(Function), reject: expect.any(Function) },
  ]);
  answer.resolve(
    new Map<string, Standing>([
      ['b', { kind: 'early', after: 'a' }],
      ['a', FIRST],
    ]),
  );
  // Of an event without an answer there is no row.
  expect(await Promise.all(standings)).toEqual([FIRST, { kind: 'early', after: 'a' }, OVER]);
  expect(asked).toHaveLength(1);
});

test('what is asked while a statement runs is the next one, of 500 events at most', async () => {
  const { rows, asked, statement } = createRows();
  const first = rows.standingOf('first', null);
  const { answer } = await statement(1);
  const later = Promise.all(Array.from({ length: 501 }, (_, i) => rows.standingOf(`${i}`, null)));
  await new Promise(setImmediate);
  expect(asked).toHaveLength(1);
  answer.resolve(new Map([['first', FIRST]]));
  expect(await first).toEqual(FIRST);
  (await statement(2)).answer.resolve(new Map());
  (await statement(3)).answer.resolve(new Map());
  expect(asked.map(({ questions }) => questions.length)).toEqual([1, 500, 1]);
  expect(await later).toEqual(Array(501).fill(OVER));
});

test('when the database does not answer, its askers are told; the next ones are asked about again', async () => {
  const { rows, statement } = createRows();
  const failed = Promise.allSettled([rows.standingOf('a', null), rows.standingOf('b', null)]);
  const { answer } = await statement(1);
  const next = rows.standingOf('c', null);
  const error = new Error('no database');
  answer.reject(error);
  expect(await failed).toEqual([
    { status: 'rejected', reason: error },
    { status: 'rejected', reason: error },
  ]);
  (await statement(2)).answer.resolve(new Map([['c', FIRST]]));
  expect(await next).toEqual(FIRST);
  const last = rows.standingOf('d', null);
  (await statement(3)).answer.resolve(new Map());
  expect(await last).toEqual(OVER);
});
