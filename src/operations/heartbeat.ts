import { randomUUID } from 'node:crypto';
import { hostname } from 'node:os';
import type { Redis } from 'ioredis';
import { script } from '../connections/redis-script.ts';
import { loop, pause } from '../lifecycle.ts';
import type { Logger } from '../telemetry/logger.ts';

/** What a pod reports in its heartbeat. */
export type PodFacts = Readonly<{
  /** Host name and process id. */
  pod: string;
  version: string;
  /**
   * Pods with the same number may run at the same time. Builds before 2 do not have it. They have no gate: they append an
   * event without asking for its predecessor.
   */
  protocol?: number;
  phase: 'starting' | 'running' | 'stopping';
  upSeconds: number;
  /** Publish jobs in progress, at most `concurrency`. */
  inProgress: number;
  concurrency: number;
  /** Seconds since it last ran a tick of the claim schedule; null if it never has. */
  tickSecondsAgo: number | null;
}>;

/** A pod, and the age of its last heartbeat. */
export type PodSeen = PodFacts & Readonly<{ heardSecondsAgo: number }>;

export type Fleet = Readonly<{
  pods: PodSeen[];
  /** Streams that the fleet has appended to, the latest first. */
  streams: string[];
  /** Clock of Redis, Unix time in ms. */
  redisTime: number;
}>;

/** A build whose pods must not run beside those of the build before raises it. */
export const PROTOCOL = 3;

const INTERVAL_MS = 5_000;
/** A pod that has missed two heartbeats is probably gone. */
export const SILENT_AFTER_SECONDS = 15;
/** A killed pod is shown for this time. */
const FORGOTTEN_AFTER_MS = 600_000;
/** Most streams that are remembered; the latest are kept. */
const STREAMS_KEPT = 50;
/** Lifetime of both keys without a heartbeat of any pod. */
const KEPT_MS = 7 * 86_400_000;

/** The time of Redis, from INFO: TIME may not be permitted. Without it, the time of the pod. */
const NOW = `
local usec = string.match(redis.call('INFO', 'server'), 'server_time_usec:(%d+)')
local now = usec and math.floor(tonumber(usec) / 1000) or tonumber(ARGV[1])`;

/**
 * KEYS: pods, streams. ARGV: time of the pod (ms), its field, its facts, ms after which a pod is forgotten, streams
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

/** KEYS: pods, streams. ARGV: time of the pod (ms). Returns the time, the streams, and the pods' values. */
const LISTEN = `${NOW}
return {string.format('%.0f', now), redis.call('ZREVRANGE', KEYS[2], 0, -1), redis.call('HVALS', KEYS[1])}`;

/** @param prefix of the keys: `<RELAY_QUEUE_PREFIX>:<RELAY_QUEUE_NAME>` */
const keysOf = (prefix: string) => [`${prefix}:pods`, `${prefix}:streams`] as const;

/** Reads pods and streams from the heartbeats. */
export function createFleetReader(redis: Redis, prefix: string): () => Promise<Fleet> {
  const listen = script<[string, string[], string[]]>(redis, 'listenForPods', LISTEN, 2);
  return async () => {
    const [now, streams, values] = await listen(...keysOf(prefix), Date.now());
    const pods = values.map((value): PodSeen => {
      const space = value.indexOf(' ');
      const heardSecondsAgo = Math.max(0, (Number(now) - Number(value.slice(0, space))) / 1_000);
      return { ...(JSON.parse(value.slice(space + 1)) as PodFacts), heardSecondsAgo };
    });
    return { pods: pods.toSorted((a, b) => (a.pod < b.pod ? -1 : 1)), streams, redisTime: Number(now) };
  };
}

/** Interval at which pods of another protocol are looked for. */
const OTHERS_RETRY_MS = 500;

/**
 * Waits until no pod of another protocol sends heartbeats.
 * @param onWaiting called with the reason at each try, and with undefined at the end
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
      deps.onWaiting(`pods of another build are at work, and this one must not run beside them: ${names}`);
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

/**
 * Tells Redis every 5 s that this pod runs, and which streams it appends to. CLIENT LIST would also show the pods, but it is
 * in the ACL category @dangerous, which the relay's user does not have.
 */
export function createHeartbeat(deps: { redis: Redis; prefix: string; logger: Logger }) {
  const { redis, logger } = deps;
  const tell = script<null>(redis, 'beat', BEAT, 2);
  const keys = keysOf(deps.prefix);
  // An embedding process may run several relays.
  const pod = `${hostname()}/${process.pid}${instances++ === 0 ? '' : `/${instances}`}`;
  // Containers may share a host name, and each calls its process 1: then they have one name, and yet are two pods.
  const field = `${pod} ${randomUUID()}`;
  const streams = new Set<string>();
  let facts: (() => Omit<PodFacts, 'pod' | 'protocol'>) | undefined;
  let stopped = true;
  let news: Promise<void> = Promise.resolve();

  async function beat(): Promise<void> {
    const beaten = [...streams];
    streams.clear();
    const told = JSON.stringify({ pod, protocol: PROTOCOL, ...facts?.() });
    try {
      await tell(...keys, Date.now(), field, told, FORGOTTEN_AFTER_MS, STREAMS_KEPT, KEPT_MS, ...beaten);
    } catch (error) {
      // Redis is away. Its connection logs that.
      for (const stream of beaten) remember(stream);
      logger.debug({ err: error }, 'no heartbeat');
    }
  }

  function remember(stream: string): void {
    if (streams.size < STREAMS_KEPT) streams.add(stream);
  }

  const beats = loop(beat, INTERVAL_MS);

  return {
    start(whatToTell: () => Omit<PodFacts, 'pod' | 'protocol'>): void {
      if (!stopped) return;
      stopped = false;
      facts = whatToTell;
      beats.start();
    },
    async stop(): Promise<void> {
      if (stopped) return;
      stopped = true;
      await Promise.all([beats.stop(), news]);
      // A pod that ends in order is not shown as silent.
      await redis.hdel(keys[0], field).catch(() => {});
    },
    /** Sends a heartbeat now, for news. */
    beat(): void {
      if (!stopped) news = Promise.all([news, beat()]).then(() => {});
    },
    /** Reports the stream with the next heartbeat. */
    appendedTo: remember,
  };
}

let instances = 0;
