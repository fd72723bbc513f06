import type { Outbox } from '../outbox/outbox.ts';
import type { Standing } from '../outbox/parked.ts';

/** Events in one statement, at most. */
const BATCH_MAX = 500;

export type RowQuestions = ReturnType<typeof createRowQuestions>;

/** Asks the rows about events. Questions that arrive while a statement runs are asked together, in the next statement. */
export function createRowQuestions(outbox: Pick<Outbox, 'standingOf'>) {
  type Question = {
    eventId: string;
    before: string | null;
    resolve: (standing: Standing) => void;
    reject: (error: Error) => void;
  };
  const asked: Question[] = [];
  let isAsking = false;

  async function askAll(): Promise<void> {
    while (asked.length > 0) {
      const batch = asked.splice(0, BATCH_MAX);
      try {
        const standings = await outbox.standingOf(batch);
        for (const { eventId, resolve } of batch) resolve(standings.get(eventId) ?? 'over');
      } catch (error) {
        for (const { reject } of batch) reject(error as Error);
      }
    }
    isAsking = false;
  }

  return {
    /**
     * What the rows say of the event; see Outbox.standingOf.
     * @throws when the database does not answer
     */
    standingOf: (eventId: string, before: string | null): Promise<Standing> =>
      new Promise((resolve, reject) => {
        asked.push({ eventId, before, resolve, reject });
        if (isAsking) return;
        isAsking = true;
        setImmediate(() => void askAll());
      }),
  };
}
