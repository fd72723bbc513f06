import type { DeadLetters } from '../finalize/dead-letter.ts';
import type { Refiller } from '../finalize/refiller.ts';
import type { ExpiredRow } from '../outbox/leases.ts';
import type { Outbox } from '../outbox/outbox.ts';
import type { JobFate, Queues } from '../queue/queues.ts';
import type { Scheduler } from '../queue/scheduler.ts';
import type { Epoch } from '../streams/epoch.ts';
import { type Lookup, UnreadableError } from '../streams/lookup.ts';
import type { Memory } from '../streams/memory.ts';
import type { Logger } from '../telemetry/logger.ts';
import type { Metrics } from '../telemetry/metrics.ts';

/** Rows in one batch: each batch walks back through the streams of its rows. */
const BATCH = 1_000;
/** Batches in one tick, at most; the next tick goes on. */
const BATCHES_MAX = 5;

const idsOf = (rows: readonly ExpiredRow[]) => rows.map((row) => row.id);

type Judged = Readonly<{ row: ExpiredRow; fate: JobFate }>;

/** What the streams have of the events whose jobs are gone. */
type Found = Readonly<{
  judged: readonly Judged[];
  /** Entry ids, by event id. */
  entries: ReadonlyMap<string, string>;
  letters: Awaited<ReturnType<Lookup['findDeadLetters']>>;
}>;

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
  logger: Logger;
}) {
  const { outbox, queues, lookup, epoch: epochs, deadLetters, logger } = deps;

  /** @param goesOn asked before each batch. If false, the reaper stops there. */
  return async function reap(goesOn: () => boolean = () => true): Promise<void> {
    const seen = { alive: 0, failed: 0, missing: 0 };
    let found = 0;
    for (let batch = 0; batch < BATCHES_MAX && goesOn(); batch++) {
      const epoch = epochs.current();
      // Without an epoch Redis may have lost entries: the rows wait until table and streams were compared.
      if (epoch === undefined) break;
      const rows = await outbox.expired(BATCH);
      const written = await write(epoch, await findEntries(await Promise.all(rows.map(judge))));
      found += written.found;
      for (const { row, fate } of written.judged) if (!row.isDead) seen[fate.state]++;
      await bury(written.judged.filter(({ fate }) => fate.state === 'failed').map(({ row }) => row));
      if (rows.length < BATCH || written.judged.length === 0) break;
    }
    deps.metrics.leasesExpired(seen);
    if (seen.missing > found) await deps.scheduler.wake();
    if (seen.missing > 0)
      logger.warn(
        { events: seen.missing, found },
        'publish jobs were lost; their events are claimed again, but for those that are in their stream',
      );
    if (seen.failed > 0)
      logger.warn({ events: seen.failed }, 'finished dead letters that had been left half done');
    if (seen.alive > 0) logger.debug({ events: seen.alive }, 'leases extended');
  };

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

  /** Changes the rows in one transaction. After it, writes the dead letters that are lost. */
  async function write(epoch: string, { judged: all, entries, letters }: Found) {
    if (all.length === 0) return { judged: [], found: 0 };
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
    if (unlettered.length > 0) await writeLetters(unlettered);
    return { judged, found: found.length };
  }

  async function bury(rows: readonly ExpiredRow[]): Promise<void> {
    if (rows.length === 0) return;
    for (const { errorMessage: _, deadLetteredAt: __, ...event } of await outbox.unfinishedEvents(
      idsOf(rows),
    )) {
      const job = await queues.failedJob(event);
      if (job) await deadLetters.bury(job);
    }
  }

  async function writeLetters(rows: readonly ExpiredRow[]): Promise<void> {
    for (const event of await outbox.unfinishedEvents(idsOf(rows))) {
      const { errorMessage, deadLetteredAt, attempts } = event;
      if (deadLetteredAt === null) continue;
      const { errorMessage: _, deadLetteredAt: __, ...plain } = event;
      await deadLetters.writeAgain({
        ...{ event: plain, attempts, reason: errorMessage ?? '', failedAt: deadLetteredAt },
      });
    }
  }
}
