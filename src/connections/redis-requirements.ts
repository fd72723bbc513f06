import type { Redis } from 'ioredis';
import type { RelayConfig } from '../config/config.ts';
import { errorText } from '../telemetry/logger.ts';
import { advice, type Finding, failed, failedFor, ok, type Requirement } from '../verdict.ts';
import { connected, inspectRedis } from './preflight.ts';

/** What the relay needs of a Redis: that of the queues, and that of the streams where it is another one. */

/** `place`: the configuration, with the variables of this server; see streamPlace. */
export type OnRedis = Readonly<{ redis: Redis; place: RelayConfig }>;

/** As long as `relay check` waits for any answer. */
const CONNECT_TIMEOUT_MS = 10_000;
/** XADD with MAXLEN ~ and everything else the relay uses; BullMQ recommends it as well. */
const MINIMUM_VERSION = [6, 2] as const;

export const REDIS_REQUIREMENTS: readonly Requirement<OnRedis>[] = [
  { subject: 'Redis', check: isRecent },
  { subject: 'AOF', check: keepsData },
  { subject: 'eviction policy', check: evictsNothing },
];

/** Errors of connections have no name of their own; refusals of the server are ReplyErrors. */
const PASSES = /^(OOM|LOADING|READONLY|MASTERDOWN|CLUSTERDOWN|TRYAGAIN|BUSY|NOREPLICAS|MISCONF)\b/;

export function redisFinding(error: unknown): Finding {
  const { name, message } = error as Error;
  return name === 'ReplyError' && !PASSES.test(message)
    ? failed(errorText(error))
    : failedFor('soon', errorText(error));
}

async function isRecent({ redis }: OnRedis): Promise<Finding> {
  await connected(redis, CONNECT_TIMEOUT_MS);
  const { version } = await inspectRedis(redis);
  const [major = 0, minor = 0] = version.split('.').map(Number);
  const [leastMajor, leastMinor] = MINIMUM_VERSION;
  const isOld = major < leastMajor || (major === leastMajor && minor < leastMinor);
  return isOld
    ? failed(`version ${version}; at least ${MINIMUM_VERSION.join('.')} is needed`)
    : ok(`version ${version}`);
}

async function keepsData({ redis }: OnRedis): Promise<Finding> {
  const { aofEnabled } = await inspectRedis(redis);
  return aofEnabled ? ok('on') : advice('off: a restart of Redis loses the streams (appendonly yes)');
}

async function evictsNothing({ redis }: OnRedis): Promise<Finding> {
  const { maxmemoryPolicy } = await inspectRedis(redis);
  if (maxmemoryPolicy === 'noeviction') return ok('noeviction');
  return failed(`${maxmemoryPolicy}: Redis may throw away jobs and streams (maxmemory-policy noeviction)`);
}
