import type { EventName, OutboxEvent, Receipt, Waiting } from '../event.ts';

/**
 * Events of one aggregate that have their jobs at the same time are appended in their order, whichever runs first: the
 * script that appends one looks at the jobs of those before it (see append.ts). Here is what becomes of its answers.
 */

/** How long an event waits for its turn: what comes first is in hand here or on another pod, or it takes long. */
const TURN_TIMEOUT_MS = 60;
/** Another pod may have what comes first: it is asked for again so often. */
const RETRY_MS = 20;

/** The script's answers: not its turn, or that is for the rows to say. */
const NOT_ITS_TURN = /^[~*]/;
const UNCLEAR = '*';
/** What they say of each job that comes first and has no entry: failed for good, waiting, for a retry, or not there. */
const DUE = 'due';
const RETRY = 'retry';
const GONE = 'gone';

export const ENTRY_ID = /^\d+-\d+$/;

export type Answer = Readonly<{
  reply: string;
  /** Those before it whose entries the reply has. */
  first: readonly EventName[];
}>;

/** Its turn has not come, or will not for long. */
export type NotYet = Readonly<{ status: 'early' | 'behind-retry' }>;

export type Turns = ReturnType<typeof createTurns>;

export function createTurns(
  deps: Readonly<{
    /** Whether that row, by `outbox.id`, has its receipt, as far as this pod knows. */
    isSettled: (id: string) => boolean;
    /** What these rows say, by `outbox.id`. */
    waiting: (ids: readonly string[]) => Promise<Waiting>;
  }>,
) {
  /** Who waits for the append of an event, by its id. */
  const awaited = new Map<string, (() => void)[]>();

  /** Resolves when this pod has asked for that append, or after a moment. */
  function appendOf(id: string): Promise<void> {
    return new Promise((resolve) => {
      const timer = setTimeout(() => {
        awaited.delete(id);
        resolve();
      }, RETRY_MS);
      const asked = () => {
        clearTimeout(timer);
        resolve();
      };
      const others = awaited.get(id);
      if (others) others.push(asked);
      else awaited.set(id, [asked]);
    });
  }

  return {
    /** Redis has answered for that event: whoever waits for it asks again. */
    answered(id: string): void {
      const waiting = awaited.get(id);
      awaited.delete(id);
      for (const asked of waiting ?? []) asked();
    },

    /**
     * Asks until those that come first have their places, or for a moment; not when one of them waits for a retry.
     * @throws when the rows of some have to be asked, and cannot
     */
    async inTurn(
      { chain }: OutboxEvent,
      append: (first: readonly EventName[]) => Promise<string>,
    ): Promise<Answer | NotYet> {
      const until = performance.now() + TURN_TIMEOUT_MS;
      for (let first: readonly EventName[] = chain?.after ?? []; ; ) {
        first = first.filter((it) => !deps.isSettled(it.id));
        const reply = await append(first);
        if (!NOT_ITS_TURN.test(reply)) return { reply, first };
        const places = reply.split('|').slice(1);
        if (places.includes(RETRY)) return { status: 'behind-retry' };
        const gone = first.filter((_, i) => places[i] === GONE);
        const due = first.find((_, i) => places[i] === DUE) ?? gone[0];
        // Of most that are gone the receipt was given in the meantime.
        const unknown = gone.filter((it) => !deps.isSettled(it.id));
        const waiting = unknown.length > 0 ? await deps.waiting(unknown.map((it) => it.id)) : 'none';
        if (waiting === 'for-retry') return { status: 'behind-retry' };
        const areThere = waiting === 'some';
        if (!areThere) first = first.filter((it) => !gone.includes(it));
        if (reply.startsWith(UNCLEAR) && !areThere) continue;
        if (performance.now() > until) return { status: 'early' };
        await appendOf(due?.id as string);
      }
    },

    /** In another epoch, those that come first may have lost their jobs and entries: they are appended again first. */
    async mayBeAhead({ chain }: OutboxEvent, epoch: string): Promise<boolean> {
      if (chain === undefined || chain.epoch === epoch) return false;
      const before = [...chain.receipts, ...chain.after];
      return before.length > 0 && (await deps.waiting(before.map((it) => it.id))) !== 'none';
    },
  };
}

/**
 * Of what the chain has before the event and was appended in this epoch; what was in another one is settled by now. If
 * the entry of one is not known, nothing is: the rows say whose turn it is.
 * @param places what the reply says of each in `first`
 */
export function precedingOf(
  { chain }: OutboxEvent,
  epoch: string,
  first: readonly EventName[],
  places: readonly string[],
): readonly Receipt[] {
  if (places.includes(GONE) || places.includes(DUE)) return [];
  const together = first.flatMap(({ id }, i) => {
    const entryId = places[i] as string;
    return ENTRY_ID.test(entryId) ? { id, entryId } : [];
  });
  return [...(chain?.epoch === epoch ? chain.receipts : []), ...together];
}
