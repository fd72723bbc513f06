import { setTimeout as delay } from 'node:timers/promises';

/**
 * How much may be asked over HTTP at once. The server shares its process, PostgreSQL and Redis with the relay, whose
 * events come first. Imports nothing.
 */

/** More was asked than is answered; asking again after a moment helps. */
export class BusyError extends Error {
  override readonly name = 'BusyError';
  readonly statusCode = 503;
  readonly retryAfterSeconds = 1;
  constructor() {
    super('too much is asked at once: try again in a second');
  }
}

/** One answer for all who ask the same while it is made, and for `keptMs` after that. A failure is not kept. */
export function shareAnswers<T>(
  keptMs: number,
  ask: (question: string) => Promise<T>,
): (question?: string) => Promise<T> {
  const answers = new Map<string, Promise<T>>();
  return (question = '') => {
    const known = answers.get(question);
    if (known !== undefined) return known;
    const answer = ask(question);
    answers.set(question, answer);
    const forget = () => answers.delete(question);
    answer.then(() => setTimeout(forget, keptMs).unref(), forget);
    return answer;
  };
}

export type Gate = <T>(work: () => Promise<T>) => Promise<T>;

/** A place rests for this time at most, however long the work in it took. */
const REST_MAX_MS = 2_000;

/**
 * Lets `atOnce` through at a time, one after another, while `waiting` more wait. A place rests `rest` times as long as the
 * work in it took: with 4, who asks without end keeps the database busy for a fifth of the time.
 * The function that it returns throws {@link BusyError} to all who come after these.
 */
export function createGate({
  atOnce,
  waiting,
  rest = 0,
}: Readonly<{ atOnce: number; waiting: number; rest?: number }>): Gate {
  const queue: (() => void)[] = [];
  let running = 0;
  return async (work) => {
    if (running < atOnce) running++;
    else if (queue.length >= waiting) throw new BusyError();
    // Each hands its place on when it ends.
    else await new Promise<void>((resolve) => queue.push(resolve));
    const beganAt = performance.now();
    try {
      return await work();
    } finally {
      const restMs = Math.min(rest * (performance.now() - beganAt), REST_MAX_MS);
      if (restMs === 0) handOn();
      else setTimeout(handOn, restMs).unref();
    }
  };

  function handOn(): void {
    const next = queue.shift();
    if (next === undefined) running--;
    else next();
  }
}

/**
 * Lets `burst` through at once and `perSecond` after that; others wait until they may, which costs a timer. A
 * client that asks again as soon as it is answered gets slower; an answer that it is refused would make it faster.
 * The function that it returns throws {@link BusyError} when `waiting` wait already.
 */
export function createPace({
  perSecond,
  burst,
  waiting,
}: Readonly<{ perSecond: number; burst: number; waiting: number }>): () => Promise<void> {
  const stepMs = 1_000 / perSecond;
  let turnAt = Number.NEGATIVE_INFINITY;
  let waitingNow = 0;
  return async () => {
    const now = performance.now();
    turnAt = Math.max(turnAt, now - burst * stepMs);
    if (turnAt > now && waitingNow >= waiting) throw new BusyError();
    turnAt += stepMs;
    if (turnAt <= now) return;
    waitingNow++;
    await delay(turnAt - now);
    waitingNow--;
  };
}
