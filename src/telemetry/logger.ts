/**
 * Log lines: one JSON object per line on stdout, with `level`, `time`, `service`, `pod`, `pid`, `msg` and fields.
 *
 * Errors of libraries contain what must not be logged: ioredis keeps the arguments of the failed command (payloads,
 * AUTH), drizzle puts every query parameter into the message, PostgreSQL quotes whole rows in `detail`. So only the parts
 * of an error that are listed here are logged, and they are redacted.
 */
import { hostname } from 'node:os';
import { format } from 'node:util';
import { type DestinationStream, pino, stdTimeFunctions } from 'pino';
import type { RelayConfig } from '../config/config.ts';
import { redactUrls } from '../config/connection-urls.ts';
import { printableJson } from '../config/printable.ts';

type LogMethod = (fields: Record<string, unknown>, message: string) => void;

/**
 * The part of pino's interface that the relay uses. A program that embeds the relay may pass its own logger. Errors are
 * always in the field `err`: let its serializer call `serializeError`, which keeps personal data out.
 */
export type Logger = {
  trace: LogMethod;
  debug: LogMethod;
  info: LogMethod;
  warn: LogMethod;
  error: LogMethod;
  fatal: LogMethod;
};

export type LogLevel = RelayConfig['logLevel'];

/** Of lines that stdout does not take, the first are kept up to this size. */
const KEPT_BYTES = 1024 * 1024;

/** Written at once, so that no end of the process loses a line or changes the order. */
function stdout(): DestinationStream {
  const written = pino.destination({ dest: 1, sync: true, maxLength: KEPT_BYTES });
  // The disk for logs is full: events go on, and the lines are written when there is room again. Unheard, it ends the process.
  written.on('error', () => {});
  return written;
}

/** @param destination default: stdout */
export function createLogger(level: LogLevel, destination: DestinationStream = stdout()): Logger {
  return pino(
    {
      level,
      base: { service: 'relay-service', pod: hostname(), pid: process.pid },
      timestamp: stdTimeFunctions.isoTime,
      formatters: { level: (label) => ({ level: label }) },
      serializers: { err: serializeError },
    },
    // Lines are read in terminals: no escape sequences.
    { write: (line) => destination.write(printableJson(line)) },
  );
}

const CONSOLE = { debug: 'debug', log: 'info', info: 'info', warn: 'warn', error: 'error' } as const;

/**
 * Libraries print with `console`. Node.js writes its warnings, and the error that ends the process, as text to stderr.
 * From this call on, all of that goes to the log. An uncaught error still ends the process.
 */
export function logWhatOthersPrint(logger: Logger): void {
  for (const [method, level] of Object.entries(CONSOLE) as [keyof typeof CONSOLE, LogLevel][])
    console[method] = (...parts: unknown[]) => {
      const text = format(...parts.map((part) => (part instanceof Error ? errorText(part) : part)));
      logger[level]({ text: cut(redactUrls(text)) }, 'a library printed this');
    };
  process.removeAllListeners('warning'); // Node's own listener, which prints
  process.on('warning', (warning) => logger.warn({ err: warning }, 'warning of Node.js'));
  process.removeAllListeners('uncaughtException');
  process.on('uncaughtException', (error, origin) => {
    logger.fatal({ err: error, origin }, 'the pod ends: nobody caught this error');
    process.exit(1);
  });
}

/** Most kinds of lines that are remembered. */
const MAX_KINDS = 100;

/**
 * For warnings that may come at any speed: of each kind one in `everyMs` is written, with the number of those that were left
 * out before it (`sinceTheLast`).
 */
export function createSpacedWarnings(logger: Logger, everyMs: number) {
  const kinds = new Map<string, { at: number; leftOut: number }>();
  return (fields: Record<string, unknown>, message: string, kind = message): void => {
    const { at, leftOut } = kinds.get(kind) ?? { at: Number.NEGATIVE_INFINITY, leftOut: 0 };
    const isDue = performance.now() - at >= everyMs;
    if (kinds.size >= MAX_KINDS) kinds.clear();
    kinds.set(kind, isDue ? { at: performance.now(), leftOut: 0 } : { at, leftOut: leftOut + 1 });
    if (isDue) logger.warn({ ...fields, ...(leftOut > 0 && { sinceTheLast: leftOut }) }, message);
  };
}

const MAX_MESSAGE_LENGTH = 2_000;
const MAX_STACK_LENGTH = 8_000;
/** Errors within errors (`cause`, AggregateError) are followed this deep. */
const MAX_DEPTH = 4;
const MAX_ERRORS = 5;

/** The parts of an error that may be logged. */
type SerializedError = {
  type: string;
  message: string;
  stack?: string;
  /** SQLSTATE, errno name or library code, e.g. `ECONNREFUSED`. */
  code?: string;
  /** Name of the Redis command that failed, without its arguments. */
  command?: string;
  cause?: SerializedError;
  /** The first members of an AggregateError. */
  errors?: SerializedError[];
};

/** @param error anything that was thrown */
export function serializeError(error: unknown, depth = 0): SerializedError {
  if (!(error instanceof Error)) return { type: typeof error, message: cut(redactUrls(textOf(error))) };
  const { code, command, errors } = error as Error & { code?: unknown; command?: unknown; errors?: unknown };
  const commandName =
    typeof command === 'object' && command !== null && 'name' in command ? command.name : undefined;
  const inner = Array.isArray(errors) && depth < MAX_DEPTH ? errors.slice(0, MAX_ERRORS) : [];
  const stack = cleanStack(error);
  return {
    type: error.name,
    message: cleanMessage(error),
    ...(stack !== undefined && { stack }),
    ...((typeof code === 'string' || typeof code === 'number') && { code: String(code) }),
    ...(typeof commandName === 'string' && { command: commandName }),
    ...(error.cause !== undefined && depth < MAX_DEPTH && { cause: serializeError(error.cause, depth + 1) }),
    ...(inner.length > 0 && { errors: inner.map((one) => serializeError(one, depth + 1)) }),
  };
}

/**
 * The error as one line, for a row's `error_message` or an outcome's reason: its message and that of its root cause,
 * without secrets. At most 2,000 characters.
 */
export function errorText(error: unknown): string {
  const { message, code, cause, errors } = serializeError(error);
  const inner = cause ?? errors?.[0];
  const own = message === '' ? (code ?? 'unknown error') : message;
  return cut((inner === undefined ? own : `${own}: ${rootMessage(inner)}`).replaceAll(/\s+/g, ' '));
}

function rootMessage({ message, code, cause, errors }: SerializedError): string {
  const inner = cause ?? errors?.[0];
  return inner === undefined ? message || (code ?? 'unknown error') : rootMessage(inner);
}

function textOf(thrown: unknown): string {
  return typeof thrown === 'object' && thrown !== null ? 'an object that is not an Error' : String(thrown);
}

function cleanMessage(error: Error): string {
  // DrizzleQueryError: "Failed query: <sql>\nparams: <every parameter>". The cause says what went wrong.
  if ('query' in error && 'params' in error) return 'Failed query';
  // Redis: "ERR unknown command 'X', with args beginning with: 'a' 'b'".
  return cut(redactUrls(error.message.replace(/,? with args beginning with:.*/s, '')));
}

/** Only the frames: the stack begins with the message, which is redacted elsewhere. */
function cleanStack(error: Error): string | undefined {
  const frames = error.stack?.replace(error.message, '').match(/^ {4}at .*$/gm);
  return frames ? redactUrls(frames.join('\n')).slice(0, MAX_STACK_LENGTH) : undefined;
}

function cut(text: string): string {
  return text.length > MAX_MESSAGE_LENGTH ? `${text.slice(0, MAX_MESSAGE_LENGTH - 3)}...` : text;
}
