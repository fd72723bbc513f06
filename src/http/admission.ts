import { setTimeout as delay } from 'node:timers/promises';
import pLimit from 'p-limit';

/**
 * Limits on the load from HTTP requests. The server shares its process, PostgreSQL and Redis with the relay, and events
 * come first.
 */

/** Too many requests; a later one may succeed. */
export class BusyError extends Error {
  override readonly name = 'BusyError';
  readonly statusCode = 503;
  readonly retryAfterSeconds = 1;
  constructor() {
    super('too many requests at once: try again in a second');
  }
}

/** Callers with the same question share one answer while `ask` runs and for `keptMs` after. A failure is not kept. */
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

export type Limiter = <T>(work: () => Promise<T>) => Promise<T>;

/** Longest rest of a slot, however long its work took. */
const REST_MAX_MS = 2_000;

/**
 * A concurrency limit with `atOnce` slots and a queue of at most `waiting` callers. After its work, a slot rests `rest`
 * times as long as the work took: with `rest` 4 and one slot, a client that never stops asking keeps the database busy for a
 * fifth of the time. The returned function throws {@link BusyError} when the queue is full.
 */
export function createLimiter({
  atOnce,
  waiting,
  rest = 0,
}: Readonly<{ atOnce: number; waiting: number; rest?: number }>): Limiter {
  const limit = pLimit(atOnce);
  return async (work) => {
    if (limit.activeCount + limit.pendingCount >= atOnce + waiting) throw new BusyError();
    return new Promise((resolve, reject) => {
      void limit(async () => {
        const beganAt = performance.now();
        await Promise.resolve().then(work).then(resolve, reject);
        const restMs = Math.min(rest * (performance.now() - beganAt), REST_MAX_MS);
        if (restMs > 0) await delay(restMs, undefined, { ref: false });
      });
    });
  };
}

/**
 * A rate limit that delays: `burst` requests pass at once, then `perSecond`. A client that asks again after each answer
 * is slowed down; refusals would make it ask faster. The returned function throws {@link BusyError} when `waiting`
 * requests wait already.
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
