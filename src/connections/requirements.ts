import type { Redis } from 'ioredis';
import type { RelayConfig } from '../config/config.ts';
import { streamPlace } from '../config/redis-places.ts';
import { NotReadyError, pause } from '../lifecycle.ts';
import { checkInTurn, RequirementError, type RequirementResult } from '../requirement.ts';
import { streamOptionsOf } from '../stream-options.ts';
import type { Logger } from '../telemetry/logger.ts';
import { asking, type Pool } from './database.ts';
import { DATABASE_REQUIREMENTS, databaseFinding } from './database-requirements.ts';
import { OWNER_REQUIREMENTS } from './ownership.ts';
import { type OnRedis, REDIS_REQUIREMENTS, redisFinding } from './redis-requirements.ts';

/** The one list of what the relay needs: `relay check` prints it, `relay start` refuses to start without it. */

/** `streamRedis`: the same as `queueRedis`, unless the streams are on a server of their own. */
type On = Readonly<{ pool: Pool; queueRedis: Redis; streamRedis: Redis }>;

/** Deadline of one question to PostgreSQL. */
const ASK_MS = 10_000;

/** Tries everything that the relay needs, on these connections. Never throws: what cannot be asked has failed. */
export async function checkRequirements(config: RelayConfig, on: On): Promise<RequirementResult[]> {
  const place = streamPlace(config);
  const isOne = place === config;
  const streamOptions = streamOptionsOf(config);
  const queues: OnRedis = {
    ...{ redis: on.queueRedis, place: config, variable: 'RELAY_REDIS_URL', hasQueues: true },
    streamOptions: isOne ? streamOptions : undefined,
  };
  const streams: OnRedis = {
    ...{ redis: on.streamRedis, place, variable: 'RELAY_STREAM_REDIS_URL', hasQueues: false, streamOptions },
  };
  const [database, ofQueues, ofStreams] = await Promise.all([
    checkInTurn(DATABASE_REQUIREMENTS, { pool: asking(on.pool, ASK_MS), config }, databaseFinding),
    checkInTurn(REDIS_REQUIREMENTS, queues, redisFinding),
    isOne ? [] : checkInTurn(REDIS_REQUIREMENTS, streams, redisFinding),
  ]);
  const redis = [...ofQueues, ...ofStreams.map((it) => ({ ...it, subject: `stream ${it.subject}` }))];
  const servers = [...database, ...redis];
  if (servers.some(({ result }) => result === 'failed')) return servers;
  const owner = ({ redis: server, place: ofServer }: OnRedis) =>
    checkInTurn(OWNER_REQUIREMENTS, { pool: on.pool, redis: server, place: ofServer }, redisFinding);
  const owners = await owner(queues);
  const ofStreamServer = isOne ? [] : await owner(streams);
  return [...servers, ...owners, ...ofStreamServer.map((it) => ({ ...it, subject: `stream ${it.subject}` }))];
}

/** Between two tries of what may pass. */
const RETRY_MS = 500;

/**
 * Resolves when nothing that the relay needs is missing; advice goes into the log. Waits for what may pass soon.
 * @throws {RequirementError} when something has to be changed first
 * @throws {NotReadyError} when what may pass soon has not within `timeoutMs`
 */
export async function meetRequirements(
  config: RelayConfig,
  on: On,
  { timeoutMs, stopped, logger }: { timeoutMs: number; stopped: () => boolean; logger: Logger },
): Promise<void> {
  const endsAt = Date.now() + timeoutMs;
  let told = '';
  while (!stopped()) {
    const results = await checkRequirements(config, on);
    const failures = results.filter(({ result }) => result === 'failed');
    const text = failures.map(({ subject, finding }) => `${subject}: ${finding}`).join('; ');
    if (failures.length === 0) {
      for (const { result, subject, finding } of results)
        if (result === 'advice')
          logger.warn({ subject, advice: finding }, 'the relay works, but not as well as it could');
      return;
    }
    if (failures.some(({ mayPass }) => mayPass === false)) throw new RequirementError(text);
    if (Date.now() >= endsAt || failures.some(({ mayPass }) => mayPass === 'later'))
      throw new NotReadyError(text);
    if (text !== told) logger.warn({ failed: text }, 'a requirement is not met; waiting for it');
    told = text;
    await pause(RETRY_MS);
  }
}
