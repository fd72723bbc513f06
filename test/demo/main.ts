/**
 * `npm run demo`: a first look at the relay without any set-up. Starts a private PostgreSQL and Redis and two pods,
 * writes sample events, shows what becomes of them, audits the result and leaves nothing behind.
 */
import { setTimeout as delay } from 'node:timers/promises';
import { Command } from 'commander';
import { Redis } from 'ioredis';
import pg from 'pg';
import { EXIT_INTERRUPTED, interruption, wholeNumber } from './command-line.ts';
import { gradeLedger } from './ledger.ts';
import { TOPIC } from './sample.ts';
import { createScreen, type Screen } from './screen.ts';
import { DLQ_STREAM, type Stack, startStack } from './stack.ts';
import { brokenTopic, createTraffic, FIRST_FAILING } from './traffic.ts';

const DEFAULT_EVENTS = 200;
const WATCHING_RATE_PER_S = 6;
/** A run of a given number of events should not take longer, if the rate is ours to choose. */
const COUNTED_RUN_S = 8;
const RATE_MAX_PER_S = 1_500;
/** In a shorter run nobody comes to try anything. */
const WORTH_TRYING_S = 60;
const ACKNOWLEDGED_DEADLINE_MS = 30_000;
const CLEANUP_DEADLINE_MS = 30_000;

const EXIT_HELD = 0;
const EXIT_NOT_HELD = 1;

type Options = { events?: number; rate?: number; pods: number };

class Interrupted extends Error {}

const options = new Command('npm run demo --')
  .description(
    'Shows the relay at work on a private PostgreSQL and Redis: rows going in, entries coming out, and an event that ' +
      'fails. In a terminal it runs until Ctrl-C; with --events, or without a terminal, it stops by itself. ' +
      'Its exit code is 0 if the promises held, else 1.',
  )
  .option(
    '--events <number>',
    `stop after so many events (without a terminal: ${DEFAULT_EVENTS}); a run of up to ${WORTH_TRYING_S} s does not say what to try`,
    wholeNumber(10, 200_000),
  )
  .option(
    '--rate <number>',
    'events per second (default: readable, or to be done in some seconds)',
    wholeNumber(1, 5_000),
  )
  .option('--pods <number>', 'relay pods', wholeNumber(1, 8), 2)
  .parse()
  .opts<Options>();

const screen = createScreen(process.stdout);
const cleanups: (() => Promise<unknown>)[] = [];

const interrupted = interruption(() => {
  screen.blank();
  screen.note('Stopping: what is on its way still arrives. Once more to stop at once.');
});
/** Also after a failure, when what still runs beside it need not go on. */
const failed = new AbortController();
const stop = AbortSignal.any([interrupted, failed.signal]);
// The reader of our output has gone (`| head`): nobody is left to show anything to.
process.stdout.on('error', () => process.exit(EXIT_NOT_HELD));

async function play(options: Options, screen: Screen): Promise<boolean> {
  const counted = options.events !== undefined || !process.stdout.isTTY;
  const events = options.events ?? (counted ? DEFAULT_EVENTS : Number.POSITIVE_INFINITY);
  const countedRate = Math.min(
    Math.max(Math.ceil(events / COUNTED_RUN_S), WATCHING_RATE_PER_S),
    RATE_MAX_PER_S,
  );
  const ratePerSecond = options.rate ?? (counted ? countedRate : WATCHING_RATE_PER_S);

  screen.title('The relay: from identity.outbox in PostgreSQL to Redis Streams');
  const stack = await startStack({
    pods: options.pods,
    onReady: screen.step,
    onNote: screen.note,
    checkStop() {
      if (stop.aborted) throw new Interrupted('Stopped before anything was written.');
    },
    onCleanup: (undo) => cleanups.push(undo),
  });
  screen.blank();
  screen.note(
    counted
      ? `Writing ${events} events, ${ratePerSecond} per second.`
      : `Writing ${ratePerSecond} events per second, until Ctrl-C.`,
  );
  screen.blank();
  return Promise.race([run(stack, events, ratePerSecond, screen), stack.podFailure]);
}

async function run(stack: Stack, events: number, ratePerSecond: number, screen: Screen): Promise<boolean> {
  const pool = new pg.Pool({ connectionString: stack.databaseUrl, max: 4 });
  pool.on('error', () => {});
  cleanups.push(() => pool.end());
  const redis = new Redis(stack.redisUrl);
  redis.on('error', () => {});
  cleanups.push(async () => redis.disconnect());
  await pool.query(
    'CREATE TABLE identity.users (id uuid PRIMARY KEY, display_name text, active boolean NOT NULL)',
  );

  const traffic = createTraffic({
    ...{ pool, redis, screen, dlqStream: DLQ_STREAM, events, ratePerSecond },
    onQuiet() {
      if (events / ratePerSecond > WORTH_TRYING_S) suggest(stack, screen);
    },
  });
  const seenEnough = new AbortController();
  const observing = traffic.observe(seenEnough.signal).catch((error: Error) => {
    throw new Error(`${error.message}. Last lines of ${stack.lastLines()}`, { cause: error });
  });
  const drained = async (): Promise<void> => {
    await traffic.produce(stop);
    while (traffic.onTheirWay() > 0) await delay(20);
    await acknowledged(pool);
  };
  await Promise.race([drained(), observing]);
  seenEnough.abort();
  await observing;
  traffic.pulse();

  const complaints = await stack.stopPods();
  const streams = { pool, redis, defaultStream: TOPIC, dlqStream: DLQ_STREAM };
  const grade = await gradeLedger({ ...streams, mayHaveCopies: true });
  const { latenciesMs } = traffic;
  return screen.summary({
    grade,
    latenciesMs,
    heldBack: traffic.heldBack(),
    complaints: [...complaints, ...traffic.complaints()],
  });
}

function suggest({ databaseUrl, redisUrl, httpUrl, operator }: Stack, screen: Screen): void {
  const redisCli = `redis-cli -p ${new URL(redisUrl).port}`;
  const topic = brokenTopic(FIRST_FAILING);
  screen.toTry('Try, in another terminal, while this runs:', [
    [`dashboard: name ${operator.name}, password ${operator.password}`, `${httpUrl}/board`],
    ['metrics', `curl ${httpUrl}/metrics`],
    ['entries', `${redisCli} XREVRANGE ${TOPIC} + - COUNT 2`],
    [
      'the relay',
      `export RELAY_DATABASE_URL='${databaseUrl}'`,
      `export RELAY_REDIS_URL='${redisUrl}'`,
      'node dist/cli.js status',
      'node dist/cli.js dlq list',
    ],
    ['rows', `psql "$RELAY_DATABASE_URL" -Axc 'SELECT * FROM identity.outbox ORDER BY id DESC LIMIT 2'`],
    [
      `mend #${FIRST_FAILING}; others likewise, each has a topic with its number`,
      `${redisCli} DEL ${topic}`,
      `node dist/cli.js dlq replay --topic ${topic}`,
    ],
  ]);
}

/** An entry is in its stream some milliseconds before its row says so. What is late is left to the audit. */
async function acknowledged(pool: pg.Pool): Promise<void> {
  const deadline = Date.now() + ACKNOWLEDGED_DEADLINE_MS;
  while (Date.now() < deadline) {
    const { rows } = await pool.query(
      'SELECT FROM identity.outbox WHERE NOT published AND dead_lettered_at IS NULL LIMIT 1',
    );
    if (rows.length === 0) return;
    await delay(20);
  }
}

async function cleanUp(): Promise<void> {
  const deadline = setTimeout(() => {
    screen.error(
      `Cleaning up took longer than ${CLEANUP_DEADLINE_MS / 1_000} s: the rest is ended the hard way.`,
    );
    process.exit(EXIT_NOT_HELD);
  }, CLEANUP_DEADLINE_MS);
  for (const undo of cleanups.reverse()) {
    await undo().catch((error: Error) => screen.error(error.message));
  }
  clearTimeout(deadline);
}

let exitCode = EXIT_NOT_HELD;
try {
  exitCode = (await play(options, screen)) ? EXIT_HELD : EXIT_NOT_HELD;
} catch (error) {
  failed.abort();
  if (error instanceof Interrupted) {
    screen.note(error.message);
    exitCode = EXIT_INTERRUPTED;
  } else {
    screen.error(error instanceof Error ? error.message : String(error));
  }
}
await cleanUp();
// Not by itself: work that was given up after an error may still hold a timer or a connection.
process.exit(exitCode);
