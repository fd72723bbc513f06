import type { Redis } from 'ioredis';
import { script } from '../connections/redis-script.ts';
import { isEntryId, type OutboxEvent } from '../event.ts';
import { NotReadyError, pause } from '../lifecycle.ts';
import { type StreamOptions, trimmedTo } from './append.ts';
import { outcomeOfError } from './append-outcome.ts';
import { replayedFields } from './envelope.ts';
import { identityOf } from './epoch-script.ts';

/** Appends copies of published events, for operators. No row and no job remembers the entry of a copy. */

/**
 * KEYS: stream, epoch. ARGV: what the epoch's key must hold, then what XADD takes after the key. Answers the id, `!` in
 * another epoch, `?` when the stream is not there: a new stream would look as if its old entries had been trimmed.
 */
const REPUBLISH = `
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return '!' end
return redis.call('XADD', KEYS[1], 'NOMKSTREAM', unpack(ARGV, 2)) or '?'`;

const LOOK_AGAIN_MS = 200;

/** The epoch is over: nothing was appended. */
export class NotOurEpochError extends Error {
  override readonly name = 'NotOurEpochError';
  constructor() {
    super('Redis may have lost entries since this epoch began; nothing was appended');
  }
}

export type Republisher = ReturnType<typeof createRepublisher>;

export function createRepublisher(redis: Redis, options: StreamOptions) {
  const republishEntry = script<string>(redis, 'republishEntry', REPUBLISH, 2);

  return {
    /**
     * The epoch to append in. It waits while a pod compares table and streams.
     * @throws {NotReadyError} when none has begun within `timeoutMs`
     */
    async epoch(timeoutMs: number): Promise<string> {
      const endsAt = Date.now() + timeoutMs;
      for (;;) {
        const [server, epoch] = await Promise.all([identityOf(redis), redis.get(options.epochKey)]);
        if (server !== null && epoch?.startsWith(`${server}:`)) return epoch;
        if (Date.now() >= endsAt)
          throw new NotReadyError(
            'Redis may have lost entries, and no relay has compared it with the table yet: start one, then try again',
          );
        await pause(LOOK_AGAIN_MS);
      }
    },

    /**
     * Appends the event's entry once more, with `replayed_at`.
     * @returns why Redis refuses this very entry, or null
     * @throws {NotOurEpochError} when the epoch is over: nothing was appended
     * @throws when Redis can take nothing now, or does not answer
     */
    async append(event: OutboxEvent, replayedAt: Date, epoch: string): Promise<string | null> {
      try {
        const reply = await republishEntry(
          event.topic,
          options.epochKey,
          ...[epoch, ...trimmedTo(options.streamMaxLen), '*', ...replayedFields(event, replayedAt)],
        );
        if (reply === '!') throw new NotOurEpochError();
        if (reply === '?') return 'the stream is not there: relay verify --repair first';
        if (!isEntryId(reply)) throw new Error('Redis gave no stream id in answer to an append');
        return null;
      } catch (error) {
        const outcome = outcomeOfError(error as Error);
        if (outcome.status === 'refused') return outcome.reason;
        throw error;
      }
    },
  };
}
