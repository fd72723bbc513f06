import { once } from 'node:events';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { onTestFinished } from 'vitest';

/** A span as a collector gets it, its attributes as an object. */
export type CollectedSpan = Readonly<{
  service: string;
  name: string;
  /** 2: error */
  status: number;
  traceId: string;
  spanId: string;
  /** Empty: none. */
  parentSpanId: string;
  attributes: Readonly<Record<string, unknown>>;
}>;

export type Collector = Readonly<{
  /** What makes a relay send its traces here. */
  env: Readonly<Record<string, string>>;
  spans: readonly CollectedSpan[];
  /** Paths that were asked for. */
  paths: ReadonlySet<string>;
  requests(): number;
}>;

/**
 * A collector of OpenTelemetry that takes OTLP over HTTP in JSON; a broken one refuses so many requests, and never
 * answers after that.
 */
export async function startCollector({ refusals }: { refusals?: number } = {}): Promise<Collector> {
  const spans: CollectedSpan[] = [];
  const paths = new Set<string>();
  let requests = 0;
  const server = createServer(async (request, response) => {
    paths.add(request.url ?? '');
    requests++;
    if (refusals !== undefined) {
      if (requests <= refusals) response.writeHead(400).end();
      return;
    }
    const chunks: Buffer[] = [];
    for await (const chunk of request) chunks.push(chunk as Buffer);
    spans.push(...spansOf(JSON.parse(Buffer.concat(chunks).toString())));
    response.setHeader('content-type', 'application/json').end('{}');
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  onTestFinished(() => {
    server.closeAllConnections();
    server.close();
  });
  const { port } = server.address() as AddressInfo;
  return {
    env: {
      OTEL_EXPORTER_OTLP_ENDPOINT: `http://127.0.0.1:${port}`,
      OTEL_EXPORTER_OTLP_PROTOCOL: 'http/json',
    },
    spans,
    paths,
    requests: () => requests,
  };
}

type Attributes = { key: string; value: Record<string, unknown> }[];
type Request = {
  resourceSpans: {
    resource: { attributes: Attributes };
    scopeSpans: {
      spans: (Omit<CollectedSpan, 'attributes' | 'status' | 'service'> & {
        attributes: Attributes;
        status: { code?: number };
      })[];
    }[];
  }[];
};

function spansOf({ resourceSpans }: Request): CollectedSpan[] {
  const plain = (attributes: Attributes) =>
    Object.fromEntries(attributes.map(({ key, value }) => [key, Object.values(value)[0]]));
  return resourceSpans.flatMap(({ resource, scopeSpans }) =>
    scopeSpans.flatMap((scope) =>
      scope.spans.map(({ name, traceId, spanId, parentSpanId, attributes, status }) => ({
        service: String(plain(resource.attributes)['service.name']),
        ...{ name, traceId, spanId, parentSpanId: parentSpanId ?? '' },
        status: status.code ?? 0,
        attributes: plain(attributes),
      })),
    ),
  );
}
