import { type Command, Option } from 'commander';
import { databaseGrants, type Grantees, redisAcls, sentinelAcl } from '../operations/roles.ts';
import { EXIT, print, withConfig } from './command.ts';

type GrantsOptions = Grantees & Readonly<{ only?: 'sql' | 'redis' }>;

export function addGrants(program: Command): void {
  program
    .command('grants')
    .description('print the rights that the relay needs with this configuration: SQL and a Redis ACL')
    .option('--role <name>', 'role of the relay in PostgreSQL', 'relay')
    .option('--operator <name>', 'role of operators', 'relay_operator')
    .option('--producer <name>', 'role of those who write events', 'producer')
    .option('--redis-user <name>', 'user of the relay in Redis', 'relay')
    .addOption(new Option('--only <part>', 'print one of the two').choices(['sql', 'redis']))
    .addHelpText(
      'after',
      '\nThe roles must exist. For example: relay grants --only sql | psql\n' +
        'In the line for Redis put a password in place of the word "password" before you use it. Where the streams\n' +
        'are on another server there are two lines: for the server of the queues, then for that of the streams.',
    )
    .action((options: GrantsOptions) =>
      withConfig(async (config) => {
        const [sql, acls] = [databaseGrants(config, options), redisAcls(config, options)];
        const sentinel = sentinelAcl(config, options);
        const redis = acls.join('\n');
        const [where, ...others] =
          acls.length === 1 ? ['Redis'] : ['the Redis of the queues', 'that of the streams'];
        const inRedis = [`-- In ${where}:\n${acls[0]}`, ...others.map((it) => `-- In ${it}:\n${acls[1]}`)];
        const both = `${sql}\n\n${inRedis.join('\n\n')}`;
        const inSentinels =
          sentinel === undefined ? '' : `\n\n-- In each sentinel, if they know users:\n${sentinel}`;
        print({ sql, redis, both: `${both}${inSentinels}` }[options.only ?? 'both']);
        if (options.only !== 'sql' && config.allowedTopics === '*')
          console.error('Every key, since RELAY_ALLOWED_TOPICS allows every topic: name those that you use.');
        return EXIT.done;
      }),
    );
}
