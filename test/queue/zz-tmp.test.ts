import { expect, test } from 'vitest';
import { createWorkers, WORKER_CONNECTION } from '../../src/queue/workers.ts';
import { createRedis } from '../support/servers.ts';
import { openAdminRedis, openRedis, silent, deferred } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';
import { Queue } from 'bullmq';
const server = await createRedis();
const admin = openAdminRedis(server.adminUrl);
const clients = async () => String(await admin.client('LIST')).split('\n').filter((x) => x.includes('cmd=info') || x.includes('bzpopmin') || x.includes('cmd=NULL')).map((x)=>/ age=(\d+)/.exec(x)?.[1]+/cmd=(\S+)/.exec(x)![1]!).join();
for (const [name, deadline, jobs] of [['idle', 10000, 0], ['tiny', 1, 0], ['hung then ends', 200, 4], ['ends', 5000, 4]] as const)
test(name, async () => {
  await admin.flushall();
  const connection = openRedis(server.url, WORKER_CONNECTION);
  const gate = deferred();
  const queue = new Queue('many', { connection });
  const w = createWorkers<number, string>({ queueName: 'many', queuePrefix: 'bull', connection, concurrency: 8, timeoutMs: 60000, logger: silent, process: async () => { await gate.promise; return { kind: 'completed', result: '' }; } });
  w.start();
  await waitFor(async () => (await clients()).split(',').filter((x) => x.includes('bzpopmin')).length === 8, { what: 'x' });
  for (let i = 0; i < jobs; i++) await queue.add('x', i);
  await waitFor(() => w.inProgress() === jobs, { what: 'y' });
  const t = Date.now();
  if (name === 'ends') setTimeout(() => gate.resolve(), 500);
  await w.stop(deadline);
  console.log(name, 'took', Date.now() - t, await clients());
  if (name.startsWith('hung')) { gate.resolve(); }
  await new Promise((r) => setTimeout(r, 7000));
  console.log(name, 'later', await clients());
}, 60000);
