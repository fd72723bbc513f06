import type { ApiRoute } from './api.ts';

/** The OpenAPI document, made from the schemas that requests are validated against. */
export function describeApi(prefix: string, version: string, routes: readonly ApiRoute[]): object {
  const paths: Record<string, Record<string, object>> = {};
  for (const route of routes) {
    const path = `${prefix}${route.url.replaceAll(/:(\w+)/g, '{$1}')}`;
    const { querystring, params, body, response } = route.schema as Readonly<{
      querystring?: ObjectSchema;
      params?: ObjectSchema;
      body?: ObjectSchema;
      response: Readonly<Record<string, { description: string }>>;
    }>;
    paths[path] ??= {};
    paths[path][route.method.toLowerCase()] = {
      summary: route.summary,
      description: `Needs the role ${route.role}.`,
      operationId: `${route.method.toLowerCase()}${route.url.replaceAll(/[^a-zA-Z]+(\w?)/g, (_, letter: string) => letter.toUpperCase())}`,
      parameters: [...parametersOf('path', params), ...parametersOf('query', querystring)],
      ...(body && { requestBody: { required: true, content: { 'application/json': { schema: body } } } }),
      responses: {
        ...Object.fromEntries(
          Object.entries(response).map(([status, { description, ...schema }]) => [
            status,
            { description, content: { 'application/json': { schema } } },
          ]),
        ),
        default: {
          description:
            'what is wrong; 429 and 503 come with Retry-After: try again, as where Redis or PostgreSQL cannot be reached',
          content: {
            'application/json': {
              schema: { type: 'object', required: ['error'], properties: { error: { type: 'string' } } },
            },
          },
        },
      },
    };
  }
  return { openapi: '3.1.0', info: { title: 'relay-service', version }, paths };
}

type ObjectSchema = Readonly<{ properties: Readonly<Record<string, object>>; required: readonly string[] }>;

const parametersOf = (place: 'path' | 'query', schema?: ObjectSchema) =>
  Object.entries(schema?.properties ?? {}).map(([name, it]) => ({
    name,
    in: place,
    required: schema?.required.includes(name) ?? false,
    schema: it,
  }));
