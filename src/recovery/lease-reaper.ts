import type { DeadLetters } from '../finalize/dead-letter.ts';
import type { Refiller } from '../finalize/refiller.ts';
import { byHalves } from '../outbox/by-halves.ts';
import { rowMayBeAtFault } from '../outbox/finalize.ts';
import type { ExpiredRow } from '../outbox/leases.ts';
import type { Outbox } from '../outbox/outbox.ts';
import type { JobFate, Queues } from '../queue/queues.ts';
import type { Scheduler } from '../queue/scheduler.ts';
import type { Epoch } from '../streams/epoch.ts';
import { type Lookup, UnreadableError } from '../streams/lookup.ts';
import type { Memory } from '../streams/memory.ts';
import type { Logger } from '../telemetry/logger.ts';
import type { Metrics } from '../telemetry/metrics.ts';
import type { Tally } from '../telemetry/tally.ts';

/** Rows in one batch: each batch walks back through the streams of its rows. */
const BATCH = 1_000;
/** Batches in one tick, at most; the next tick goes on. */
const BATCHES_MAX = 5;

const idsOf = (rows: readonly ExpiredRow[]) => rows.map((row) => row.id);

/** How long a row that the database refused to change is left alone, and how many are remembered. */
const REFUSED_MS = 60_000;
const REFUSED_KEPT = 5_000;

type Judged = Readonly<{ row: ExpiredRow; fate: JobFate }>;

/** What the streams have of the events whose jobs are gone. */
type Found = Readonly<{
  judged: readonly Judged[];
  /** Entry ids, by event id. */
  entries: ReadonlyMap<string, string>;
  letters: Awaited<ReturnType<Lookup['findDeadLetters']>>;
}>;

type Written = Readonly<{ judged: readonly Judged[]; found: number; unlettered: readonly ExpiredRow[] }>;
const NOTHING: Written = { judged: [], found: 0, unlettered: [] };

/**
 * What one round has done: rows by the fate of their jobs, and
 * - `found`: of the `missing`, those whose entry or dead letter was in its stream
 * - `finished`: of the `failed`, those whose dead letter was written
 * - `kept`: events whose job a worker keeps
 */
type Seen = Record<'alive' | 'failed' | 'missing' | 'found' | 'finished', number> & { kept: string[] };

/**
 * Finds out what became of the jobs of rows whose lease has ended.
 *
 * - The job is alive: the row gets another lease.
 * - The job has failed: a pod died before it had written the dead letter, so the reaper writes it.
 * - The job is gone: if the event is among the latest entries of its stream, the row becomes published (the job was removed
 *   between append and acknowledgement). If it is among the latest dead letters, the row becomes dead. If Redis refuses to
 *   tell, the row gets another lease. Otherwise the row becomes fresh.
 * - The row is dead: its lease ended because its dead letter is lost. The reaper writes it again.
 *
 * It asks Redis before its transaction begins, since a walk through long streams takes seconds. The transaction then skips
 * rows that have changed meanwhile. Only a reaper takes expired rows, so no new job can be added in between.
 */
export function createLeaseReaper(deps: {
  outbox: Outbox;
  queues: Pick<Queues, 'jobFate' | 'failedJob'>;
  lookup: Pick<Lookup, 'find' | 'findDeadLetters'>;
  epoch: Pick<Epoch, 'current' | 'confirm'>;
  deadLetters: Pick<DeadLetters, 'bury' | 'writeAgain'>;
  memory: Pick<Memory, 'forget'>;
  refiller: Pick<Refiller, 'request'>;
  scheduler: Pick<Scheduler, 'wake'>;
  metrics: Pick<Metrics, 'leasesExpired'>;
  tally: Pick<Tally, 'error'>;
  logger: Logger;
}) {
  const { outbox, queues, lookup, epoch: epochs, deadLetters, tally, logger } = deps;
  /** Events whose rows the database refused to change, since then. */
  const refused = new Set<string>();
  let refusedSince = 0;

  /** @param goesOn asked before each batch. If false, the reaper stops there. */
  return async function reap(goesOn: () => boolean = () => true): Promise<void> {
    if (performance.now() - refusedSince > REFUSED_MS || refused.size >= REFUSED_KEPT) refused.clear();
    const seen: Seen = { alive: 0, failed: 0, missing: 0, found: 0, finished: 0, kept: [] };
    try {
      for (let batch = 0; batch < BATCHES_MAX && goesOn(); batch++) {
        const epoch = epochs.current();
        // Without an epoch Redis may have lost entries: the rows wait until table and streams were compared.
        if (epoch === undefined) break;
        const rows = (await outbox.expired(BATCH + refused.size)).filter(
          ({ eventId }) => !refused.has(eventId),
        );
        const { judged, found, unlettered } = await writeAll(
          epoch,
          await findEntries(await Promise.all(rows.map(judge))),
        );
        seen.found += found;
        for (const { row, fate } of judged) {
          if (!row.isDead) seen[fate.state]++;
          if (fate.state === 'alive' && fate.isKept) seen.kept.push(row.eventId);
        }
        if (unlettered.length > 0) await writeLetters(unlettered);
        const failed = judged.filter(({ fate }) => fate.state === 'failed').map(({ row }) => row);
        await bury(failed);
        seen.finished += failed.length;
        if (rows.length < BATCH || judged.length === 0) break;
      }
    } finally {
      await tell(seen);
    }
  };

  /** Asks for a claim of the rows that became fresh, and tells what was done: also by a round that has failed since. */
  async function tell({ alive, failed, missing, found, finished, kept }: Seen): Promise<void> {
    deps.metrics.leasesExpired({ alive, failed, missing });
    if (missing > found) await deps.scheduler.wake();
    if (missing > 0)
      logger.warn(
        { events: missing, found },
        'publish jobs were lost; their events are claimed again, but for those that are in their stream',
      );
    if (finished > 0) logger.warn({ events: finished }, 'finished dead letters that had been left half done');
    if (kept.length > 0)
      logger.warn(
        { events: kept.length, eventIds: kept.slice(0, 3) },
        'a worker keeps publish jobs and does not end them; is it another program’s, on the relay’s queue?',
      );
    if (alive > 0) logger.debug({ events: alive }, 'leases extended');
  }

  async function judge(row: ExpiredRow): Promise<Judged> {
    return { row, fate: row.isDead ? { state: 'missing' } : await queues.jobFate(row.eventId) };
  }

  /** Looks for entries and dead letters of the events whose jobs are gone. Without a job no pod appends them meanwhile. */
  async function findEntries(judged: readonly Judged[]): Promise<Found> {
    const missing = judged.filter(({ fate }) => fate.state === 'missing').map(({ row }) => row);
    const live = missing.filter((row) => !row.isDead);
    const entries = new Map<string, string>();
    const unknown = new Set<string>();
    for (const topic of new Set(live.map((row) => row.topic))) {
      const eventIds = live.filter((row) => row.topic === topic).map((row) => row.eventId);
      const found = await unlessUnreadable(lookup.find(topic, eventIds), eventIds);
      for (const [eventId, entryId] of found ?? []) entries.set(eventId, entryId);
      if (found === null) for (const eventId of eventIds) unknown.add(eventId);
    }
    const left = missing.filter(({ eventId }) => !entries.has(eventId) && !unknown.has(eventId));
    const eventIds = left.map((row) => row.eventId);
    const known = new Map(left.map((row) => [row.eventId, row.isDead ? null : row.knownLetter]));
    const letters = await unlessUnreadable(lookup.findDeadLetters(eventIds, known), eventIds);
    if (letters === null) for (const eventId of eventIds) unknown.add(eventId);
    // Nothing can be said of them now: they get another lease, as if their jobs were alive.
    const waits = { state: 'alive', attempts: 0, reason: '' } as const;
    return {
      judged: judged.map((it) => (unknown.has(it.row.eventId) ? { row: it.row, fate: waits } : it)),
      entries,
      letters: letters ?? new Map(),
    };
  }

  /** What is asked, or null where Redis refuses to let the relay read the stream. */
  async function unlessUnreadable<T>(asked: Promise<T>, eventIds: readonly string[]): Promise<T | null> {
    try {
      return await asked;
    } catch (err) {
      if (!(err instanceof UnreadableError)) throw err;
      logger.error(
        { err, events: eventIds.length, eventIds: eventIds.slice(0, 3) },
        'publish jobs were lost, and Redis does not let the relay see whether their events were appended: they wait until it may read the stream again',
      );
      return null;
    }
  }

  /** Changes the rows together, but for those that refuse to be changed. */
  async function writeAll(epoch: string, found: Found): Promise<Written> {
    const all = { judged: [] as Judged[], found: 0, unlettered: [] as ExpiredRow[] };
    await byHalves(
      found.judged,
      async (judged) => {
        const written = await write(epoch, { ...found, judged });
        all.judged.push(...written.judged);
        all.found += written.found;
        all.unlettered.push(...written.unlettered);
      },
      ({ row }, error) => refuse(row.eventId, error),
    );
    return all;
  }

  /** Leaves a row out for a while: those that wait longest come first, and would be all that is ever asked about. */
  function refuse(eventId: string, err: unknown): void {
    if (refused.size === 0) refusedSince = performance.now();
    refused.add(eventId);
    tally.error(
      eventId,
      { err },
      'the database refuses to change rows whose leases have ended; they are tried again in a minute',
    );
  }

  async function unlessRefused(eventId: string, work: () => Promise<void>): Promise<void> {
    await work().catch((error) => {
      if (!rowMayBeAtFault(error)) throw error;
      refuse(eventId, error);
    });
  }

  /** Changes the rows in one transaction. `unlettered` are dead rows whose letters are to be written again. */
  async function write(epoch: string, { judged: all, entries, letters }: Found): Promise<Written> {
    if (all.length === 0) return NOTHING;
    const { judged, found, unlettered } = await outbox.inEpoch(
      async (tx) => {
        const locked = await outbox.lockExpired(
          tx,
          all.map(({ row }) => row),
        );
        const judged = all.filter(({ row }) => locked.has(row.eventId));
        const missing = judged.filter(({ fate }) => fate.state === 'missing').map(({ row }) => row);
        const published = missing.flatMap(({ id, eventId }) => {
          const entryId = entries.get(eventId);
          return entryId === undefined ? [] : [{ id, eventId, entryId }];
        });
        const left = missing.filter((row) => !entries.has(row.eventId));
        const without = left.filter((row) => !letters.has(row.eventId));
        const fresh = without.filter((row) => !row.isDead).map((row) => row.eventId);
        // They get another lease: until then the letter below is written, or the reaper tries again.
        const dead = without.filter((row) => row.isDead);

        if (published.length > 0) await outbox.markPublished(tx, published);
        for (const { id, eventId } of left) {
          const letter = letters.get(eventId);
          if (letter !== undefined) await outbox.markDead(tx, { id, eventId, ...letter });
        }
        if (fresh.length > 0) await outbox.returnToFresh(tx, fresh);
        const leased = judged.filter(({ row, fate }) => fate.state !== 'missing' || dead.includes(row));
        await outbox.extendLeases(
          tx,
          leased.map(({ row: { eventId }, fate }) => ({
            ...{ eventId, attempts: 0, reason: '' },
            ...(fate.state === 'alive' && { attempts: fate.attempts, reason: fate.reason }),
          })),
        );
        await epochs.confirm(epoch);
        const isFresh = new Set(fresh);
        return {
          judged,
          found: missing.filter((row) => !row.isDead && !isFresh.has(row.eventId)),
          unlettered: dead,
        };
      },
      { generic: true },
    );
    deps.memory.forget(found.map((row) => row.eventId));
    if (found.length > 0) deps.refiller.request(found);
    return { judged, found: found.length, unlettered };
  }

  async function bury(rows: readonly ExpiredRow[]): Promise<void> {
    if (rows.length === 0) return;
    for (const event of await outbox.unfinishedEvents(idsOf(rows))) {
      const job = await queues.failedJob(event);
      if (job) await unlessRefused(event.eventId, () => deadLetters.bury(job));
    }
  }

  async function writeLetters(rows: readonly ExpiredRow[]): Promise<void> {
    for (const event of await outbox.unfinishedEvents(idsOf(rows))) {
      const { errorMessage, deadLetteredAt, attempts } = event;
      if (deadLetteredAt === null) continue;
      const failure = { event, attempts, reason: errorMessage ?? '', failedAt: deadLetteredAt };
      await unlessRefused(event.eventId, () => deadLetters.writeAgain(failure));
    }
  }
}
