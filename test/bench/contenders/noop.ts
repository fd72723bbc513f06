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
  /** Jobs at once; 200 is a fifth slower. */
  concurrency: number;
  /** Jobs in one call. */
  batch: number;
  /** What every job is like. */
  sample: SampleJob;
}>;

export async function openNoop(servers: Servers, sample: SampleJob, undo: Undo): Promise<Contender> {
  const config: NoopConfig = { redisUrl: servers.redisServer.url, concurrency: 100, batch: 100, sample };
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
