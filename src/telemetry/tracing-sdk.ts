import { hostname } from 'node:os';
import { type ContextManager, type DiagLogger, DiagLogLevel, diag } from '@opentelemetry/api';
import { core, NodeSDK, resources } from '@opentelemetry/sdk-node';
import { succeedsWithin } from '../lifecycle.ts';
import { errorText, type Logger } from './logger.ts';
import { traceIds } from './trace-ids.ts';

/** Interval at which the same problem is reported again: a collector that is away makes one with every batch. */
const REPEAT_AFTER_MS = 10_000;

/**
 * OpenTelemetry's SDK for a relay that is a process of its own: traces, as the `OTEL_*` variables say; no metrics and
 * no logs. It works beside the relay: spans wait in a queue of bounded size, and those that find no room are dropped.
 *
 * @param version of the relay
 */
export function startSdk(
  version: string,
  logger: Logger,
): Readonly<{
  /** Sends what is left, and gives up after `deadlineMs`. Says whether all of it was sent. */
  stop(deadlineMs: number): Promise<boolean>;
}> {
  const sdk = new NodeSDK({
    // What OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say comes on top of this.
    resource: resources.defaultResource().merge(
      resources.resourceFromAttributes({
        'service.name': 'relay-service',
        'service.version': version,
        'service.instance.id': `${hostname()}:${process.pid}`,
      }),
    ),
    idGenerator: traceIds,
    // Null means none, of which the type knows nothing. The relay has no need of an AsyncLocalStorage.
    contextManager: null as unknown as ContextManager,
    // Left out, both would be sent by default.
    metricReaders: [],
    logRecordProcessors: [],
  });
  // After the SDK was made, which logs to the console where OTEL_LOG_LEVEL is set; before it starts.
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

/** The text alone, and who says it: what else OpenTelemetry would log are spans, and requests with their headers. */
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
