import { AjvCompiler } from '@fastify/ajv-compiler';
import { SerializerSelector } from '@fastify/fast-json-stringify-compiler';
import helmet from '@fastify/helmet';
import type { FastifyInstance } from 'fastify';
import type { BoardUser } from '../config/board-users.ts';
import type { Logger } from '../telemetry/logger.ts';
import { createAccess } from './access.ts';
import type { RelayQueues } from './board-queues.ts';
import { createBoard } from './bull-board.ts';

/** Nothing is loaded from other hosts, and no other site may frame our pages. */
const CONTENT_SECURITY_POLICY = {
  useDefaults: false,
  directives: {
    defaultSrc: ["'none'"],
    scriptSrc: ["'self'"],
    // Bull Board uses style attributes.
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
  /** Who may log in. If empty, everyone on this machine is the operator "local". */
  users: readonly BoardUser[];
  /** Of the deployment; signs sessions. */
  secret: () => Promise<string>;
  /** Path of the whole server as the browser sees it, without a trailing slash. */
  basePath: string;
  queues: RelayQueues;
  /** The backlog, in a sentence. */
  backlog: () => Promise<string>;
  /** Adds routes under /api; `requires` is their hook. */
  api?: (app: FastifyInstance, requires: ReturnType<typeof createAccess>['requires']) => Promise<void>;
  /** Called when the server stops. */
  close(): Promise<void>;
  logger: Logger;
}>;

/**
 * Everything that needs a log-in: /login, /logout, the board at /board, and the routes of `api`. Its hooks are in a scope
 * of their own and do not affect health and metrics.
 */
export function createDashboard(deps: DashboardOptions): (app: FastifyInstance) => Promise<void> {
  const { basePath, logger } = deps;
  const access = createAccess(deps);
  const board = createBoard({ ...deps, requires: access.requires });

  return async (app) => {
    app.setSchemaController({
      compilersFactory: { buildValidator: AjvCompiler(), buildSerializer: SerializerSelector() },
    });
    app.addHook('onClose', deps.close);
    if (deps.users.length === 0)
      logger.warn(
        {},
        'the dashboard asks for no password: everyone who can reach its loopback address may do everything',
      );
    await app.register(async (scope) => {
      await scope.register(helmet, {
        contentSecurityPolicy: CONTENT_SECURITY_POLICY,
        frameguard: { action: 'deny' },
        // With helmet's default, no-referrer, browsers send `Origin: null` with forms.
        referrerPolicy: { policy: 'same-origin' },
        // It applies to the whole host: the proxy that terminates TLS decides on it.
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
