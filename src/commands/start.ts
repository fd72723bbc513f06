import { setFlagsFromString } from 'node:v8';
import type { Command } from 'commander';
import type { RelayConfig } from '../config/config.ts';
import { boardUrl } from '../http/dashboard-options.ts';
import { succeedsWithin } from '../lifecycle.ts';
import { createRelay } from '../relay.ts';
import { createLogger, type Logger, logWhatOthersPrint } from '../telemetry/logger.ts';
import { tracesWanted } from '../telemetry/tracing.ts';
import { VERSION } from '../version.ts';
import { EXIT, exitCodeOf, fail, warnOfUnknownVariables, withConfig } from './command.ts';
import { signalled } from './signals.ts';
import { helpColumns } from './terminal.ts';
import { describeVariables, settings } from './variables.ts';

/**
 * V8 lets the heap grow to four times what lives before it collects all of it: 25 MiB of a busy pod became 225 MiB of
 * resident memory. With 50 % it was 152 MiB, with 20 % 144, for 3 % of its CPU time. No cap: what lives may be as large
 * as it must be.
 */
const HEAP_GROWING_PERCENT = 25;

/** Longest time for sending the last traces; the relay itself has ended by then. */
const FLUSH_MS = 2_000;

export function add(command: Command): void {
  command
    .addHelpText(
      'after',
      () =>
        `\nEnvironment:\n${describeVariables(helpColumns())}\n\nTraces are switched on by the standard OTEL_* variables.`,
    )
    .action(() => withConfig(start, { logs: true }));
}

async function start(config: RelayConfig): Promise<never> {
  setFlagsFromString(`--heap-growing-percent=${HEAP_GROWING_PERCENT}`);
  const logger = createLogger(config.logLevel);
  logWhatOthersPrint(logger);
  warnOfUnknownVariables(logger);
  const traces = tracesWanted(process.env) ? await startTraces(logger) : undefined;
  const relay = createRelay(config, { logger, adjustClock: clockOfProcess() });
  const signal = signalled();
  let stopBy = Number.POSITIVE_INFINITY;
  const started = relay.start().then(() => 'started' as const);
  try {
    const first = await Promise.race([started, signal]);
    if (first === 'started') {
      const port = relay.httpPort() ?? config.httpPort;
      const dashboard = config.board && { dashboard: boardUrl(config, port) };
      logger.info({ port, ...dashboard, ...settings(config) }, 'relay started');
    }
    logger.info({ signal: await signal }, 'stopping');
    stopBy = Date.now() + config.shutdownTimeoutMs;
    started.catch((error) => logger.warn({ err: error }, 'stopped while starting'));
    // Parts that overrun get a grace each, which may add up to some seconds more.
    await succeedsWithin(config.shutdownTimeoutMs, relay.stop());
  } catch (error) {
    process.exitCode = exitCodeOf(error);
    // What an operator has to change is in the message; a stack would make it seem a bug of the relay.
    if (process.exitCode !== EXIT.failed) delete (error as Error).stack;
    logger.fatal({ err: error }, 'the relay cannot start');
    // Logs go to a collector, a person reads the sentence.
    if (process.stderr.isTTY) fail(error);
  }
  const flushMs = Math.max(0, Math.min(FLUSH_MS, stopBy - Date.now()));
  if (traces && !(await traces.stop(flushMs))) logger.warn({}, 'the last traces could not be sent in time');
  // Whatever is still open belongs to a part that overran; it must not keep the process.
  process.exit();
}

/** The process is the relay's alone, so all that goes by `Date.now()` in it, BullMQ first of all, may go by another clock. */
function clockOfProcess(): (aheadMs: number) => void {
  const now = Date.now.bind(Date);
  let ahead = 0;
  return (aheadMs) => {
    ahead = Math.round(aheadMs);
    Date.now = () => now() - ahead;
  };
}

/** Loaded only where it is wanted. Without traces the relay works as well as with them. */
async function startTraces(logger: Logger) {
  try {
    const { startSdk } = await import('../telemetry/tracing-sdk.ts');
    return startSdk(VERSION, logger);
  } catch (err) {
    const isMissing = (err as NodeJS.ErrnoException).code === 'ERR_MODULE_NOT_FOUND';
    logger.error(
      {
        err,
        ...(isMissing && {
          hint: 'install @opentelemetry/sdk-node, an optional dependency: npm install --include=optional',
        }),
      },
      'traces cannot be switched on; the relay starts without them',
    );
    return undefined;
  }
}
