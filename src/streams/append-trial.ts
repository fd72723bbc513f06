import { randomUUID } from 'node:crypto';
import type { Redis } from 'ioredis';
import { script } from '../connections/redis-script.ts';
import type { AppendOutcome, OutboxEvent } from '../event.ts';
import { createStreams, type PublishedAfterAll, type StreamOptions } from './append.ts';
import { identityOf, keysOf, STAMP } from './epoch-script.ts';

/** Long enough for the trial. A process that dies in the middle leaves nothing that lives longer. */
const TTL_MS = 60_000;

/**
 * Appends an event, and a dead letter, to streams beside the real ones by the real scripts, in the slot of the real keys
 * and with the rights on them, and removes them.
 *
 * @param hasTwoServers whether the jobs are on another server
 * @throws what Redis has against it
 */
export async function tryAppend(redis: Redis, real: StreamOptions, hasTwoServers: boolean): Promise<void> {
  const eventId = randomUUID();
  const prefix = `${real.memoryPrefix}:trial:${eventId}`;
  const [stream, dlqStreamName, epochKey] = [`${prefix}:stream`, `${prefix}:dlq`, `${prefix}:epoch`];
  const jobKey = (id: string) => `${prefix}:job:${id}`;
  const job = jobKey(eventId);
  const options: StreamOptions = {
    ...{ dlqStreamName, streamMaxLen: 10, dlqMaxLen: 10, epochKey, memoryPrefix: prefix },
    jobKey,
    topicProblem: () => null,
  };
  const madeAt = Date.now();
  const event: OutboxEvent = {
    ...{ id: '1', eventId, eventType: 'Trial', aggregateType: 'trial', aggregateId: eventId, topic: stream },
    ...{ payload: '{}', occurredAt: new Date(madeAt).toISOString(), tenantId: null, correlationId: null },
    ...{ attempts: 0, after: null },
  };
  const { lastEntries, checkpoint, appended } = keysOf(epochKey);
  const keys = [stream, dlqStreamName, epochKey, lastEntries, checkpoint, appended, job];
  keys.push(`${prefix}:entry:${eventId}`, `${prefix}:dead:${eventId}:${madeAt}`);
  try {
    const epoch = await tryEpoch(redis, epochKey);
    await redis.hset(job, 'timestamp', madeAt);
    await redis.pexpire(job, TTL_MS);
    const streams = createStreams({
      redis,
      epoch: { current: () => epoch, known: async () => epoch, invalidate() {}, endFor() {} },
      options,
      jobFacts: hasTwoServers ? async (ids) => ids.map(() => [String(madeAt), false, 0]) : undefined,
    });
    const outcome = await streams.publish(event, { epoch, gate: 'open', madeAt });
    if (outcome.status !== 'appended') throw refused(outcome);
    const failure = { event, attempts: 1, reason: 'trial', failedAt: new Date(madeAt) };
    const letter = await streams.deadLetter(failure, null);
    if (letter.status !== 'appended') throw refused(letter);
    // What only a comparison of table and streams takes.
    const asked = redis
      .pipeline()
      .xrange(stream, '-', '+')
      .xrevrange(stream, '+', '-')
      .xinfo('STREAM', stream);
    for (const [error] of (await asked.exec()) ?? []) if (error) throw error;
  } finally {
    await redis.del(...keys);
  }
}

/**
 * Begins an epoch and stamps it, as pods do all the time. The caller deletes the keys.
 * @returns its name
 * @throws what Redis has against it
 */
async function tryEpoch(redis: Redis, key: string): Promise<string> {
  const server = await identityOf(redis);
  if (server === null) throw new Error('this Redis is a replica: it takes no appends');
  const epoch = `${server}:trial`;
  await redis.set(key, epoch, 'PX', TTL_MS);
  const stampEpoch = script<[number, string]>(redis, 'stampEpoch', STAMP, 3);
  const { checkpoint, lastEntries } = keysOf(key);
  const [lasts] = await stampEpoch(key, checkpoint, lastEntries, epoch, '', '0', 0);
  if (lasts !== 1)
    throw new Error('Redis is another server each time that it is asked (a proxy in front of several?)');
  return epoch;
}

/** A refusal is the server's answer. Any other outcome passes: its keys vanished in the middle of the trial. */
function refused(outcome: AppendOutcome | PublishedAfterAll): Error {
  const reason = 'reason' in outcome ? outcome.reason : `the append script answers "${outcome.status}"`;
  return Object.assign(new Error(reason), outcome.status === 'refused' && { name: 'ReplyError' });
}

/**
 * Whether this key holds something else than a stream: what is asked of it changes nothing, since no entry has this id.
 * @throws when Redis refuses for another reason, e.g. for want of rights
 */
export async function isNoStream(redis: Redis, stream: string): Promise<boolean> {
  try {
    await redis.xdel(stream, '0-1');
    return false;
  } catch (error) {
    if (/^WRONGTYPE\b/.test((error as Error).message)) return true;
    throw error;
  }
}
