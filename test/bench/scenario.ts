/** What a scenario is, and what it leaves behind. */
import type { Contender, Drained } from './contender.ts';
import type { Progress } from './progress.ts';
import type { Servers, Undo } from './servers.ts';
import type { Workload } from './workload.ts';

/** Something that was measured, once in each round. */
export type Figure = Readonly<{ name: string; unit: string; values: readonly number[] }>;

export type ScenarioResult = Readonly<{
  scenario: string;
  /** What was done, in a sentence. */
  about: string;
  figures: readonly Figure[];
  /** What was checked of the outcome, of every run. */
  verified: string;
  notes: readonly string[];
  /** False where the scenario has a bound of its own and it was not kept. */
  kept?: boolean;
}>;

export type ScenarioOptions = Readonly<{
  /** Left out: the scenario's own choice. */
  events?: number | undefined;
  runs: number;
  quick: boolean;
  fsync: boolean;
  seconds?: number | undefined;
  variant?: number | undefined;
  aggregates?: number | undefined;
  platformIndexes: boolean;
  published?: readonly number[] | undefined;
}>;

export type ScenarioContext = Readonly<{
  options: ScenarioOptions;
  progress: Progress;
  /** Opens private servers; they go when the scenario has ended. */
  open(settings?: Readonly<Record<string, string | number>>): Promise<Servers>;
  undo: Undo;
}>;

export type Scenario = Readonly<{
  name: string;
  describe: string;
  /** With the options left out, on two cores; tells nobody anything exact. */
  minutes: number;
  run(context: ScenarioContext): Promise<Omit<ScenarioResult, 'scenario'>>;
}>;

/** For each process. More would warm up nothing that so many do not. */
const WARM_MOST = 5_000;
/** What a slow contender is given of a backlog at most: it would need hours, and is the slower the more there is. */
export const SLOW_MOST = 20_000;

/**
 * Drains the same work by each contender in turn, `runs` times, and back in every other round: what slows the machine
 * down for a while meets them all. A round before the first is not counted.
 *
 * @returns what each contender did, in the order of the rounds
 */
export async function inTurns(
  context: ScenarioContext,
  entries: readonly Readonly<{ contender: Contender; workload: Workload }>[],
): Promise<Map<string, Drained[]>> {
  const { options, progress } = context;
  const drained = new Map<string, Drained[]>(entries.map(({ contender }) => [contender.name, []]));
  for (let round = 0; round <= options.runs; round++) {
    const warm = round === 0;
    for (const { contender, workload } of round % 2 === 0 ? entries : entries.toReversed()) {
      if (warm && contender.isSlow) continue;
      progress.now(`${warm ? 'warming up' : `round ${round} of ${options.runs}`}: ${contender.name}`);
      const most = warm
        ? WARM_MOST * (contender.processes ?? 1)
        : contender.isSlow
          ? SLOW_MOST
          : workload.events;
      const events = Math.min(workload.events, most);
      const work = { ...workload, events, aggregates: Math.min(workload.aggregates, events) };
      const result = await contender.drain(work);
      if (warm) continue;
      drained.get(contender.name)?.push(result);
      progress.note(
        `round ${round}: ${contender.name} ${Math.round(result.events / result.seconds)} events/s` +
          (result.cpu ? `; CPU per event ${cpuText(result)}` : ''),
      );
    }
  }
  return drained;
}

const cpuText = ({ cpu, events }: Drained) =>
  Object.entries(cpu ?? {})
    .map(([who, micros]) => `${who} ${Math.round(micros / events)} µs`)
    .join(', ');

export const rates = (runs: readonly Drained[]): number[] => runs.map((it) => it.events / it.seconds);

/** Events per second of each, and each one's ratio to the others' of the same round. */
export function rateFigures(
  drained: ReadonlyMap<string, readonly Drained[]>,
  ratios: readonly (readonly [of: string, to: string])[],
): Figure[] {
  const rateOf = (name: string) => rates(drained.get(name) ?? []);
  return [
    ...[...drained.keys()].map((name) => ({ name, unit: 'events/s', values: rateOf(name) })),
    ...ratios
      .filter((pair) => pair.every((name) => drained.has(name)))
      .map(([of, to]) => {
        const others = rateOf(to);
        return {
          name: `${of} / ${to}`,
          unit: 'ratio',
          values: rateOf(of).map((rate, i) => rate / (others[i] as number)),
        };
      }),
  ];
}

/** CPU time for each event: the contender's own, Redis', PostgreSQL's. */
export function cpuFigures(name: string, runs: readonly Drained[]): Figure[] {
  return (['contender', 'redis', 'postgres'] as const).map((who) => ({
    name: `${name}, CPU of ${{ contender: 'its process', redis: 'Redis', postgres: 'PostgreSQL' }[who]}`,
    unit: 'µs/event',
    values: runs.map((it) => (it.cpu?.[who] ?? Number.NaN) / it.events),
  }));
}

/** What a process spends of the CPU on an event, against another one in the same round. */
export function cpuRatio(name: string, runs: readonly Drained[], others: readonly Drained[]): Figure {
  const micros = (run: Drained | undefined) => (run?.cpu?.contender ?? Number.NaN) / (run?.events ?? 1);
  return { name, unit: 'ratio', values: runs.map((run, i) => micros(run) / micros(others[i])) };
}

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = Math.floor(sorted.length / 2);
  if (sorted.length % 2 === 1) return sorted[middle] as number;
  return ((sorted[middle - 1] as number) + (sorted[middle] as number)) / 2;
}

export const ONCE_IN_ORDER = 'every event once, in the order of its aggregate, in every run';
