/** A run: a world, a load, faults by schedule, rest, and the result. The same for the command line and the test. */
import { cpSync, mkdtempSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import pLimit from 'p-limit';
import { withDeadline } from '../../src/lifecycle.ts';
import { takeEvidence, traceEvents } from './evidence.ts';
import { type Fault, LANES, RECOVERY_MS, type Undo } from './fault.ts';
import { GRADE_NAMES, GRADES, type Grade, gradeWorld, isClean, since } from './grade.ts';
import { comesTrue, pause, persistently } from './patience.ts';
import { createRandom } from './random.ts';
import { laneOf, type Scheduled, scheduleEach, scheduleTogether } from './schedule.ts';
import { POISON_TOPIC } from './topics.ts';
import { buildWorld, type World } from './world.ts';

/** For an injection as a whole; the longest waits for a pod to come into its window. */
const INJECT_DEADLINE_MS = 300_000;
/** Flow that has not resumed by then is not waited for. */
const PROBE_DEADLINE_MS = 60_000;
const SETTLE_DEADLINE_MS = 180_000;
/** The load before the first fault, and around each one that is alone. */
const WARM_UP_MS = 2_000;
/** A poisonous event takes 7.5 s to die, and its successors wait for it. */
const POISON_EVERY_MS = 10_000;
/** Alone, a fault takes about so long with the load on; decides the rate. */
const ALONE_S = 12;
const RATE_MIN_PER_S = 40;

export type RunOptions = Readonly<{
  seed: number;
  /** To be written over the run; a run that takes longer writes more. */
  events: number;
  pods: number;
  durationMs: number;
  faults: readonly Fault[];
  /** Each fault alone on a settled system, instead of all over the whole run. */
  each: boolean;
  /** Keep the logs of pods and servers, and all that Redis ran, although nothing was violated. */
  keep: boolean;
  signal?: AbortSignal;
  onNote?(text: string): void;
  /** The world is there; what it holds may be watched from now on. */
  onWorld?(world: World, underWay: () => readonly string[]): void;
}>;

export type Injection = Readonly<{
  fault: Fault;
  /** From the end of the fault until an event flows from table to stream; undefined if it did not in time. */
  recoveryMs: number | undefined;
  beganAt: Date;
  /** When it was undone, or could not be injected. */
  endedAt: Date;
  /** Why it could not be injected, or not be undone. */
  error: string | undefined;
  /** What the servers saw when flow had not resumed in time. */
  evidence: string | undefined;
  /** What it did, where that can be told. */
  grade: Grade | undefined;
}>;

export type RunResult = Readonly<{
  injections: readonly Injection[];
  /** Of everything, at the end. */
  grade: Grade;
  settled: boolean;
  /** A line each: what makes the run a failure. */
  violations: readonly string[];
  /** A line each: what somebody should look at. */
  warnings: readonly string[];
  counts: Readonly<Record<string, number>>;
  logs: string | undefined;
}>;

/** @throws when the world could not be built, or fell to pieces; what it did to the events is in the result */
export async function run(options: RunOptions): Promise<RunResult> {
  const { seed, pods, each, onNote = () => {} } = options;
  const schedule = planOf(options);
  const world = await buildWorld({ pods, seed, keepHistory: options.keep });
  try {
    const underWay = new Set<string>();
    options.onWorld?.(world, () => [...underWay]);
    const injections = each
      ? await oneByOne(world, schedule, options, underWay)
      : await allTogether(world, schedule, options, underWay);
    await world.workload.quiet();
    underWay.add('settling');
    const settled = await settle(world, options.signal);
    onNote(`Settled: ${settled ? 'yes' : 'no'}. Ending the pods.`);
    // Nobody writes any more: table and streams are of the same moment.
    await world.fleet.stop();
    const grade = await gradeWorld(world);
    const counts = world.workload.counts();
    const result = judge(options, injections, grade, settled, world);
    const logs =
      options.keep || result.violations.length > 0 || world.fleet.surprises().length > 0
        ? await keepLogs(world, seed, injections, grade)
        : undefined;
    return { injections, grade, settled, counts, logs, ...result };
  } finally {
    await world.stop();
  }
}

export function planOf({
  each,
  ...options
}: Pick<RunOptions, 'seed' | 'durationMs' | 'faults' | 'each'>): Scheduled[] {
  return each ? scheduleEach(options) : scheduleTogether(options);
}

async function allTogether(
  world: World,
  schedule: readonly Scheduled[],
  options: RunOptions,
  underWay: Set<string>,
): Promise<Injection[]> {
  const { signal } = options;
  world.workload.setRate(Math.max(options.events / (options.durationMs / 1_000), RATE_MIN_PER_S));
  const startedAt = performance.now();
  const injections: Injection[] = [];
  const ended = new AbortController();
  const poisoning = poisonUntil(world, ended.signal);
  const lanes = LANES.map(async (lane) => {
    for (const scheduled of laneOf(schedule, lane)) {
      await pause(Math.max(WARM_UP_MS, scheduled.atMs) - (performance.now() - startedAt), signal);
      if (signal?.aborted) return;
      injections.push(await injectOne(world, scheduled, underWay, options));
    }
  });
  await Promise.all(lanes);
  // Faults that were through early leave the rest of the load to a system in peace.
  const enough = async () => world.workload.committed().size >= options.events;
  await comesTrue(enough, options.durationMs + SETTLE_DEADLINE_MS, signal);
  ended.abort();
  await poisoning;
  return injections;
}

async function poisonUntil(world: World, signal: AbortSignal): Promise<void> {
  while (!signal.aborted) {
    // They die one after the other: what an outage holds up must not pile up beyond the time to settle.
    const [waiting] = await world
      .sql(
        'SELECT count(*)::int AS n FROM identity.outbox WHERE topic = $1 AND NOT published AND dead_lettered_at IS NULL',
        [POISON_TOPIC],
      )
      .catch(() => []);
    if (waiting?.n === 0) await world.workload.poisonOnce();
    await pause(POISON_EVERY_MS, signal);
  }
}

async function oneByOne(
  world: World,
  schedule: readonly Scheduled[],
  options: RunOptions,
  underWay: Set<string>,
): Promise<Injection[]> {
  const rate = Math.max(options.events / schedule.length / ALONE_S, RATE_MIN_PER_S);
  const injections: Injection[] = [];
  let before: Grade | undefined;
  for (const scheduled of schedule) {
    if (options.signal?.aborted) break;
    world.workload.setRate(rate);
    await world.workload.poisonOnce();
    await pause(WARM_UP_MS, options.signal);
    const injection = await injectOne(world, scheduled, underWay, options);
    await pause(WARM_UP_MS, options.signal);
    await world.workload.quiet();
    underWay.add(`settling after ${scheduled.fault.name}`);
    await settle(world, options.signal);
    underWay.clear();
    const now = await gradeWorld(world);
    injections.push({ ...injection, grade: since(before, now) });
    before = now;
  }
  return injections;
}

/** Of a server that has lost data, until nothing of it is left to be done. */
const AFTERMATH_MS = 5_000;
const losing = pLimit(1);

function injectOne(
  world: World,
  scheduled: Scheduled,
  underWay: Set<string>,
  options: RunOptions,
): Promise<Injection> {
  if (!scheduled.fault.losesData) return inject(world, scheduled, underWay, options);
  return losing(async () => {
    const injection = await inject(world, scheduled, underWay, options);
    await pause(AFTERMATH_MS, options.signal);
    return injection;
  });
}

async function inject(
  world: World,
  { fault, seed }: Scheduled,
  underWay: Set<string>,
  { signal, onNote = () => {} }: RunOptions,
): Promise<Injection> {
  underWay.add(fault.name);
  const beganAt = new Date();
  const done = { fault, beganAt, grade: undefined };
  try {
    let undo: Undo | undefined;
    let meanwhile: Awaited<ReturnType<typeof recovery>> | undefined;
    try {
      undo = await withDeadline(INJECT_DEADLINE_MS, fault.inject(world, createRandom(seed)));
      if (fault.flowsMeanwhile) meanwhile = await recovery(world, fault);
      await pause(fault.lastsMs ?? 0, signal);
    } finally {
      if (undo !== undefined) await persistently(undo);
    }
    const endedAt = new Date();
    const { recoveryMs, evidence } = meanwhile ?? (await recovery(world, fault));
    onNote(
      `${fault.name}: ${recoveryMs === undefined ? 'no flow' : `flow after ${Math.round(recoveryMs)} ms`}`,
    );
    return { ...done, endedAt, recoveryMs, error: undefined, evidence };
  } catch (error) {
    const { message } = error as Error;
    onNote(`${fault.name}: ${message}`);
    return { ...done, endedAt: new Date(), recoveryMs: undefined, error: message, evidence: undefined };
  } finally {
    underWay.delete(fault.name);
  }
}

/** How long it takes until an event flows; what there is to be seen if that is too long. */
async function recovery(world: World, fault: Fault): Promise<Pick<Injection, 'recoveryMs' | 'evidence'>> {
  const flows = new AbortController();
  const looking = pause(fault.recoveryMs ?? RECOVERY_MS, flows.signal).then(() =>
    flows.signal.aborted ? undefined : takeEvidence(world),
  );
  const recoveryMs = await world.workload.probe(PROBE_DEADLINE_MS);
  flows.abort();
  return { recoveryMs, evidence: await looking };
}

/** Whether every row is published or dead, and no job is left, within the deadline. */
async function settle({ sql, queues }: World, signal: AbortSignal | undefined): Promise<boolean> {
  return comesTrue(
    async () => {
      const left = await sql(
        'SELECT FROM identity.outbox WHERE NOT published AND dead_lettered_at IS NULL LIMIT 1',
      );
      if (left.length > 0) return false;
      const jobs = await queues.publish.getJobCounts('waiting', 'active', 'delayed', 'prioritized');
      return Object.values(jobs).every((count) => count === 0);
    },
    SETTLE_DEADLINE_MS,
    signal,
  );
}

function judge(
  { each, signal }: RunOptions,
  injections: readonly Injection[],
  grade: Grade,
  settled: boolean,
  world: World,
): Pick<RunResult, 'violations' | 'warnings'> {
  if (signal?.aborted) return { violations: [], warnings: ['interrupted: there is no result'] };
  const violations: string[] = [];
  const warnings: string[] = world.fleet.surprises().slice();
  if (!isClean(grade)) {
    const kinds = GRADE_NAMES.filter((name) => grade[name].length > 0);
    for (const kind of kinds)
      violations.push(`${GRADES[kind]}: ${grade[kind].length} (${grade[kind].slice(0, 5).join(', ')})`);
  }
  if (!settled) warnings.push(`rows or jobs were left after ${SETTLE_DEADLINE_MS / 1_000} s of peace`);
  for (const { fault, recoveryMs, error } of injections) {
    if (error !== undefined) violations.push(`${fault.name} could not be injected: ${error}`);
    else if ((recoveryMs ?? Number.POSITIVE_INFINITY) > (fault.recoveryMs ?? RECOVERY_MS)) {
      const took =
        recoveryMs === undefined ? 'no flow again' : `flow only after ${(recoveryMs / 1_000).toFixed(1)} s`;
      (each ? violations : warnings).push(`recovery from ${fault.name}: ${took}`);
    }
  }
  return { violations, warnings };
}

/** What it takes to find out what happened to an event. */
async function keepLogs(
  world: World,
  seed: number,
  injections: readonly Injection[],
  grade: Grade,
): Promise<string> {
  const folder = mkdtempSync(join(tmpdir(), `relay-chaos-seed-${seed}-`));
  await world.fleet.writeLogs(folder);
  const slow = injections.flatMap(({ fault, evidence }) => (evidence ? `${fault.name}\n${evidence}\n` : []));
  writeFileSync(join(folder, 'no-flow.txt'), slow.join('\n'));
  const times = injections.map(
    ({ fault, beganAt, endedAt }) => `${beganAt.toISOString()} to ${endedAt.toISOString()} ${fault.name}\n`,
  );
  writeFileSync(join(folder, 'faults.txt'), times.join(''));
  cpSync(world.redis.logFile, join(folder, 'redis.log'));
  cpSync(world.postgres.logFile, join(folder, 'postgres.log'));
  cpSync(join(world.redisFolder, 'appendonlydir'), join(folder, 'appendonlydir'), { recursive: true });
  const violated = new Set(GRADE_NAMES.flatMap((name) => grade[name]));
  writeFileSync(join(folder, 'violated.json'), JSON.stringify(await traceEvents(world, violated), null, 2));
  return folder;
}
