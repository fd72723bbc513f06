/**
 * Whatever comes between what: pods that overlap, stall and die, attempts that fail, operators, a Redis that loses
 * data. Every event gets out once and in order, or is dead. A counter-example is shrunk and told as a script.
 *
 * `MODEL_SEED` (a number, or `random`) and `MODEL_RUNS` walk elsewhere, and longer. `MODEL_PATH`, as a failure reports
 * it, walks that one again; with `MODEL_TRACE=1` the script shows rows and jobs after each step. `MODEL_SURVEY=1` takes
 * every walk, and tells how many failed.
 */
import { Worker } from 'bullmq';
import fc from 'fast-check';
import { afterEach, beforeAll, expect, test, vi } from 'vitest';
import { FAILS_FAST } from '../../src/connections/servers.ts';
import type { OutboxEvent } from '../../src/event.ts';
import { createQueues, publishQueueName } from '../../src/queue/queues.ts';
import { WORKER_CONNECTION } from '../../src/queue/workers.ts';
import { atEndOfFile } from '../support/cleanup.ts';
import { asRelay, OPERATOR_ROLE } from '../support/least-privilege.ts';
import { createDatabase, createRedis } from '../support/servers.ts';
import { openAdminPool, openAdminRedis, openPool, openRedis, silent } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';
import { FAR_OFF_MS } from './pod.ts';
import { createWorld, type Servers, type Settings, TOPIC, type World } from './world.ts';

const { MODEL_SEED = '1', MODEL_RUNS = '60', MODEL_PATH, MODEL_TRACE, MODEL_SURVEY } = process.env;
const RUNS = Number(MODEL_RUNS);
const STEPS_MAX = 1_000;
const EVENTS = 9;
/** Shrinking takes hundreds of runs; after so long the shortest script so far has to do. */
const LIMIT_MS = 120_000 + RUNS * 3_000;
const GRACE_MS = 60_000;
/** An early event is asked again for 60 ms of a pod's time: for so many steps at least. */
const MS_PER_STEP = 5;
/** Until everything is at rest. */
const ROUNDS_MAX = 80;
const STEPS_PER_ROUND_MAX = 1_000;

let servers: Servers;
let steps = 0;
let walks = 0;
const failures: string[] = [];

beforeAll(async () => {
  const { url, adminUrl, name } = await createDatabase();
  const { url: redisUrl, adminUrl: adminRedisUrl } = await createRedis();
  const admin = openAdminPool(adminUrl);
  await admin.query(`ALTER DATABASE ${name} SET deadlock_timeout = '20ms'`);
  await admin.query(`ALTER DATABASE ${name} SET synchronous_commit = off`);
  const redis = openRedis(redisUrl, FAILS_FAST);
  await waitFor(() => redis.status === 'ready', { what: 'the connection to Redis' });
  const naming = { queuePrefix: 'bull', queueName: 'relay' };
  const queues = createQueues(
    redis,
    { ...naming, maxRetryAttempts: 1, retryBaseDelayMs: FAR_OFF_MS },
    silent,
  );
  const worker = new Worker<OutboxEvent>(publishQueueName(naming.queueName), null, {
    connection: openRedis(redisUrl, WORKER_CONNECTION),
    ...{ prefix: naming.queuePrefix, autorun: false, lockDuration: FAR_OFF_MS, maxStalledCount: 1_000_000 },
  });
  atEndOfFile(() => worker.close(true));
  await Promise.all([queues.ready(), worker.waitUntilReady()]);
  servers = {
    ...{ admin, redis, queues, worker, adminRedis: openAdminRedis(adminRedisUrl) },
    pool: openPool(url, { max: 40 }),
    operators: openPool(asRelay(adminUrl, OPERATOR_ROLE)),
    streamOptions: {
      ...{ dlqStreamName: `${TOPIC}.dlq`, streamMaxLen: 0, dlqMaxLen: 0, jobKey: queues.jobKey },
      ...{ memoryPrefix: 'bull:relay', epochKey: 'bull:relay:epoch', topicProblem: () => null },
    },
  };
});

afterEach(() => {
  vi.restoreAllMocks();
});

type Kind = Readonly<{
  weight: number;
  /** What happened, or undefined where it makes no sense now. `n` chooses among what there is. */
  run: (world: World, n: number) => Promise<string | undefined>;
}>;

/** What makes up an undisturbed relay. */
const ROAD: Readonly<Record<string, Kind>> = {
  insert: {
    weight: 30,
    run: async ({ steps, events }, n) => (events.size < EVENTS ? steps.insert(n) : undefined),
  },
  'go on': { weight: 400, run: ({ steps }, n) => steps.goOn(n) },
  'fall asleep': { weight: 40, run: ({ steps }, n) => steps.fallAsleep(n) },
  'wake up': { weight: 6, run: ({ steps }, n) => steps.wakeUp(n) },
  claim: { weight: 40, run: ({ steps }, n) => steps.claim(n) },
  fetch: { weight: 120, run: ({ steps }, n) => steps.fetch(n) },
  refill: { weight: 60, run: ({ steps }, n) => steps.refill(n) },
  look: { weight: 30, run: ({ steps }, n) => steps.look(n) },
  recover: { weight: 10, run: ({ steps }, n) => steps.recover(n) },
  ask: { weight: 8, run: ({ steps }, n) => steps.ask(n) },
  tick: { weight: 20, run: ({ steps }, n) => steps.tick(n) },
  wake: { weight: 60, run: ({ steps }, n) => steps.wake(n) },
  'take over': { weight: 30, run: ({ steps }, n) => steps.takeOver(n) },
  'miss jobs': { weight: 10, run: ({ steps }, n) => steps.missJobs(n) },
  snapshot: { weight: 15, run: ({ steps }) => steps.snapshot() },
};

/** What may disturb it: in each walk some of these. */
const FAULTS: Readonly<Record<string, Kind>> = {
  stall: { weight: 30, run: ({ steps }, n) => steps.stall(n) },
  crash: { weight: 6, run: ({ steps }, n) => steps.crash(n) },
  'cut off': { weight: 15, run: ({ steps }, n) => steps.cutOff(n) },
  'end a lease': { weight: 30, run: ({ steps }, n) => steps.endLease(n) },
  heal: { weight: 25, run: ({ steps }, n) => steps.heal(n) },
  doom: { weight: 8, run: ({ steps }, n) => steps.doom(n) },
  replay: { weight: 30, run: ({ steps }, n) => steps.replay(n) },
  discard: { weight: 3, run: ({ steps }, n) => steps.discard(n) },
  retry: { weight: 25, run: ({ steps }, n) => steps.retry(n) },
  'remove a job': { weight: 10, run: ({ steps }, n) => steps.removeJob(n) },
  trim: { weight: 15, run: ({ steps }) => steps.trim() },
  'roll back': { weight: 10, run: ({ steps }, n) => steps.rollBack(n) },
  flush: { weight: 2, run: ({ steps }, n) => steps.flush(n) },
  'delete a stream': { weight: 4, run: ({ steps }, n) => steps.deleteStream(n) },
  'end the epoch': { weight: 4, run: ({ steps }, n) => steps.endEpoch(n) },
};

const KINDS = { ...ROAD, ...FAULTS };

type Choice = Readonly<{ kind: string; n: number }>;

const aChoice: fc.Arbitrary<Choice> = fc
  .record({
    kind: fc.oneof(
      ...Object.entries(KINDS).map(([kind, { weight }]) => ({ arbitrary: fc.constant(kind), weight })),
    ),
    n: fc.nat(999),
  })
  .map((choice) => Object.assign(choice, { [fc.toStringMethod]: () => `${choice.kind} ${choice.n}` }));

const someSettings: fc.Arbitrary<Settings & Readonly<{ faults: string[] }>> = fc.record({
  policy: fc.constantFrom('continue', 'hold'),
  maxInFlight: fc.constantFrom(40, 4, 8, 12),
  redis: fc.constantFrom(1, 2),
  faults: fc.subarray(Object.keys(FAULTS)),
});

/** A walk, and what has happened so far. */
type Walk = Readonly<{ world: World; script: string[] }>;

async function take({ world, script }: Walk, kind: string, n: number): Promise<boolean> {
  steps++;
  const what = await (KINDS[kind] as Kind).run(world, n);
  if (what === undefined) return false;
  script.push(what);
  const index = script.length - 1;
  script[index] = what + (await world.assertAll());
  if (MODEL_TRACE) script.push(`    ${await world.picture()}`);
  return true;
}

/** Faults end, waits and leases too: then every row must get where it belongs. */
async function comeToRest(walk: Walk, seed: number): Promise<void> {
  const { world, script } = walk;
  script.push('-- from here on everything is let run to rest');
  let random = seed;
  const next = () => {
    random = (random * 1_103_515_245 + 12_345) % 2_147_483_648;
    return random >> 8;
  };
  const all = async (kind: string) => {
    for (let i = 0; i < STEPS_PER_ROUND_MAX; i++) if (!(await take(walk, kind, next()))) return;
    throw new Error(`"${kind}" does not end`);
  };
  for (let round = 0; round < ROUNDS_MAX; round++) {
    for (const kind of ['wake up', 'go on', 'ask']) await all(kind);
    if ((await world.unrest()) === '') return;
    for (let pod = 0; pod < world.podCount(); pod++) {
      await take(walk, 'look', next());
      await all('go on');
    }
    for (const kind of ['wake', 'take over', 'end a lease']) await all(kind);
    await take(walk, 'tick', next());
    for (const kind of ['go on', 'refill', 'go on']) await all(kind);
    await take(walk, 'claim', next());
    for (const kind of ['go on', 'fetch', 'go on', 'refill']) await all(kind);
  }
  throw new Error(`not at rest after ${ROUNDS_MAX} rounds: ${await world.unrest()}`);
}

test('whatever happens in whatever order, every event gets out once and in order, or is dead', {
  timeout: LIMIT_MS + GRACE_MS,
}, async () => {
  vi.spyOn(performance, 'now').mockImplementation(() => steps * MS_PER_STEP);
  await fc.assert(
    fc.asyncProperty(
      someSettings,
      fc.noBias(fc.array(aChoice, { minLength: 1, maxLength: STEPS_MAX, size: 'max' })),
      fc.nat(1_000_000),
      async (settings, choices, seed) => {
        // fast-check would go on with others from there.
        if (MODEL_PATH !== undefined && walks > 0) return;
        walks++;
        const world = await createWorld(servers, settings);
        const walk: Walk = { world, script: [] };
        try {
          for (const { kind, n } of choices)
            if (kind in ROAD || settings.faults.includes(kind)) await take(walk, kind, n);
          for (let n = 0; world.events.size < EVENTS; n++) await take(walk, 'insert', 7 * n);
          await comeToRest(walk, seed);
          await world.assertAllArrived();
        } catch (error) {
          const told = `${(error as Error).message}\n\nWhat had happened:\n  ${walk.script.join('\n  ')}`;
          if (MODEL_SURVEY) {
            failures.push(told);
            return;
          }
          throw new Error(told, { cause: error });
        } finally {
          await world.abandon();
        }
      },
    ),
    {
      numRuns: RUNS,
      includeErrorInReport: true,
      endOnFailure: MODEL_PATH !== undefined,
      interruptAfterTimeLimit: LIMIT_MS,
      ...(MODEL_SEED !== 'random' && { seed: Number(MODEL_SEED) }),
      ...(MODEL_PATH !== undefined && { path: MODEL_PATH }),
    },
  );
  expect(failures.join('\n\n'), `${failures.length} of ${walks} walks failed`).toBe('');
});
