import type { Command } from 'commander';
import type { Redis } from 'ioredis';
import type { RelayConfig } from '../config/config.ts';
import { asking, type Pool } from '../connections/database.ts';
import { describeOwner, isSame, ownerKey, ownerOf } from '../connections/ownership.ts';
import { readOwner } from '../outbox/owner.ts';
import { streamOptionsOf } from '../stream-options.ts';
import { forgetEpoch } from '../streams/epoch.ts';
import { confirmed } from './act.ts';
import { type Connections, EXIT, withConfig, withServers } from './command.ts';
import { print, text } from './terminal.ts';

export function add(command: Command): void {
  command
    .option('--yes', 'do not ask; needed where there is no terminal')
    .addHelpText(
      'after',
      '\nA queue belongs to one database: the first whose relay used it. A failover does\n' +
        'not change that. The relay and its commands refuse a database that was created\n' +
        'anew, copied, renamed or restored to another server, and a primary from before a\n' +
        'failover (a lower timeline), until this command is run with its\n' +
        'RELAY_DATABASE_URL.\n\n' +
        'Stop the relay of the other database first. This command writes the new owner to\n' +
        'Redis. It changes no row and no entry. Before they claim again, the pods look up\n' +
        'every unpublished row in its stream. Jobs of events that have no row here end\n' +
        'without effect.',
    )
    .action(({ yes = false }: { yes?: boolean }) => withConfig((config) => own(config, yes)));
}

const own = (config: RelayConfig, yes: boolean): Promise<number> =>
  withServers(config, 'relay-own', (servers) => takeOver(config, yes, servers), { anyOwner: true });

async function takeOver(
  config: RelayConfig,
  yes: boolean,
  { pool, redis, streamRedis }: Pick<Connections, 'redis' | 'streamRedis'> & Readonly<{ pool: Pool }>,
): Promise<number> {
  const mine = await readOwner(asking(pool, config.publishTimeoutMs));
  const servers = new Map<Redis, string>([
    [redis, 'RELAY_REDIS_URL'],
    ...(streamRedis === redis ? [] : ([[streamRedis, 'RELAY_STREAM_REDIS_URL']] as const)),
  ]);
  print(text`This database: ${describeOwner(mine)}.`);
  let isOurs = true;
  for (const [server, variable] of servers) {
    const there = await ownerOf(server, config);
    isOurs &&= there !== null && isSame(mine, there);
    const whose = there === null ? 'nobody' : isSame(mine, there) ? 'this database' : describeOwner(there);
    print(
      text`Queue "${config.queueName}" (prefix "${config.queuePrefix}") at ${variable}: belongs to ${whose}.`,
    );
  }
  if (isOurs) print(text`There is nothing to take over, unless this is a primary from before a failover.`);
  const question = isOurs
    ? text`Have every unpublished row looked up in its stream all the same?`
    : text`Make it this database’s, and have every unpublished row looked up in its stream?`;
  if (!(await confirmed(question, yes))) return EXIT.failed;
  for (const server of servers.keys()) await server.set(ownerKey(config), JSON.stringify(mine));
  await forgetEpoch(streamRedis, streamOptionsOf(config).epochKey);
  print(
    text`It is this database’s. The pods of this relay go on by themselves; those of another one claim nothing more.`,
  );
  return EXIT.done;
}
