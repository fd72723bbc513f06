import type { Outbox } from '../outbox/outbox.ts';
import { OVER, type Standing } from '../outbox/parked.ts';
import { inBatches } from './in-batches.ts';

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
  const asked = inBatches<Question>(BATCH_MAX, async (batch) => {
    try {
      const standings = await outbox.standingOf(batch);
      for (const { eventId, resolve } of batch) resolve(standings.get(eventId) ?? OVER);
    } catch (error) {
      for (const { reject } of batch) reject(error as Error);
    }
  });

  return {
    /**
     * What the rows say of the event; see Outbox.standingOf.
     * @throws when the database does not answer
     */
    standingOf: (eventId: string, before: string | null): Promise<Standing> =>
      new Promise((resolve, reject) => asked.add({ eventId, before, resolve, reject })),
  };
}
