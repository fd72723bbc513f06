/** The pods of a run, each behind proxies of its own, and what a platform does for them: who ends is replaced. */
import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { type Pod, startPod } from '../demo/pod.ts';
import { type NetworkLink, startProxy } from '../support/proxy.ts';

export const CLI = fileURLToPath(new URL('../../dist/cli.js', import.meta.url));
/** As a platform takes to notice, and to start another. */
const REPLACE_AFTER_MS = 1_000;
/** Above the start-up timeout of a pod (30 s), which it may spend waiting for servers that are down. */
const READY_DEADLINE_MS = 60_000;
/** Above RELAY_SHUTDOWN_TIMEOUT (25 s). */
const STOP_DEADLINE_MS = 40_000;
/** "Database or Redis not reachable within RELAY_STARTUP_TIMEOUT": what a pod that starts in an outage says. */
const EXIT_NO_SERVERS = 69;

export type Links = Readonly<{ redis: NetworkLink; postgres: NetworkLink }>;

export type Fleet = Readonly<{
  /** Numbers of the pods that are kept alive. */
  slots: readonly number[];
  /** The proxies of every pod. */
  links: readonly Links[];
  /** Ends a pod and resolves when it is gone; another takes its place after a moment. */
  end(slot: number, signal: NodeJS.Signals): Promise<void>;
  /** As a rolling deploy does: the new pod is ready before the old one is told to go. */
  roll(slot: number): Promise<void>;
  /** A pod beside the others that nobody replaces. `script`: instead of the relay's own command. */
  extra(env: Readonly<Record<string, string>>, script?: string): Promise<Pod>;
  waitReady(): Promise<void>;
  /** Pods that ended though nobody ended them. */
  surprises(): readonly string[];
  /** Ends every pod, in the orderly way at first. */
  stop(): Promise<void>;
  /** Writes what each pod said to a file of its own. */
  writeLogs(folder: string): Promise<void>;
}>;

export type FleetOptions = Readonly<{
  pods: number;
  redisPort: number;
  postgresPort: number;
  /** What every pod is started with, given the ports it is to connect to. */
  env(redisPort: number, postgresPort: number): Record<string, string>;
}>;

export async function startFleet(options: FleetOptions): Promise<Fleet> {
  const slots = Array.from({ length: options.pods }, (_, slot) => slot);
  // One more: extra pods share it.
  const links: Links[] = await Promise.all(
    [...slots, slots.length].map(async () => ({
      redis: await startProxy(options.redisPort),
      postgres: await startProxy(options.postgresPort),
    })),
  );
  const everyPod: { name: string; pod: Pod }[] = [];
  const current = new Map<number, Pod>();
  const expected = new Set<Pod>();
  const surprises: string[] = [];
  let stopping = false;

  async function start(
    name: string,
    slot: number,
    more: Readonly<Record<string, string>> = {},
    cli = CLI,
  ): Promise<Pod> {
    const { redis, postgres } = links[slot] as Links;
    const pod = await startPod({ cli, env: { ...options.env(redis.port, postgres.port), ...more } });
    everyPod.push({ name, pod });
    return pod;
  }

  async function keep(slot: number, started?: Pod): Promise<void> {
    const pod = started ?? (await start(`pod-${slot + 1}`, slot));
    current.set(slot, pod);
    void pod.exited.then(async ({ code, signal }) => {
      if (stopping || current.get(slot) !== pod) return;
      if (!expected.has(pod) && code !== EXIT_NO_SERVERS) {
        surprises.push(`pod ${slot + 1} (pid ${pod.pid}) ended by itself: ${signal ?? `exit code ${code}`}`);
      }
      await delay(REPLACE_AFTER_MS);
      if (!stopping) await keep(slot);
    });
  }

  function podIn(slot: number): Pod {
    const pod = current.get(slot);
    if (pod === undefined) throw new Error(`no pod in slot ${slot}`);
    return pod;
  }

  await Promise.all(slots.map((slot) => keep(slot)));

  return {
    slots,
    links,
    async end(slot, signal) {
      const pod = podIn(slot);
      expected.add(pod);
      await endInTime(pod, signal);
    },
    async roll(slot) {
      const old = podIn(slot);
      const fresh = await start(`pod-${slot + 1}`, slot);
      await fresh.waitReady(READY_DEADLINE_MS);
      await keep(slot, fresh);
      await endInTime(old, 'SIGTERM');
    },
    extra: (env, script) => start('extra', slots.length, env, script),
    async waitReady() {
      await Promise.all(slots.map((slot) => podIn(slot).waitReady(READY_DEADLINE_MS)));
    },
    surprises: () => surprises,
    async stop() {
      stopping = true;
      await Promise.all(everyPod.map(({ pod }) => endInTime(pod, 'SIGTERM')));
      await Promise.all(links.flatMap(({ redis, postgres }) => [redis.close(), postgres.close()]));
    },
    async writeLogs(folder) {
      for (const { name, pod } of everyPod) {
        await writeFile(join(folder, `${name}-${pod.pid}.log`), `${pod.lines.join('\n')}\n`);
      }
    },
  };
}

/** Whoever does not go in time is killed: an orderly stop is what other tests are about. */
async function endInTime(pod: Pod, signal: NodeJS.Signals): Promise<void> {
  const inTime = new AbortController();
  const late = delay(STOP_DEADLINE_MS, 'late', { signal: inTime.signal }).catch(() => 'gone');
  const how = await Promise.race([pod.kill(signal), late]);
  inTime.abort();
  if (how === 'late') await pod.kill('SIGKILL');
}
