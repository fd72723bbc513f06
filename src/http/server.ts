import { type FastifyReply, fastify } from 'fastify';
import { NotReadyError } from '../lifecycle.ts';
import { type BusyError, createPace, shareAnswers } from './admission.ts';
import type { DashboardOptions } from './dashboard.ts';
import type { createHealth } from './health.ts';
import { overall } from './health.ts';

/** Probes, Prometheus and people send a few requests a second; 200 take a twentieth of a core. */
const PACE = { perSecond: 200, burst: 100, waiting: 300 };
/** Requests within this time share one answer. */
const SHARED_MS = 1_000;
const MAX_CONNECTIONS = 1_000;
/** Against clients that send their headers slowly on purpose. */
const HEADERS_TIMEOUT_MS = 5_000;
const CHECK_TIMEOUTS_EVERY_MS = 1_000;

/** The routes here have no schemas. To load the compilers takes 8 ms of every start: the dashboard brings its own. */
const withoutSchemas = (): never => {
  throw new Error('schemas are for the routes of the dashboard');
};
const NO_SCHEMAS = {
  compilersFactory: { buildValidator: withoutSchemas, buildSerializer: withoutSchemas },
};

export type WebServer = Readonly<{
  start(): Promise<void>;
  stop(): Promise<void>;
  /** The port, once started. */
  port(): number;
}>;

/**
 * - `/livez`: 200 while this process makes progress; otherwise it should be restarted
 * - `/readyz`: 200 while the relay runs and database and Redis answer
 * - `/metrics`: for Prometheus
 * - `/health`, `/health/detailed`: the checks of `/readyz`, and of the backlog, in the platform's form; 503 when unhealthy
 * - the routes of `dashboard`, for people who log in
 */
export function createWebServer(deps: {
  host: string;
  port: number;
  version: string;
  health: ReturnType<typeof createHealth>;
  /** Without it, as in `relay board`, there is no `/metrics`. */
  metrics?: Readonly<{ contentType: string; render: () => Promise<string> }>;
  /** Why this process makes no progress; empty while it does. */
  stuck: () => string[];
  phase: () => 'starting' | 'running' | 'stopping';
  /** What the start-up waits for. */
  waitsFor?: () => string | undefined;
  /** Called when the server starts. Without it there is no dashboard. */
  dashboard?: (() => Promise<DashboardOptions>) | undefined;
  /** Prefix of every path as the browser sees it. A proxy may strip it or not. */
  basePath?: string;
  /** Addresses whose X-Forwarded-* headers are trusted. */
  trustedProxies?: readonly string[];
}): WebServer {
  const { phase, basePath = '', trustedProxies = [] } = deps;
  const readyChecks = shareAnswers(SHARED_MS, deps.health.ready);
  const allChecks = shareAnswers(SHARED_MS, deps.health.detailed);
  const service = { service: 'relay-service', version: deps.version };
  const routes: RegExp[] = [];
  const isOurs = (path: string): boolean => routes.some((route) => route.test(path));
  const app = fastify({
    logger: false,
    schemaController: NO_SCHEMAS,
    forceCloseConnections: true,
    requestTimeout: 10_000,
    http: { headersTimeout: HEADERS_TIMEOUT_MS, connectionsCheckingInterval: CHECK_TIMEOUTS_EVERY_MS },
    trustProxy: trustedProxies.length > 0 && [...trustedProxies],
    rewriteUrl: ({ url = '/' }) => withoutPrefix(url, basePath, isOurs),
  });
  app.server.maxConnections = MAX_CONNECTIONS;
  app.addHook('onRoute', ({ url }) => {
    routes.push(new RegExp(`^${url.replaceAll(/:\w+/g, '[^/]+').replace('*', '.*')}$`));
  });
  const pace = createPace(PACE);
  app.addHook('onRequest', async (_request, reply) => {
    try {
      await pace();
    } catch (error) {
      return refuseForNow(reply, error as BusyError);
    }
    return undefined;
  });
  const { dashboard } = deps;
  app.setNotFoundHandler(async ({ method, url }, reply) => {
    const [path = ''] = url.split('?');
    const error = !dashboard && OF_DASHBOARD.test(path) ? NO_DASHBOARD : `there is no ${method} ${path} here`;
    return reply.code(404).send({ error });
  });
  if (dashboard) {
    app.register(async (scope) => {
      // Loaded only where it is used: it takes 14 MiB and 0.3 s.
      const { createDashboard } = await import('./dashboard.ts');
      await createDashboard(await dashboard())(scope);
    });
  }

  app.get('/livez', async (_request, reply) => {
    const reasons = phase() === 'running' ? deps.stuck() : [];
    return reply
      .code(reasons.length > 0 ? 503 : 200)
      .send({ status: reasons.length > 0 ? 'stuck' : 'alive', reasons });
  });

  app.get('/readyz', async (_request, reply) => {
    if (phase() !== 'running') {
      const reason = deps.waitsFor?.();
      return reply.code(503).send({ status: phase(), ...(reason !== undefined && { reason }) });
    }
    const checks = await readyChecks();
    const ready = overall(checks) !== 'unhealthy';
    return reply.code(ready ? 200 : 503).send({ status: ready ? 'ready' : 'not ready', checks });
  });

  app.get('/health', async (_request, reply) => {
    const status = phase() === 'running' ? overall(await readyChecks()) : phase();
    return reply.code(status === 'healthy' || status === 'degraded' ? 200 : 503).send({ status, ...service });
  });

  app.get('/health/detailed', async (_request, reply) => {
    const checks = await allChecks();
    const status = phase() === 'running' ? overall(checks) : phase();
    return reply
      .code(status === 'healthy' || status === 'degraded' ? 200 : 503)
      .send({ status, ...service, timestamp: new Date().toISOString(), checks });
  });

  const { metrics } = deps;
  if (metrics) {
    app.get('/metrics', async (_request, reply) =>
      reply.type(metrics.contentType).send(await metrics.render()),
    );
  }

  return {
    async start() {
      await app.listen({ host: deps.host, port: deps.port }).catch((error: NodeJS.ErrnoException) => {
        if (error instanceof NotReadyError) throw error;
        throw new NotReadyError(
          `cannot listen on ${deps.host}:${deps.port} (see RELAY_HTTP_HOST, RELAY_HTTP_PORT): ${error.code ?? error.message}`,
        );
      });
    },
    stop: () => app.close(),
    port: () => {
      const address = app.server.address();
      return typeof address === 'object' && address ? address.port : deps.port;
    },
  };
}

/**
 * The URL without the path of the proxy, where the proxy has left it. A path that begins like one of ours, as `/board`, may
 * be our own: `/board/api/queues` is, since there is no `/api/queues`.
 */
function withoutPrefix(url: string, basePath: string, isOurs: (path: string) => boolean): string {
  const [path = ''] = url.split('?');
  if (basePath === '' || !`${path}/`.startsWith(`${basePath}/`)) return url;
  if (path === basePath) return isOurs(path) ? url : '/';
  return isOurs(path.slice(basePath.length)) ? url.slice(basePath.length) : url;
}

const OF_DASHBOARD = /^\/(?:|login|board|board\/.*|api\/.*)$/;
const NO_DASHBOARD = 'there is no dashboard and no API here: set RELAY_BOARD=true, or run "relay board"';

/** Closes the connection: a client that asks again at once must open a new one. */
const refuseForNow = (reply: FastifyReply, { message, statusCode, retryAfterSeconds }: BusyError) =>
  reply
    .code(statusCode)
    .headers({ 'retry-after': retryAfterSeconds, connection: 'close' })
    .send({ error: message });
