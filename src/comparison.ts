import type { RelayConfig } from './config.ts';
import type { Logger } from './logger.ts';
import type { Receipts } from './outbox/receipts.ts';
import { publishJobKey } from './queue/queues.ts';
import type { StreamOptions } from './stream/append.ts';
import type { Loss } from './stream/epoch.ts';
import { entryMarkerOf } from './stream/markers.ts';
import type { Restorer } from './stream/restore.ts';
import { createResync, type Found, totals } from './triage/resync.ts';

/** Table and streams compared, when Redis may have lost data and by `relay verify`. */

/** What the configuration says about streams and the keys beside them. */
export const streamOptionsOf = (config: RelayConfig): StreamOptions => ({
  ...config,
  jobKey: (eventId) => publishJobKey(config, eventId),
  epochKey: `${config.queuePrefix}:${config.queueName}:epoch`,
  ...(config.streamRedisUrl !== 'same' && {
    markerKey: entryMarkerOf(`${config.queuePrefix}:${config.queueName}`),
  }),
});

export const createComparison = (
  restorer: Restorer,
  receipts: Receipts,
  dlqStreamName: string,
  logger: Logger,
) =>
  createResync({
    dlqStreamName,
    rows: receipts.rows,
    events: receipts.events,
    renew: receipts.renew,
    absent: restorer.absent,
    restoreEntry: restorer.entry,
    restoreDeadLetter: restorer.deadLetter,
    logger,
  });

/** Redis may have lost entries and jobs: what is missing is appended again before anything new is. */
export const createRestore =
  (deps: {
    receipts: Receipts;
    compare: ReturnType<typeof createComparison>;
    /** How far back, at most. */
    windowMs: number;
    endLeases: () => Promise<number>;
    onRestored: (found: Found) => void;
    logger: Logger;
  }) =>
  async ({ intactUntil, guard }: Loss): Promise<void> => {
    const { receipts, logger } = deps;
    const startedAt = Date.now();
    await receipts.given();
    const since = await receipts.comparedFrom(deps.windowMs, intactUntil);
    const found = totals(await deps.compare({ since, until: 'infinity', guard }));
    const leases = await deps.endLeases();
    const about = { since, ...found, leases, ms: Date.now() - startedAt };
    if (found.lost + found.refused === 0) logger.info(about, 'nothing that was published is missing');
    else logger.warn(about, 'Redis had lost entries; they were appended again');
    deps.onRestored(found);
  };
