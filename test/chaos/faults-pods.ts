import { randomBytes } from 'node:crypto';
import { fileURLToPath } from 'node:url';
import pg from 'pg';
import { type Pod, startPod } from '../demo/pod.ts';
import { sampleEvent } from '../demo/sample.ts';
import { insertEvents } from '../support/events.ts';
import { grantLeast } from '../support/least-privilege.ts';
import type { Fault } from './fault.ts';
import { CLI } from './fleet.ts';
import { comesTrue, pause, persistently } from './patience.ts';
import { between, pick } from './random.ts';
import { patientTopic } from './topics.ts';
import { as, POD_SETTINGS, POSTGRES_ROLE, PRODUCER_ROLE, type World } from './world.ts';

const DOOMED_POD = fileURLToPath(new URL('./doomed-pod.ts', import.meta.url));
const SKEWED_CLOCK = new URL('./skewed-clock.mjs', import.meta.url).href;

/** The moments in the life of an event at which a pod dies; doomed-pod.ts knows how to tell them. */
export const WINDOWS = {
  'claim-before-commit': 'after it has claimed, before the commit',
  'claim-after-commit': 'after the commit of its claim',
  'append-before-acknowledge': 'after an append, before the acknowledgement',
  'acknowledge-before-completion': 'after an acknowledgement, before the jobs complete',
  'failure-before-dead-letter': 'after a job has failed for good, before the dead-letter entry',
  'dead-letter-before-row': 'after a dead-letter entry, before the row says so',
} as const;

export type Window = keyof typeof WINDOWS;

const FAILURES: readonly Window[] = ['failure-before-dead-letter', 'dead-letter-before-row'];

/** A window comes by chance: the doomed pod has to get the right job. */
const DOOM_DEADLINE_MS = 90_000;
/** Another fault may end one while it starts. */
const DOOMED_PODS = 3;
/** Above the 7.5 s that a poisonous event takes to die. */
const FEED_EVERY_MS = 9_000;
const POISON_PER_FEED = 15;
const LURE_EVERY_MS = 1_000;
/** Long enough for the claim job that runs to come to its end (2 s at most). */
const PAUSED_MS = 2_100;
const CLOCK_OFF_BY_MS = 3_600_000;
/** Nobody dies of it: retries come after 0.5, 1, 2 and 4 s, so the last one 7.5 s after the first attempt. */
const EXTRA_POD_TRIES = 5;
const REFUSED_MS = 6_000;
const PATIENT_EVENTS = 50;
/** The longest retry, and what it may be late. */
const RETRIES_END_MS = 15_000;
const SECOND_EVENTS = 50;
/** Above the start-up timeout of a pod, whose servers may be away meanwhile. */
const REFUSAL_DEADLINE_MS = 60_000;
const EXIT_CONFIG = 78;

/** Gives the doomed pod the occasion, as often as it takes. */
async function lureInto(world: World, window: Window, signal: AbortSignal): Promise<void> {
  while (!signal.aborted) {
    if (window.startsWith('claim-')) {
      // Under load the pod that claims goes on claiming. After a pause the one that has waited longest is next.
      await persistently(() => world.queues.claim.pause());
      await pause(PAUSED_MS);
      await persistently(() => world.queues.claim.resume());
      await pause(LURE_EVERY_MS, signal);
    } else if (FAILURES.includes(window)) {
      await world.workload.poison(POISON_PER_FEED);
      await pause(FEED_EVERY_MS, signal);
    } else return;
  }
}

async function killInWindow(world: World, window: Window, occurrence: number): Promise<void> {
  const lured = new AbortController();
  const luring = lureInto(world, window, lured.signal);
  // Awaited below; should it fail before, that is no reason to end the harness.
  luring.catch(() => {});
  try {
    let last = '';
    for (let pod = 1; pod <= DOOMED_PODS; pod++) {
      const { signal, code, lines } = await endOfDoomedPod(world, window, occurrence);
      // It says where it kills itself: a pod that somebody else has ended does not count.
      if (signal === 'SIGKILL' && lines.at(-1) === `dies: ${window}`) return;
      last = `${signal ?? `exit code ${code}`}\n${lines.slice(-5).join('\n')}`;
    }
    throw new Error(`${DOOMED_PODS} pods ended, none of them in the window; the last: ${last}`);
  } finally {
    lured.abort();
    await luring;
  }
}

async function endOfDoomedPod(world: World, window: Window, occurrence: number) {
  const doomed = await world.fleet.extra(
    {
      // Of the sources, as they are.
      NODE_OPTIONS: '--import=tsx',
      TSX_DISABLE_CACHE: '1',
      CHAOS_WINDOW: window,
      CHAOS_OCCURRENCE: String(occurrence),
    },
    DOOMED_POD,
  );
  const inTime = new AbortController();
  const late = pause(DOOM_DEADLINE_MS, inTime.signal).then(() => undefined);
  const end = await Promise.race([doomed.exited, late]);
  inTime.abort();
  if (end !== undefined) return { ...end, lines: doomed.lines };
  await doomed.kill('SIGKILL');
  throw new Error(`no pod came into the window within ${DOOM_DEADLINE_MS / 1_000} s`);
}

const windows = (Object.keys(WINDOWS) as Window[]).map(
  (window): Fault => ({
    name: `pod-${window}`,
    describe: `kill -9 of a pod ${WINDOWS[window]}`,
    lane: 'pods',
    async inject(world, random) {
      await killInWindow(world, window, between(random, 1, 3));
      return undefined;
    },
  }),
);

export const podFaults: readonly Fault[] = [
  {
    name: 'pod-kill',
    describe: 'kill -9 of a pod at any moment; another takes its place',
    lane: 'pods',
    async inject({ fleet }, random) {
      await fleet.end(pick(random, fleet.slots), 'SIGKILL');
      return undefined;
    },
  },
  {
    name: 'pod-kill-all',
    describe: 'kill -9 of all pods at once (an evicted node)',
    lane: 'pods',
    async inject({ fleet }) {
      await Promise.all(fleet.slots.map((slot) => fleet.end(slot, 'SIGKILL')));
      return undefined;
    },
  },
  {
    name: 'pod-term',
    describe: 'SIGTERM to a pod under load; another takes its place',
    lane: 'pods',
    async inject({ fleet }, random) {
      await fleet.end(pick(random, fleet.slots), 'SIGTERM');
      return undefined;
    },
  },
  ...windows,
  {
    name: 'pod-rolling-deploy',
    describe: 'every pod is replaced, the new one ready before the old one gets SIGTERM',
    lane: 'pods',
    async inject({ fleet }) {
      for (const slot of fleet.slots) await fleet.roll(slot);
      return undefined;
    },
  },
  ...['slow', 'fast'].map(
    (kind): Fault => ({
      name: `pod-clock-${kind}`,
      describe: `one more pod, whose clock is an hour ${kind}, while events are refused for ${REFUSED_MS / 1_000} s and tried again`,
      lane: 'pods',
      flowsMeanwhile: true,
      async inject({ fleet, client, workload, sql }, random) {
        const pod = await readyPod(fleet, {
          NODE_OPTIONS: `--import=${SKEWED_CLOCK}`,
          CHAOS_CLOCK_OFFSET_MS: String(CLOCK_OFF_BY_MS * (kind === 'slow' ? -1 : 1)),
        });
        const topic = patientTopic(between(random, 1, 1_000_000));
        await client.set(topic, 'not a stream');
        await workload.write(Array.from({ length: PATIENT_EVENTS }, () => ({ ...sampleEvent(), topic })));
        await pause(REFUSED_MS);
        if ((await client.type(topic)) === 'string') await client.del(topic);
        const areOut = async () => (await sql(LIVE_OF_TOPIC, [topic])).length === 0;
        await comesTrue(areOut, RETRIES_END_MS);
        return () => pod.kill('SIGTERM');
      },
    }),
  ),
  {
    name: 'pod-second-owner',
    describe: 'a pod with another database on the same Redis and queue name: it must end with exit code 78',
    lane: 'pods',
    async inject(world) {
      await meetSecondOwner(world);
      return undefined;
    },
  },
];

/** One more pod. Where another fault keeps it from starting (rights that are gone), it is started anew, as a platform does. */
async function readyPod(fleet: World['fleet'], env: Readonly<Record<string, string>>): Promise<Pod> {
  for (let tries = 1; ; tries++) {
    const pod = await fleet.extra(env);
    try {
      await pod.waitReady(60_000);
      return pod;
    } catch (error) {
      await pod.kill('SIGKILL');
      if (tries === EXTRA_POD_TRIES) throw error;
    }
  }
}

const LIVE_OF_TOPIC = `SELECT FROM identity.outbox WHERE topic = $1 AND NOT published AND dead_lettered_at IS NULL`;

/** @throws when the second owner was not refused, or has changed anything of its own table */
async function meetSecondOwner(world: World): Promise<void> {
  const name = `second_${randomBytes(4).toString('hex')}`;
  const urlOf = (url: string) => Object.assign(new URL(url), { pathname: `/${name}` }).href;
  const url = urlOf(world.postgres.url);
  await world.sql(`CREATE DATABASE ${name}`);
  try {
    // Another fault may have made PostgreSQL read-only for a moment.
    await persistently(async () => {
      const migration = await startPod({ cli: CLI, args: ['migrate'], env: { RELAY_DATABASE_URL: url } });
      if ((await migration.exited).code !== 0)
        throw new Error(`relay migrate failed: ${migration.lines.join(' ')}`);
      await grantLeast(url, POD_SETTINGS, { role: POSTGRES_ROLE, producer: PRODUCER_ROLE });
    });
    const client = new pg.Client({ connectionString: url });
    client.on('error', () => {});
    await client.connect();
    try {
      await insertEvents(
        client,
        Array.from({ length: SECOND_EVENTS }, () => ({ ...sampleEvent(), topic: null })),
      );
      const pod = await world.fleet.extra({ RELAY_DATABASE_URL: as(url, POSTGRES_ROLE) });
      const late = pause(REFUSAL_DEADLINE_MS).then(() => undefined);
      const end = await Promise.race([pod.exited, late]);
      if (end === undefined) await pod.kill('SIGKILL');
      if (end?.code !== EXIT_CONFIG) {
        const how = end === undefined ? 'it runs' : `${end.signal ?? `exit code ${end.code}`}`;
        throw new Error(`a second owner was not refused: ${how}\n${pod.lines.slice(-3).join('\n')}`);
      }
      const { rows } = await client.query(
        'SELECT FROM identity.outbox WHERE published OR next_attempt_at IS NOT NULL',
      );
      if (rows.length > 0) throw new Error(`the second owner has changed ${rows.length} rows of its table`);
    } finally {
      await client.end().catch(() => {});
    }
  } finally {
    await world.sql(`DROP DATABASE IF EXISTS ${name} WITH (FORCE)`);
  }
}
