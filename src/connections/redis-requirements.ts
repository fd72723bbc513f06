import type { Redis } from 'ioredis';
import type { RelayConfig } from '../config/config.ts';
import { isCluster } from '../config/redis-places.ts';
import { quoted } from '../config/topics.ts';
import { queueKeyTypes, tryQueue, whatHoldsUp } from '../queue/queue-trial.ts';
import { advice, type Finding, failed, failedFor, ok, type Requirement } from '../requirement.ts';
import type { StreamOptions } from '../streams/append.ts';
import { isNoStream, tryAppend } from '../streams/append-trial.ts';
import { epochKeyTypes } from '../streams/epoch-script.ts';
import { errorText } from '../telemetry/logger.ts';
import { keyTypeProblem } from './key-types.ts';
import { connected, type infoOf, writeProbeKey } from './preflight.ts';

/** What the relay needs of a Redis: that of the queues, and that of the streams where it is another one. */

export type OnRedis = Readonly<{
  redis: Redis;
  /** Its INFO, which it is asked for once. */
  info: () => ReturnType<typeof infoOf>;
  /** The configuration, with the variables of this server; see streamPlace. */
  place: RelayConfig;
  /** The variable that leads to it. */
  variable: 'RELAY_REDIS_URL' | 'RELAY_STREAM_REDIS_URL';
  hasQueues: boolean;
  /** Undefined where the streams are elsewhere. */
  streamOptions: StreamOptions | undefined;
}>;

/** As long as `relay check` waits for any answer. */
const CONNECT_TIMEOUT_MS = 10_000;
/** XADD with MAXLEN ~ and everything else the relay uses; BullMQ recommends it as well. */
const MINIMUM_VERSION = [6, 2] as const;

/** The cause before its consequences: a replica refuses writes, and a node of a cluster keys. */
export const REDIS_REQUIREMENTS: readonly Requirement<OnRedis>[] = [
  { subject: 'Redis', check: isRecent },
  { subject: 'role', check: isMaster },
  { subject: 'cluster', check: isAnnounced },
  { subject: 'AOF', check: keepsData },
  { subject: 'eviction policy', check: evictsNothing },
  { subject: 'writes', check: takesWrites },
  { subject: 'keys', check: ownKeysAreOurs },
  { subject: 'queues', check: addsJobs },
  { subject: 'queue limits', check: takesJobs },
  { subject: 'streams', check: appends },
];

/** A script has no code for it. */
const NO_RIGHT = /\bNOPERM\b|executing the script can't (run|access)/;

/** What to do about what a server answers. */
const REMEDIES: readonly (readonly [answer: RegExp, remedy: string])[] = [
  [NO_RIGHT, 'give the user its rights; "relay grants" prints them'],
  [/\b(NOAUTH|WRONGPASS)\b/, 'see user and password in {variable}'],
  [/DB index|SELECT is not allowed/, 'change the number at the end of {variable}'],
  [/cluster support disabled/, 'it is in no cluster; unset RELAY_REDIS_CLUSTER, and name a single server'],
  [/unknown command/i, 'the relay needs this command; a server that renames or lacks it will not do'],
  [/\bOOM\b/, 'Redis is full; raise maxmemory, or trim streams'],
  [/\bMISCONF\b/, 'Redis cannot save; see its disk and its log'],
  [/\bNOREPLICAS\b/, 'too few replicas follow for its min-replicas-to-write'],
  [/\bREADONLY\b/, 'let {variable} lead to the master'],
];

/** Errors of connections have no name of their own; refusals of the server are ReplyErrors. A script quotes its error. */
const PASSES =
  /max number of clients|Script attempted to access a non local key|\b(OOM|LOADING|READONLY|MASTERDOWN|CLUSTERDOWN|MOVED|ASK|TRYAGAIN|BUSY|NOREPLICAS|MISCONF|UNBLOCKED)\b/;
const REFUSES = /\b(NOPERM|NOAUTH|WRONGPASS)\b|cluster support disabled/;

/** Some answers of Redis end with a full stop. */
const withRemedy = (error: unknown, remedy: string): string =>
  `${errorText(error).replace(/\.$/, '')}: ${remedy}`;

export function redisFinding(error: unknown, variable = 'the URL'): Finding {
  const { name, message } = error as Error;
  const remedy = REMEDIES.find(([answer]) => answer.test(message))?.[1].replace('{variable}', variable);
  const text = remedy === undefined ? errorText(error) : withRemedy(error, remedy);
  const isAnswer = name === 'ReplyError' || REFUSES.test(message);
  return isAnswer && !PASSES.test(message) ? failed(text) : failedFor('soon', text);
}

/** What calls itself something else than Redis, by a field of INFO. */
const OTHERS = ['valkey', 'dragonfly', 'keydb', 'kvrocks', 'garnet', 'upstash', 'memurai', 'rlec'];

async function isRecent({ redis, info: ask, variable }: OnRedis): Promise<Finding> {
  await connected(redis, CONNECT_TIMEOUT_MS).catch((error: Error) => {
    throw error.name === 'ReplyError' ? error : new Error(withRemedy(error, `see ${variable}`));
  });
  const info = await ask();
  if (info('redis_mode') === 'sentinel')
    return failed(
      `this is a sentinel: name it in RELAY_REDIS_SENTINELS, and in ${variable} a user and password alone`,
    );
  const version = info('redis_version') ?? 'unknown';
  const other = OTHERS.find((it) => info(`${it}_version`) !== undefined);
  const found =
    other === undefined ? `version ${version}` : `${other} ${info(`${other}_version`)} (as Redis ${version})`;
  const [major = 0, minor = 0] = version.split('.').map(Number);
  const [leastMajor, leastMinor] = MINIMUM_VERSION;
  if (major < leastMajor || (major === leastMajor && minor < leastMinor))
    return failed(`${found}; at least ${MINIMUM_VERSION.join('.')} is needed`);
  for (const [field, purpose] of [
    ['run_id', 'a restart, after which it may have lost data'],
    ['master_replid', 'a failover, after which it may have lost data'],
  ] as const) {
    if (!/^\w/.test(info(field) ?? '') || Number.isNaN(major))
      return failed(
        `${found}, and its INFO has no ${field}: the relay cannot notice ${purpose}; use a server that tells it`,
      );
  }
  return ok(found);
}

async function isMaster({ info, variable }: OnRedis): Promise<Finding | undefined> {
  const role = (await info())('role');
  if (role === 'master' || role === undefined) return undefined;
  return failedFor(
    'soon',
    role === 'slave'
      ? `this is a replica, which takes no writes: let ${variable} lead to the master`
      : `its role is ${role}, and the relay needs a single master: let ${variable} lead to one`,
  );
}

async function isAnnounced({ info, place, variable }: OnRedis): Promise<Finding | undefined> {
  if ((await info())('cluster_enabled') !== '1' || isCluster(place)) return undefined;
  const how =
    variable === 'RELAY_REDIS_URL'
      ? 'set RELAY_REDIS_CLUSTER=true, or name several nodes in RELAY_REDIS_URL'
      : 'name several of its nodes in RELAY_STREAM_REDIS_URL';
  return failed(`this is a node of a Redis Cluster, which the configuration does not say: ${how}`);
}

async function keepsData({ info }: OnRedis): Promise<Finding> {
  const enabled = (await info())('aof_enabled');
  if (enabled === '1') return ok('on');
  if (enabled === undefined)
    return advice('the server does not tell: a restart without it loses the streams');
  return advice('off: a restart of Redis loses the streams (appendonly yes)');
}

async function evictsNothing({ info }: OnRedis): Promise<Finding> {
  const policy = (await info())('maxmemory_policy');
  if (policy === 'noeviction') return ok('noeviction');
  if (policy === undefined) return advice('the server does not tell: it must never evict a key (noeviction)');
  return failed(`${policy}: Redis may throw away jobs and streams (maxmemory-policy noeviction)`);
}

async function takesWrites({ redis, place }: OnRedis): Promise<Finding | undefined> {
  await writeProbeKey(redis, `${place.queuePrefix}:${place.queueName}:probe`);
  return undefined;
}

async function ownKeysAreOurs({
  redis,
  place,
  hasQueues,
  streamOptions,
}: OnRedis): Promise<Finding | undefined> {
  const types = {
    ...(hasQueues && queueKeyTypes(place)),
    ...(streamOptions && epochKeyTypes(streamOptions.epochKey)),
  };
  const problem = await keyTypeProblem(redis, types);
  return problem === undefined ? undefined : failed(problem);
}

async function addsJobs({ redis, place, hasQueues }: OnRedis): Promise<Finding | undefined> {
  if (!hasQueues) return undefined;
  await tryQueue(redis, place);
  return ok('BullMQ can add jobs and schedules (tried in a queue of its own)');
}

async function takesJobs({ redis, place, hasQueues }: OnRedis): Promise<Finding | undefined> {
  const held = hasQueues ? await whatHoldsUp(redis, place) : [];
  return held.length > 0 ? advice(held.join('; ')) : undefined;
}

async function appends({ redis, place, hasQueues, streamOptions }: OnRedis): Promise<Finding | undefined> {
  if (streamOptions === undefined) return undefined;
  for (const [variable, stream] of [
    ['RELAY_STREAM_NAME', place.streamName],
    ['RELAY_DLQ_STREAM_NAME', place.dlqStreamName],
  ] as const) {
    if (await isNoStream(redis, stream))
      return failed(
        `the key ${quoted(stream)} holds something else than a stream: change ${variable}, or remove the key`,
      );
  }
  await tryAppend(redis, streamOptions, !hasQueues);
  return ok('the scripts append (tried in streams of their own)');
}
