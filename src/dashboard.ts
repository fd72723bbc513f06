import type { RelayConfig } from './config.ts';
import type { Logger } from './logger.ts';
import { openOperations } from './operate/open.ts';
import type { Queues } from './queue/queues.ts';
import type { Servers } from './servers.ts';
import type { DashboardOptions } from './web/dashboard.ts';

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
      const { registerApi } = await import('./web/api.ts');
      const { pool, queueRedis: redis, streamRedis } = servers;
      const operations = openOperations(config, { pool, redis, streamRedis, queues, logger });
      registerApi(scope, { ...operations, requires, version, logger });
    },
    logger,
  };
}
