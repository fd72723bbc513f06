import type { Redis } from 'ioredis';
import { script } from '../connections/redis-script.ts';
import { isEntryId, type OutboxEvent } from '../event.ts';
import { NotReadyError, pause } from '../lifecycle.ts';
import { type StreamOptions, trimmedTo } from './append.ts';
import { orRefusal } from './append-outcome.ts';
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
/** How long an append waits while a pod compares table and streams. */
const EPOCH_TIMEOUT_MS = 15_000;

export type Republisher = ReturnType<typeof createRepublisher>;

export function createRepublisher(redis: Redis, options: StreamOptions) {
  const republishEntry = script<string>(redis, 'republishEntry', REPUBLISH, 2);

  async function presentEpoch(): Promise<string> {
    const endsAt = Date.now() + EPOCH_TIMEOUT_MS;
    for (;;) {
      const [server, found] = await Promise.all([identityOf(redis), redis.get(options.epochKey)]);
      if (server !== null && found?.startsWith(`${server}:`)) return found;
      if (Date.now() >= endsAt)
        throw new NotReadyError(
          'Redis may have lost entries, and no relay has compared it with the table yet: start one, then try again',
        );
      await pause(LOOK_AGAIN_MS);
    }
  }

  /**
   * For one republishing: answers a function that appends an event's entry once more, with `replayed_at`. It waits while
   * table and streams are being compared, and answers why Redis refuses this very entry, or null.
   * @throws {NotReadyError} when no epoch has begun in time
   * @throws when Redis can take nothing now, or does not answer
   */
  return (replayedAt: Date): ((event: OutboxEvent) => Promise<string | null>) => {
    let epoch: string | undefined;
    return async (event) => {
      for (;;) {
        epoch ??= await presentEpoch();
        const reply = await orRefusal(
          republishEntry(
            event.topic,
            options.epochKey,
            ...[epoch, ...trimmedTo(options.streamMaxLen), '*', ...replayedFields(event, replayedAt)],
          ),
        );
        if (typeof reply !== 'string') return reply.reason;
        if (reply === '?') return 'the stream is not there: relay verify --repair first';
        if (isEntryId(reply)) return null;
        if (reply !== '!') throw new Error('Redis gave no stream id in answer to an append');
        epoch = undefined;
      }
    };
  };
}
