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

function inWords({ fresh, leased, due, retrying, parked, dead, oldestSeconds, limit }: Backlog): string {
  const number = (count: number) => `${count.toLocaleString('en')}${count >= limit ? '+' : ''}`;
  const waiting = [fresh, leased, due].reduce((sum, count) => sum + count);
  const oldest =
    oldestSeconds.waiting === null ? '' : `, the oldest for ${Math.round(oldestSeconds.waiting)} s`;
  return `${number(waiting)} ${waiting === 1 ? 'event waits' : 'events wait'}${oldest}; ${number(retrying)} for a retry, ${number(parked)} behind an earlier event; ${number(dead)} dead.`;
}
