/** Everything the demo runs on: a private PostgreSQL and Redis, and relay pods in processes of their own. */
import { execFile } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { entryOf } from '../../src/config/board-users.ts';
import { hashPassword } from '../../src/http/passwords.ts';
import { cleanEnvironment, type Pod, startPod } from './pod.ts';
import { TOPIC } from './sample.ts';
import { startPrivatePostgres, startPrivateRedis } from './servers.ts';
import { temporaryFolder } from './watchdog.ts';

const MIGRATE_DEADLINE_MS = 60_000;
/** Above RELAY_SHUTDOWN_TIMEOUT, within which a pod ends by itself. */
const POD_STOP_DEADLINE_MS = 15_000;

export const DLQ_STREAM = `${TOPIC}.dlq`;

export type Stack = Readonly<{
  databaseUrl: string;
  redisUrl: string;
  /** Of the first pod, and who may log in to its dashboard. */
  httpUrl: string;
  operator: Readonly<{ name: string; password: string }>;
  /** Never resolves; rejects when a pod ends that nobody stopped. */
  podFailure: Promise<never>;
  /** The last lines that each pod wrote. */
  lastLines(): string;
  /** Stops the pods as a platform does (SIGTERM). @returns what was not as it should be */
  stopPods(): Promise<string[]>;
}>;

export type StackOptions = {
  pods: number;
  /** Told of each thing that is ready. */
  onReady(text: string): void;
  onNote(text: string): void;
  /** Throws when somebody asked to stop. */
  checkStop(): void;
  /** Registers what has to be undone at the end, in reverse order. */
  onCleanup(undo: () => Promise<unknown>): void;
};

export async function startStack({
  pods,
  onReady,
  onNote,
  checkStop,
  onCleanup,
}: StackOptions): Promise<Stack> {
  const cli = fileURLToPath(new URL('../../dist/cli.js', import.meta.url));
  const folder = await temporaryFolder('relay-demo-');
  onCleanup(folder.remove);

  const redis = await startPrivateRedis({ directory: join(folder.path, 'redis') });
  onCleanup(redis.stop);
  onReady(`Redis on port ${redis.port}`);
  checkStop();

  const postgres = await startPrivatePostgres({ directory: join(folder.path, 'postgres'), onLog: onNote });
  onCleanup(postgres.stop);
  onReady(`PostgreSQL on port ${postgres.port}`);
  checkStop();

  const operator = { name: 'demo', password: randomBytes(9).toString('base64url') };
  const environment = {
    RELAY_DATABASE_URL: postgres.url,
    RELAY_REDIS_URL: redis.url,
    RELAY_STREAM_NAME: TOPIC,
    RELAY_DLQ_STREAM_NAME: DLQ_STREAM,
    // The audit at the end wants to see every entry.
    RELAY_STREAM_MAXLEN: '0',
    RELAY_DLQ_MAXLEN: '0',
    // Retries within seconds instead of within half an hour.
    RELAY_RETRY_BASE_DELAY: '1',
    RELAY_MAX_RETRY_ATTEMPTS: '2',
    RELAY_SHUTDOWN_TIMEOUT: '10',
    RELAY_BOARD: 'true',
    RELAY_BOARD_USERS: entryOf({
      ...{ name: operator.name, role: 'operator', hash: await hashPassword(operator.password) },
    }),
  };
  await migrate(cli, environment);
  onReady('relay migrate: identity.outbox is there');
  checkStop();

  const running: Pod[] = [];
  let stopping = false;
  let failPods: (error: Error) => void = () => {};
  const podFailure = new Promise<never>((_, fail) => {
    failPods = fail;
  });
  // Not everybody waits for it all the time.
  podFailure.catch(() => {});
  const lastLines = (): string =>
    running
      .map((pod, index) => `pod ${index + 1}:\n${pod.lines.slice(-10).join('\n') || '(wrote nothing)'}`)
      .join('\n');

  onCleanup(async () => {
    stopping = true;
    await Promise.all(running.map((pod) => pod.kill('SIGKILL')));
  });
  for (let number = 1; number <= pods; number++) {
    const pod = await startPod({ cli, env: environment });
    running.push(pod);
    const report = (how: string): void => {
      if (!stopping)
        failPods(new Error(`Pod ${number} ended unexpectedly (${how}). Last lines of ${lastLines()}`));
    };
    pod.exited.then(
      ({ code, signal }) => report(signal ?? `exit code ${code}`),
      (error: Error) => report(error.message),
    );
  }
  await Promise.all(running.map((pod) => pod.waitReady()));
  for (const [index, pod] of running.entries())
    onReady(`relay pod ${index + 1}: pid ${pod.pid}, ${pod.url}/health`);
  checkStop();

  return {
    databaseUrl: postgres.url,
    redisUrl: redis.url,
    httpUrl: running[0]?.url ?? '',
    operator,
    podFailure,
    lastLines,
    async stopPods() {
      stopping = true;
      const complaints = running.map(async (pod, index) => {
        const ended = pod.kill('SIGTERM');
        const expired = new AbortController();
        const late = delay(POD_STOP_DEADLINE_MS, undefined, { signal: expired.signal }).catch(
          () => undefined,
        );
        const exit = await Promise.race([ended, late]);
        expired.abort();
        if (exit?.code === 0) return [];
        const how = exit ? `ended with ${exit.signal ?? `exit code ${exit.code}`}` : 'did not end in time';
        return [`pod ${index + 1} ${how} after SIGTERM`];
      });
      return (await Promise.all(complaints)).flat();
    },
  };
}

async function migrate(cli: string, environment: Record<string, string>): Promise<void> {
  try {
    await promisify(execFile)(process.execPath, [cli, 'migrate'], {
      env: { ...cleanEnvironment(), ...environment },
      timeout: MIGRATE_DEADLINE_MS,
      killSignal: 'SIGKILL',
    });
  } catch (error) {
    const { stdout = '', stderr = '', message } = error as Error & { stdout?: string; stderr?: string };
    throw new Error(`relay migrate failed: ${`${stdout}${stderr}`.trim() || message}`, { cause: error });
  }
}
