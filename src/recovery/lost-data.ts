import type { Outbox } from '../outbox/outbox.ts';
import type { FinalizedPlace, FinalizedRow, Published } from '../outbox/published.ts';
import type { Loss } from '../streams/epoch.ts';
import type { Lookup } from '../streams/lookup.ts';
import type { Memory } from '../streams/memory.ts';
import type { Logger } from '../telemetry/logger.ts';
import type { FindForgotten } from './forgotten-entries.ts';

/** Rows compared in one step. */
const PAGE_ROWS = 1_000;

/** Rows with an entry id, by what was found in their stream. */
export type Found = {
  rows: number;
  /** Not in the stream, though they should be. */
  lost: number;
  /** Of these, made unpublished: the relay publishes them again. */
  unpublished: number;
  /** Before the stream's first entry: trimmed on purpose. */
  trimmed: number;
  /** Their stream's key holds something else, or is none that the relay may read: nothing can be said of them. */
  unreadable: number;
};

const NOTHING: Found = { rows: 0, lost: 0, unpublished: 0, trimmed: 0, unreadable: 0 };

/** By stream, in the order in which they were met. */
export type Comparison = ReadonlyMap<string, Found>;

/** Sums of all streams. */
export function totals(comparison: Comparison): Found {
  const sum = { ...NOTHING };
  for (const found of comparison.values()) {
    for (const what of Object.keys(sum) as (keyof Found)[]) sum[what] += found[what];
  }
  return sum;
}

export type ComparisonRange = Readonly<{
  /** Both are times of the database. */
  since: string;
  until: string;
  /** Only this stream. */
  stream?: string;
  /** Called with the rows of a page whose entries are lost; answers how many rows it changed. */
  onLost?: (rows: readonly FinalizedRow[]) => Promise<number>;
  /** Whether the comparison remembers the last entry of each stream; see gate-script.ts. */
  remembering?: boolean;
  onProgress?: (at: string, found: Comparison) => void;
  /** Asked between two pages. If true, the comparison ends there. */
  stopped?: () => boolean;
}>;

type Compare = ReturnType<typeof createCompare>;

/** Looks for the entry of each published or dead row in its stream, page by page. */
export function createCompare(deps: {
  published: Pick<Published, 'finalizedRows'>;
  lookup: Pick<Lookup, 'absent'>;
  dlqStreamName: string;
}) {
  return async function compare(range: ComparisonRange): Promise<Comparison> {
    const found = new Map<string, Found>();
    let after: FinalizedPlace = { finalizedAt: range.since, id: '-1' };
    for (;;) {
      const page = await deps.published.finalizedRows(after, range.until, PAGE_ROWS);
      await compareRows(deps, page, range, found);
      range.onProgress?.(page.at(-1)?.finalizedAt ?? after.finalizedAt, found);
      const last = page.at(-1);
      if (last === undefined || page.length < PAGE_ROWS || range.stopped?.()) return found;
      after = last;
    }
  };
}

/** Looks for the entries of these rows, and adds what it finds to `found`. */
export async function compareRows(
  { lookup, dlqStreamName }: Readonly<{ lookup: Pick<Lookup, 'absent'>; dlqStreamName: string }>,
  all: readonly FinalizedRow[],
  range: Pick<ComparisonRange, 'stream' | 'onLost' | 'remembering'>,
  found: Map<string, Found>,
): Promise<void> {
  const streamOf = (row: FinalizedRow) => row.topic ?? dlqStreamName;
  const streams = [...new Set(all.map(streamOf))];
  await Promise.all(
    streams.map(async (stream) => {
      if (range.stream !== undefined && stream !== range.stream) return;
      const rows = all.filter((row) => streamOf(row) === stream);
      const absent = await lookup.absent(stream, rows, range.remembering === true);
      const sum = found.get(stream) ?? { ...NOTHING };
      found.set(stream, sum);
      sum.rows += rows.length;
      sum.trimmed += absent.trimmed;
      if (absent.unreadable) sum.unreadable += rows.length;
      sum.lost += absent.lost.length;
      if (absent.lost.length > 0 && range.onLost) sum.unpublished += await range.onLost(absent.lost);
    }),
  );
}

/**
 * Runs between two epochs (streams/epoch.ts), when Redis may have lost entries and jobs, and PostgreSQL may have forgotten
 * what became of rows. Meanwhile nothing is appended, and no transaction that rests on an append commits.
 *
 * 1. It waits until every transaction of the last epoch has ended.
 * 2. If PostgreSQL may have forgotten, it looks for unpublished rows in their streams (forgotten-entries.ts).
 * 3. It makes each row unpublished whose entry is missing: `outbox.unpublish`.
 * 4. It ends every lease, so that the lease reaper asks which jobs are there.
 * 5. Appends are forgotten whose rows are published, or gone.
 *
 * Then the next epoch begins, and the claim takes the fresh rows in their order.
 */
export const createRecoverLostData =
  (deps: {
    outbox: Pick<Published, 'comparedFrom' | 'unpublish'> &
      Pick<Outbox, 'epochsEnded' | 'expireAllLeases' | 'liveOf'>;
    memory: Pick<Memory, 'remembered' | 'forget'>;
    findForgotten: FindForgotten;
    compare: Compare;
    /** How far back rows are compared, at most. */
    windowMs: number;
    onRecovered: (found: Found) => void;
    logger: Logger;
  }) =>
  async ({ checkpoint, forgotten, confirm }: Loss): Promise<void> => {
    const { outbox, logger } = deps;
    const startedAt = Date.now();
    await outbox.epochsEnded();
    if (forgotten) await deps.findForgotten(confirm);
    const since = await outbox.comparedFrom(deps.windowMs, checkpoint);
    const found = totals(
      await deps.compare({ since, until: 'infinity', remembering: true, onLost: outbox.unpublish }),
    );
    const leases = await outbox.expireAllLeases();
    const remembered = await deps.memory.remembered();
    for (let i = 0; i < remembered.length; i += PAGE_ROWS) {
      const some = remembered.slice(i, i + PAGE_ROWS);
      const live = new Set(await outbox.liveOf(some));
      deps.memory.forget(some.filter((eventId) => !live.has(eventId)));
    }
    const about = { since, ...found, leases, ms: Date.now() - startedAt };
    if (found.lost + found.unreadable === 0) logger.info(about, 'nothing that was published is missing');
    if (found.lost > 0) logger.warn(about, 'Redis had lost entries; their events are published again');
    if (found.unreadable > 0)
      logger.warn(
        about,
        'not all entries could be looked for: some rows name a key that holds no stream, or that this relay must not read; "relay verify" tells which',
      );
    deps.onRecovered(found);
  };
