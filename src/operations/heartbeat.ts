import { hostname } from 'node:os';
import type { Redis, Result } from 'ioredis';
import { pause } from '../lifecycle.ts';
import type { Logger } from '../telemetry/logger.ts';

/** What a pod tells of itself. */
export type PodFacts = Readonly<{
  /** Host name and process id. */
  pod: string;
  version: string;
  /**
   * Pods of one number may work at the same time. Absent from builds before 2, which know no gate: they append without
   * asking for what comes before.
   */
  protocol?: number;
  phase: 'starting' | 'running' | 'stopping';
  upSeconds: number;
  /** Publish jobs that it works on, of at most `concurrency`. */
  inProgress: number;
  concurrency: number;
  /** Since it last ran a tick of the claim schedule; null when it never has. */
  tickSecondsAgo: number | null;
}>;

/** A pod, and how long ago it was heard of. */
export type PodSeen = PodFacts & Readonly<{ heardSecondsAgo: number }>;

export type Fleet = Readonly<{
  pods: PodSeen[];
  /** Streams that were lately appended to, the latest first. */
  streams: string[];
  /** Clock of Redis, ms since the epoch. */
  redisTime: number;
}>;

/** Raised by a build whose pods must not work beside those of the build before. */
export const PROTOCOL = 3;

const INTERVAL_MS = 5_000;
/** A pod that has missed two beats is likely to be gone. */
export const SILENT_AFTER_SECONDS = 15;
/** How long a pod that was killed is shown. */
const FORGOTTEN_AFTER_MS = 600_000;
/** Streams remembered, those appended to last; all are forgotten when there was no pod for this time. */
const STREAMS_KEPT = 50;
const KEPT_MS = 7 * 86_400_000;

/** By the clock of Redis, which a script may ask for by INFO where TIME is not permitted; else by that of the pod. */
const NOW = `
local usec = string.match(redis.call('INFO', 'server'), 'server_time_usec:(%d+)')
local now = usec and math.floor(tonumber(usec) / 1000) or tonumber(ARGV[1])`;

/**
 * KEYS: pods, streams. ARGV: time of the pod (ms), name of the pod, its facts, ms after which a pod is forgotten, streams
 * kept, lifetime of both keys (ms), then the streams that it has appended to.
 */
const BEAT = `${NOW}
redis.call('HSET', KEYS[1], ARGV[2], string.format('%.0f', now) .. ' ' .. ARGV[3])
local pods = redis.call('HGETALL', KEYS[1])
for i = 1, #pods, 2 do
  if now - (tonumber(string.match(pods[i + 1], '^%d+')) or 0) > tonumber(ARGV[4]) then redis.call('HDEL', KEYS[1], pods[i]) end
end
for i = 7, #ARGV do redis.call('ZADD', KEYS[2], now, ARGV[i]) end
redis.call('ZREMRANGEBYRANK', KEYS[2], 0, -1 - tonumber(ARGV[5]))
redis.call('PEXPIRE', KEYS[1], ARGV[6])
redis.call('PEXPIRE', KEYS[2], ARGV[6])`;

/** KEYS: pods, streams. ARGV: time of the pod that asks (ms). Answers the time, the streams, the values of the pods. */
const LISTEN = `${NOW}
return {string.format('%.0f', now), redis.call('ZREVRANGE', KEYS[2], 0, -1), redis.call('HVALS', KEYS[1])}`;

declare module 'ioredis' {
  interface RedisCommander<Context> {
    beat(podsKey: string, streamsKey: string, ...args: (string | number)[]): Result<null, Context>;
    listenForPods(
      podsKey: string,
      streamsKey: string,
      now: number,
    ): Result<[string, string[], string[]], Context>;
  }
}

/** @param prefix of the keys: `<RELAY_QUEUE_PREFIX>:<RELAY_QUEUE_NAME>` */
const keysOf = (prefix: string) => [`${prefix}:pods`, `${prefix}:streams`] as const;

/** Which pods there are, and what they publish to; as they have said in their heartbeats. */
export function createFleetReader(redis: Redis, prefix: string): () => Promise<Fleet> {
  redis.defineCommand('listenForPods', { numberOfKeys: 2, lua: LISTEN });
  return async () => {
    const [now, streams, values] = await redis.listenForPods(...keysOf(prefix), Date.now());
    const pods = values.map((value): PodSeen => {
      const space = value.indexOf(' ');
      const heardSecondsAgo = Math.max(0, (Number(now) - Number(value.slice(0, space))) / 1_000);
      return { ...(JSON.parse(value.slice(space + 1)) as PodFacts), heardSecondsAgo };
    });
    return { pods: pods.toSorted((a, b) => (a.pod < b.pod ? -1 : 1)), streams, redisTime: Number(now) };
  };
}

/** Between two reads of pods of another protocol. */
const OTHERS_RETRY_MS = 500;

/**
 * Waits until no pod of another protocol is heard of any more.
 * @param onWaiting told why, each time; undefined when there is none
 */
export async function waitForOtherProtocols(deps: {
  fleet: () => Promise<Fleet>;
  onWaiting: (reason: string | undefined) => void;
  stopped: () => boolean;
  logger: Logger;
}): Promise<void> {
  let isReported = false;
  while (!deps.stopped()) {
    try {
      const { pods } = await deps.fleet();
      const others = pods.filter(
        (it) => it.protocol !== PROTOCOL && it.heardSecondsAgo < SILENT_AFTER_SECONDS,
      );
      if (others.length === 0) break;
      const names = others.map((it) => `${it.pod} (version ${it.version})`).join(', ');
      deps.onWaiting(`pods of another build are at work, beside which this one must not be: ${names}`);
      if (!isReported)
        deps.logger.warn(
          { pods: others.map((it) => it.pod) },
          'pods of another build are at work; this one waits until they have ended: stop the old ones first',
        );
      isReported = true;
    } catch (error) {
      deps.logger.debug({ err: error }, 'cannot read the heartbeats of other pods');
    }
    await pause(OTHERS_RETRY_MS);
  }
  deps.onWaiting(undefined);
}

export type Heartbeat = Readonly<{
  start(facts: () => Omit<PodFacts, 'pod' | 'protocol'>): void;
  stop(): Promise<void>;
  /** Tells it now as well; for news. */
  beat(): void;
  /** Remembers a stream, for the next beat. */
  appendedTo(stream: string): void;
}>;

/**
 * Tells Redis every 5 s that this pod is there: who may not ask for the list of connections (CLIENT LIST is a
 * dangerous command) still knows the pods, and which streams there are.
 */
export function createHeartbeat(deps: { redis: Redis; prefix: string; logger: Logger }): Heartbeat {
  const { redis, logger } = deps;
  redis.defineCommand('beat', { numberOfKeys: 2, lua: BEAT });
  const keys = keysOf(deps.prefix);
  // An embedding process may run several relays.
  const pod = `${hostname()}/${process.pid}${instances++ === 0 ? '' : `/${instances}`}`;
  const streams = new Set<string>();
  let facts: (() => Omit<PodFacts, 'pod' | 'protocol'>) | undefined;
  let stopped = true;
  let timer: NodeJS.Timeout | undefined;
  let beating: Promise<void> = Promise.resolve();

  async function beat(): Promise<void> {
    const beaten = [...streams];
    streams.clear();
    const told = JSON.stringify({ pod, protocol: PROTOCOL, ...facts?.() });
    try {
      await redis.beat(...keys, Date.now(), pod, told, FORGOTTEN_AFTER_MS, STREAMS_KEPT, KEPT_MS, ...beaten);
    } catch (error) {
      // Redis is away, of which others tell.
      for (const stream of beaten) remember(stream);
      logger.debug({ err: error }, 'no heartbeat');
    }
  }

  function remember(stream: string): void {
    if (streams.size < STREAMS_KEPT) streams.add(stream);
  }

  function beatAgain(): void {
    beating = beat().then(() => {
      if (!stopped) timer = setTimeout(beatAgain, INTERVAL_MS);
    });
  }

  return {
    start(whatToTell) {
      if (!stopped) return;
      stopped = false;
      facts = whatToTell;
      beatAgain();
    },
    async stop() {
      if (stopped) return;
      stopped = true;
      clearTimeout(timer);
      await beating;
      // Gone in peace; one that was killed is missed for a while.
      await redis.hdel(keys[0], pod).catch(() => {});
    },
    beat() {
      if (!stopped) beating = Promise.all([beating, beat()]).then(() => {});
    },
    appendedTo: remember,
  };
}

let instances = 0;
