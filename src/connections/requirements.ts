import type { Redis } from 'ioredis';
import type { RelayConfig } from '../config/config.ts';
import { streamPlace } from '../config/redis-places.ts';
import { loop, NotReadyError, pause } from '../lifecycle.ts';
import { checkInTurn, RequirementError, type RequirementResult } from '../requirement.ts';
import { streamOptionsOf } from '../stream-options.ts';
import type { Logger } from '../telemetry/logger.ts';
import { asking, type Pool } from './database.ts';
import {
  adviceFinding,
  DATABASE_ADVICE,
  DATABASE_AT_START,
  DATABASE_REQUIREMENTS,
  databaseFinding,
  type OnDatabase,
} from './database-requirements.ts';
import { isOurs } from './ownership.ts';
import { infoOf } from './preflight.ts';
import { type OnRedis, REDIS_REQUIREMENTS, redisFinding } from './redis-requirements.ts';

/** The one list of what the relay needs: `relay check` prints it, `relay start` refuses to start without it. */

/** `streamRedis`: the same as `queueRedis`, unless the streams are on a server of their own. */
type On = Readonly<{ pool: Pool; queueRedis: Redis; streamRedis: Redis }>;

/** While pods claim, no row waits for this long: a claim that is tried on such a row is in no other claim's way. */
const STANDS_STILL_MS = 10_000;

/** Deadline of one question to PostgreSQL. */
const ASK_MS = 10_000;

/** Who asks: an operator; a pod before it starts, which leaves advice for later; a pod at work, which reads no table. */
type Asker = 'operator' | 'start' | 'work';

const onDatabase = (config: RelayConfig, pool: Pool, asker: Asker): OnDatabase => ({
  ...{ pool: asking(pool, ASK_MS), config, waitedMs: asker === 'work' ? STANDS_STILL_MS : 0 },
});

async function checkDatabase(config: RelayConfig, pool: Pool, asker: Asker): Promise<RequirementResult[]> {
  const on = onDatabase(config, pool, asker);
  const needs = [...DATABASE_REQUIREMENTS, ...(asker === 'work' ? [] : DATABASE_AT_START)];
  const results = await checkInTurn(needs, on, databaseFinding);
  if (asker !== 'operator' || failuresAmong(results).length > 0) return results;
  return [...results, ...(await checkInTurn(DATABASE_ADVICE, on, adviceFinding))];
}

type Server = Omit<OnRedis, 'info'>;

function askedOnce(redis: Redis): OnRedis['info'] {
  let info: ReturnType<OnRedis['info']> | undefined;
  return () => {
    info ??= infoOf(redis);
    return info;
  };
}

/** Tries everything that the relay needs, on these connections. Never throws: what cannot be asked has failed. */
export async function checkRequirements(
  config: RelayConfig,
  on: On,
  asker: Asker = 'operator',
): Promise<RequirementResult[]> {
  const place = streamPlace(config);
  const isOne = place === config;
  const streamOptions = streamOptionsOf(config);
  const queues: Server = {
    ...{ redis: on.queueRedis, place: config, variable: 'RELAY_REDIS_URL', hasQueues: true },
    streamOptions: isOne ? streamOptions : undefined,
  };
  const streams: Server = {
    ...{ redis: on.streamRedis, place, variable: 'RELAY_STREAM_REDIS_URL', hasQueues: false, streamOptions },
  };
  const checkRedis = (server: Server) =>
    checkInTurn(REDIS_REQUIREMENTS, { ...server, info: askedOnce(server.redis) }, (error) =>
      redisFinding(error, server.variable),
    );
  const [database, ofQueues, ofStreams] = await Promise.all([
    checkDatabase(config, on.pool, asker),
    checkRedis(queues),
    isOne ? [] : checkRedis(streams),
  ]);
  const redis = [...ofQueues, ...ofStreams.map((it) => ({ ...it, subject: `stream ${it.subject}` }))];
  const servers = [...database, ...redis];
  if (servers.some(({ result }) => result === 'failed')) return servers;
  const owner = async (server: Server, subject: string) => ({
    ...(await isOurs(on.pool, server.redis, server.place).catch((error) => redisFinding(error))),
    subject,
  });
  const owners = [await owner(queues, 'owner'), ...(isOne ? [] : [await owner(streams, 'stream owner')])];
  return [...servers, ...owners];
}

const failuresAmong = (results: readonly RequirementResult[]) =>
  results.filter(({ result }) => result === 'failed');
const listed = (results: readonly RequirementResult[]): string =>
  results.map(({ subject, finding }) => `${subject}: ${finding}`).join('; ');

function logAdvice(results: readonly RequirementResult[], logger: Logger): void {
  for (const { result, subject, finding } of results)
    if (result !== 'ok')
      logger.warn({ subject, advice: finding }, 'the relay works, but not as well as it could');
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
    const results = await checkRequirements(config, on, 'start');
    const failures = failuresAmong(results);
    const text = listed(failures);
    if (failures.length === 0) {
      logAdvice(results, logger);
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

/** Between two tries while the relay runs: 15 s, and 3 s while something is missing. */
const ROUND_MS = 3_000;
const ROUNDS = 5;

/**
 * Gives the advice that the start did not wait for, then tries again, while the relay runs, what it needs: rights, row level
 * security, triggers and settings may change, and some changes give no error, only an empty backlog.
 */
export function watchRequirements(config: RelayConfig, on: On, logger: Logger) {
  /** What has to be changed before the relay can work; empty when nothing has to be. */
  let unmet = '';
  let sinceLast = 0;
  let unasked = DATABASE_ADVICE;
  let isStopped = false;

  /** What PostgreSQL gives no answer to now is asked again in the next round, last: it hides no other advice. */
  async function advise(): Promise<void> {
    const results = await checkInTurn(unasked, onDatabase(config, on.pool, 'work'), adviceFinding);
    if (isStopped) return;
    const [unanswered] = failuresAmong(results);
    logAdvice(
      results.filter((it) => it !== unanswered),
      logger,
    );
    const at = unasked.findIndex(({ subject }) => subject === unanswered?.subject);
    unasked = at < 0 ? [] : [...unasked.slice(at + 1), ...unasked.slice(at, at + 1)];
  }

  const rounds = loop(async () => {
    if (unasked.length > 0) await advise();
    // `start` has just tried all of it. What is missing is tried more often: it may be there again.
    if (unmet === '' && sinceLast++ % ROUNDS !== ROUNDS - 1) return;
    const results = await checkRequirements(config, on, 'work');
    const failures = failuresAmong(results);
    const lasting = failures.filter(({ mayPass }) => mayPass !== 'soon');
    // While a server is away, nobody knows. The health checks tell that it is.
    if (isStopped || (lasting.length === 0 && failures.length > 0)) return;
    const text = listed(lasting);
    if (text !== '' && text !== unmet)
      logger.error({ failed: text }, 'the relay cannot work any more: something that it needs was changed');
    if (text === '' && unmet !== '') logger.info({}, 'the relay has everything that it needs again');
    unmet = text;
  }, ROUND_MS);

  return {
    start: rounds.start,
    /** Does not wait for a trial in progress: it changes nothing, and its servers may be away. */
    stop(): void {
      isStopped = true;
      void rounds.stop();
    },
    unmet: (): string => unmet,
  };
}
