/**
 * The engine's limit: a BullMQ queue whose jobs do nothing, added and processed in one process. The jobs have the
 * data, ids and options of the relay's own.
 */
import { type Contender, startChild } from '../contender.ts';
import { cpuBetween, cpuSoFar } from '../cpu.ts';
import type { Servers, Undo } from '../servers.ts';
import type { SampleJob } from './relay.ts';

export type NoopConfig = Readonly<{
  redisUrl: string;
  /** Jobs at once. */
  concurrency: number;
  /** Jobs in one call, and calls at once. */
  batch: number;
  calls: number;
  /** Jobs that may wait; a backlog of a million is added as room is made. */
  mostWaiting: number;
  /** What every job is like. */
  sample: SampleJob;
}>;

/** More calls at once, and 200 or 300 jobs at once, made no difference that could be told from noise. */
const BEST = { concurrency: 100, batch: 100, calls: 1, mostWaiting: 20_000 };

export async function openNoop(
  servers: Servers,
  sample: SampleJob,
  undo: Undo,
  tuning: Partial<typeof BEST> = {},
): Promise<Contender> {
  const config: NoopConfig = { redisUrl: servers.redisServer.url, ...BEST, ...tuning, sample };
  const child = await startChild('noop-child.ts', config, undo);
  return {
    name: 'no-op queue',
    describe: 'BullMQ jobs of the same size that do nothing: the limit of the engine',
    async drain({ events }) {
      const before = await cpuSoFar(servers, [child.pid]);
      const { seconds } = await child.ask<{ seconds: number }>({ jobs: events });
      return { events, seconds, cpu: cpuBetween(before, await cpuSoFar(servers, [child.pid])) };
    },
  };
}
