import { expect, test } from 'vitest';
import { inSteps } from '../src/event.ts';

const sizes = (items: number[], maxItems: number, maxBytes: number): number[][] =>
  inSteps(
    items.map((bytes) => ({ bytes })),
    maxItems,
    maxBytes,
  ).map((step) => step.map(({ bytes }) => bytes));

test('steps keep the order, and have neither too many items nor too many bytes', () => {
  expect(sizes([], 2, 10)).toEqual([]);
  expect(sizes([1, 2, 3, 4, 5], 2, 100)).toEqual([[1, 2], [3, 4], [5]]);
  expect(sizes([4, 6, 1, 9, 1], 10, 10)).toEqual([[4, 6], [1, 9], [1]]);
});

test('what is too large by itself is a step by itself', () => {
  expect(sizes([1, 50, 1, 1], 10, 10)).toEqual([[1], [50], [1, 1]]);
});
