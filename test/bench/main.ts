/**
 * `npm run bench`: how fast the relay is, and what an event costs, beside the limits of what it stands on and what else
 * there is to choose. Seconds of one machine mean little: contenders run in turns on the same servers, and their ratios
 * are what counts. Every run is checked from table and stream before it counts.
 */
import { mkdir, writeFile } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import { Command, InvalidArgumentError } from 'commander';
import { EXIT_INTERRUPTED, wholeNumber } from '../demo/command-line.ts';
import { barChart } from './chart.ts';
import { createProgress } from './progress.ts';
import { type Bench, describeSetting, resultText, type Setting, settingText, targetsText } from './report.ts';
import type { Scenario, ScenarioOptions, ScenarioResult } from './scenario.ts';
import { BACKLOG } from './scenarios/backlog.ts';
import { BLOCKED } from './scenarios/blocked.ts';
import { COSTS } from './scenarios/costs.ts';
import { DRAIN } from './scenarios/drain.ts';
import { GROWTH } from './scenarios/growth.ts';
import { IDLE } from './scenarios/idle.ts';
import { POISON } from './scenarios/poison.ts';
import { RETENTION } from './scenarios/retention.ts';
import { SHARDING } from './scenarios/sharding.ts';
import { START_UP } from './scenarios/start-up.ts';
import { STEADY } from './scenarios/steady.ts';
import { TABLE_SIZE } from './scenarios/table-size.ts';
import { HOT, ORDERING, PAYLOAD, PODS, VALIDATION } from './scenarios/variants.ts';
import { openServers, type Undo } from './servers.ts';
import { judge } from './targets.ts';

const SCENARIOS: readonly Scenario[] = [
  ...[DRAIN, COSTS, IDLE, STEADY, HOT, PODS, POISON, ORDERING, VALIDATION, PAYLOAD, BLOCKED, BACKLOG, GROWTH],
  ...[RETENTION, TABLE_SIZE, START_UP, SHARDING],
];
/** Without arguments: what tells most in five minutes or so. */
const USUAL = [DRAIN, COSTS, IDLE];

const positive = wholeNumber(1, 1_000_000_000);
const list = (text: string) => text.split(',').map(wholeNumber(0, 1_000_000_000));

function scenarioList(text: string, earlier: readonly Scenario[] = []): readonly Scenario[] {
  if (text === 'all') return SCENARIOS;
  const named = text.split(',').map((name) => {
    const found = SCENARIOS.find((it) => it.name === name.trim());
    if (!found)
      throw new InvalidArgumentError(`There are: all, ${SCENARIOS.map((it) => it.name).join(', ')}.`);
    return found;
  });
  return [...earlier, ...named];
}

const options = new Command('npm run bench --')
  .description(
    'Measures the relay on private servers, beside its limits and other outboxes, and checks what came of it.',
  )
  .option('--scenario <names>', 'names with commas between them, or all; may be repeated', scenarioList)
  .option('--events <n>', 'events of a run (default: as the scenario says)', positive)
  .option('--runs <n>', 'rounds in which each contender is measured', positive, 3)
  .option('--quick', 'small runs, to see that it works: their figures say nothing', false)
  .option('--out <folder>', 'where bench.json and the chart are written', '.bench')
  .option('--aggregates <n>', 'number of aggregates that the events belong to (drain)', positive)
  .option(
    '--platform-indexes',
    'the tables of relay and card have the six indexes of the old system (drain)',
    false,
  )
  .option('--published <list>', 'numbers of published rows in the table (growth)', list)
  .option('--seconds <n>', 'watch no longer (backlog)', positive)
  .option('--variant <n>', 'only this variant of the table (table-size)', positive)
  .option('--no-fsync', 'run PostgreSQL without fsync')
  .option('--fail', 'exit 1 if a target is not met', false)
  .addHelpText(
    'after',
    `\nScenarios, and how many minutes they take:\n${SCENARIOS.map(
      ({ name, describe, minutes }) => `  ${name.padEnd(12)} ${String(minutes).padStart(3)}  ${describe}`,
    ).join(
      '\n',
    )}\n\nWithout --scenario: ${USUAL.map((it) => it.name).join(', ')}. BENCH_CLI is the path of another build's cli.js.\nBENCH_CLI_BEFORE is the path of one more, which drain and hot measure in turns with it.`,
  )
  .parse()
  .opts<ScenarioOptions & { scenario?: readonly Scenario[]; out: string; fail: boolean }>();

const progress = createProgress(process.stderr);
const undo: Undo = [];
let interrupted = false;
const onSignal = (): void => {
  if (interrupted) return;
  interrupted = true;
  progress.stop();
  console.error('Stopping: contenders and servers are ended.');
  void cleanUp().finally(() => process.exit(EXIT_INTERRUPTED));
};
process.on('SIGINT', onSignal);
process.on('SIGTERM', onSignal);

const startedAt = performance.now();
let setting: Setting | undefined;
const results: ScenarioResult[] = [];
try {
  for (const scenario of options.scenario ?? USUAL) results.push(await run(scenario));
} catch (error) {
  // What is measured when it is ended fails; the process exits when all is cleaned up.
  if (interrupted) await new Promise(() => {});
  throw error;
} finally {
  progress.stop();
  if (!interrupted) await cleanUp();
}
await conclude();

async function run(scenario: Scenario): Promise<ScenarioResult> {
  const part = progress.within(scenario.name);
  try {
    const result = await scenario.run({
      ...{ options, undo, progress: part },
      async open(settings = {}) {
        const servers = await openServers({ fsync: options.fsync, postgres: settings }, undo);
        if (setting === undefined) {
          setting = await describeSetting(servers, options);
          console.log(settingText(setting));
        }
        return servers;
      },
    });
    part.stop();
    const named = { scenario: scenario.name, ...result };
    console.log(resultText(named));
    return named;
  } finally {
    part.stop();
    await cleanUp();
  }
}

async function cleanUp(): Promise<void> {
  for (const step of undo.splice(0).reverse()) await step();
}

async function conclude(): Promise<void> {
  const targets = judge(results);
  console.log(targetsText(targets));
  if (setting !== undefined) {
    const folder = resolve(options.out);
    await mkdir(folder, { recursive: true });
    const tookSeconds = Math.round((performance.now() - startedAt) / 1_000);
    const bench: Bench = { ...setting, tookSeconds, results, targets };
    await writeFile(join(folder, 'bench.json'), `${JSON.stringify(bench, null, 2)}\n`);
    const drain = results.find((it) => it.scenario === DRAIN.name);
    if (drain) {
      const figures = drain.figures.filter((it) => it.unit === 'events/s');
      const title = `Draining a backlog: ${drain.about}`;
      await writeFile(join(folder, 'drain.svg'), barChart(title, figures, settingText(setting).split('\n')));
    }
    console.log(`\nWritten to ${folder}: bench.json${drain ? ', drain.svg' : ''}. It took ${tookSeconds} s.`);
  }
  if (options.quick) console.log('These were quick runs: their figures say nothing.');
  const broken = results.some((it) => it.kept === false);
  const missed = options.fail && targets.some((it) => it.result === 'not met');
  process.exit(broken || missed ? 1 : 0);
}
