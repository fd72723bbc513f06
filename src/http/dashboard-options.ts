import type { RelayConfig } from '../config/config.ts';
import type { Servers } from '../connections/servers.ts';
import { openOperations } from '../operations/open.ts';
import type { Queues } from '../queue/queues.ts';
import type { Logger } from '../telemetry/logger.ts';
import type { DashboardOptions } from './dashboard.ts';

/** What people who log in may see and do, in a pod and in `relay board`. */
export function dashboardOf(
  config: RelayConfig,
  servers: Pick<Servers, 'pool' | 'queueRedis' | 'streamRedis'>,
  queues: Queues,
  version: string,
  logger: Logger,
): DashboardOptions {
  return {
    users: config.boardUsers,
    basePath: config.boardBasePath,
    queues,
    async api(scope, requires) {
      const { registerApi } = await import('./api.ts');
      const { pool, queueRedis: redis, streamRedis } = servers;
      const operations = openOperations(config, { pool, redis, streamRedis, queues, logger });
      registerApi(scope, { ...operations, requires, version, logger });
    },
    logger,
  };
}
