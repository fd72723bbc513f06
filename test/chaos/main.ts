/**
 * `npm run chaos`: every fault that production brings, against private servers and real pods, under load; then
 * a result from the table, the streams and the dead letters alone. docs/guarantees.md, "Chaos runs".
 */
import { Command, InvalidArgumentError } from 'commander';
import { EXIT_INTERRUPTED, interruption, wholeNumber } from '../demo/command-line.ts';
import type { Fault } from './fault.ts';
import { FAULTS, faultsNamed } from './faults.ts';
import { createProgress } from './progress.ts';
import { reportTable, schedulePlan } from './report.ts';
import { planOf, run } from './run.ts';

const EXIT_VIOLATED = 1;

function faultList(text: string): readonly Fault[] {
  if (text === 'all') return FAULTS;
  try {
    return faultsNamed(text.split(',').map((name) => name.trim()));
  } catch (error) {
    throw new InvalidArgumentError((error as Error).message);
  }
}

type Options = {
  seed: number;
  events: number;
  pods: number;
  duration: number;
  faults?: readonly Fault[];
  each: boolean;
  list: boolean;
  keep: boolean;
};

const options = new Command('npm run chaos --')
  .description(
    'Starts a private PostgreSQL and Redis and relay pods, writes events from many transactions at once, injects ' +
      'faults, lets everything settle, and audits table, streams and dead letters. Exits 1 on any violation.',
  )
  .option('--seed <number>', 'the same seed gives the same schedule of faults', wholeNumber(0, 2 ** 31), 1)
  .option('--events <number>', 'events to write over the run, at least', wholeNumber(100, 1_000_000), 20_000)
  .option('--pods <number>', 'relay pods', wholeNumber(1, 8), 3)
  .option('--duration <seconds>', 'time over which the faults are spread', wholeNumber(5, 86_400), 300)
  .option('--faults <names>', 'names with commas between them (default: all)', faultList)
  .option('--each', 'each fault alone, on a settled system, graded by itself', false)
  .option('--list', 'name the faults, and end', false)
  .option('--keep', 'keep logs and every command that Redis ran (it starts again more slowly then)', false)
  .addHelpText('after', '\nFaults: see --list.')
  .parse()
  .opts<Options>();

const faults = options.faults ?? FAULTS;

if (options.list) {
  for (const fault of faults) console.log(`${fault.name.padEnd(36)} ${fault.describe}`);
  process.exit(0);
}

const progress = createProgress(process.stdout);
const stop = interruption(() =>
  progress.note('Stopping: faults are undone, servers and pods ended. Once more to stop at once.'),
);

const runOptions = {
  ...options,
  faults,
  durationMs: options.duration * 1_000,
  signal: stop,
  onNote: progress.note,
  onWorld: progress.watch,
};
console.log(`Seed ${options.seed}, ${options.pods} pods, ${options.events} events. The schedule:\n`);
console.log(schedulePlan(planOf(runOptions), options.each).join('\n'), '\n');
const result = await run(runOptions).finally(progress.stop);
console.log(`\n${reportTable(result).join('\n')}\n`);
console.log(
  Object.entries(result.counts)
    .map(([what, count]) => `${what} ${count}`)
    .join(', '),
);
for (const warning of result.warnings) console.log(`Look at: ${warning}`);
for (const violation of result.violations) console.log(`VIOLATED ${violation}`);
if (result.logs !== undefined) console.log(`Logs of pods and servers: ${result.logs}`);
if (stop.aborted) process.exit(EXIT_INTERRUPTED);
if (result.violations.length === 0) console.log('Every promise held.');
process.exit(result.violations.length === 0 ? 0 : EXIT_VIOLATED);
