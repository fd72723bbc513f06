import type { Acknowledger } from '../finalize/acknowledger.ts';
import type { DeadLetters } from '../finalize/dead-letter.ts';
import type { Refiller } from '../finalize/refiller.ts';
import type { ExpiredRow } from '../outbox/leases.ts';
import type { Outbox } from '../outbox/outbox.ts';
import type { JobFate, Queues } from '../queue/queues.ts';
import type { Epoch } from '../streams/epoch.ts';
import type { Lookup } from '../streams/lookup.ts';
import type { Logger } from '../telemetry/logger.ts';
import type { Metrics } from '../telemetry/metrics.ts';

/** Rows in one transaction. */
const BATCH = 100;
/** Batches of one round; the next tick goes on. */
const BATCHES_MAX = 50;

type Judged = Readonly<{ row: ExpiredRow; fate: JobFate }>;

/**
 * Asks what became of the jobs of rows whose lease has ended. Alive: another lease. Failed: a pod died before it had
 * written the dead letter, so that is finished. Gone: the row is published if its entry is among the latest of its
 * stream (the job was removed between append and acknowledgement, and with it the memory), dead if its dead letter is,
 * else fresh. A dead row expires when its dead letter is lost; the reaper writes it again.
 */
export function createLeaseReaper(deps: {
  outbox: Outbox;
  queues: Pick<Queues, 'jobFate' | 'failedJob'>;
  lookup: Pick<Lookup, 'find' | 'findDeadLetters'>;
  epoch: Pick<Epoch, 'current' | 'confirm'>;
  deadLetters: Pick<DeadLetters, 'bury' | 'writeAgain'>;
  acknowledger: Pick<Acknowledger, 'acknowledge'>;
  refiller: Pick<Refiller, 'request'>;
  metrics: Pick<Metrics, 'leasesExpired'>;
  logger: Logger;
}) {
  const { outbox, queues, lookup, epoch: epochs, deadLetters, logger } = deps;

  return async function reap(): Promise<void> {
    const seen = { alive: 0, failed: 0, missing: 0 };
    let found = 0;
    for (let batch = 0; batch < BATCHES_MAX; batch++) {
      const epoch = epochs.current();
      // What is in the streams now may be lost in a moment; then the rows wait for the comparison.
      if (epoch === undefined) break;
      const result = await reapBatch(epoch);
      for (const { row, fate } of result.judged) if (!row.isDead) seen[fate.state]++;
      found += result.found;
      for (const { row, fate } of result.judged) if (fate.state === 'failed') await finish(row);
      if (result.judged.length < BATCH) break;
    }
    deps.metrics.leasesExpired(seen);
    if (seen.missing > 0)
      logger.warn(
        { events: seen.missing, found },
        'publish jobs were lost; their events are claimed again, but for those that are in their stream',
      );
    if (seen.failed > 0)
      logger.warn({ events: seen.failed }, 'finished dead letters that had been left half done');
    if (seen.alive > 0) logger.debug({ events: seen.alive }, 'leases extended');
  };

  /** One transaction, and the dead letters that are to be written after it. */
  async function reapBatch(epoch: string): Promise<{ judged: Judged[]; found: number }> {
    const { judged, found, unlettered } = await outbox.inEpoch(
      async (tx) => {
        const rows = await outbox.lockExpired(tx, BATCH);
        if (rows.length === 0) return { judged: [], found: [], unlettered: [] };
        // Under the rows' locks: no claim can add their jobs meanwhile.
        const fates = await Promise.all(
          rows.map((row): Promise<JobFate> | JobFate =>
            row.isDead ? { state: 'missing' } : queues.jobFate(row.eventId),
          ),
        );
        const all = rows.map((row, i): Judged => ({ row, fate: fates[i] as JobFate }));
        const missing = all.filter(({ fate }) => fate.state === 'missing').map(({ row }) => row);
        const published = await publishedOf(missing.filter((row) => !row.isDead));
        const left = missing.filter((row) => !published.some((it) => it.eventId === row.eventId));
        const letters = await lookup.findDeadLetters(
          left.map((row) => row.eventId),
          new Map(left.map((row) => [row.eventId, row.isDead ? null : row.knownLetter])),
        );
        const fresh = left.filter((row) => !row.isDead && !letters.has(row.eventId));

        if (published.length > 0) await outbox.markPublished(tx, published);
        for (const { id, eventId } of left) {
          const letter = letters.get(eventId);
          if (letter !== undefined) await outbox.markDead(tx, { id, eventId, ...letter });
        }
        if (fresh.length > 0)
          await outbox.returnToFresh(
            tx,
            fresh.map((row) => row.eventId),
          );
        // Until its letter is written, or its job is asked about again.
        const dead = left.filter((row) => row.isDead && !letters.has(row.eventId));
        await outbox.extendLeases(tx, [
          ...dead.map(({ eventId }) => ({ eventId, attempts: 0, reason: '' })),
          ...all.flatMap(({ row: { eventId }, fate }) => {
            if (fate.state === 'missing') return [];
            return fate.state === 'alive'
              ? [{ eventId, attempts: fate.attempts, reason: fate.reason }]
              : [{ eventId, attempts: 0, reason: '' }];
          }),
        ]);
        await epochs.confirm(epoch);
        const known = new Set(fresh.map((row) => row.eventId));
        return {
          judged: all,
          found: missing.filter((row) => !row.isDead && !known.has(row.eventId)),
          unlettered: dead,
        };
      },
      { generic: true },
    );
    if (found.length > 0) deps.refiller.request(found);
    if (unlettered.length > 0) await writeLetters(unlettered);
    return { judged, found: found.length };
  }

  /** Of these rows, those whose entry is in the stream of their topic. */
  async function publishedOf(rows: readonly ExpiredRow[]) {
    const published: { id: string; eventId: string; entryId: string }[] = [];
    for (const topic of new Set(rows.map((row) => row.topic))) {
      const ofTopic = rows.filter((row) => row.topic === topic);
      const entryIds = await lookup.find(
        topic,
        ofTopic.map((row) => row.eventId),
      );
      for (const { id, eventId } of ofTopic) {
        const entryId = entryIds.get(eventId);
        if (entryId !== undefined) published.push({ id, eventId, entryId });
      }
    }
    return published;
  }

  async function finish({ eventId }: ExpiredRow): Promise<void> {
    const job = await queues.failedJob(eventId);
    if (job) await deadLetters.bury(job);
  }

  async function writeLetters(rows: readonly ExpiredRow[]): Promise<void> {
    for (const event of await outbox.deadEvents(rows.map((row) => row.id))) {
      const { errorMessage, deadLetteredAt, attempts } = event;
      if (event.entryId !== null || deadLetteredAt === null) continue;
      const { errorMessage: _, deadLetteredAt: __, entryId: ___, ...plain } = event;
      await deadLetters.writeAgain({
        ...{ event: plain, attempts, reason: errorMessage ?? '', failedAt: deadLetteredAt },
      });
    }
  }
}
