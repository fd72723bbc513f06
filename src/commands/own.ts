import type { Command } from 'commander';
import type { Redis } from 'ioredis';
import type { RelayConfig } from '../config/config.ts';
import { asking } from '../connections/database.ts';
import { describeOwner, isSame, ownerKey, ownerOf } from '../connections/ownership.ts';
import { readOwner } from '../outbox/owner.ts';
import { streamOptionsOf } from '../stream-options.ts';
import { forgetEpoch } from '../streams/epoch.ts';
import { confirmed } from './act.ts';
import { EXIT, withConfig, withServers } from './command.ts';
import { print, text } from './terminal.ts';

export function addOwn(command: Command): void {
  command
    .option('--yes', 'do not ask')
    .addHelpText(
      'after',
      '\nA queue belongs to one database: the one that came first. A database that fails over stays its owner. One that\n' +
        'was restored to another server, renamed, copied, or that was made anew is refused by relay start and relay check\n' +
        'until this is run with its RELAY_DATABASE_URL. So is a primary of before a failover (a lower timeline).\n\n' +
        'Stop the relay of the other database first. What is done: the owner is written anew in Redis, and the epoch\n' +
        'ends. Then the pods look up every row that is not published in its stream before they claim anything, and jobs\n' +
        'whose events have no row here end without a trace. No row and no entry is changed by this command.',
    )
    .action(({ yes = false }: { yes?: boolean }) => withConfig((config) => own(config, yes)));
}

const own = (config: RelayConfig, yes: boolean): Promise<number> =>
  withServers(config, 'relay-own', async ({ pool, redis, streamRedis }) => {
    const mine = await readOwner(asking(pool, config.publishTimeoutMs));
    const servers = new Map<Redis, string>([
      [redis, 'RELAY_REDIS_URL'],
      ...(streamRedis === redis ? [] : ([[streamRedis, 'RELAY_STREAM_REDIS_URL']] as const)),
    ]);
    print(text`This database: ${describeOwner(mine)}.`);
    for (const [server, variable] of servers) {
      const there = await ownerOf(server, config);
      const whose = there === null ? 'nobody' : isSame(mine, there) ? 'this database' : describeOwner(there);
      print(
        text`Queue "${config.queueName}" (prefix "${config.queuePrefix}") at ${variable}: belongs to ${whose}.`,
      );
    }
    if (
      !(await confirmed(
        text`Make it this database’s, and have every unpublished row looked up in its stream?`,
        yes,
      ))
    )
      return EXIT.failed;
    for (const server of servers.keys()) await server.set(ownerKey(config), JSON.stringify(mine));
    await forgetEpoch(streamRedis, streamOptionsOf(config).epochKey);
    print(
      text`It is this database’s. The pods of this relay go on by themselves; those of another one claim nothing more.`,
    );
    return EXIT.done;
  });
