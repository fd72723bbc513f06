import { AsyncLocalStorage } from 'node:async_hooks';
import { createBullBoard } from '@bull-board/api';
import { FastifyAdapter } from '@bull-board/fastify';
import type { FastifyInstance, FastifyPluginAsync, FastifyRequest } from 'fastify';
import { createUnreachable, RETRY_AFTER } from '../operations/unreachable.ts';
import { errorText, type Logger } from '../telemetry/logger.ts';
import { type createAccess, isRead, type Operator } from './access.ts';
import { type BusyError, createPace } from './admission.ts';
import { actionOf } from './board-actions.ts';
import { adaptersOf, createGuard, type RelayQueues } from './board-queues.ts';

const PREFIX = '/board';

/** Most jobs on one page: Bull Board itself has no limit. */
const MAX_JOBS_PER_PAGE = 100;

/**
 * Reads per second, by all users together. A read returns up to 1 MiB of jobs, so a client that never stops reading costs
 * at most a tenth of a core. An open page reads once in 5 s.
 */
const READS = { perSecond: 10, burst: 20, waiting: 50 };

/** Placeholder in the page's configuration: replaced by the name of the user. */
const WHO = 'who-is-logged-in';

/** Links to other hosts, where Bull Board's page loads its fonts from. */
const FOREIGN_LINK = /<link\b[^>]*\bhref="(?:https?:)?\/\/[^>]*>\s*/g;

/**
 * Hides the buttons that are refused to everybody and the second count of attempts, and shows two lines of a description.
 * Bull Board has no options for that. Its class names change with each version, the names of its icons do not.
 */
const withoutRefused = (claimQueue: string): string => {
  const path = `/${encodeURIComponent(claimQueue)}`;
  return `<style>
  li button:has(.lucide-files, .lucide-pencil, .lucide-clock, .lucide-arrow-up-down), [role=dialog] button:has(.lucide-pencil),
  [role=menuitem]:has(.lucide-plus, .lucide-chart-no-axes-gantt, .lucide-gauge, .lucide-trash-2, .lucide-ban), td button,
  /* The next tick of the claim queue: in the list, and on its own page. */
  main:has([aria-current][href*="${path}?status=delayed"]) li button,
  main:has([href*="${path}"]):has([style*="--status-delayed"]) li button { display: none !important }
  /* The name of a job says how often it was tried. */
  h5 > span { display: none }
  /* What a queue is for, and how many events are dead, is said nowhere else: two lines of it. */
  header div:has(> h1) + p {
    display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2;
    white-space: normal !important; line-height: 1.2;
  }
</style>`;
};

/**
 * Bull Board at /board. Viewers see no buttons and no payloads, and the server refuses their actions. Every action is
 * logged with the name of the operator.
 */
export function createBoard(deps: {
  queues: RelayQueues;
  requires: ReturnType<typeof createAccess>['requires'];
  /** The backlog, in a sentence. */
  backlog: () => Promise<string>;
  basePath: string;
  logger: Logger;
}) {
  const { queues, requires, basePath, logger } = deps;
  /** Bull Board does not pass the request to its hooks and formatters. */
  const asking = new AsyncLocalStorage<Operator | null>();
  const mayAct = () => asking.getStore()?.role === 'operator';

  const server = new FastifyAdapter().setBasePath(`${basePath}${PREFIX}`);
  createBullBoard({
    queues: adaptersOf(queues, mayAct, { mayRetry: mayAct, backlog: deps.backlog }),
    serverAdapter: server,
    options: {
      uiConfig: {
        boardTitle: 'Relay',
        hideDocsLink: true,
        // Needs CLIENT LIST, which is in the ACL category @dangerous: the relay's user may not run it.
        showWorkers: false,
        environment: { label: WHO, color: '#1f5fbf', textColor: '#fff' },
        miscLinks: [{ text: 'Log out', url: `${basePath}/logout` }],
        sortQueues: false,
      },
      handlerHooks: {
        before: createGuard(queues),
        after: (context, result) => {
          if (context.route === '/api/queues' && !mayAct()) withoutButtons(result.body);
          return result;
        },
      },
    },
  });

  // It knows no 503, and no header: the handler of the routes below answers.
  server.setErrorHandler((error) => {
    throw error;
  });
  const unreachable = createUnreachable(logger);

  function logAction(request: FastifyRequest, status: number): void {
    if (isRead(request) || request.operator === null) return;
    const route = (request.routeOptions.url ?? '').slice(PREFIX.length);
    const { queueName, jobId, queueStatus } = request.params as Record<string, string | undefined>;
    const fields = {
      operator: request.operator.name,
      action: actionOf(request.method, route) ?? `${request.method} ${route}`,
      ...(queueName !== undefined && { queue: queueName }),
      ...(jobId !== undefined && { jobId }),
      ...(queueStatus !== undefined && { jobs: queueStatus }),
    };
    if (status < 400) logger.info(fields, 'an operator acted');
    else logger.info({ ...fields, status }, 'an action of an operator was refused, or failed');
  }

  const routes: FastifyPluginAsync = async (board) => {
    board.addHook('onRequest', (request, reply) =>
      requires(isRead(request) ? 'viewer' : 'operator')(request, reply),
    );
    board.addHook('preHandler', async (request) => {
      const query = request.query as { jobsPerPage?: string };
      if (Number(query.jobsPerPage) > MAX_JOBS_PER_PAGE) query.jobsPerPage = String(MAX_JOBS_PER_PAGE);
    });
    const pace = createPace(READS);
    board.addHook('preHandler', async (request, reply) => {
      if (!isRead(request) || !request.url.startsWith(`${PREFIX}/api/`)) return undefined;
      try {
        await pace();
      } catch (error) {
        const { message, statusCode, retryAfterSeconds } = error as BusyError;
        return reply.code(statusCode).header('retry-after', retryAfterSeconds).send({ message });
      }
      return undefined;
    });
    board.addHook('preHandler', (request, _reply, done) => asking.run(request.operator, done));
    board.addHook('onSend', async ({ operator }, reply, payload) =>
      typeof payload === 'string' && String(reply.getHeader('content-type')).startsWith('text/html')
        ? payload
            .replace(FOREIGN_LINK, '')
            .replace('</head>', `${withoutRefused(queues.claim.name)}</head>`)
            .replace(WHO, `${operator?.name} (${operator?.role})`)
        : payload,
    );
    board.setErrorHandler(async (error: Error & { statusCode?: number }, _request, reply) => {
      const sentence = unreachable(error);
      // The page shows `error`; without it not even `message`.
      if (sentence !== undefined)
        return reply.code(503).header('retry-after', RETRY_AFTER).send({ error: sentence });
      return reply
        .code(error.statusCode ?? 500)
        .send({ error: { key: 'ERRORS.INTERNAL_SERVER_ERROR' }, message: errorText(error) });
    });
    board.addHook('onResponse', async (request, reply) => logAction(request, reply.statusCode));
    await board.register(server.registerPlugin());
  };

  return {
    async register(app: FastifyInstance): Promise<void> {
      await app.register(routes, { prefix: PREFIX });
    },
  };
}

/** Bull Board shows no buttons for a read-only queue. */
function withoutButtons(body: unknown): void {
  const { queues = [] } = body as { queues?: Record<string, unknown>[] };
  for (const queue of queues) {
    Object.assign(queue, { readOnlyMode: true, allowRetries: false, allowCompletedRetries: false });
  }
}
