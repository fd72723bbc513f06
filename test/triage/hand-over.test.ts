import { describe, expect, test } from 'vitest';
import type { Chain, OutboxEvent } from '../../src/event.ts';
import { createHandOver, type JustAppended, mayBeFollowed } from '../../src/triage/hand-over.ts';
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
    room?: () => Promise<number>;
    together?: boolean;
    readAhead?: ((after: readonly Readonly<{ id: string }>[]) => Promise<OutboxEvent[]>) | undefined;
  } = {},
) {
  const done: string[] = [];
  const jobs = new Map<string, OutboxEvent>();
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
      for (const event of events) {
        done.push(`job of ${event.id}`);
        jobs.set(event.id, event);
      }
    },
    room: deps.room ?? (async () => 8),
    together: deps.together ?? true,
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
  return { ...handOver, done, jobs };
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
  const EVENTS = ofOneAggregate(30);
  const [first, second, third] = EVENTS as [OutboxEvent, OutboxEvent, OutboxEvent];
  const readAhead = async ([after]: readonly Readonly<{ id: string }>[]) => EVENTS.slice(Number(after?.id));
  const entryOf = (event: OutboxEvent) => ({ id: event.id, entryId: `1-${event.id}` });
  const at = (event: OutboxEvent, ...preceding: OutboxEvent[]) => ({
    ...{ entryId: `1-${event.id}`, epoch: EPOCH, beganAt: performance.now(), isFirst: true, isLate: false },
    preceding: preceding.map(entryOf),
  });
  const following = (...ids: string[]) => ({
    followers: ids.map((id) => ({ id, hasJob: true })),
    mayHaveMore: false,
  });
  const range = (from: number, to: number) =>
    Array.from({ length: to - from + 1 }, (_, i) => String(from + i));

  /** The first event has its job, and those behind it are read. */
  async function started(deps: Parameters<typeof start>[0] = {}) {
    const it = start({ readAhead, ...deps });
    await it.giveReceipts(EPOCH, async () => [first]);
    return {
      ...it,
      bringAlong: (event: OutboxEvent, appended: JustAppended) =>
        it.bringAlong(event, event.chain as Chain, appended),
      /** An event as its job has it. */
      job: (id: number) => it.jobs.get(String(id)) as OutboxEvent,
      jobsAre: async (count: number) => {
        await waitFor(() => it.jobs.size >= count, { what: `${count} jobs` });
        return [...it.jobs.keys()];
      },
      since: () => it.done.slice(2),
    };
  }

  test('gets its jobs eight at a time, with what comes before them', async () => {
    const { bringAlong, job, jobsAre } = await started();
    expect(job(1).chain).toMatchObject({ leads: true, receipts: [], after: [], rest: [] });
    expect(await bringAlong(job(1), at(first))).toEqual(following(...range(2, 9)));
    expect(await jobsAre(9)).toEqual(range(1, 9));
    const { reading } = job(1).chain as Chain;
    expect(job(2).chain).toMatchObject({ reading, leads: true, receipts: [entryOf(first)], after: [] });
    expect(job(9).chain).toMatchObject({ reading, leads: false, receipts: [entryOf(first)], rest: [] });
    expect(job(9).chain?.after.map((it) => it.id)).toEqual(range(2, 8));
  });

  test('the first of eight brings the next ones along, which come after the others; each knows its follower', async () => {
    const { bringAlong, job, jobsAre } = await started();
    await bringAlong(job(1), at(first));
    await jobsAre(9);
    expect(await bringAlong(job(2), at(second, first))).toEqual(following('3'));
    expect(await jobsAre(17)).toEqual(range(1, 17));
    expect(job(10).chain).toMatchObject({ leads: true, receipts: [first, second].map(entryOf) });
    expect(job(12).chain?.after.map((it) => it.id)).toEqual([...range(3, 9), '10', '11']);
    expect(await bringAlong(job(3), at(third))).toEqual(following('4'));
    expect(await bringAlong(job(9), at(third))).toEqual(following(...range(10, 17)));
    // To the end.
    await bringAlong(job(10), at(EVENTS[9] as OutboxEvent));
    await jobsAre(25);
    await bringAlong(job(18), at(EVENTS[17] as OutboxEvent));
    expect(await jobsAre(30)).toEqual(range(1, 30));
    expect(await bringAlong(job(26), at(EVENTS[25] as OutboxEvent))).toEqual(following('27'));
    expect(await bringAlong(job(30), at(EVENTS[29] as OutboxEvent))).toEqual(following());
  });

  test('is read on before it ends', async () => {
    const reads: string[] = [];
    const it = await started({
      readAhead: async ([after]) => {
        reads.push(after?.id as string);
        return EVENTS.slice(Number(after?.id), Number(after?.id) + 12);
      },
    });
    await it.bringAlong(it.job(1), at(first));
    await it.jobsAre(9);
    expect(reads).toEqual(['1', '13']);
    await it.bringAlong(it.job(2), at(second));
    await it.jobsAre(17);
    expect(reads).toEqual(['1', '13', '25']);
  });

  test('is read by whichever pod runs the first of eight', async () => {
    const here = await started();
    await here.bringAlong(here.job(1), at(first));
    await here.jobsAre(9);
    const there = start({ readAhead });
    const leader = here.job(2);
    expect(await there.bringAlong(leader, leader.chain as Chain, at(second, first))).toEqual(following('3'));
    await waitFor(() => there.jobs.size === 8, { what: 'the jobs of the next ones' });
    expect([...there.jobs.keys()]).toEqual(range(10, 17));
  });

  test('is waited for when the event is appended before it is read', async () => {
    const read = deferred();
    const it = await started({ readAhead: (after) => read.promise.then(() => readAhead(after)) });
    const brought = it.bringAlong(it.job(1), at(first));
    read.resolve();
    expect(await brought).toEqual(following(...range(2, 9)));
  });

  test('gets its jobs one at a time where appends do not see those of others', async () => {
    const { bringAlong, job, jobsAre } = await started({ together: false });
    expect(await bringAlong(job(1), at(first))).toEqual(following('2'));
    await jobsAre(2);
    expect(await bringAlong(job(2), at(second, first))).toEqual(following('3'));
    await jobsAre(3);
    expect(job(3).chain).toMatchObject({ receipts: [first, second].map(entryOf), after: [], leads: true });
  });

  test('is brought along as far as there is room in Redis', async () => {
    for (const room of [async () => 7, () => Promise.reject(new Error('no Redis'))]) {
      const full = await started({ room });
      expect(await full.bringAlong(full.job(1), at(first))).toEqual(following());
      expect(full.jobs.size).toBe(1);
    }
    // One of two that ask at the same time.
    const narrow = await started({ room: async () => 15 });
    await narrow.bringAlong(narrow.job(1), at(first));
    await narrow.jobsAre(9);
    const added = () => narrow.done.filter((it) => it.startsWith('job of')).length;
    const [one, other] = [narrow.job(1), narrow.job(2)].map((event) => narrow.bringAlong(event, at(event)));
    expect([await one, await other]).toEqual([following(...range(2, 9)), following('3')]);
    await waitFor(() => added() === 17, { what: 'the jobs of one' });
    expect(narrow.jobs.size).toBe(9);
    await narrow.bringAlong(narrow.job(2), at(second));
    await narrow.jobsAre(17);
  });

  test('does without the receipts that are given', async () => {
    const { bringAlong, settle, isSettled, job, jobsAre } = await started();
    await bringAlong(job(1), at(first));
    await jobsAre(9);
    settle([first.id]);
    expect([isSettled(first.id), isSettled(second.id)]).toEqual([true, false]);
    await bringAlong(job(2), at(second, first));
    await jobsAre(17);
    expect(job(10).chain?.receipts).toEqual([entryOf(second)]);
  });

  test('is brought along in time, in its epoch, while it is fresh, by the first run of a job', async () => {
    const none = async (appended: Partial<ReturnType<typeof at>>) => {
      const it = await started();
      const found = await it.bringAlong(it.job(1), { ...at(first), ...appended });
      expect(found.followers).toEqual([]);
      return found.mayHaveMore;
    };
    expect(await none({ isFirst: false })).toBe(false);
    expect(await none({ beganAt: performance.now() - 501 })).toBe(false);
    // Whatever had its job may be lost.
    expect(await none({ epoch: 'another' })).toBe(true);
    // Or have left, behind a retry.
    expect(await none({ isLate: true })).toBe(true);
    const now = performance.now.bind(performance);
    const late = await started();
    performance.now = () => now() + 5_001;
    try {
      expect(await late.bringAlong(late.job(1), at(first))).toEqual(following());
    } finally {
      performance.now = now;
    }
  });

  test('is brought along by the job that it was read for, and by no other of the same event: that may have been dead', async () => {
    const { bringAlong, job, since } = await started();
    const chain = { ...(job(1).chain as Chain), reading: 'another' };
    expect(await bringAlong({ ...first, chain }, at(first))).toEqual(following());
    expect(since()).toEqual([]);
  });

  test('is not when too many before it have no receipts yet', async () => {
    const many = (count: number) =>
      Array.from({ length: count }, (_, i) => aClaimedEvent({ id: String(100 + i) }));
    const it = await started();
    expect(await it.bringAlong(it.job(1), at(first, ...many(121)))).toEqual(following());
    expect(await it.bringAlong(it.job(1), at(first, ...many(120)))).toEqual(following(...range(2, 9)));
  });

  test('gets no second job when its row is leased: the first may have been run and removed', async () => {
    const { bringAlong, giveReceipts, job, jobsAre, since } = await started();
    const { followers } = await bringAlong(job(1), at(first));
    await jobsAre(9);
    await giveReceipts(EPOCH, async () => [second], { followers });
    expect(since().at(-1)).toBe('committed');
    await giveReceipts(EPOCH, async () => [second]); // much later, e.g. because it was given back
    expect(since().at(-1)).toBe('job of 2');
  });

  test('is not added when the next one is published by now', async () => {
    const published: string[] = [];
    const { bringAlong, giveReceipts, job, jobs, since } = await started({ published });
    published.push('2', '3');
    const { followers } = await bringAlong(job(1), at(first));
    await waitFor(() => followers.every((it) => !it.hasJob), { what: 'it to be noticed' });
    expect(jobs.size).toBe(1);
    await giveReceipts(EPOCH, async () => [EVENTS[3] as OutboxEvent], { followers });
    // It may have had another job, from whoever published those.
    expect(since()).toEqual(['committed', 'leases of 4 ended']);
  });

  test('is not added when any of them is: what was replayed in front of them may have been read with them', async () => {
    const published: string[] = [];
    const { bringAlong, job, jobs } = await started({ published });
    published.push('5');
    const { followers } = await bringAlong(job(1), at(first));
    await waitFor(() => followers.every((it) => !it.hasJob), { what: 'it to be noticed' });
    expect(jobs.size).toBe(1);
  });

  test('of an event of whom only another pod knows whether it had a job has its row looked at', async () => {
    const { giveReceipts, bringAlong, job, jobsAre, jobs, since } = await started();
    await giveReceipts(EPOCH, async () => [second, aClaimedEvent({ id: '77' })], { unclear: [first] });
    expect(since()).toEqual(['committed', 'job of 77', 'leases of 2 ended']);
    await giveReceipts(EPOCH, async () => [second, third], { unclear: 'all' });
    expect(since().slice(3)).toEqual(['committed', 'leases of 2,3 ended']);

    // The last of eight, whose first one another pod has run.
    jobs.delete('77');
    await bringAlong(job(1), at(first));
    await jobsAre(9);
    const other = start({ readAhead: async () => [] });
    expect(await other.bringAlong(job(9), job(9).chain as Chain, at(first))).toEqual({
      followers: [],
      mayHaveMore: true,
    });
    expect(await bringAlong(job(2), { ...at(second), isLate: true })).toEqual({
      followers: [],
      mayHaveMore: true,
    });
    expect([first, job(1), job(2), job(9)].map(mayBeFollowed)).toEqual([false, false, false, true]);
  });

  test('has its row looked at when its job cannot be added, or may not have been, at once and when it is leased', async () => {
    let isThere = true;
    const { bringAlong, giveReceipts, job, since } = await started({
      add: async () => {
        if (!isThere) throw new Error('no Redis');
      },
    });
    isThere = false;
    const { followers } = await bringAlong(job(1), at(first));
    await waitFor(() => followers.every((it) => !it.hasJob), { what: 'the look' });
    isThere = true;
    await giveReceipts(EPOCH, async () => [second], { followers });
    expect(since()).toEqual([`leases of ${range(2, 9)} ended`, 'committed', 'leases of 2 ended']);
  });

  test('is nothing where many aggregates go on, or the table cannot be read', async () => {
    const reads: number[] = [];
    const count = async (after: readonly unknown[]) => {
      reads.push(after.length);
      return [];
    };
    const { giveReceipts } = start({ readAhead: count });
    await giveReceipts(EPOCH, async () => Array.from({ length: 17 }, () => aClaimedEvent()));
    await giveReceipts(EPOCH, async () => Array.from({ length: 16 }, () => aClaimedEvent()));
    expect(reads).toEqual([16]);
    const broken = await started({ readAhead: () => Promise.reject(new Error('no database')) });
    expect(await broken.bringAlong(broken.job(1), at(first))).toEqual(following());
  });
});
