import { DelayedError, type Job, Worker, type WorkerOptions } from 'bullmq';
import type { RedisOptions } from 'ioredis';
import { succeedsWithin } from '../lifecycle.ts';
import type { Logger } from '../logger.ts';

/**
 * BullMQ's own connections for its workers: commands wait until Redis is back, and are sent again on the next
 * connection. One that was executed twice finds its lock gone, or leaves a job that nobody works on: the stalled check
 * finds both.
 */
export const WORKER_CONNECTION: RedisOptions = { maxRetriesPerRequest: null, enableOfflineQueue: true };

/** Workers wait for jobs so long at once: well within the time in which an answer must come, ANSWER_TIMEOUT_MS. */
const BLOCK_S = 2;

/** A killed pod's jobs are taken over after this and a stalled check or two. */
const LOCK_DURATION_MS = 5_000;

export const WORKER_OPTIONS = {
  autorun: false,
  lockDuration: LOCK_DURATION_MS,
  stalledInterval: LOCK_DURATION_MS / 2,
  drainDelay: BLOCK_S,
  /** How long a worker waits after an error of the connection before it asks again. */
  runRetryDelay: 1_000,
} as const;

/** Jobs that are asked for at once, at most: of those that were announced, and of others, which may not be there. */
const MOST_AT_ONCE = 32;
const MOST_ON_SPEC = 8;
/** However long jobs take, so many at once: receipts are written together. */
const FEWEST_PLACES = 8;

/**
 * A BullMQ worker for many short jobs at once.
 *
 * - It asks for several jobs at once, more while it gets as many as it asks for, and begins each the moment it is
 *   there. BullMQ's asks for one after the other and begins none while there are more, up to its concurrency: 300 of
 *   them took 300 ms (measured, at half the rate at which a backlog drains). So its main loop only fetches here, and
 *   each job that it fetched begins a run: that job, then the one which BullMQ fetches as it finishes it, and so on.
 * - It never blocks for longer than its connection waits for an answer: BullMQ would, 10 s, when a delayed job is far
 *   off.
 * - It takes a breath after an error that is not the connection's own (OOM, READONLY, NOPERM): BullMQ asks for the next
 *   job again at once, 10,000 times a second, measured.
 */
export class PatientWorker<T = unknown> extends Worker<T> {
  readonly #most: number;
  /** Jobs that it works on at once, at most: as many as it may, or fewer while they take too long. */
  #places: number;
  /** By `performance.now()`. */
  #narrowedAt = 0;
  readonly #runs = new Set<Promise<void>>();
  readonly #takenAt = new Map<Job<T>, number>();
  #lastTakenAt = Date.now();
  /** Jobs that are likely to wait for us. */
  #expected = 0;
  #askFor = 1;
  /** Places that the main loop asks jobs for just now. */
  #asked = 0;
  /** Jobs that are asked for beside the main loop. */
  readonly #takes = new Set<Promise<void>>();
  #takeCount = 0;
  #onRoom = (): void => {};

  constructor(
    name: string,
    process: (job: Job<T>, token?: string) => Promise<void>,
    { concurrency, ...options }: WorkerOptions & { concurrency: number },
  ) {
    // The main loop has one job at a time, and gives it away.
    super(name, process, { ...options, concurrency: 1 });
    this.#most = concurrency;
    this.#places = concurrency;
  }

  get places(): number {
    return this.#places;
  }

  /**
   * A job that it began then, by `performance.now()`, took so long that it was nearly given up, or was: half as many at
   * once. Those that it had in hand by then tell nothing new. Without this, a pod that gets too little of a processor
   * would give up most of what it begins, and publish next to nothing for a minute (measured). Returns whether there
   * are fewer now.
   */
  narrow(beganAt: number): boolean {
    const fewer = Math.max(FEWEST_PLACES, Math.floor(this.#places / 2));
    if (beganAt < this.#narrowedAt || fewer >= this.#places) return false;
    this.#narrowedAt = performance.now();
    this.#places = fewer;
    return true;
  }

  /** A job was quick: one more at once, up to all. So they double while they take their turns. */
  widen(): void {
    if (this.#places >= this.#most) return;
    this.#places++;
    this.#onRoom();
  }

  override get maximumBlockTimeout(): number {
    return BLOCK_S;
  }

  /** So many jobs were added; they may be in hand already, or go to others. */
  expect(jobs: number): void {
    // Those that others added were not expected; they must not count against these for ever.
    this.#expected = Math.max(this.#expected, -jobs) + jobs;
  }

  /**
   * So many jobs are on their way to Redis: asks for them at once, beside the main loop, which would be told of them
   * there and ask then. That is one round trip less. If they are not there yet, or there is no room, the main loop gets
   * them.
   */
  take(jobs: number): void {
    if (!this.isRunning() || this.isPaused() || this.closing !== undefined) return;
    // One place is the main loop's.
    const room = this.places - this.#runs.size - this.#takes.size - Math.max(this.#asked, 1);
    for (let i = 0; i < Math.min(jobs, room); i++) {
      const take = super
        .moveToActive(`${this.id}:take:${this.#takeCount++}`, this.opts.name)
        .then((job) => void this.#begin(job))
        // The main loop meets the same error, and knows what to do.
        .catch(() => {})
        .finally(() => this.#takes.delete(take));
      this.#takes.add(take);
    }
  }

  /** When it last began to work on a job, or on nothing yet; ms since the epoch. */
  lastTakenAt(): number {
    return this.#lastTakenAt;
  }

  /** Jobs that it works on, until they are moved on in Redis. */
  inHand(): number {
    return this.#takenAt.size;
  }

  /** When it took the one that it has in hand for the longest time. */
  oldestTakenAt(): number | undefined {
    // A Map keeps the order in which they were taken.
    for (const takenAt of this.#takenAt.values()) return takenAt;
    return undefined;
  }

  /** The job was begun when it came. Resolves, without another one, when there is room for that. */
  override async processJob(): Promise<void> {
    while (this.#runs.size >= this.places) {
      await new Promise<void>((resolve) => {
        this.#onRoom = resolve;
      });
    }
  }

  /** In the order in which they come. */
  #begin<J extends Job<T> | undefined>(job: J): J {
    if (job === undefined) return job;
    const run = this.#run(job).finally(() => {
      this.#runs.delete(run);
      this.#onRoom();
    });
    this.#runs.add(run);
    return job;
  }

  async #run(first: Job<T>): Promise<void> {
    for (let job: Job<T> | undefined = first; job; ) {
      this.#lastTakenAt = Date.now();
      this.#takenAt.set(job, this.#lastTakenAt);
      this.#expected--;
      let next: unknown;
      try {
        next = await super.processJob(job, job.token as string, () => this.#runs.size <= this.places);
      } catch (error) {
        // It could not be moved on; its lock ends, and the stalled check finds it.
        this.emit('error', error as Error);
      }
      this.#takenAt.delete(job);
      job = next as Job<T> | undefined;
    }
  }

  protected override async moveToActive(token: string, name?: string): Promise<Job<T>> {
    const known = this.#expected;
    const wanted = Math.min(Math.max(known, this.#askFor), MOST_AT_ONCE);
    const asked = Math.max(1, Math.min(wanted, this.places - this.#runs.size - this.#takes.size));
    this.#asked = asked;
    const fetched = await Promise.allSettled(
      Array.from({ length: asked }, (_, i) =>
        super.moveToActive(i === 0 ? token : `${token}:${i}`, name).then((job) => this.#begin(job)),
      ),
    );
    this.#asked = 0;
    const jobs = fetched.flatMap((it) => (it.status === 'fulfilled' && it.value ? [it.value] : []));
    const failure = fetched.find((it) => it.status === 'rejected');
    if (failure && jobs.length === 0) {
      this.#expected = 0;
      this.#askFor = 1;
      await new Promise((resolve) => setTimeout(resolve, WORKER_OPTIONS.runRetryDelay));
      throw failure.reason;
    }
    // All were there, and more than we knew of: somebody else adds jobs, too.
    this.#askFor = jobs.length === asked && asked > known ? Math.min(2 * asked, MOST_ON_SPEC) : 1;
    if (jobs.length < asked) this.#expected = 0;
    return jobs[0] as Job<T>;
  }

  protected override handleFailed(
    ...[error, job, token, fetchNext, span]: Parameters<Worker<T>['handleFailed']>
  ): Promise<Job<T>> {
    // A job is put off because something is wrong: the main loop alone asks for the next, and takes its breath.
    const goesOn = error instanceof DelayedError ? () => false : fetchNext;
    return super.handleFailed(error, job, token, goesOn, span);
  }

  override async pause(doNotWaitActive?: boolean): Promise<void> {
    await super.pause(doNotWaitActive);
    if (doNotWaitActive) return;
    await Promise.all(this.#takes);
    await Promise.all(this.#runs);
  }

  override async close(force = false): Promise<void> {
    if (!force) await this.pause();
    await super.close(force);
  }
}

/** The same error of a worker is reported once in so long: an outage makes one a second. */
const REPEAT_AFTER_MS = 10_000;

export function reportErrors(worker: Worker, logger: Logger): void {
  const reportedAt = new Map<string, number>();
  worker.on('error', (error) => {
    if (Date.now() - (reportedAt.get(error.message) ?? 0) < REPEAT_AFTER_MS) return;
    if (reportedAt.size >= 100) reportedAt.clear();
    reportedAt.set(error.message, Date.now());
    logger.warn({ err: error, queue: worker.name }, 'a worker met an error; it goes on');
  });
}

/** Waits for the jobs in hand until the deadline; what is left then goes to the other pods' stalled check. */
export async function closeWorker(worker: Worker, deadlineMs: number): Promise<void> {
  const finished = await succeedsWithin(deadlineMs, worker.pause());
  await succeedsWithin(CLOSE_TIMEOUT_MS, worker.close(!finished));
}

const CLOSE_TIMEOUT_MS = 2_000;
