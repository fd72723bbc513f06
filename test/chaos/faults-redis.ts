import { setTimeout as delay } from 'node:timers/promises';
import { sampleEvent } from '../demo/sample.ts';
import { cutAof, endOfAof } from '../support/aof.ts';
import { redisRules } from '../support/least-privilege.ts';
import { type Fault, SERVER_BACK_MS } from './fault.ts';
import { judgeBeforeErasing } from './grade.ts';
import { persistently } from './patience.ts';
import { between, pick } from './random.ts';
import { REFUSED_TOPICS, TOPICS, turncoatTopic } from './topics.ts';
import { REDIS_USER, STREAM, type World } from './world.ts';

/** What `appendfsync everysec` may lose. */
const LOST_TAIL_MS = 1_000;
const TURNCOAT_EVENTS = 20;
/** Below the 3.5 s after which an event that is refused has one retry left: nobody dies of it. */
const WITHDRAWN_MS = 3_000;
const KEYS_PER_SCAN = 1_000;

/** FLUSHALL, but the keys of the wrong type are there again at once: they are a fault of their own. */
const emptied = ({ client }: World) =>
  client
    .multi()
    .flushall()
    .mset(...REFUSED_TOPICS.flatMap((topic) => [topic, 'not a stream']))
    .exec();

async function deleteMatching({ client }: World, pattern: string): Promise<void> {
  for (let cursor = '0'; ; ) {
    const [next, keys] = await client.scan(cursor, 'MATCH', pattern, 'COUNT', KEYS_PER_SCAN);
    if (keys.length > 0) await client.del(...keys);
    if (next === '0') return;
    cursor = next;
  }
}

const withdrawn = (name: string, describe: string, rules: readonly string[]): Fault => ({
  name,
  describe,
  lane: 'redis',
  lastsMs: WITHDRAWN_MS,
  async inject({ client }) {
    await client.call('ACL', 'SETUSER', REDIS_USER, ...rules);
    return () => client.call('ACL', 'SETUSER', REDIS_USER, ...redisRules());
  },
});

export const redisFaults: readonly Fault[] = [
  {
    name: 'redis-restart',
    describe: 'kill -9, started again after 2 s from its append-only file',
    lane: 'redis',
    lastsMs: 2_000,
    recoveryMs: SERVER_BACK_MS,
    async inject({ redis }) {
      await redis.kill('SIGKILL');
      return () => redis.restart();
    },
  },
  {
    name: 'redis-power-cut',
    describe: 'kill -9, and the last second of the append-only file was never written',
    lane: 'redis',
    losesData: true,
    lastsMs: 1_000,
    recoveryMs: SERVER_BACK_MS,
    async inject({ redis, redisFolder }) {
      const position = await endOfAof(redisFolder);
      await delay(LOST_TAIL_MS);
      await redis.kill('SIGKILL');
      await cutAof(redisFolder, position);
      return () => redis.restart();
    },
  },
  {
    name: 'redis-flushall',
    describe: 'FLUSHALL',
    lane: 'redis',
    losesData: true,
    async inject(world) {
      await persistently(() => judgeBeforeErasing(world));
      await emptied(world);
      return undefined;
    },
  },
  {
    name: 'redis-stream-remade',
    describe: 'a stream is deleted, and made again at once by a consumer: XGROUP CREATE … MKSTREAM',
    lane: 'redis',
    losesData: true,
    async inject(world, random) {
      await persistently(() => judgeBeforeErasing(world));
      const stream = pick(random, TOPICS) ?? STREAM;
      await world.client.multi().del(stream).xgroup('CREATE', stream, 'consumer', '$', 'MKSTREAM').exec();
      return undefined;
    },
  },
  {
    name: 'redis-scheduler-removed',
    describe: 'the claim schedule is removed, with the jobs of its queue',
    lane: 'redis',
    async inject({ queues }) {
      for (const { key } of await queues.claim.getJobSchedulers()) await queues.claim.removeJobScheduler(key);
      await queues.claim.drain(true);
      return undefined;
    },
  },
  {
    name: 'redis-jobs-removed',
    describe: 'every key of the publish queue is deleted',
    lane: 'redis',
    async inject(world) {
      await deleteMatching(world, 'bull:relay-publish:*');
      return undefined;
    },
  },
  {
    name: 'redis-script-flush',
    describe: 'SCRIPT FLUSH, ten times',
    lane: 'redis',
    async inject({ client }) {
      for (let time = 0; time < 10; time++) {
        await client.script('FLUSH');
        await delay(100);
      }
      return undefined;
    },
  },
  {
    name: 'redis-memory-full',
    describe: 'maxmemory is reached for 5 s (noeviction)',
    lane: 'redis',
    lastsMs: 5_000,
    async inject({ client }) {
      await client.config('SET', 'maxmemory', '1');
      return () => client.config('SET', 'maxmemory', '0');
    },
  },
  {
    name: 'redis-client-pause',
    describe: 'CLIENT PAUSE for 5 s',
    lane: 'redis',
    lastsMs: 5_000,
    async inject({ client }) {
      await client.client('PAUSE', 5_000);
      return undefined;
    },
  },
  {
    name: 'redis-stopped',
    describe: 'the process hangs (SIGSTOP) for 8 s',
    lane: 'redis',
    lastsMs: 8_000,
    recoveryMs: SERVER_BACK_MS,
    async inject({ redis }) {
      redis.pause();
      return async () => redis.resume();
    },
  },
  {
    name: 'redis-wrong-type',
    describe: 'the stream of some events is a string for 3 s',
    lane: 'redis',
    lastsMs: 3_000,
    async inject({ client, workload }, random) {
      const topic = turncoatTopic(between(random, 1, 1_000_000));
      await client.set(topic, 'not a stream');
      const events = Array.from({ length: TURNCOAT_EVENTS }, () => ({ ...sampleEvent(), topic }));
      await workload.write(events);
      return () => client.del(topic);
    },
  },
  withdrawn('redis-acl-streams', 'the relay may not touch the streams for 3 s', ['resetkeys', '~bull:*']),
  // BullMQ keeps its events in streams as well: its scripts break half-way, after some of their changes.
  withdrawn('redis-acl-xadd', "the relay may not run XADD for 3 s, BullMQ's scripts neither", ['-xadd']),
  withdrawn('redis-acl-all', 'the relay may do nothing for 3 s', ['resetkeys', '-@all']),
];
