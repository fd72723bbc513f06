import type { Fault, Lane } from './fault.ts';
import { between, createRandom, type Random, shuffled } from './random.ts';

/** Room for one fault in its lane: to begin, to last, and to be recovered from. */
const ROOM_MS = 15_000;

/** One injection to come. */
export type Scheduled = Readonly<{
  /** Since the start of the run. */
  atMs: number;
  fault: Fault;
  /** Of the injection's own choices (which pod, how many), so that they do not depend on the other lanes' timing. */
  seed: number;
}>;

/** Nothing but the seed and the options decides what is injected when. */
export type ScheduleOptions = Readonly<{ seed: number; durationMs: number; faults: readonly Fault[] }>;

/**
 * All faults together: each lane deals its faults out over the whole run, in rounds, each round in another order.
 * Every fault comes at least once, so a short run of many faults takes longer than its duration. Lanes overlap.
 */
export function scheduleTogether({ seed, durationMs, faults }: ScheduleOptions): Scheduled[] {
  const random = createRandom(seed);
  const lanes = new Set(faults.map((fault) => fault.lane));
  return [...lanes]
    .flatMap((lane) => {
      const own = faults.filter((fault) => fault.lane === lane);
      return scheduleLane(own, durationMs, random);
    })
    .sort((a, b) => a.atMs - b.atMs);
}

function scheduleLane(faults: readonly Fault[], durationMs: number, random: Random): Scheduled[] {
  const rounds = Math.max(1, Math.floor(durationMs / (faults.length * ROOM_MS)));
  const order = Array.from({ length: rounds }, () => shuffled(random, faults)).flat();
  const room = durationMs / order.length;
  return order.map((fault, place) => ({
    atMs: Math.round(place * room + (random() * room) / 3),
    fault,
    seed: seedOf(random),
  }));
}

/** One fault after the other, in the given order; when each comes is up to how fast the one before is settled. */
export function scheduleEach({ seed, faults }: ScheduleOptions): Scheduled[] {
  const random = createRandom(seed);
  return faults.map((fault) => ({ atMs: 0, fault, seed: seedOf(random) }));
}

const seedOf = (random: Random): number => between(random, 1, 2 ** 31);

export function laneOf(schedule: readonly Scheduled[], lane: Lane): Scheduled[] {
  return schedule.filter((it) => it.fault.lane === lane);
}
