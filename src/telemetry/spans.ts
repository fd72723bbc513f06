import {
  type Attributes,
  type Context,
  context,
  createTraceState,
  ROOT_CONTEXT,
  type Span,
  SpanKind,
  SpanStatusCode,
  trace,
} from '@opentelemetry/api';
import type { Telemetry } from 'bullmq';
import { BullMQOtel } from 'bullmq-otel';
import { type Attempt, brief, type OutboxEvent, type TraceContext } from '../event.ts';
import { namedAfter } from './trace-ids.ts';
import type { Tracing } from './tracing.ts';

const TRACER = 'relay-service';

/**
 * Spans, by the tracer that is registered with OpenTelemetry in this process: that of the relay's own SDK
 * (tracing-sdk.ts), or of the program that embeds the relay. The caller asks `isTracerRegistered` first.
 *
 * Names and attributes follow OpenTelemetry's conventions for messaging and contain no payload.
 *
 * @param version of the relay
 * @param dlqStreamName where dead letters go
 */
export function createTracing(version: string, dlqStreamName: string): Tracing {
  const tracer = trace.getTracer(TRACER, version);
  /** Spans of this process, by the trace context that is handed on with the event. */
  const contexts = new WeakMap<TraceContext, Context>();
  const runs = createJobSpans();

  /** The previous step, if it ran in this process; else BullMQ's span of this job run; else what the job or the row says. */
  function parentOf({ trace: handedOn }: OutboxEvent): Context {
    if (!handedOn) return ROOT_CONTEXT;
    const own = contexts.get(handedOn);
    if (own !== undefined) return own;
    const said = parsed(handedOn);
    const run = runs.current();
    return run && traceIdOf(run) === traceIdOf(said) ? run : said;
  }

  function begin(
    name: string,
    kind: SpanKind,
    event: OutboxEvent,
    attributes: Attributes,
  ): { span: Span; traced: OutboxEvent } {
    const options = { kind, attributes: { ...attributesOf(name, event), ...attributes } };
    const parent = parentOf(event);
    const start = () => tracer.startSpan(name, options, parent);
    const span = parent === ROOT_CONTEXT ? namedAfter(event.eventId, start) : start();
    const handedOn = written(span);
    contexts.set(handedOn, contextOf(span));
    return { span, traced: { ...event, trace: handedOn } };
  }

  async function during<T>(
    { span, traced }: ReturnType<typeof begin>,
    work: (traced: OutboxEvent) => Promise<T>,
    conclude: (span: Span, result: T) => void,
  ): Promise<T> {
    try {
      // So that spans of other instrumentation, such as for Redis calls, are children of this one.
      const result = await context.with(contextOf(span), work, undefined, traced);
      conclude(span, result);
      return result;
    } catch (error) {
      fail(span, (error as Error).message);
      throw error;
    } finally {
      span.end();
    }
  }

  return {
    async claim(events, add) {
      const begun = events.map((event) =>
        begin('claim', SpanKind.PRODUCER, event, { ...operation('create') }),
      );
      try {
        await add(begun.map(({ traced }) => traced));
      } catch (error) {
        for (const { span } of begun) fail(span, (error as Error).message);
        throw error;
      } finally {
        for (const { span } of begun) span.end();
      }
    },

    publish: (event, attempt, work) =>
      during(
        begin('publish', SpanKind.INTERNAL, event, { ...operation('process'), 'relay.attempt': attempt }),
        work,
        concludeAttempt,
      ),

    append: (event, work) =>
      during(begin('append', SpanKind.PRODUCER, event, operation('send')), work, concludeAppend),

    deadLetter(event, { reason, attempts }, work) {
      const begun = begin('dead letter', SpanKind.PRODUCER, event, {
        ...operation('send'),
        'messaging.destination.name': dlqStreamName,
        'relay.attempt': attempts,
      });
      fail(begun.span, reason);
      return during(begun, work, concludeAppend);
    },

    jobs: runs.telemetry,
  };
}

const operation = (type: 'create' | 'process' | 'send'): Attributes => ({ 'messaging.operation.type': type });

const attributesOf = (name: string, event: OutboxEvent): Attributes => ({
  'messaging.system': 'redis',
  'messaging.operation.name': name,
  'messaging.destination.name': brief(event.topic),
  'messaging.message.id': event.eventId,
  'relay.outbox.id': event.id,
  'relay.event.type': brief(event.eventType),
  'relay.aggregate.type': brief(event.aggregateType),
  'relay.aggregate.id': event.aggregateId,
});

function concludeAttempt(span: Span, attempt: Attempt): void {
  span.setAttribute('relay.outcome', attempt.kind);
  if ('reason' in attempt) fail(span, attempt.reason);
}

function concludeAppend(
  span: Span,
  outcome: Readonly<{ status: string; entryId?: string; reason?: string }>,
): void {
  span.setAttribute('relay.outcome', outcome.status);
  if (outcome.entryId !== undefined) span.setAttribute('relay.entry.id', outcome.entryId);
  if (outcome.reason !== undefined) fail(span, outcome.reason);
}

/** The code in an error of Redis: `WRONGTYPE Operation against a key …`. */
const CODE = /^[A-Z][A-Z0-9]+\b/;

function fail(span: Span, reason: string): void {
  span.setAttribute('error.type', CODE.exec(reason)?.[0] ?? '_OTHER');
  span.setStatus({ code: SpanStatusCode.ERROR, message: brief(reason) });
}

/** Jobs and entries always have the W3C form, whatever OTEL_PROPAGATORS says. */
function written(span: Span): TraceContext {
  const { traceId, spanId, traceFlags, traceState } = span.spanContext();
  const tracestate = traceState?.serialize();
  return {
    traceparent: `00-${traceId}-${spanId}-${traceFlags.toString(16).padStart(2, '0')}`,
    ...(tracestate && { tracestate }),
  };
}

function parsed({ traceparent, tracestate }: TraceContext): Context {
  const [, traceId = '', spanId = '', flags = ''] = traceparent.split('-');
  return trace.setSpanContext(ROOT_CONTEXT, {
    traceId,
    spanId,
    traceFlags: Number.parseInt(flags, 16),
    isRemote: true,
    ...(tracestate !== undefined && { traceState: createTraceState(tracestate) }),
  });
}

const traceIdOf = (ctx: Context) => trace.getSpanContext(ctx)?.traceId;
const contextOf = (span: Span): Context => trace.setSpan(ROOT_CONTEXT, span);

/**
 * BullMQ's span of each job run, by bullmq-otel. Its other spans are left out: checks for stalled jobs and renewals of locks
 * belong to no event, and would begin a trace every few seconds.
 *
 * The run that an attempt belongs to is kept in a variable, which works because BullMQ calls the processor synchronously.
 * OpenTelemetry's AsyncLocalStorage slows down every promise on Node 20.
 */
function createJobSpans(): { telemetry: Telemetry; current: () => Context | undefined } {
  const { tracer, contextManager } = new BullMQOtel({ tracerName: TRACER });
  let current: Context | undefined;
  const nothing: ReturnType<typeof tracer.startSpan> = {
    setSpanOnContext: (ctx) => ctx,
    setAttribute: () => {},
    setAttributes: () => {},
    addEvent: () => {},
    recordException: () => {},
    end: () => {},
  };
  const telemetry: Telemetry = {
    tracer: {
      startSpan: (name, options, parent) =>
        parent === undefined ? nothing : tracer.startSpan(name, options, parent),
    },
    contextManager: {
      getMetadata: (ctx) => contextManager.getMetadata(ctx),
      fromMetadata: (active, metadata) => {
        try {
          return parsed(JSON.parse(metadata));
        } catch {
          // Not written by a relay. A missing span must not make the job fail.
          return active;
        }
      },
      with: (ctx, work) => {
        const before = current;
        current = ctx === ROOT_CONTEXT ? undefined : (ctx as Context);
        try {
          return contextManager.with(ctx, work);
        } finally {
          current = before;
        }
      },
      active: () => contextManager.active(),
    },
  };
  return { telemetry, current: () => current };
}
