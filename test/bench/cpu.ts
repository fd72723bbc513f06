/** CPU time of the processes that share the machine. */
import { readdir, readFile } from 'node:fs/promises';
import { cpus } from 'node:os';
import type { Servers } from './servers.ts';

export type CpuMicros = Readonly<{ contender: number; redis: number; postgres: number }>;

/** CPU time so far: of the contender's processes, of Redis, and of PostgreSQL with all its backends. */
export async function cpuSoFar(servers: Servers, pids: readonly number[]): Promise<CpuMicros> {
  const { postgres, redisServer } = servers;
  const times = await processTimes();
  const micros = (which: (it: ProcessTimes) => boolean) =>
    times.filter(which).reduce((sum, it) => sum + it.micros, 0);
  return {
    contender: micros((it) => pids.includes(it.pid)),
    redis: micros((it) => it.pid === redisServer.pid),
    postgres: micros((it) => it.pid === postgres.pid || it.parent === postgres.pid),
  };
}

export function cpuBetween(before: CpuMicros, after: CpuMicros): CpuMicros {
  return {
    contender: after.contender - before.contender,
    redis: after.redis - before.redis,
    postgres: after.postgres - before.postgres,
  };
}

/** Time that the cores of this machine have been busy with whatever there is, and in all, so far. */
export function coresSoFar(): Readonly<{ busyMs: number; allMs: number }> {
  const times = cpus().map((it) => it.times);
  const allMs = times.reduce((sum, it) => sum + it.user + it.nice + it.sys + it.irq + it.idle, 0);
  return { busyMs: allMs - times.reduce((sum, it) => sum + it.idle, 0), allMs };
}

type ProcessTimes = { pid: number; parent: number; micros: number };

/** User and system time of every process, from /proc; empty where there is none. */
async function processTimes(): Promise<ProcessTimes[]> {
  const pids = (await readdir('/proc').catch(() => [])).filter((name) => /^\d+$/.test(name));
  const stats = await Promise.all(pids.map((pid) => readFile(`/proc/${pid}/stat`, 'utf8').catch(() => '')));
  return stats.filter(Boolean).map((stat) => {
    const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
    return {
      pid: Number.parseInt(stat, 10),
      parent: Number(fields[1]),
      // Its own, and that of the children that have ended (backends come and go).
      micros: fields.slice(11, 15).reduce((sum, ticks) => sum + Number(ticks), 0) * 10_000,
    };
  });
}

/** Resident memory in bytes, now and at most so far, from /proc: Linux only. */
export async function residentBytes(pid: number): Promise<{ now: number; peak: number }> {
  const status = await readFile(`/proc/${pid}/status`, 'utf8');
  const bytes = (field: string) =>
    Number(new RegExp(`^${field}:\\s*(\\d+) kB`, 'm').exec(status)?.[1]) * 1024;
  return { now: bytes('VmRSS'), peak: bytes('VmHWM') };
}
