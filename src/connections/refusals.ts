import type { Redis } from 'ioredis';
import { succeedsWithin } from '../lifecycle.ts';

/**
 * What a failed request says: whether Redis refuses this very request, or takes none now.
 *
 * Some servers, and proxies before them, refuse a request above a size that they do not tell (1 MiB is common among
 * hosted ones). They answer with an error, or close the connection, which looks like any other loss of it.
 */

/** Any server takes requests of this size. Larger ones are made one at a time: then it is known which of them fails. */
export const LARGE_BYTES = 64 * 1024;
/** Time to wait for a connection before a request is made once more. */
const RECONNECT_MS = 2_000;

/** Replies by which Redis refuses everybody, whatever the request. A script finds keys of its slot gone while the slot moves. */
const NOBODY_NOW =
  /^(OOM|LOADING|READONLY|MASTERDOWN|CLUSTERDOWN|MOVED|ASK|TRYAGAIN|BUSY|NOREPLICAS|MISCONF|UNBLOCKED|NOAUTH|WRONGPASS)|Script attempted to access a non local key/;

/** Redis says where in the script it refused: before the refusal up to version 6, after it since 7. */
export const reasonOf = (error: Error): string =>
  error.message
    .replace(/^ERR Error running script.*?@user_script:\s*\d+:\s*-?/, '')
    .replace(/ script: [0-9a-f]{40}, on @user_script:\d+\.?$/, '')
    .slice(0, 500);

/** Whether Redis takes no request, or no change, from anybody now: it is full, read-only, loading and so on. */
export const refusesEverybody = (error: Error): boolean =>
  error.name === 'ReplyError' && NOBODY_NOW.test(reasonOf(error));

/** Whether Redis refuses this very request; otherwise it takes none now, or there was no answer. */
export const isRefusal = (error: Error): boolean => error.name === 'ReplyError' && !refusesEverybody(error);

/** Whether the connection was lost between a request and its answer, where lost requests are not sent again. */
export const isConnectionLoss = (error: Error): boolean =>
  error.name === 'MaxRetriesPerRequestError' || error.message === 'Connection is closed.';

/** Whether a command failed for want of a connection or an answer, by what ioredis says where FAILS_FAST. */
export const isLost = (error: Error): boolean =>
  isConnectionLoss(error) ||
  /^(Stream isn't writeable|Command timed out|Command aborted due to connection close)/.test(error.message);

export const closesConnection = (bytes: number): string =>
  `Redis, or what is before it, closes the connection at this request of ${bytes} bytes`;

/** Waits until the server answers on a connection, for a moment: nothing is sent while there is none. */
export async function untilConnected(redis: Redis): Promise<void> {
  if (redis.status === 'ready') return;
  let onReady = () => {};
  const ready = new Promise<void>((resolve) => {
    onReady = resolve;
    redis.once('ready', onReady);
  });
  await succeedsWithin(RECONNECT_MS, ready);
  redis.off('ready', onReady);
}
