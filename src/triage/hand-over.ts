import { randomUUID } from 'node:crypto';
import type { Chain, EventName, OutboxEvent, Receipt, Run } from '../event.ts';
import type { Logger } from '../logger.ts';

/** What is appended in an attempt that took longer brings nothing along: others may have gone on. */
const IN_TIME_MS = 500;
/** Aggregates that go on at once, at most, for it to be worth reading ahead: more have work for everybody. */
const FEW = 16;
/** Events of one aggregate that are read ahead, and their bytes. */
const AHEAD = 200;
const AHEAD_BYTES = 128 * 1024;
/** So few of them are left when more is read. */
const READ_ON_BELOW = 50;
/** Those that are appended before the first of them is acknowledged. */
const MOST_UNSETTLED = 128;
/** Those that get their jobs together. */
const MOST_TOGETHER = 8;
/** What was read is good for so long: rows may be changed by hand. */
const FRESH_MS = 5_000;
/** Waits before the tries after the first to have rows looked at; then their leases end. */
const LOOK_RETRY_DELAYS_MS = [1_000, 2_000, 4_000, 8_000, 16_000];
/** Events that are kept in mind at most, of each kind; the oldest go first. */
const KEPT = 4_000;

/** One event was appended just now, in an attempt that began at that `performance.now()`. */
export type JustAppended = Run &
  Readonly<{
    entryId: string;
    epoch: string;
    preceding: readonly Receipt[];
    beganAt: number;
  }>;

/** An event that was brought along, and whose row is not leased yet. */
export type Follower = {
  readonly id: string;
  /** Until it is known that its job could not be added, or may not have been. */
  hasJob: boolean;
};

/** Of an event in its aggregate. */
type Place = Readonly<{ id: string; aggregateType: string; aggregateId: string }>;
type AddJobs = (events: readonly OutboxEvent[]) => Promise<void>;

/** What is known of the jobs of what comes next in an aggregate. */
export type Following = Readonly<{
  /** These have their jobs. */
  followers: readonly Follower[];
  /** What comes behind these, or behind the event, may have been brought along by another pod, and be gone again. */
  mayHaveMore: boolean;
}>;

/**
 * Carries an aggregate on from one event to the next.
 *
 * The job of a successor is added when the lease of its row is committed, not before: it may run at once, and if a
 * crash of PostgreSQL undid the lease, nobody would know what it had appended. Should this pod die in between, the job
 * of the event before runs again elsewhere, and ends the lease of what has no job.
 *
 * An aggregate with much to do does not wait for that. What comes next is read ahead, and gets its jobs several at a
 * time, each time by the first of those before, as soon as it is appended. These jobs carry the receipts of what comes
 * before them, so that rows get theirs in order whoever acknowledges first, and are appended in order whoever runs first
 * (see turn.ts). The rows are parked meanwhile, as they would be without; all else is as it is where nothing was read
 * ahead: each acknowledgement leases the row that is first then, and sees that it has its job.
 *
 * What was read is good for one job of each event, and for its first run: an event that is appended by that has not been
 * dead in between, so what comes behind it has been waiting ever since. One that died and was replayed has another job,
 * or runs again. What comes behind one that waits for a retry leaves Redis, and makes room for others. A job that is
 * gone may have been run: of what may have had one, the row is looked at, which looks in the stream as well.
 */
export function createHandOver<Tx>(deps: {
  /** Runs a transaction that gives receipts. */
  giving: <T>(work: (tx: Tx) => Promise<T>) => Promise<T>;
  epoch: Readonly<{ confirm: (epoch: string) => Promise<void>; current: () => string | undefined }>;
  addJobs: (events: readonly OutboxEvent[]) => Promise<void>;
  /** How many more jobs may be in Redis. */
  room: () => Promise<number>;
  /** Whether jobs may be added together that have to be run in their order. */
  together: boolean;
  /** Adds those of whom no other pod has published the row by now, nor does meanwhile. */
  whileLive: (events: readonly OutboxEvent[], add: (live: OutboxEvent[]) => Promise<void>) => Promise<void>;
  /** These events have no job, for all we know. */
  endLeases: (events: readonly OutboxEvent[]) => Promise<void>;
  /** What comes after each of these in its aggregate, in order. Absent where dead rows hold their aggregate, or there is no order. */
  readAhead?:
    | ((after: readonly Place[], limit: number, maxBytes: number) => Promise<OutboxEvent[]>)
    | undefined;
  payloadMayBeAtFault: (error: unknown) => boolean;
  logger: Logger;
}) {
  const {
    giving,
    epoch,
    addJobs,
    room,
    together,
    whileLive,
    endLeases,
    readAhead,
    payloadMayBeAtFault,
    logger,
  } = deps;
  /** What was read ahead, by the id of the event that comes before. */
  const ahead = new Map<string, Readonly<{ event: OutboxEvent; reading: string; until: number }>>();
  /** Events behind which was read, once each: there may have been nothing. */
  const ends = new Map<string, true>();
  /** Those that are not done yet. */
  const readings = new Map<string, Promise<void>>();
  /** What was brought along behind an event that had its job before. */
  const behind = new Map<string, Promise<Follower[]>>();
  /** Jobs that are about to be added, and not counted in Redis yet. */
  let bringing = 0;
  /** Events that have their receipts. */
  const settled = new Map<string, true>();

  /** Adds jobs in that epoch; if it cannot, their rows are looked at. Never throws. Returns whether they were added. */
  async function add(
    events: readonly OutboxEvent[],
    of: string,
    adding: (addJobs: AddJobs) => Promise<boolean>,
  ): Promise<boolean> {
    try {
      return await adding((some) => {
        if (epoch.current() !== of) throw new Error('Redis may have lost entries');
        return addJobs(some);
      });
    } catch (error) {
      logger.warn(
        { err: error, events: events.length },
        'cannot add the next jobs of aggregates; their rows are looked at',
      );
      await haveLookedAt(events);
      return false;
    }
  }

  /** Resolves after the first try: whatever took the job away may have taken the database as well. */
  const haveLookedAt = (events: readonly OutboxEvent[], tries = 0): Promise<void> =>
    endLeases(events).catch((error) => {
      logger.debug({ err: error }, 'the rows are looked at when their leases end, or earlier');
      const delay = LOOK_RETRY_DELAYS_MS[tries];
      if (delay !== undefined) setTimeout(() => void haveLookedAt(events, tries + 1), delay).unref();
    });

  /** Reads behind events that wait for their acknowledgement, or for what comes before them; behind each once. */
  function lookAhead(heads: readonly Place[], reading: string): Promise<void> | undefined {
    const isUnderWay = readings.get(reading);
    const some = heads.filter((it) => !ends.has(it.id));
    if (isUnderWay || some.length === 0) return isUnderWay;
    for (const { id } of some) keep(ends, id, true);
    const isRead = read(some, reading).finally(() => readings.delete(reading));
    readings.set(reading, isRead);
    return isRead;
  }

  /** The reading comes to its end: what is behind that is read before it is there. */
  function readOn(from: OutboxEvent, reading: string): void {
    const rest = behindOf(from, reading, READ_ON_BELOW);
    if (rest.length < READ_ON_BELOW) void lookAhead([rest.at(-1) ?? from], reading);
  }

  async function read(heads: readonly Place[], reading: string): Promise<void> {
    const until = performance.now() + FRESH_MS;
    try {
      const before = new Map(heads.map((it) => [aggregateKey(it), it.id]));
      for (const event of (await readAhead?.(heads, AHEAD, AHEAD_BYTES)) ?? []) {
        const key = aggregateKey(event);
        keep(ahead, before.get(key) as string, { event, reading, until });
        before.set(key, event.id);
      }
    } catch (error) {
      logger.debug({ err: error }, 'cannot read ahead; events go on one by one');
    }
  }

  /** What was read behind that event, the next few. */
  function behindOf(event: EventName, reading: string, limit: number): OutboxEvent[] {
    const now = performance.now();
    const some: OutboxEvent[] = [];
    for (let last = event; some.length < limit; ) {
      const known = ahead.get(last.id);
      if (known?.reading !== reading || now > known.until) break;
      some.push(known.event);
      last = known.event;
    }
    return some;
  }

  /** The first jobs of rows that were leased just now. */
  async function addFirst(events: readonly OutboxEvent[], of: string): Promise<void> {
    const isWorthIt = readAhead && events.length <= FEW;
    const reading = randomUUID();
    const chain: Chain = { reading, epoch: of, ...{ receipts: [], after: [], rest: [] }, leads: true };
    if (isWorthIt) void lookAhead(events, reading);
    const jobs = isWorthIt ? events.map((it) => ({ ...it, chain })) : events;
    await add(jobs, of, (addJobs) => whileLive(jobs, addJobs).then(() => true));
  }

  /** The next ones of the aggregate get their jobs, if they were read ahead for this one; which these are. */
  async function bring(
    event: OutboxEvent,
    { reading, rest }: Chain,
    { entryId, epoch: of, preceding, beganAt }: JustAppended,
  ): Promise<Follower[]> {
    const last = rest.at(-1) ?? event;
    // Another pod may have read behind those before.
    if (ahead.get(last.id)?.reading !== reading) await lookAhead([{ ...event, id: last.id }], reading);
    if (performance.now() - beganAt > IN_TIME_MS) return [];
    const before = preceding.filter((it) => !settled.has(it.id));
    const some = behindOf(last, reading, together ? MOST_TOGETHER : 1);
    if (some.length === 0 || before.length + some.length > MOST_UNSETTLED) return [];
    bringing += some.length;
    const wanted = bringing;
    const isRoom = await room().then(
      (count) => count >= wanted,
      () => false,
    );
    if (!isRoom) {
      bringing -= some.length;
      return [];
    }
    const receipts = [...before, { id: event.id, entryId }];
    const names = some.map(({ id, eventId }) => ({ id, eventId }));
    const jobs = some.map((it, i) => {
      const after = [...rest, ...names.slice(0, i)];
      const chain = { reading, epoch: of, receipts, after, rest: names.slice(i + 1), leads: i === 0 };
      return { ...it, chain };
    });
    const brought = some.map(({ id }): Follower => ({ id, hasJob: true }));
    // Others may have gone on to them meanwhile: another pod, by acknowledging what had its job before, or what was
    // replayed in front of them.
    const adding = async (addJobs: AddJobs) => {
      let areLive = false;
      await whileLive(jobs, async (live) => {
        areLive = live.length === jobs.length;
        if (areLive) await addJobs(jobs);
      });
      return areLive;
    };
    void add(jobs, of, adding).then((added) => {
      bringing -= some.length;
      for (const it of brought) it.hasJob = added;
    });
    readOn(some.at(-1) as OutboxEvent, reading);
    return brought;
  }

  return {
    /**
     * Rows get their receipts by `change`, and what it leased the jobs that follow. An entry that Redis may have lost
     * gives no receipt. Returns what was leased.
     * @param of epoch in which the entries were appended
     * @param followers have, or had, their jobs already
     * @param unclear events of whom nobody here knows whether the next one had a job before
     */
    async giveReceipts(
      of: string,
      change: (tx: Tx, promoting: boolean) => Promise<OutboxEvent[]>,
      {
        followers = [],
        unclear = [],
      }: Readonly<{ followers?: readonly Follower[]; unclear?: readonly OutboxEvent[] | 'all' }> = {},
    ): Promise<OutboxEvent[]> {
      const write = async (promoting: boolean) => {
        const successors = await giving(async (tx) => {
          const changed = await change(tx, promoting);
          await epoch.confirm(of);
          return changed;
        });
        const known = new Map(followers.map((it) => [it.id, it.hasJob]));
        const others = successors.filter((it) => !known.get(it.id));
        const perhaps = unclear === 'all' ? null : new Set(unclear.map(aggregateKey));
        const isFirst = (it: OutboxEvent) => !known.has(it.id) && perhaps?.has(aggregateKey(it)) === false;
        const first = others.filter(isFirst);
        if (first.length > 0) await addFirst(first, of);
        const again = others.filter((it) => !isFirst(it));
        if (again.length > 0) await haveLookedAt(again);
        return successors;
      };
      try {
        return await write(true);
      } catch (error) {
        // The change must not wait for a successor that cannot be printed: the orphan watch makes it fresh, and the
        // claim deals with it.
        if (!payloadMayBeAtFault(error)) throw error;
        return write(false);
      }
    },

    /** Whether that row has its receipt, as far as this pod knows. */
    isSettled: (id: string): boolean => settled.has(id),

    /** These rows have their receipts, some of them of chains. */
    settle(ids: readonly string[]): void {
      for (const id of ids) keep(settled, id, true);
    },

    /**
     * The event was appended just now: by the first run of its job, the next ones of its aggregate get their jobs, if
     * they were read ahead. Returns what is known of the jobs of those.
     */
    async bringAlong(event: OutboxEvent, chain: Chain, appended: JustAppended): Promise<Following> {
      // Their jobs may be lost, or have left, since what comes before them waited for a retry.
      if (chain.epoch !== appended.epoch || appended.isLate) return { followers: [], mayHaveMore: true };
      const [next] = chain.rest;
      if (chain.leads) {
        const brought = appended.isFirst ? bring(event, chain, appended) : Promise.resolve([]);
        const last = chain.rest.at(-1);
        if (last === undefined) return { followers: await brought, mayHaveMore: false };
        // At once: the last one may have been appended by the same call.
        keep(behind, last.id, brought);
      }
      if (next) return { followers: [{ id: next.id, hasJob: true }], mayHaveMore: false };
      const known = behind.get(event.id);
      behind.delete(event.id);
      return { followers: (await known) ?? [], mayHaveMore: known === undefined };
    },
  };
}

/** Whether what comes behind this event may have its job, though this one was not appended. */
export const mayBeFollowed = ({ chain }: OutboxEvent): boolean => chain !== undefined && !chain.leads;

function keep<T>(map: Map<string, T>, key: string, value: T): void {
  map.delete(key);
  map.set(key, value);
  if (map.size <= KEPT) return;
  for (const oldest of map.keys()) {
    map.delete(oldest);
    return;
  }
}

const aggregateKey = (it: Readonly<{ aggregateType: string; aggregateId: string }>) =>
  `${it.aggregateId} ${it.aggregateType}`;
