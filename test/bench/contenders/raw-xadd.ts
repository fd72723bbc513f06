/** The limit of Redis: entries of the same size, appended in pipelines by one process. No table, no order, no memory. */
import { type Contender, startChild } from '../contender.ts';
import { cpuBetween, cpuSoFar } from '../cpu.ts';
import type { Servers, Undo } from '../servers.ts';

export type RawXaddConfig = Readonly<{ redisUrl: string; stream: string; batch: number; payload: string }>;

export async function openRawXadd(servers: Servers, payload: string, undo: Undo): Promise<Contender> {
  const { redis, redisServer } = servers;
  const stream = 'bench.raw-xadd.v1';
  const config: RawXaddConfig = { redisUrl: redisServer.url, stream, batch: 500, payload };
  const child = await startChild('raw-xadd-child.ts', config, undo);
  return {
    name: 'raw XADD',
    describe: 'pipelined appends, from memory: the limit of Redis',
    async drain({ events }) {
      await redis.del(stream);
      const before = await cpuSoFar(servers, [child.pid]);
      const { seconds } = await child.ask<{ seconds: number }>({ events });
      const cpu = cpuBetween(before, await cpuSoFar(servers, [child.pid]));
      const entries = await redis.xlen(stream);
      if (entries !== events) throw new Error(`raw XADD: ${entries} entries instead of ${events}`);
      await redis.del(stream);
      return { events, seconds, cpu };
    },
  };
}
