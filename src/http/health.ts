import { withDeadline } from '../lifecycle.ts';
import { errorText } from '../telemetry/logger.ts';

/** The checks behind the health endpoints. Each call asks the servers anew. */

export type Check = Readonly<{ status: 'healthy' | 'degraded' | 'unhealthy'; [detail: string]: unknown }>;

/** Of the server, and whatever else is known of it. */
type RedisFacts = Record<string, unknown> & { aofEnabled: boolean; maxmemoryPolicy: string };

export type Probes = Readonly<{
  /** What has to be changed before the relay can work; empty when nothing has to be. */
  unmet?: () => string;
  database: () => Promise<Record<string, unknown>>;
  redis: () => Promise<RedisFacts>;
  /** Redis of the streams, if it is another server. */
  streamRedis?: () => Promise<RedisFacts>;
  backlog: () => Promise<Record<string, unknown> & { oldestSeconds: { waiting: number | null } }>;
}>;

const PROBE_TIMEOUT_MS = 3_000;
/** The backlog is degraded when a publishable event has waited for longer than this. */
const WAITING_TOO_LONG_SECONDS = 60;

export function createHealth(probes: Probes) {
  async function check<T>(probe: () => Promise<T>, judge: (found: T) => Check): Promise<Check> {
    const startedAt = performance.now();
    try {
      const found = judge(await withDeadline(PROBE_TIMEOUT_MS, probe()));
      return { ...found, latency_ms: Math.round(performance.now() - startedAt) };
    } catch (error) {
      return { status: 'unhealthy', error: errorText(error) };
    }
  }

  const database = () => check(probes.database, (details) => ({ status: 'healthy', ...details }));
  const redis = (probe = probes.redis) =>
    check(probe, ({ aofEnabled, maxmemoryPolicy, ...details }) => ({
      status: aofEnabled ? 'healthy' : 'degraded',
      aof_enabled: aofEnabled,
      maxmemory_policy: maxmemoryPolicy,
      ...details,
      ...(!aofEnabled && { warning: 'AOF is off: a restart of Redis loses the streams' }),
    }));
  const backlog = () =>
    check(probes.backlog, ({ oldestSeconds: { waiting }, ...counts }) => ({
      status: (waiting ?? 0) > WAITING_TOO_LONG_SECONDS ? 'degraded' : 'healthy',
      ...counts,
      oldest_waiting_seconds: waiting,
    }));

  async function ready(): Promise<Record<string, Check>> {
    const { streamRedis } = probes;
    const unmet = probes.unmet?.();
    const [db, cache, streams] = await Promise.all([
      database(),
      redis(),
      streamRedis === undefined ? undefined : redis(streamRedis),
    ]);
    return {
      ...{ database: db, redis: cache, ...(streams && { stream_redis: streams }) },
      ...(unmet && { requirements: { status: 'unhealthy', error: unmet } }),
    };
  }

  return {
    ready,
    async detailed(): Promise<Record<string, Check>> {
      const [servers, waiting] = await Promise.all([ready(), backlog()]);
      return { ...servers, backlog: waiting };
    },
  };
}

/** The worst status of all checks. */
export function overall(checks: Record<string, Check>): Check['status'] {
  const found = Object.values(checks).map((check) => check.status);
  return found.includes('unhealthy') ? 'unhealthy' : found.includes('degraded') ? 'degraded' : 'healthy';
}
