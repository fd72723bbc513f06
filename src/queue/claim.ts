import type { Job } from 'bullmq';
import type { Redis } from 'ioredis';
import type { Logger } from '../logger.ts';
import { claimQueueName, type InFlight } from './queues.ts';
import { TICK } from './scheduler.ts';
import { closeWorker, PatientWorker, reportErrors, WORKER_OPTIONS } from './worker.ts';

/** A claim job gives way after so long and asks for another: other pods get their turn, dashboards move. */
const TURN_MS = 2_000;
/** Looks again this soon while there is no room, or while a writer has yet to commit. */
const PAUSE_MS = 5;
/**
 * While events keep coming, claims begin so far apart: fewer, larger ones, and nobody is woken in between. Small ones
 * cost more than what they carry: 1,100 µs of the pod per event at 600 events/s, 890 with a pause of 20 ms. But every
 * event waits for half of it: at half the drain rate p99 is 63 ms with 20 ms, 29 with 10 (measured).
 */
const PACE_MS = 10;
/** Claims again this soon after it failed, not only with the next tick: the database may be back. */
const AGAIN_AFTER_MS = 1_000;
/** A failure is reported once in so long: an outage makes one a second. */
const REPEAT_AFTER_MS = 10_000;
/** Asks again for the turn this soon while another pod has it. */
const BUSY_PAUSE_MS = 25;
/** Rounds that overlap: the database works on one while Redis takes the jobs of the other. */
const LANES = 2;

/**
 * What one round found.
 * - `more`: as much as it could take, so there may be more
 * - `all`: everything that is fresh, `events` of it (perhaps none)
 * - `no-room`: as many jobs in Redis as are allowed
 */
export type ClaimRound = { kind: 'more' | 'all'; events: number } | { kind: 'no-room' };

/**
 * How many jobs may be added so that there are never more than `maxInFlight`, 0 when too few to be worth a
 * transaction. In order, a job that is acknowledged brings its successor before it leaves, so as many jobs as can be
 * active at once may count twice: those that are, and at least as many as this pod can work on. Retries that wait
 * will be active again.
 *
 * @param reserved jobs about to be added that Redis does not count yet
 */
export function claimable(
  inFlight: InFlight,
  reserved: number,
  options: Readonly<{
    ordering: 'aggregate' | 'none';
    maxInFlight: number;
    concurrency: number;
    batchSize: number;
  }>,
): number {
  const { maxInFlight, batchSize } = options;
  const room = maxInFlight - inFlight.total - reserved;
  const jobs = inFlight.total + reserved;
  const doubled = Math.max(inFlight.active, options.concurrency);
  const limit = options.ordering === 'none' ? room : Math.max(room - doubled, Math.floor((room - jobs) / 2));
  // One or two places are too few for an event and its successor; it gets through all the same.
  if (maxInFlight <= 2 && room > 0 && jobs === inFlight.delayed) return 1;
  // A quarter of the places at most is taken by retries: then there is always enough for another quarter.
  const worthwhile = Math.min(batchSize, Math.max(1, Math.floor(maxInFlight / 4)));
  return limit < worthwhile ? 0 : Math.min(limit, batchSize);
}

/** Whoever adds jobs ahead of their turn has not the claim's turn: others may do so at the same moment. */
const AHEAD_MARGIN = 64;

/** How many jobs may be added for events that were read ahead; less than none where claims need the room. */
export function roomAhead(
  inFlight: InFlight,
  options: Readonly<{ maxInFlight: number; concurrency: number }>,
): number {
  const doubled = Math.max(inFlight.active, options.concurrency);
  return options.maxInFlight - inFlight.total - doubled - AHEAD_MARGIN;
}

type Turn = Readonly<{
  events: number;
  /** Nothing is left, and who writes from now on will wake us (or the next tick does). */
  exhausted: boolean;
}>;

export type ClaimWorker = Readonly<{
  start(): void;
  stop(deadlineMs: number): Promise<void>;
  isRunning(): boolean;
  /** When a claim last came to its end, or was found to have nothing to do; ms since the epoch. */
  lastTurnAt(): number;
  worker: PatientWorker;
}>;

/** Runs claim jobs: each claims while there is work and room, so throughput does not depend on the ticks. */
export function createClaimWorker(deps: {
  connection: Redis;
  queuePrefix: string;
  queueName: string;
  claim: () => Promise<ClaimRound>;
  /** Runs `turn` unless another pod has the turn: one claims at a time, so that the cap on jobs is a cap. */
  exclusively: (turn: () => Promise<Turn>) => Promise<Turn | 'busy'>;
  /** What a tick does besides claiming: reconcile, sweep, trim. */
  maintain: () => Promise<void>;
  /** Starts the work of another schedule, by the job's name, and waits for none of it. Whether there is such work. */
  kick?: (name: string) => boolean;
  /** Asks writers to wake us up from now on. */
  arm: () => Promise<'armed' | 'already-armed' | 'writers' | 'deaf'>;
  wake: () => Promise<void>;
  logger: Logger;
}): ClaimWorker {
  const { claim, logger } = deps;
  let stopping = false;
  let lastTurnAt = Date.now();

  async function process(job: Job): Promise<void> {
    if (deps.kick?.(job.name)) return;
    if (job.name === TICK) await deps.maintain();
    const turn = await deps.exclusively(takeTurn);
    lastTurnAt = Date.now();
    if (turn === 'busy') await pause(BUSY_PAUSE_MS);
    else if (turn.events > 0) logger.info({ events: turn.events }, 'claimed events');
    // What another pod has seen when it ends its turn may be older than the wish that brought us here.
    if ((turn === 'busy' || !turn.exhausted) && !stopping) await deps.wake();
  }

  /** Claims until nothing is left (and writers will wake us), or the turn is over. */
  async function takeTurn(): Promise<Turn> {
    const endsAt = Date.now() + TURN_MS;
    const goesOn = () => !stopping && Date.now() < endsAt;
    let events = 0;
    let armed = false;
    while (goesOn()) {
      const beganAt = Date.now();
      const before = events;
      // An idle relay is mostly woken for one event: one round tells whether there is work for all lanes.
      const first = await claim();
      if (first.kind !== 'no-room') events += first.events;
      if (first.kind !== 'all') events += await claimInLanes(goesOn);
      if (!goesOn()) break;
      // Where events have come, more are coming: we look again by ourselves, so that nobody has to wake us for each.
      if (events > before && !armed) {
        await pause(beganAt + PACE_MS - Date.now());
        continue;
      }
      // Whoever wrote before the wake-up was armed said nothing: armed, look once more.
      if (armed) return { events, exhausted: true };
      const arming = await deps.arm();
      if (arming === 'already-armed' || arming === 'deaf') return { events, exhausted: true };
      if (arming === 'armed') armed = true;
      else await pause(PAUSE_MS);
    }
    return { events, exhausted: false };
  }

  async function claimInLanes(goesOn: () => boolean): Promise<number> {
    const lanes = await Promise.allSettled(Array.from({ length: LANES }, () => claimAll(goesOn)));
    let events = 0;
    for (const lane of lanes) {
      if (lane.status === 'rejected') throw lane.reason;
      events += lane.value;
    }
    return events;
  }

  /** One lane: round after round until one finds less than it could take. */
  async function claimAll(goesOn: () => boolean): Promise<number> {
    let events = 0;
    while (goesOn()) {
      const round = await claim();
      if (round.kind === 'no-room') await pause(PAUSE_MS);
      else {
        events += round.events;
        if (round.kind === 'all') break;
      }
    }
    return events;
  }

  const worker = new PatientWorker(claimQueueName(deps.queueName), process, {
    ...WORKER_OPTIONS,
    connection: deps.connection,
    prefix: deps.queuePrefix,
    concurrency: 1,
    // A claim job that was cut off is simply run again: nothing about it can be to blame.
    maxStalledCount: 1_000_000,
  });
  reportErrors(worker, logger);
  let reportedAt = 0;
  let again: NodeJS.Timeout | undefined;
  worker.on('failed', (_job, error) => {
    // Not by a wish from within the job: BullMQ would give that one to this pod, who may be the only one to fail.
    clearTimeout(again);
    if (!stopping) again = setTimeout(() => void deps.wake(), AGAIN_AFTER_MS);
    if (Date.now() - reportedAt < REPEAT_AFTER_MS) return;
    reportedAt = Date.now();
    logger.warn({ err: error }, 'claiming failed; nothing was claimed, trying again');
  });

  return {
    start() {
      worker.run().catch((error) => logger.error({ err: error }, 'claim worker ended'));
    },
    async stop(deadlineMs) {
      stopping = true;
      clearTimeout(again);
      await closeWorker(worker, deadlineMs);
    },
    isRunning: () => worker.isRunning() && !worker.isPaused(),
    lastTurnAt: () => lastTurnAt,
    worker,
  };
}

const pause = (ms: number) => new Promise<void>((resolve) => setTimeout(resolve, ms));
