import { fastify } from 'fastify';
import { NotReadyError } from '../lifecycle.ts';
import type { DashboardOptions } from './dashboard.ts';
import type { createHealth } from './health.ts';
import { overall } from './health.ts';

export type WebServer = Readonly<{
  start(): Promise<void>;
  stop(): Promise<void>;
  /** Port that is listened on, once started. */
  port(): number;
}>;

/**
 * - `/livez`: 200 while this process makes progress; a restart helps otherwise
 * - `/readyz`: 200 while database and Redis answer and the relay is not stopping
 * - `/metrics`: for Prometheus
 * - `/health`, `/health/detailed`: the same question in the platform's form; 503 when unhealthy
 * - what `dashboard` adds, for people who log in
 */
export function createWebServer(deps: {
  host: string;
  port: number;
  version: string;
  health: ReturnType<typeof createHealth>;
  /** Left out where nothing is published: no `/metrics` then. */
  metrics?: Readonly<{ contentType: string; render: () => Promise<string> }>;
  /** What keeps this process from making progress; empty when nothing does. */
  stuck: () => string[];
  phase: () => 'starting' | 'running' | 'stopping';
  /** Why it is still starting, where that takes long. */
  waitsFor?: () => string | undefined;
  /** Added in a scope of its own; no dashboard without. */
  dashboard?: DashboardOptions | undefined;
  /** Path that the browser sees in front of every path here; a proxy may take it away or leave it. */
  basePath?: string;
  /** Addresses whose X-Forwarded-* headers are believed. */
  trustedProxies?: readonly string[];
}): WebServer {
  const { health, phase, basePath = '', trustedProxies = [] } = deps;
  const service = { service: 'relay-service', version: deps.version };
  const app = fastify({
    logger: false,
    forceCloseConnections: true,
    requestTimeout: 10_000,
    trustProxy: trustedProxies.length > 0 && [...trustedProxies],
    rewriteUrl: ({ url = '/' }) =>
      basePath !== '' && url.startsWith(`${basePath}/`) ? url.slice(basePath.length) : url,
  });
  const { dashboard } = deps;
  if (dashboard) {
    app.register(async (scope) => {
      // 14 MiB and 0.3 s that most pods do without.
      const { createDashboard } = await import('./dashboard.ts');
      await createDashboard(dashboard)(scope);
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
    const checks = await health.ready();
    const ready = overall(checks) !== 'unhealthy';
    return reply.code(ready ? 200 : 503).send({ status: ready ? 'ready' : 'not ready', checks });
  });

  app.get('/health', async (_request, reply) => {
    const status = phase() === 'running' ? overall(await health.ready()) : phase();
    return reply.code(status === 'healthy' || status === 'degraded' ? 200 : 503).send({ status, ...service });
  });

  app.get('/health/detailed', async (_request, reply) => {
    const checks = await health.detailed();
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
