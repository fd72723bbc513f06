import helmet from '@fastify/helmet';
import type { FastifyInstance } from 'fastify';
import type { BoardUser } from '../config/board-users.ts';
import type { Logger } from '../telemetry/logger.ts';
import { createAccess } from './access.ts';
import type { RelayQueues } from './board-queues.ts';
import { createBoard } from './bull-board.ts';

/** Works offline: nothing is asked of another host, and no other page may show ours. */
const CONTENT_SECURITY_POLICY = {
  useDefaults: false,
  directives: {
    defaultSrc: ["'none'"],
    scriptSrc: ["'self'"],
    // Bull Board styles elements in place.
    styleSrc: ["'self'", "'unsafe-inline'"],
    imgSrc: ["'self'", 'data:'],
    fontSrc: ["'self'"],
    connectSrc: ["'self'"],
    workerSrc: ["'self'"],
    formAction: ["'self'"],
    baseUri: ["'self'"],
    frameAncestors: ["'none'"],
  },
};

export type DashboardOptions = Readonly<{
  /** Who may log in; nobody: everybody on this machine is the operator "local". */
  users: readonly BoardUser[];
  /** Of the deployment, for sessions. */
  secret: () => Promise<string>;
  /** Path of the whole server as the browser sees it, without a slash at its end. */
  basePath: string;
  queues: RelayQueues;
  /** How much waits, in a sentence. */
  backlog: () => Promise<string>;
  /** Adds routes under /api; `requires` is their hook. */
  api?: (app: FastifyInstance, requires: ReturnType<typeof createAccess>['requires']) => Promise<void>;
  /** Called when the server stops. */
  close(): Promise<void>;
  logger: Logger;
}>;

/**
 * Everything that asks who you are: the log-in at /login and /logout, the board at /board, and whatever `api` adds.
 * In a scope of its own: the endpoints beside it stay as they are.
 */
export function createDashboard(deps: DashboardOptions): (app: FastifyInstance) => Promise<void> {
  const { basePath, logger } = deps;
  const access = createAccess(deps);
  const board = createBoard({ ...deps, requires: access.requires });

  return async (app) => {
    app.addHook('onClose', deps.close);
    if (deps.users.length === 0)
      logger.warn(
        {},
        'the dashboard asks for no password: who can reach its loopback address may do everything',
      );
    await app.register(async (scope) => {
      await scope.register(helmet, {
        contentSecurityPolicy: CONTENT_SECURITY_POLICY,
        frameguard: { action: 'deny' },
        // With no-referrer the browser does not say where a form comes from.
        referrerPolicy: { policy: 'same-origin' },
        // For a whole host, and that is for the proxy that serves it by TLS.
        hsts: false,
      });
      scope.addHook('onSend', async (_request, reply) => {
        if (!reply.hasHeader('cache-control')) reply.header('cache-control', 'no-store');
      });
      await access.register(scope);
      await board.register(scope);
      await deps.api?.(scope, access.requires);
      scope.get('/', async (_request, reply) => reply.redirect(`${basePath}/board`, 303));
    });
  };
}
