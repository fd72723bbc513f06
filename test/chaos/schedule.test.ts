import { expect, test } from 'vitest';
import { FAULTS } from './faults.ts';
import { planOf } from './run.ts';

const together = (seed: number, durationMs = 3_600_000) =>
  planOf({ seed, durationMs, faults: FAULTS, each: false }).map(({ atMs, fault, seed: own }) => ({
    ...{ atMs, own },
    name: fault.name,
    lane: fault.lane,
  }));

test('the same seed gives the same schedule, another seed another', () => {
  expect(together(7)).toEqual(together(7));
  expect(together(7)).not.toEqual(together(8));
});

test('every fault comes as often as every other of its lane, over the whole duration', () => {
  const schedule = together(7);
  for (const lane of new Set(schedule.map((it) => it.lane))) {
    const own = schedule.filter((it) => it.lane === lane);
    const times = own.map(({ name }) => own.filter((it) => it.name === name).length);
    expect(new Set(times).size).toBe(1);
    expect(times[0]).toBeGreaterThan(5);
    expect(Math.min(...own.map((it) => it.atMs))).toBeLessThan(60_000);
    expect(Math.max(...own.map((it) => it.atMs))).toBeGreaterThan(3_500_000);
  }
});

test('a run that is too short for all faults still has each of them once', () => {
  expect(
    together(7, 5_000)
      .map((it) => it.name)
      .sort(),
  ).toEqual(FAULTS.map((fault) => fault.name).sort());
});

test('no two faults have the same name', () => {
  expect(new Set(FAULTS.map((fault) => fault.name)).size).toBe(FAULTS.length);
});
