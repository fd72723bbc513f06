import { hostname } from 'node:os';
import { type ContextManager, type DiagLogger, DiagLogLevel, diag } from '@opentelemetry/api';
import { core, NodeSDK, resources } from '@opentelemetry/sdk-node';
import { succeedsWithin } from '../lifecycle.ts';
import { errorText, type Logger } from './logger.ts';
import { traceIds } from './trace-ids.ts';

/** Shortest time between two reports: an unreachable collector causes a problem with every batch. */
const REPEAT_AFTER_MS = 10_000;

/**
 * OpenTelemetry's SDK for `relay start`: exports traces as the `OTEL_*` variables say, no metrics and no logs. It never
 * holds the relay up: spans wait in a bounded queue, and are dropped when it is full.
 *
 * @param version of the relay
 */
export function startSdk(
  version: string,
  logger: Logger,
): Readonly<{
  /** Sends the remaining spans. Returns false if that took longer than `deadlineMs`. */
  stop(deadlineMs: number): Promise<boolean>;
}> {
  const sdk = new NodeSDK({
    // OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES override this.
    resource: resources.defaultResource().merge(
      resources.resourceFromAttributes({
        'service.name': 'relay-service',
        'service.version': version,
        'service.instance.id': `${hostname()}:${process.pid}`,
      }),
    ),
    idGenerator: traceIds,
    // Null means none, though the type does not say so. The relay needs no AsyncLocalStorage.
    contextManager: null as unknown as ContextManager,
    // By default, the SDK would send metrics and logs.
    metricReaders: [],
    logRecordProcessors: [],
  });
  // The SDK's constructor sets a console logger if OTEL_LOG_LEVEL is set: replace it before the SDK starts.
  const report = reportProblems(logger);
  diag.setLogger(toLogger(logger, report), {
    logLevel: core.diagLogLevelFromString(process.env.OTEL_LOG_LEVEL) ?? DiagLogLevel.WARN,
    suppressOverrideMessage: true,
  });
  core.setGlobalErrorHandler((error) => report(errorText(error instanceof Error ? error : String(error))));
  sdk.start();
  logger.info({}, 'traces are on');
  return { stop: (deadlineMs) => succeedsWithin(deadlineMs, sdk.shutdown()) };
}

function reportProblems(logger: Logger): (reason: string) => void {
  let reportedAt = Number.NEGATIVE_INFINITY;
  let problems = 0;
  return (reason) => {
    problems++;
    logger.debug({ reason }, 'a problem with traces');
    if (performance.now() - reportedAt < REPEAT_AFTER_MS) return;
    logger.warn({ reason, problems }, 'traces are not sent as they should be; the relay goes on without');
    reportedAt = performance.now();
    problems = 0;
  };
}

/** Logs only the first two arguments, component and text: the others are spans, and requests with their headers. */
function toLogger(logger: Logger, report: (reason: string) => void): DiagLogger {
  const text = (said: unknown[]) =>
    errorText(
      said
        .slice(0, 2)
        .filter((it) => typeof it === 'string')
        .join(': '),
    );
  const problem = (...said: unknown[]) => report(text(said));
  const detail = (...said: unknown[]) => logger.debug({ detail: text(said) }, 'OpenTelemetry');
  return { error: problem, warn: problem, info: detail, debug: detail, verbose: detail };
}
