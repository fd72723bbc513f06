import { type Command, InvalidArgumentError, Option } from 'commander';
import { printable } from '../config/printable.ts';
import { databaseGrants, type Grantees, redisAcls, sentinelAcl } from '../operations/roles.ts';
import { EXIT, withConfig } from './command.ts';
import { print, printError, text } from './terminal.ts';

type GrantsOptions = Grantees & Readonly<{ only?: 'sql' | 'redis' }>;

export function add(command: Command): void {
  command
    .option('--role <name>', 'role of the relay in PostgreSQL', name, 'relay')
    .option('--operator <name>', 'role of operators', name, 'relay_operator')
    .option('--producer <name>', 'role of those who write events', name, 'producer')
    .option('--redis-user <name>', 'user of the relay in Redis', name, 'relay')
    .addOption(new Option('--only <part>', 'print one of the two').choices(['sql', 'redis']))
    .addHelpText(
      'after',
      '\nThe roles must exist. For example: relay grants --only sql | psql\n' +
        'In the line for Redis, replace the word "password" before you use it. If the\n' +
        'streams have a server of their own, there are two lines: for the server of the\n' +
        'queues, then for that of the streams.',
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
        const wanted = { sql, redis, both: `${both}${inSentinels}` }[options.only ?? 'both'];
        for (const line of wanted.split('\n')) print(text`${line}`);
        if (options.only !== 'sql' && config.allowedTopics === '*')
          printError(
            text`relay: the Redis user may use every key, since RELAY_ALLOWED_TOPICS allows every topic; name those that you use`,
          );
        return EXIT.done;
      }),
    );
}

/** Option parser: a name as it is to stand in what is printed. */
function name(given: string): string {
  if (given !== '' && printable(given) === given) return given;
  throw new InvalidArgumentError('Expected a name without control characters.');
}
