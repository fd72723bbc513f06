import type { FastifyInstance, FastifySchema, onRequestHookHandler } from 'fastify';
import type { Role } from '../config/board-users.ts';
import { NotReadyError } from '../lifecycle.ts';
import { CursorError } from '../operations/cursor.ts';
import type { DeadLetters, Selection } from '../operations/dead-letters.ts';
import type { Republish } from '../operations/republishing.ts';
import { createUnreachable, RETRY_AFTER } from '../operations/unreachable.ts';
import { errorText, type Logger } from '../telemetry/logger.ts';
import type { Operator } from './access.ts';
import { BusyError, createLimiter, shareAnswers } from './admission.ts';
import { describeApi } from './openapi.ts';

/**
 * The HTTP API for operators: what `relay dlq` and `relay republish` do. Each request does a bounded part of the work;
 * `next` of the answer, sent as `after`, continues it.
 */

/** The operations behind the API. */
export type ApiDeps = Readonly<{
  deadLetters: Pick<DeadLetters, 'list' | 'groups' | 'show' | 'replay' | 'discard'>;
  republish: Republish;
  /** A hook that requires the role and sets `request.operator`. */
  requires: (role: Role) => onRequestHookHandler;
  version: string;
  logger: Logger;
}>;

type Filter = Extract<Selection, { filter: unknown }>['filter'];

/** Most dead letters, or entries, that one request reads or changes. */
const MOST_PER_REQUEST = 1_000;
/** Most dead letters that are counted by error: 10,000 take the database about 50 ms. */
const MOST_GROUPED = 10_000;
/** Requests within this time share the same groups. */
const SHARED_MS = 1_000;
/** Each request at work has a connection to the database. */
const LIMITS = {
  viewer: { atOnce: 1, waiting: 20, rest: 4 },
  operator: { atOnce: 2, waiting: 20 },
};

const text = { type: 'string', minLength: 1, maxLength: 1_000, pattern: '^[^\\u0000]*$' };
const words = { ...text, pattern: '^[^\\u0000]*[^\\u0000\\s][^\\u0000]*$' };
/** `maxLength` excludes `urn:uuid:…`, which has this format, too, but which PostgreSQL does not read. */
const uuid = { type: 'string', format: 'uuid', maxLength: 36 };
const time = { type: 'string', format: 'date-time' };
const cursor = { type: 'string', minLength: 1, maxLength: 8_000, description: '`next` of an earlier answer' };
const limit = (standard: number) => ({
  ...{ type: 'integer', minimum: 1, maximum: MOST_PER_REQUEST, default: standard },
});
const flag = (description: string) => ({ type: 'boolean', default: false, description });
const published = { eventType: text, topic: text, aggregateType: text, aggregateId: uuid };
const filter = {
  ...published,
  error: { ...text, description: 'part of the error, in any case; # stands for numbers and ids' },
  since: time,
  until: time,
};
const pruned = flag('those whose row is gone, from the dead-letter stream, instead');
const object = (properties: object, required: string[] = []) => ({
  type: 'object',
  additionalProperties: false,
  required,
  properties,
});
const selection = {
  eventIds: { type: 'array', items: uuid, minItems: 1, maxItems: MOST_PER_REQUEST },
  filter: object(filter),
  pruned,
  all: flag('every dead letter: needed where there are neither event ids nor a filter'),
  dryRun: flag('only count'),
  limit: limit(MOST_PER_REQUEST),
  after: cursor,
};
const answer = (description: string, properties: object) => ({
  200: { description, type: 'object', additionalProperties: true, properties },
});
/** `POST /api/dlq/discard?dryRun=true` would discard. */
const NO_QUERY = object({});
const next = { type: ['string', 'null'], description: 'where to go on; null at the end' };
const result = {
  done: { type: 'integer', description: 'how many events; of a dry run, how many it would be' },
  dryRun: { type: 'boolean', description: 'nothing was done' },
  refused: { type: 'integer' },
  refusals: {
    type: 'array',
    items: { type: 'object', properties: { eventId: { type: 'string' }, reason: { type: 'string' } } },
  },
  next,
};
const list = { type: 'array', items: { type: 'object', additionalProperties: true } };

export type ApiRoute = Readonly<{
  method: 'GET' | 'POST';
  url: string;
  role: Role;
  summary: string;
  schema: FastifySchema;
  handle: (request: ApiRequest) => Promise<object>;
}>;

type ApiRequest = Readonly<{
  query: Record<string, unknown>;
  body: Record<string, unknown>;
  params: Record<string, string>;
  by: string;
  role: Role;
}>;

class ApiError extends Error {
  override readonly name = 'ApiError';
  readonly statusCode: number;
  constructor(statusCode: number, message: string) {
    super(message);
    this.statusCode = statusCode;
  }
}

function routesOf({ deadLetters, republish, version }: ApiDeps): ApiRoute[] {
  const groups = shareAnswers(SHARED_MS, (question) => {
    const { filter: wanted, limit: most } = JSON.parse(question) as { filter: Filter; limit: number };
    return deadLetters.groups(wanted, most, MOST_GROUPED);
  });
  const routes: ApiRoute[] = [
    {
      ...{ method: 'GET', url: '/dlq', role: 'viewer' },
      summary: 'Dead letters, the latest first; without payloads',
      schema: {
        querystring: object({ ...filter, pruned, limit: limit(50), after: cursor }),
        response: answer('a page', { letters: list, next }),
      },
      handle: async ({ query }) =>
        deadLetters.list(filterOf(query), {
          ...page(query),
          ...{ pruned: query.pruned === true, look: MOST_PER_REQUEST },
        }),
    },
    {
      ...{ method: 'GET', url: '/dlq/groups', role: 'viewer' },
      summary: `Dead letters counted by error, the most frequent first; the latest ${MOST_GROUPED} that match`,
      schema: {
        querystring: object({ ...filter, limit: limit(100) }),
        response: answer('the groups', { groups: list }),
      },
      handle: async ({ query }) => ({
        groups: await groups(JSON.stringify({ filter: filterOf(query), limit: page(query).limit })),
      }),
    },
    {
      ...{ method: 'GET', url: '/dlq/:eventId', role: 'viewer' },
      summary: 'Everything that is known of one event; its payload, tenant and trace are for operators alone',
      schema: {
        params: object({ eventId: uuid }, ['eventId']),
        response: answer('the event', {}),
      },
      handle: async ({ params, role }) => {
        const details = await deadLetters.show((params.eventId ?? '').toLowerCase());
        if (details === null)
          throw new ApiError(404, 'neither the table nor the dead-letter stream knows this event');
        return role === 'operator' ? details : { ...details, event: forViewers(details.event) };
      },
    },
    {
      ...{ method: 'POST', url: '/dlq/replay', role: 'operator' },
      summary: 'Publishes dead events again, in the order of their aggregates',
      schema: { body: object(selection), response: answer('what was done', result) },
      handle: async ({ body, by }) => {
        const options = actionOf(body, by);
        return { ...(await deadLetters.replay(selectionOf(body), options)), dryRun: options.dryRun };
      },
    },
    {
      ...{ method: 'POST', url: '/dlq/discard', role: 'operator' },
      summary: 'Gives dead events up for good; nothing waits for them any more',
      schema: {
        body: object({ ...selection, reason: words }, ['reason']),
        response: answer('what was done', result),
      },
      handle: async ({ body, by }) => {
        const [options, reason] = [actionOf(body, by), String(body.reason)];
        return { ...(await deadLetters.discard(selectionOf(body), reason, options)), dryRun: options.dryRun };
      },
    },
    {
      ...{ method: 'POST', url: '/republish', role: 'operator' },
      summary: 'Appends once more what was published before, marked with replayed_at',
      schema: {
        body: object(
          {
            ...{ since: time, until: time, filter: object(published), after: cursor },
            ...{ dryRun: flag('only count'), limit: limit(MOST_PER_REQUEST) },
          },
          ['since', 'until'],
        ),
        response: answer('what was done; of a dry run the counts by stream', {
          appended: { type: 'integer' },
          refused: { type: 'integer' },
          reason: { type: ['string', 'null'], description: 'why the first one was refused' },
          error: { type: ['string', 'null'], description: 'what ended it early; `next` goes on' },
          next,
          streams: { type: 'object', additionalProperties: { type: 'integer' } },
        }),
      },
      handle: async ({ body, by }) => {
        const { since, until } = body as { since: string; until: string };
        const range = { since, until, filter: (body.filter ?? {}) as Filter };
        const { dryRun, ...options } = actionOf(body, by);
        if (!dryRun) return republish.run(range, options);
        const { streams, next: rest } = await republish.count(range, page(body));
        return { appended: 0, refused: 0, next: rest, streams: Object.fromEntries(streams) };
      },
    },
  ];
  const description: ApiRoute = {
    ...{ method: 'GET', url: '/openapi.json', role: 'viewer' },
    summary: 'This description (OpenAPI 3.1)',
    schema: { response: answer('OpenAPI 3.1', {}) },
    handle: async () => describeApi('/api', version, [...routes, description]),
  };
  return [...routes, description];
}

/** Columns without personal data: not the payload, nor tenant and trace, which tell whose event it is. */
const SHOWN_TO_VIEWERS = [
  ...['id', 'eventId', 'eventType', 'aggregateType', 'aggregateId', 'topic'],
  ...['withheld', 'occurredAt', 'attempts'],
];
const forViewers = (event: object): object => ({
  ...Object.fromEntries(Object.entries(event).filter(([member]) => SHOWN_TO_VIEWERS.includes(member))),
  payload: null,
});

const FILTERS = Object.keys(filter);
const filterOf = (query: Record<string, unknown>): Filter =>
  Object.fromEntries(
    FILTERS.flatMap((name) => (query[name] === undefined ? [] : [[name, String(query[name])]])),
  );

const page = (from: Record<string, unknown>) => ({
  limit: Number(from.limit),
  ...(from.after !== undefined && { after: String(from.after) }),
});

const actionOf = (body: Record<string, unknown>, by: string) => ({
  by,
  dryRun: body.dryRun === true,
  ...page(body),
});

function selectionOf(body: Record<string, unknown>): Selection {
  const {
    eventIds,
    filter: wanted = {},
    all,
  } = body as { eventIds?: string[]; filter?: Filter; all?: boolean };
  const filtered = Object.keys(wanted).length > 0 || body.pruned === true;
  if (eventIds !== undefined) {
    if (filtered || all) throw new ApiError(400, 'body has both eventIds and a filter: give one of them');
    // Lower case, as in the table and in job ids.
    return { eventIds: [...new Set(eventIds.map((eventId) => eventId.toLowerCase()))] };
  }
  if (!filtered && !all)
    throw new ApiError(400, 'body has neither eventIds nor a filter: set all to true for every dead letter');
  return { filter: wanted, pruned: body.pruned === true };
}

/** Serves `/api/dlq…`, `/api/republish` and their description, `/api/openapi.json`. */
export function registerApi(app: FastifyInstance, deps: ApiDeps): void {
  const unreachable = createUnreachable(deps.logger);
  void app.register(
    (api, _options, done) => {
      api.setErrorHandler(
        async (error: Error & { statusCode?: number; validation?: unknown }, request, reply) => {
          const sentence = unreachable(error);
          if (sentence !== undefined)
            return reply.code(503).header('retry-after', RETRY_AFTER).send({ error: sentence });
          const status = statusOf(error);
          if (error instanceof BusyError) reply.header('retry-after', error.retryAfterSeconds);
          else if (status >= 500)
            deps.logger.error(
              { err: error, route: request.routeOptions.url },
              'a request to the HTTP API failed',
            );
          const text = errorText(error);
          const hint = isForbidden(error) ? OPERATORS_ROLE : status === 415 ? JSON_ALONE : undefined;
          return reply.code(status).send({ error: hint === undefined ? text : `${text}: ${hint}` });
        },
      );
      api.removeContentTypeParser(['text/plain', 'application/x-www-form-urlencoded']);
      const limits = { viewer: createLimiter(LIMITS.viewer), operator: createLimiter(LIMITS.operator) };
      for (const route of routesOf(deps)) {
        api.route<{
          Querystring: Record<string, unknown>;
          Body: Record<string, unknown>;
          Params: Record<string, string>;
        }>({
          method: route.method,
          url: route.url,
          schema: route.schema,
          // Before the body is read: errors about the request must not reach people without the role.
          onRequest: deps.requires(route.role) as never,
          preValidation: [
            // Fastify removes unknown members: `{"filter": {"tpye": …}}` would select everything.
            async (request) => {
              refuseUnknown(route.schema.querystring ?? NO_QUERY, request.query, 'query');
              refuseUnknown(route.schema.body, request.body, 'body');
              refuseMistyped(route.schema.body, request.body, 'body');
            },
          ],
          handler: async (request) => {
            const { name: by, role } = request.operator as Operator;
            const { query, params } = request;
            return limits[role](() =>
              route.handle({ query, params, body: request.body ?? {}, ...{ by, role } }),
            );
          },
        });
      }
      done();
    },
    { prefix: '/api' },
  );
}

/** PostgreSQL refuses the relay's role, not the user who asks. */
const isForbidden = (error: Error): boolean => (error as { code?: string }).code === '42501';
const OPERATORS_ROLE =
  'replay and discard need the operators’ role in the RELAY_DATABASE_URL of the relay; "relay grants" prints its rights';

/** Forms of other sites can send any other type without asking. */
const JSON_ALONE = 'send the body as JSON, with Content-Type: application/json';

function statusOf(error: Error & { statusCode?: number; validation?: unknown }): number {
  if (error.validation !== undefined || error instanceof CursorError) return 400;
  if (error instanceof NotReadyError || error instanceof BusyError) return 503;
  // It has the format but is out of range, such as a year that PostgreSQL does not have.
  if (UNREADABLE.has((error as { code?: string }).code ?? '')) return 400;
  if (isForbidden(error)) return 403;
  return error.statusCode !== undefined && error.statusCode < 500 ? error.statusCode : 500;
}

/** SQLSTATEs of values that PostgreSQL cannot read: out of range, bad time, zone, character or text for the type. */
const UNREADABLE = new Set(['22003', '22007', '22008', '22009', '22021', '22P02']);

/** Fastify coerces types: it would read `{"dryRun": null}` as false, and act. */
function refuseMistyped(schema: unknown, value: unknown, where: string): void {
  const { type, properties = {}, items } = (schema ?? {}) as Schema;
  if (type === undefined) return;
  const found = Array.isArray(value) ? 'array' : value === null ? 'null' : typeof value;
  if (found !== (type === 'integer' ? 'number' : type))
    throw new ApiError(400, `${where} must be ${type}, is ${found}`);
  if (Array.isArray(value))
    for (const [i, item] of value.entries()) refuseMistyped(items, item, `${where}/${i}`);
  else if (found === 'object')
    for (const [name, member] of Object.entries(value as object))
      refuseMistyped(properties[name], member, `${where}/${name}`);
}

type Schema = Readonly<{ type?: string; properties?: Readonly<Record<string, unknown>>; items?: unknown }>;

function refuseUnknown(schema: unknown, value: unknown, where: string): void {
  const { properties } = (schema ?? {}) as { properties?: Record<string, unknown> };
  if (properties === undefined || typeof value !== 'object' || value === null || Array.isArray(value)) return;
  for (const [name, member] of Object.entries(value)) {
    if (!Object.hasOwn(properties, name))
      throw new ApiError(
        400,
        `${where} has "${name}"; known: ${Object.keys(properties).join(', ') || 'none'}`,
      );
    refuseUnknown(properties[name], member, `${where}.${name}`);
  }
}
