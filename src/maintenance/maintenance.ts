import type { RelayConfig } from '../config/config.ts';
import type { Pool } from '../connections/database.ts';
import { levelOf } from '../connections/outage.ts';
import type { Servers } from '../connections/servers.ts';
import { createTask, type Task } from '../lifecycle.ts';
import { createPruner, type KeptRow } from '../outbox/pruner.ts';
import { createPublished } from '../outbox/published.ts';
import type { Schedule } from '../queue/scheduler.ts';
import { streamOptionsOf } from '../stream-options.ts';
import { isComparing } from '../streams/epoch.ts';
import { createTrimmer } from '../streams/trim.ts';
import type { Logger } from '../telemetry/logger.ts';
import { createRetention } from './retention.ts';

/**
 * Tasks that no event waits for: deleting old rows and trimming streams. Each has a schedule of its own in the claim queue.
 * Its job reaches one pod and only starts the task there, so that no claim waits for it. If the pod dies, the next job
 * reaches another one.
 */

const PRUNE = 'prune';
const TRIM = 'trim';
const PRUNE_EVERY_MS = 60_000;
const TRIM_EVERY_MS = 5_000;
/** Rows that the database refused to delete are counted; this many are logged with the reason. */
const KEPT_SHOWN = 5;

/** The key of the list of streams to trim. (`…:streams` belongs to the heartbeat.) */
const streamListKey = (config: RelayConfig) => `${config.queuePrefix}:${config.queueName}:trimmed`;

export const createRetentionOf = (
  config: RelayConfig,
  pool: Pool,
  redis: Servers['streamRedis'],
  statementTimeoutMs: number,
  onKept: (rows: readonly KeptRow[]) => void,
) =>
  createRetention({
    step: createPruner(pool, { statementTimeoutMs }).step,
    ago: createPublished(pool, { ...config, statementTimeoutMs }).ago,
    onKept,
    comparing: () => isComparing(redis, streamOptionsOf(config).epochKey),
    resyncWindowMs: config.resyncWindowMs,
  });

/** The schedules of this configuration, and the names of those that an earlier configuration may have left behind. */
export function schedulesOf(config: RelayConfig): { schedules: Schedule[]; retired: string[] } {
  const schedules = [
    ...(config.streamTrim === 'acknowledged'
      ? [{ name: TRIM, everyMs: Math.min(TRIM_EVERY_MS, config.pollIntervalMs) }]
      : []),
    ...(config.publishedRetentionMs > 0 ? [{ name: PRUNE, everyMs: PRUNE_EVERY_MS }] : []),
  ];
  const retired = [PRUNE, TRIM].filter((name) => !schedules.some((it) => it.name === name));
  return { schedules, retired };
}

export function createMaintenance(deps: {
  config: RelayConfig;
  servers: Servers;
  statementTimeoutMs: number;
  epoch: () => string | undefined;
  logger: Logger;
}) {
  const { config, servers, logger } = deps;
  const tasks = new Map<string, Task>();
  /** A pod leaves to the others what its own configuration has no schedule for. */
  const scheduled = new Set(schedulesOf(config).schedules.map(({ name }) => name));

  const trimmer = createTrimmer(servers.appendRedis, {
    streamMaxLen: config.streamMaxLen,
    epochKey: streamOptionsOf(config).epochKey,
    listKey: streamListKey(config),
    epoch: deps.epoch,
    logger,
  });
  add(TRIM, async (goesOn) => {
    const trimmed = await trimmer.run(goesOn);
    if (trimmed > 0) logger.debug({ entries: trimmed }, 'trimmed what every consumer group has acknowledged');
  });

  let kept = { rows: 0, examples: [] as KeptRow[] };
  const { pool, streamRedis } = servers;
  const retention = createRetentionOf(config, pool, streamRedis, deps.statementTimeoutMs, (rows) => {
    kept = { rows: kept.rows + rows.length, examples: [...kept.examples, ...rows].slice(0, KEPT_SHOWN) };
  });
  add(PRUNE, async (goesOn) => {
    kept = { rows: 0, examples: [] };
    const rows = await retention.run(config.publishedRetentionMs, goesOn);
    if (rows > 0) logger.info({ rows }, 'deleted old published rows');
    if (kept.rows > 0)
      logger.warn(
        kept,
        'the database keeps old published rows that should be deleted; they are tried again in an hour, all others are deleted',
      );
  });

  function add(name: string, run: (goesOn: () => boolean) => Promise<void>): void {
    const task = createTask((goesOn) =>
      run(goesOn).catch((error) =>
        logger[levelOf(error)]({ err: error, duty: name }, 'a maintenance task failed; it is tried again'),
      ),
    );
    tasks.set(name, task);
  }

  return {
    /** Starts the task of that name unless it is running. Returns false if there is no such task in any configuration. */
    begin(name: string): boolean {
      if (scheduled.has(name)) tasks.get(name)?.begin();
      return tasks.has(name);
    },
    /** Called when this pod publishes to a stream for the first time that it knows of. */
    met(stream: string): void {
      if (scheduled.has(TRIM)) trimmer.remember(stream);
    },
    async stop(): Promise<void> {
      await Promise.all([...tasks.values()].map((task) => task.stop()));
    },
  };
}
