/** A Redis master with two replicas of a test file's own, watched by three sentinels. */
import { randomBytes } from 'node:crypto';
import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { RedisOptions } from 'ioredis';
import { loadConfig } from '../../src/config/load-config.ts';
import { sentinelAcl } from '../../src/operations/roles.ts';
import { type PrivateRedis, redisBinary, redisIsReady } from '../demo/servers.ts';
import { type PrivateServer, supervise } from '../demo/supervise.ts';
import { atEndOfFile } from './cleanup.ts';
import { RELAY_PASSWORD, RELAY_USER } from './least-privilege.ts';
import { createRedis, folderOfFile } from './servers.ts';
import { type AdminRedis, openAdminRedis } from './stages.ts';
import { waitFor } from './wait.ts';

const NAME = 'identity';
/** A server that is only starved by a busy machine is not taken for dead. */
const DOWN_AFTER_MS = 3_000;
const QUORUM = 2;

export type WatchedRedis = Readonly<{
  servers: readonly PrivateRedis[];
  sentinels: readonly AdminRedis[];
  /** What pods need to find the master. */
  env: Readonly<Record<string, string> & { RELAY_REDIS_URL: string }>;
  /** Of the master, whichever that is. */
  client: AdminRedis;
  master(): Promise<PrivateRedis>;
}>;

export async function createWatchedRedis(args: readonly string[] = []): Promise<WatchedRedis> {
  const first = await createRedis({ args });
  const follows = [
    '--replicaof',
    '127.0.0.1',
    String(first.port),
    '--repl-diskless-sync-delay',
    '0',
    ...args,
  ];
  const servers = [first, await createRedis({ args: follows }), await createRedis({ args: follows })];
  const toFirst = openAdminRedis(first.adminUrl);
  await waitFor(async () => (await toFirst.info('replication')).match(/state=online/g)?.length === 2, {
    what: 'the replicas to be in step',
  });
  const started = await Promise.all([1, 2, 3].map(() => startSentinel(first.port)));
  const sentinels = started.map(({ url }) => openAdminRedis(url, { enableReadyCheck: false }));
  const addresses = started.map(({ port }) => ({ host: '127.0.0.1', port }));
  for (const sentinel of sentinels) {
    await waitFor(
      async () => {
        const [others, replicas] = await Promise.all([
          sentinel.call('SENTINEL', 'SENTINELS', NAME) as Promise<unknown[]>,
          sentinel.call('SENTINEL', 'REPLICAS', NAME) as Promise<unknown[]>,
        ]);
        return others.length === 2 && replicas.length === 2;
      },
      { what: 'the sentinels to know each other and the replicas' },
    );
  }
  const client = openAdminRedis(first.adminUrl, {
    ...{ sentinels: addresses, name: NAME, maxRetriesPerRequest: null },
  } as RedisOptions);
  const hosts = addresses.map(({ host, port }) => `${host}:${port}`).join(',');
  return {
    servers,
    sentinels,
    client,
    env: {
      RELAY_REDIS_URL: first.url,
      RELAY_REDIS_SENTINELS: `redis+sentinel://${RELAY_USER}:${RELAY_PASSWORD}@${hosts}`,
      RELAY_REDIS_SENTINEL_NAME: NAME,
    },
    async master() {
      const [sentinel] = sentinels as [AdminRedis, ...AdminRedis[]];
      const address = await sentinel.call('SENTINEL', 'GET-MASTER-ADDR-BY-NAME', NAME);
      const [, port] = address as [host: string, port: string];
      return servers.find((it) => it.port === Number(port)) as PrivateRedis;
    },
  };
}

async function startSentinel(masterPort: number): Promise<PrivateServer> {
  const directory = join(await folderOfFile(), `sentinel-${randomBytes(4).toString('hex')}`);
  await mkdir(directory, { recursive: true });
  const config = join(directory, 'sentinel.conf');
  const acl = sentinelAcl(loadConfig({ RELAY_REDIS_SENTINELS: 'any' }), { redisUser: RELAY_USER }) ?? '';
  const rules = acl.replace('>password', `>${RELAY_PASSWORD}`).split(' ').slice(3).join(' ');
  await writeFile(
    config,
    [
      `sentinel monitor ${NAME} 127.0.0.1 ${masterPort} ${QUORUM}`,
      `sentinel down-after-milliseconds ${NAME} ${DOWN_AFTER_MS}`,
      `sentinel failover-timeout ${NAME} 5000`,
      `user ${RELAY_USER} ${rules}`,
    ].join('\n'),
  );
  const sentinel = await supervise({
    name: 'Sentinel',
    url: (port) => `redis://127.0.0.1:${port}`,
    directory,
    command: redisBinary(),
    args: (port) => [config, '--sentinel', '--port', String(port), '--bind', '127.0.0.1', '--dir', directory],
    identity: {},
    environment: process.env,
    stopSignal: 'SIGTERM',
    watchdogSignal: 'KILL',
    isReady: redisIsReady,
    portIsTaken: /Address already in use|Failed listening on port/,
    isPassing: /Address already in use|Failed listening on port/,
  });
  atEndOfFile(() => sentinel.kill('SIGKILL'));
  return sentinel;
}
