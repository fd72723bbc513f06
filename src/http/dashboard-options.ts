import type { RelayConfig } from '../config/config.ts';
import type { Pool } from '../connections/database.ts';
import type { Servers } from '../connections/servers.ts';
import { createBoardSecret } from '../operations/board-secret.ts';
import { openOperations } from '../operations/open.ts';
import type { Backlog } from '../outbox/backlog.ts';
import { openQueues } from '../queue/queues.ts';
import type { Logger } from '../telemetry/logger.ts';
import { shareAnswers } from './admission.ts';
import type { DashboardOptions } from './dashboard.ts';

/** Requests within this time share one answer. */
const SHARED_MS = 1_000;

/**
 * What the dashboard serves, in a pod and in `relay board`.
 * @param servers connections that only the dashboard uses
 */
export async function openDashboard(
  config: RelayConfig,
  servers: Readonly<{ pool: Pool }> & Pick<Servers, 'queueRedis' | 'streamRedis'>,
  {
    backlog,
    version,
    logger,
  }: Readonly<{ backlog: () => Promise<Backlog>; version: string; logger: Logger }>,
): Promise<DashboardOptions> {
  const { pool, queueRedis: redis, streamRedis } = servers;
  const queues = await openQueues(redis, config, logger, config.startupTimeoutMs);
  return {
    users: config.boardUsers,
    secret: createBoardSecret(redis, `${config.queuePrefix}:${config.queueName}:board-secret`),
    basePath: config.boardBasePath,
    queues,
    backlog: shareAnswers(SHARED_MS, async () => inWords(await backlog())),
    async api(scope, requires) {
      const { registerApi } = await import('./api.ts');
      const operations = openOperations(config, { pool, redis, streamRedis, queues, logger });
      registerApi(scope, { ...operations, requires, version, logger });
    },
    close: queues.close,
    logger,
  };
}

/** What a person on the same machine opens; with a name or address that is configured, on others as well. */
export function boardUrl(
  { httpHost, boardBasePath }: Pick<RelayConfig, 'httpHost' | 'boardBasePath'>,
  port: number,
): string {
  // 0.0.0.0 and :: are every address.
  const host = /^[0.:]+$/.test(httpHost) ? 'localhost' : httpHost;
  return `http://${host.includes(':') ? `[${host.replace('%', '%25')}]` : host}:${port}${boardBasePath}/board`;
}

/** `5 dead, 2 waiting (the oldest for 30 s), 1 waiting for a retry.`: the dashboard cuts what does not fit. */
export function inWords(backlog: Backlog): string {
  const { fresh, leased, due, retrying, parked, dead, oldestSeconds, limit } = backlog;
  const waiting = [fresh, leased, due].reduce((sum, count) => sum + count);
  const oldest =
    oldestSeconds.waiting === null ? '' : ` (the oldest for ${Math.round(oldestSeconds.waiting)} s)`;
  const parts = [
    [dead, 'dead'],
    [waiting, `waiting${oldest}`],
    [retrying, 'waiting for a retry'],
    [parked, 'behind an earlier event'],
  ] as const;
  const said = parts.flatMap(([count, what]) =>
    count > 0 ? [`${count.toLocaleString('en')}${count >= limit ? '+' : ''} ${what}`] : [],
  );
  return `${said.join(', ') || 'No event waits'}.`;
}
