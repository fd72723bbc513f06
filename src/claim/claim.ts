import type { RelayConfig } from '../config/config.ts';
import type { Queryable } from '../connections/database.ts';
import type { OutboxEvent } from '../event.ts';
import type { RemoveJobs } from '../finalize/job-removal.ts';
import type { Refiller } from '../finalize/refiller.ts';
import { RowRefusedError } from '../outbox/claims.ts';
import { payloadMayBeAtFault } from '../outbox/event-of-row.ts';
import { rowMayBeAtFault } from '../outbox/finalize.ts';
import type { Claim, LeasedEvent, Outbox } from '../outbox/outbox.ts';
import type { InFlight, Queues } from '../queue/queues.ts';
import { type Epoch, epochId } from '../streams/epoch.ts';
import type { Logger } from '../telemetry/logger.ts';
import type { Metrics } from '../telemetry/metrics.ts';
import type { Tally } from '../telemetry/tally.ts';
import type { Tracing } from '../telemetry/tracing.ts';

/**
 * What one claim came to.
 * - `more`: it took as much as it may, so more rows may be fresh
 * - `all`: it took every fresh row; `events` were leased, perhaps none
 * - `no-room`: it took nothing, since Redis holds as many jobs as are allowed, or since no epoch is known
 */
export type ClaimOutcome = { kind: 'more' | 'all'; events: number } | { kind: 'no-room' };

/** `batchSize`: rows of the first claim. While more rows are fresh, each claim takes twice as many, up to `maxBatchSize`. */
export type ClaimOptions = Pick<RelayConfig, 'maxInFlight' | 'batchSize' | 'maxBatchSize'>;

/**
 * How many jobs may be added so that there are never more than `maxInFlight`; 0 when too few to be worth a
 * transaction.
 */
export function roomFor(inFlight: Pick<InFlight, 'total'>, batchSize: number, maxInFlight: number): number {
  const room = maxInFlight - inFlight.total;
  // Retries take a quarter of the slots at most (RETRIES_SHARE in publish.ts), so a quarter becomes free sooner or later.
  const worthwhile = Math.min(batchSize, Math.max(1, Math.floor(maxInFlight / 4)));
  return room < worthwhile ? 0 : Math.min(room, batchSize);
}

/** So many rows in a row that refuse to be changed mean that it is not the rows: the claim fails. */
const REFUSALS_MAX = 32;

/**
 * Makes one claim: leases or parks fresh rows (outbox/claims.ts), and adds a job for each leased row before the transaction
 * commits. The caller, claim-worker.ts, holds the claim lock, so one pod claims at a time.
 */
export function createClaim(deps: {
  outbox: Outbox;
  queues: Pick<Queues, 'inFlight' | 'addPublishJobs'>;
  epoch: Pick<Epoch, 'known' | 'confirm'>;
  removeJobs: RemoveJobs;
  refiller: Pick<Refiller, 'request'>;
  metrics: Pick<Metrics, 'claimed'>;
  tracing: Pick<Tracing, 'claim'>;
  tally: Pick<Tally, 'error'>;
  options: ClaimOptions;
  logger: Logger;
}): () => Promise<ClaimOutcome> {
  const { outbox, queues, epoch: epochs, tally, options, logger } = deps;
  // Largest batch: a quarter of the slots. A larger one would wait for room while workers idle.
  const largest = Math.max(
    options.batchSize,
    Math.min(options.maxBatchSize, Math.floor(options.maxInFlight / 4)),
  );
  let batchSize = options.batchSize;

  return async function claim() {
    const limit = roomFor(await queues.inFlight(), batchSize, options.maxInFlight);
    if (limit === 0) return { kind: 'no-room' };
    // The epoch is read before the rows. If it ends in between, `confirm` fails, and the claim is rolled back: rows that a
    // later epoch made fresh never get jobs that name this one.
    const epoch = await epochs.known();
    if (epoch === undefined) return { kind: 'no-room' };
    const { leased, parked, rows, more } = await claimBatch(limit, epoch).catch((error) => {
      if (payloadMayBeAtFault(error))
        logger.warn({ err: error }, 'the payload of an event may be unprintable; claiming one by one');
      else if (rowMayBeAtFault(error))
        logger.warn({ err: error }, 'the database refuses to change a row, or all; claiming one by one');
      else throw error;
      return claimOneByOne(limit, epoch);
    });
    deps.refiller.request(parked);
    if (rows > 0) deps.metrics.claimed(rows);
    batchSize = more ? Math.min(2 * batchSize, largest) : options.batchSize;
    return { kind: more ? 'more' : 'all', events: leased.length };
  };

  function claimBatch(limit: number, epoch: string): Promise<Claim> {
    return outbox.inEpoch((tx) => lease(tx, epoch, () => outbox.claimFresh(tx, limit)), { generic: true });
  }

  /**
   * Claims row by row, up to the one that PostgreSQL cannot print. That event gets a job without its payload. Rows that the
   * database refuses to change are left out, until so many in a row were.
   */
  async function claimOneByOne(limit: number, epoch: string): Promise<Claim> {
    const all: Claim = { leased: [], parked: [], rows: 0, more: true };
    const deadlineMs = outbox.printDeadlineMs;
    let refusals = 0;
    for (let rows = 0; rows < limit; rows++) {
      const one = await outbox
        .inEpoch((tx) => lease(tx, epoch, () => outbox.claimFirst(tx)), { deadlineMs })
        .catch((error) => {
          if (!(error instanceof RowRefusedError)) throw error;
          tally.error(
            error.eventId,
            { err: error.cause },
            'the database refuses to change fresh rows; they are tried again in a minute, and later events of their aggregates wait',
          );
          if (++refusals >= REFUSALS_MAX) throw error.cause;
          return undefined;
        });
      if (one === undefined) continue;
      refusals = 0;
      if (one.rows === 0) break;
      all.leased.push(...one.leased);
      all.parked.push(...one.parked);
      if (one.leased[0]?.withheld) break;
    }
    return { ...all, rows: all.leased.length + all.parked.length };
  }

  /** Takes rows and adds their jobs, while the transaction holds the rows' locks. */
  async function lease(tx: Queryable, epoch: string, take: () => Promise<Claim>): Promise<Claim> {
    const claimed = await take();
    if (claimed.leased.length === 0) return claimed;
    const events = await withoutEarlierJobs(tx, claimed.leased);
    if (events.length > 0)
      await deps.tracing.claim(
        events.map(
          ({ mayHaveJob: _, knownEntry: __, ...event }): OutboxEvent => ({ ...event, epoch: epochId(epoch) }),
        ),
        queues.addPublishJobs,
      );
    await epochs.confirm(epoch);
    return claimed;
  }

  /**
   * Removes earlier jobs of these events: BullMQ adds no job whose id is taken. A job that remembers an append, or a
   * dead letter that its row does not know, stays; its row's lease ends, and the lease reaper decides. So does one that a
   * worker has: it goes on in place of the new one.
   */
  async function withoutEarlierJobs(tx: Queryable, leased: readonly LeasedEvent[]): Promise<LeasedEvent[]> {
    const again = leased.filter((it) => it.mayHaveJob);
    if (again.length === 0) return [...leased];
    const left = await deps.removeJobs(again);
    const remembering = again.filter((it) => left.get(it.eventId) === 'remembers').map((it) => it.eventId);
    if (remembering.length > 0) await outbox.expireLeases(tx, remembering);
    return leased.filter((it) => !remembering.includes(it.eventId));
  }
}
