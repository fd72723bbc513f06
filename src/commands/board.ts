import type { Command } from 'commander';
import type { RelayConfig } from '../config/config.ts';
import { openBoard } from '../config/conflicts.ts';
import { ConfigError } from '../config/load-config.ts';
import { asking, transaction } from '../connections/database.ts';
import { whyNoOperator } from '../connections/database-requirements.ts';
import { assertOurs } from '../connections/ownership.ts';
import { inspectRedis, requireTable } from '../connections/preflight.ts';
import { openServers } from '../connections/servers.ts';
import { waitForServers } from '../connections/wait-for-servers.ts';
import { boardUrl, openDashboard } from '../http/dashboard-options.ts';
import { createHealth } from '../http/health.ts';
import { createWebServer, type WebServer } from '../http/server.ts';
import { succeedsWithin } from '../lifecycle.ts';
import { createBacklog } from '../outbox/backlog.ts';
import { createLogger } from '../telemetry/logger.ts';
import { VERSION } from '../version.ts';
import { EXIT, warnOfUnknownVariables, withConfig } from './command.ts';
import { signalled } from './signals.ts';
import { helpColumns } from './terminal.ts';
import { describeVariables } from './variables.ts';

export function add(command: Command): void {
  command
    .addHelpText(
      'after',
      () =>
        '\nGive it the environment of the pods ("relay start --help"). To replay and to\n' +
        'discard, the role of RELAY_DATABASE_URL must be the operators’; "relay grants"\n' +
        `prints its rights. Where it listens, and who may log in:\n${describeVariables(helpColumns(), (name) => SERVES.test(name))}`,
    )
    .action(async () => {
      await withConfig(serve, { logs: true });
      // What still waits for a server that is away must not keep the process.
      process.exit();
    });
}

const SERVES = /^RELAY_(HTTP_|BOARD_|TRUSTED_PROXIES)/;

const STATEMENT_TIMEOUT_MS = 4_000;
const STOP_TIMEOUT_MS = 5_000;

/**
 * The dashboard in a process of its own. It has the connections of a pod and no workers.
 * @throws {ConfigError} when everybody could use it
 * @throws {NotReadyError} when a server cannot be reached in time, or the port is taken
 * @throws {RequirementError} when the queue belongs to another database
 */
async function serve(config: RelayConfig): Promise<number> {
  const problems = openBoard(config);
  if (problems.length > 0) throw new ConfigError(problems);
  const logger = createLogger(config.logLevel);
  warnOfUnknownVariables(logger);
  const signal = signalled();
  const servers = openServers(config, {}, logger);
  const { pool, queueRedis, streamRedis } = servers;
  const { startupTimeoutMs } = config;
  let phase: 'starting' | 'running' | 'stopping' = 'starting';
  let web: WebServer | undefined;
  async function start(): Promise<'started'> {
    await waitForServers({
      ...{ pool, redis: [queueRedis], streamRedis: [streamRedis] },
      ...{ timeoutMs: startupTimeoutMs, logger },
    });
    await requireTable(pool);
    for (const it of new Set([queueRedis, streamRedis])) await assertOurs(pool, it, config);
    const problem = await whyNoOperator(asking(pool, STATEMENT_TIMEOUT_MS), config).catch(() => undefined);
    if (problem !== undefined)
      logger.warn({ advice: problem }, 'the dashboard works, but not as well as it could');
    const backlog = createBacklog(servers.httpPool, { ...config, statementTimeoutMs: STATEMENT_TIMEOUT_MS });
    web = createWebServer({
      host: config.httpHost,
      port: config.httpPort,
      version: VERSION,
      health: createHealth({
        database: async () => {
          await transaction(pool, STATEMENT_TIMEOUT_MS, 'repeatable', (tx) => tx.query('SELECT 1'));
          return {};
        },
        redis: () => inspectRedis(queueRedis),
        ...(streamRedis !== queueRedis && { streamRedis: () => inspectRedis(streamRedis) }),
        backlog: backlog.count,
      }),
      stuck: () => [],
      phase: () => phase,
      dashboard: () => openDashboard(config, servers, { backlog: backlog.count, version: VERSION, logger }),
      basePath: config.boardBasePath,
      trustedProxies: config.trustedProxies,
    });
    await web.start();
    return 'started';
  }
  try {
    const started = start();
    if ((await Promise.race([started, signal])) === 'started') {
      phase = 'running';
      const port = web?.port() ?? config.httpPort;
      logger.info({ port, url: boardUrl(config, port) }, 'dashboard started');
    }
    logger.info({ signal: await signal }, 'stopping');
    started.catch(() => {});
  } finally {
    phase = 'stopping';
    await succeedsWithin(STOP_TIMEOUT_MS, web?.stop() ?? Promise.resolve());
    await succeedsWithin(STOP_TIMEOUT_MS, servers.close());
  }
  logger.info({}, 'stopped');
  return EXIT.done;
}
