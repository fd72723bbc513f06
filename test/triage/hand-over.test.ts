import { describe, expect, test } from 'vitest';
import type { OutboxEvent } from '../../src/event.ts';
import { createHandOver } from '../../src/triage/hand-over.ts';
import { aClaimedEvent, deferred, silent } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const EPOCH = 'epoch';

/** Events of one aggregate, in their order. */
function ofOneAggregate(count: number): OutboxEvent[] {
  const { aggregateId } = aClaimedEvent();
  return Array.from({ length: count }, (_, i) => aClaimedEvent({ id: String(i + 1), aggregateId }));
}

/** What is done, in its order. */
function start(
  deps: {
    add?: () => Promise<void>;
    confirm?: () => Promise<void>;
    current?: () => string;
    commit?: () => Promise<void>;
    /** By another pod, in the meantime. */
    published?: string[];
    endLeases?: () => Promise<void>;
    readAhead?: ((after: readonly OutboxEvent[]) => Promise<OutboxEvent[]>) | undefined;
  } = {},
) {
  const done: string[] = [];
  const handOver = createHandOver<string>({
    giving: async (work) => {
      const result = await work('tx');
      await deps.commit?.();
      done.push('committed');
      return result;
    },
    epoch: { confirm: deps.confirm ?? (async () => {}), current: deps.current ?? (() => EPOCH) },
    addJobs: async (events) => {
      await deps.add?.();
      for (const { id, follows } of events) {
        const before = follows?.receipts.map((it) => `${it.id} at ${it.entryId}`).join(', ');
        done.push(`job of ${id}${before === undefined ? '' : ` after ${before}`}`);
      }
    },
    whileLive: async (events, add) => {
      const live = events.filter((it) => !deps.published?.includes(it.id));
      if (live.length > 0) await add(live);
    },
    endLeases: async (events) => {
      await deps.endLeases?.();
      done.push(`leases of ${events.map((it) => it.id)} ended`);
    },
    payloadMayBeAtFault: (error) => (error as Error).message === 'unprintable',
    readAhead: deps.readAhead,
    logger: silent,
  });
  return { ...handOver, done };
}

describe('the next job of an aggregate', () => {
  test('is added when its lease is committed, not before', async () => {
    const commit = deferred();
    const { giveReceipts, done } = start({ commit: () => commit.promise });
    const given = giveReceipts(EPOCH, async () => [aClaimedEvent({ id: '1' }), aClaimedEvent({ id: '7' })]);
    await new Promise((resolve) => setImmediate(resolve));
    expect(done).toEqual([]);
    commit.resolve();
    expect((await given).map((it) => it.id)).toEqual(['1', '7']);
    expect(done).toEqual(['committed', 'job of 1', 'job of 7']);
  });

  test('is not added, nor a receipt given, in an epoch that is over', async () => {
    const { giveReceipts, done } = start({
      confirm: async () => {
        throw new Error('over');
      },
    });
    await expect(giveReceipts(EPOCH, async () => [aClaimedEvent()])).rejects.toThrow('over');
    expect(done).toEqual([]);
  });

  test('is not added when the epoch ended with the commit: its row is looked at', async () => {
    const { giveReceipts, done } = start({ current: () => 'another' });
    await giveReceipts(EPOCH, async () => [aClaimedEvent({ id: '5' })]);
    expect(done).toEqual(['committed', 'leases of 5 ended']);
  });

  test('that cannot be added has its row looked at; the receipts are given all the same', async () => {
    const failing = start({ add: () => Promise.reject(new Error('no Redis')) });
    await failing.giveReceipts(EPOCH, async () => [aClaimedEvent({ id: '5' })]);
    expect(failing.done).toEqual(['committed', 'leases of 5 ended']);

    let isThere = false;
    const hopeless = start({
      add: () => Promise.reject(new Error('no Redis')),
      endLeases: async () => {
        if (!isThere) throw new Error('no database');
      },
    });
    await hopeless.giveReceipts(EPOCH, async () => [aClaimedEvent({ id: '5' })]);
    expect(hopeless.done).toEqual(['committed']);
    isThere = true;
    await waitFor(() => hopeless.done.length === 2, { what: 'another try' });
    expect(hopeless.done).toEqual(['committed', 'leases of 5 ended']);
  });

  test('is not added when another pod has brought it along, and published it meanwhile', async () => {
    const { giveReceipts, done } = start({ published: ['1'] });
    await giveReceipts(EPOCH, async () => [aClaimedEvent({ id: '1' }), aClaimedEvent({ id: '2' })]);
    expect(done).toEqual(['committed', 'job of 2']);
  });

  test('that cannot be printed is left to the claim', async () => {
    const { giveReceipts, done } = start();
    const asked: boolean[] = [];
    await giveReceipts(EPOCH, async (_, promoting) => {
      asked.push(promoting);
      if (promoting) throw new Error('unprintable');
      return [];
    });
    expect([asked, done]).toEqual([[true, false], ['committed']]);
    const broken = giveReceipts(EPOCH, () => Promise.reject(new Error('no database')));
    await expect(broken).rejects.toThrow('no database');
  });
});

describe('what was read ahead', () => {
  const EVENTS = ofOneAggregate(5);
  const [first, second, third] = EVENTS as [OutboxEvent, OutboxEvent, OutboxEvent];
  const readAhead = async ([after]: readonly OutboxEvent[]) =>
    EVENTS.filter((it) => it.id > (after?.id ?? ''));
  const at = (event: OutboxEvent) => ({ entryId: `1-${event.id}`, epoch: EPOCH, beganAt: performance.now() });

  /** The first event has its job, and those behind it were read. */
  async function started(deps: Parameters<typeof start>[0] = {}) {
    const it = start({ readAhead, ...deps });
    await it.giveReceipts(EPOCH, async () => [first]);
    await new Promise((resolve) => setImmediate(resolve));
    return { ...it, since: () => it.done.slice(2) };
  }
  /** As its job has it. */
  const chained = (event: OutboxEvent, ...before: OutboxEvent[]) => ({
    ...event,
    follows: { epoch: EPOCH, receipts: before.map((it) => ({ id: it.id, entryId: at(it).entryId })) },
  });

  test('gets its jobs one after the other, each when the one before is appended, with the receipts of these', async () => {
    const { bringAlong, since } = await started();
    expect(bringAlong(first, at(first))).toBe(true);
    expect(bringAlong(chained(second, first), at(second))).toBe(true);
    await waitFor(() => since().length === 2, { what: 'two jobs' });
    expect(since()).toEqual(['job of 2 after 1 at 1-1', 'job of 3 after 1 at 1-1, 2 at 1-2']);
    expect(bringAlong(EVENTS[4] as OutboxEvent, at(first))).toBe(false); // the last one
  });

  test('does without the receipts that are given, and with those of this epoch alone', async () => {
    const { bringAlong, settle, since } = await started();
    settle([first.id]);
    bringAlong(chained(second, first), at(second));
    bringAlong(
      { ...third, follows: { epoch: 'another', receipts: [{ id: '9', entryId: '9-9' }] } },
      at(third),
    );
    await waitFor(() => since().length === 2, { what: 'two jobs' });
    expect(since()).toEqual(['job of 3 after 2 at 1-2', 'job of 4 after 3 at 1-3']);
  });

  test('is brought along once, in its epoch, while it is fresh', async () => {
    const once = await started();
    expect([once.bringAlong(first, at(first)), once.bringAlong(first, at(first))]).toEqual([true, false]);
    expect((await started()).bringAlong(first, { ...at(first), epoch: 'another' })).toBe(false);
    const paused = await started();
    expect(paused.bringAlong(first, { ...at(first), beganAt: performance.now() - 3_001 })).toBe(false);
    const now = performance.now.bind(performance);
    const late = await started();
    performance.now = () => now() + 5_001;
    try {
      expect(late.bringAlong(first, at(first))).toBe(false);
    } finally {
      performance.now = now;
    }
  });

  test('is not when too many before it have no receipts yet', async () => {
    const { bringAlong } = await started();
    const many = Array.from({ length: 64 }, (_, i) => aClaimedEvent({ id: String(100 + i) }));
    expect(bringAlong(chained(second, ...many.slice(1)), at(second))).toBe(true);
    expect(bringAlong(chained(third, ...many), at(third))).toBe(false);
  });

  test('gets no second job when its row is leased: the first may have been run and removed', async () => {
    const { bringAlong, giveReceipts, since } = await started();
    bringAlong(first, at(first));
    await giveReceipts(EPOCH, async () => [second]);
    expect(since()).toEqual(['job of 2 after 1 at 1-1', 'committed']);
    await giveReceipts(EPOCH, async () => [second]); // much later, e.g. because it was given back
    expect(since().at(-1)).toBe('job of 2');

    const replayed = await started();
    replayed.bringAlong(first, at(first));
    await replayed.giveReceipts(EPOCH, async () => [{ ...second, attempts: 1 }]);
    expect(replayed.since().at(-1)).toBe('job of 2');

    let of = EPOCH;
    const emptied = await started({ current: () => of });
    emptied.bringAlong(first, at(first));
    of = 'another';
    await emptied.giveReceipts('another', async () => [second]);
    expect(emptied.since().at(-1)).toBe('job of 2');
  });

  test('of an event that ran before, on another pod, has its row looked at', async () => {
    const { giveReceipts, since } = await started();
    await giveReceipts(EPOCH, async () => [second, aClaimedEvent({ id: '7' })], [first]);
    expect(since()).toEqual(['committed', 'job of 7', 'leases of 2 ended']);
    await giveReceipts(EPOCH, async () => [second, third], 'all');
    expect(since().slice(3)).toEqual(['committed', 'leases of 2,3 ended']);
  });

  test('has its row looked at when its job cannot be added, and gets one later', async () => {
    let isThere = true;
    const { bringAlong, giveReceipts, since } = await started({
      add: async () => {
        if (!isThere) throw new Error('no Redis');
      },
    });
    isThere = false;
    expect(bringAlong(first, at(first))).toBe(true);
    await waitFor(() => since().length === 1, { what: 'the look' });
    isThere = true;
    await giveReceipts(EPOCH, async () => [second]);
    expect(since()).toEqual(['leases of 2 ended', 'committed', 'job of 2']);
  });

  test('is nothing where many aggregates go on, or the table cannot be read', async () => {
    const reads: number[] = [];
    const count = async (after: readonly OutboxEvent[]) => {
      reads.push(after.length);
      return [];
    };
    const { giveReceipts } = start({ readAhead: count });
    await giveReceipts(EPOCH, async () => Array.from({ length: 17 }, () => aClaimedEvent()));
    await giveReceipts(EPOCH, async () => Array.from({ length: 16 }, () => aClaimedEvent()));
    expect(reads).toEqual([16]);
    const broken = await started({ readAhead: () => Promise.reject(new Error('no database')) });
    expect(broken.bringAlong(first, at(first))).toBe(false);
  });
});
