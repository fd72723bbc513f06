import { withDeadline } from '../lifecycle.ts';
import type { OldestRow, Rates } from '../outbox/backlog.ts';
import { RequirementError } from '../requirement.ts';
import { errorText } from '../telemetry/logger.ts';
import { type Figures, problemOf } from './figures.ts';
import { type PodSeen, SILENT_AFTER_SECONDS } from './heartbeat.ts';

/** What the relay is doing, for the person on call; ages and times to go are seconds. */
export type Status = Readonly<{
  /** ISO 8601 */
  at: string;
  figures: Figures;
  /** The oldest event of each state, the oldest of all first, and what it waits for: `to be claimed`, `for its first attempt`, … */
  oldest?: readonly (OldestRow & Readonly<{ waitsFor: string }>)[];
  rates?: Rates;
  /** Jobs that may be in Redis at once. */
  maxInFlight: number;
  /** Since a pod that runs last ran a tick of the claim schedule; null when none has, or no pod runs. */
  lastTickSecondsAgo: number | null;
  /** Where the queue belongs to another database: that it does, and what to do. */
  wrongDatabase?: string;
  /** What was not answered, and why. */
  problems: readonly string[];
}>;

export function createStatus(deps: {
  figures: () => Promise<Figures>;
  oldest: () => Promise<OldestRow[]>;
  rates: () => Promise<Rates>;
  /** Where BullMQ has the event's job. */
  jobState: (eventId: string) => Promise<string>;
  /** Rejects with a RequirementError where the queue belongs to another database. */
  assertOurs: () => Promise<void>;
  maxInFlight: number;
  /** Longest time for each part. */
  deadlineMs: number;
}): () => Promise<Status> {
  const { maxInFlight, deadlineMs } = deps;
  return async () => {
    const problems: string[] = [];
    const fromDatabase = <T>(work: Promise<T>): Promise<T | undefined> =>
      withDeadline(deadlineMs, work).catch((error) => {
        problems.push(problemOf('database', error, deadlineMs));
        return undefined;
      });
    const ownership = withDeadline(deadlineMs, deps.assertOurs()).then(
      () => undefined,
      (error) => error,
    );
    const [figures, rows, rates] = await Promise.all([
      deps.figures(),
      fromDatabase(deps.oldest()),
      fromDatabase(deps.rates()),
    ]);
    const oldest =
      rows &&
      (await Promise.all(
        rows.map(async (row) => {
          const jobState =
            row.state === 'fresh' || row.state === 'parked'
              ? undefined
              : await withDeadline(deadlineMs, deps.jobState(row.eventId)).catch(() => undefined);
          return { ...row, waitsFor: whatFor(row, jobState, figures, maxInFlight) };
        }),
      ));
    const foreign = await ownership;
    const isForeign = foreign instanceof RequirementError;
    // Where a server does not answer, it is named already.
    if (foreign !== undefined && !isForeign && problems.length + figures.problems.length === 0)
      problems.push(errorText(foreign));
    return {
      at: new Date().toISOString(),
      figures,
      ...(oldest && { oldest }),
      ...(rates && { rates }),
      maxInFlight,
      lastTickSecondsAgo: lastTick(figures.fleet?.pods ?? []),
      ...(isForeign && { wrongDatabase: foreign.message }),
      problems: [...new Set([...figures.problems, ...problems])],
    };
  };
}

export const isSilent = (pod: PodSeen): boolean => pod.heardSecondsAgo > SILENT_AFTER_SECONDS;

function lastTick(pods: readonly PodSeen[]): number | null {
  const ticks = pods.flatMap((pod) =>
    // A silent pod knows nothing of the ticks since then.
    pod.tickSecondsAgo === null || isSilent(pod) ? [] : [pod.tickSecondsAgo + pod.heardSecondsAgo],
  );
  return ticks.length === 0 ? null : Math.min(...ticks);
}

/** In words, as the states of the row, of its job and of the queues tell it. */
function whatFor(
  row: OldestRow,
  jobState: string | undefined,
  figures: Figures,
  maxInFlight: number,
): string {
  const { queues, fleet } = figures;
  switch (row.state) {
    case 'fresh':
      if (fleet?.pods.every(isSilent)) return 'to be claimed, but no pod is there';
      if (queues?.claim.isPaused) return 'to be claimed, but the claim queue is paused';
      if (queues !== undefined && inFlight(queues.publish) >= maxInFlight / 2)
        return 'to be claimed; many jobs are in Redis already, see RELAY_MAX_IN_FLIGHT';
      return 'to be claimed';
    case 'parked':
      if (row.behind === null)
        return 'for the sweep of the next tick, or for a session that keeps its row locked: nothing is before it any more';
      return row.behind.isDead
        ? `for event ${row.behind.eventId} before it, which is dead and holds its aggregate`
        : `for event ${row.behind.eventId} before it`;
    case 'due':
      return row.attempts > 0 && jobState === 'active'
        ? 'for the end of its attempt'
        : `for the lease reaper to ask what became of its job: nothing was heard of it${jobWords(jobState, figures)}`;
    case 'leased':
      return `for its first attempt${jobWords(jobState, figures)}`;
    case 'retrying':
      return `for attempt ${row.attempts + 1}${row.nextInSeconds === null ? '' : ` in ${Math.round(row.nextInSeconds)} s`}, after: ${row.error ?? 'an error'}`;
  }
}

function jobWords(jobState: string | undefined, { queues }: Figures): string {
  if (jobState === undefined) return '';
  if (jobState === 'unknown') return '; its job is lost, or not yet added';
  if (jobState !== 'active' && queues?.publish.isPaused) return '; the publish queue is paused';
  const limit = queues?.publish.limits[0];
  if (jobState !== 'active' && limit) return `; the publish queue takes ${limit}`;
  return `; its job is ${jobState}`;
}

/** Jobs that count towards RELAY_MAX_IN_FLIGHT. */
export const inFlight = (publish: NonNullable<Figures['queues']>['publish']): number =>
  publish.waiting + publish.active + publish.delayed + publish.prioritized;
