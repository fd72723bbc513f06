import type { RelayConfig } from '../config/config.ts';
import { isCluster, streamPlace } from '../config/redis-places.ts';
import { redisOptions } from '../config/redis-urls.ts';
import { allowing, patternsOf } from '../config/topics.ts';

/** The rights that the relay uses with this configuration, and no others. A change here is a change of what it may do. */

/** Columns that the relay changes. It adds no rows, and deletes them only where it is told to. */
const CHANGED = [
  ...['published', 'published_at', 'attempts', 'next_attempt_at', 'error_message'],
  ...['dead_lettered_at', 'stream_entry_id'],
] as const;

/** What replaying and discarding takes beyond that; the row of an event that was deleted is written anew. */
const CHANGED_BY_OPERATORS = ['replayed_at', 'discard_reason', 'discarded_by'] as const;
const INSERTED_BY_OPERATORS = [
  ...['event_id', 'event_type', 'aggregate_type', 'aggregate_id', 'topic', 'payload', 'created_at'],
  'replayed_at',
] as const;

/**
 * What producers say about an event. The rest says what became of it: `published` with an entry id that never was, a
 * number of attempts, who discarded it. Nor `id`, which gives the order and must come from the sequence.
 */
const INSERTED_BY_PRODUCERS = [
  ...['event_id', 'event_type', 'aggregate_type', 'aggregate_id', 'payload', 'topic', 'created_at'],
] as const;

export type Grantees = Readonly<{
  /** Role of the relay in PostgreSQL. */
  role: string;
  /** Role that replays, discards and deletes: operators' commands, and what serves the dashboard. */
  operator: string;
  /** Role that writes events. */
  producer: string;
  /** User of the relay in Redis. */
  redisUser: string;
}>;

/**
 * Statements for the owner of the table, in terms of roles that exist. They may be run again: what an earlier
 * configuration needed is taken back, in one transaction, so that a relay at work is never without its rights.
 */
export function databaseGrants(
  config: Pick<RelayConfig, 'publishedRetentionMs'>,
  grantees: Pick<Grantees, 'role' | 'operator' | 'producer'>,
): string {
  const { role, operator, producer } = grantees;
  const [relay, operators, producers] = [identifier(role), identifier(operator), identifier(producer)];
  const deletes = config.publishedRetentionMs > 0;
  return [
    `-- The roles ${relay}, ${operators} and ${producers} must exist; "relay grants --help" says how to name others.`,
    '-- Their owner, who runs "relay migrate" and these statements, is none of them.',
    'BEGIN;',
    `REVOKE ALL ON identity.outbox FROM ${relay}, ${operators}, ${producers};`,
    `GRANT USAGE ON SCHEMA identity TO ${relay};`,
    '-- Locks between pods: a right to change them is one to lock them. There is nothing in them.',
    `GRANT UPDATE ON identity.relay_claim_lock, identity.relay_epoch_lock, identity.relay_prune_lock TO ${relay};`,
    `GRANT SELECT${deletes ? ', DELETE' : ''} ON identity.outbox TO ${relay};`,
    `GRANT UPDATE (${CHANGED.join(', ')})`,
    `  ON identity.outbox TO ${relay};`,
    '-- Operators: relay dlq, prune and board, and pods with RELAY_BOARD=true.',
    `GRANT ${relay} TO ${operators};`,
    `GRANT UPDATE (${CHANGED_BY_OPERATORS.join(', ')}),${deletes ? '' : ' DELETE,'}`,
    `  INSERT (${INSERTED_BY_OPERATORS.join(', ')})`,
    `  ON identity.outbox TO ${operators};`,
    `GRANT USAGE ON SEQUENCE identity.outbox_id_seq TO ${operators};`,
    '-- Producers; SELECT is for appendEvent, which returns both.',
    `GRANT USAGE ON SCHEMA identity TO ${producers};`,
    `GRANT INSERT (${INSERTED_BY_PRODUCERS.join(', ')}),`,
    `  SELECT (id, event_id) ON identity.outbox TO ${producers};`,
    '-- The column for trace headers, where a team has added it.',
    `DO ${literalText(`BEGIN GRANT INSERT (headers) ON identity.outbox TO ${producers}; EXCEPTION WHEN undefined_column THEN NULL; END`)};`,
    `GRANT USAGE ON SEQUENCE identity.outbox_id_seq TO ${producers};`,
    'COMMIT;',
  ].join('\n');
}

/**
 * The Redis commands that make the user, or lines of its ACL file without the first two words: one, or where the
 * streams are on another server, that for the queues' and that for the streams'. The password is a placeholder. The
 * user has its queues and every stream that the configuration allows.
 */
export function redisAcls(config: RelayConfig, grantees: Pick<Grantees, 'redisUser'>): string[] {
  const { queuePrefix, queueName, dlqStreamName, allowedTopics } = config;
  const topics = patternsOf(allowedTopics).map(inGlob);
  const own = literal(`${queuePrefix}:${queueName}`);
  // Each queue by its name: `relay-*` would be every queue whose name begins like ours, such as `relay-emails`.
  const queues = [`${own}:*`, `${own}-claim:*`, `${own}-publish:*`];
  const dlq = allowing(allowedTopics)(dlqStreamName) ? [] : [literal(dlqStreamName)];
  // RELAY_STREAM_NAME is one of the topics that are allowed.
  const streams = [...topics, ...dlq];
  const place = streamPlace(config);
  if (place === config) return [aclOf([...queues, ...streams], config, grantees)];
  return [aclOf(queues, config, grantees), aclOf([`${own}:*`, ...streams], place, grantees)];
}

/**
 * BullMQ uses dozens of commands on the data of its own keys, so these are given by their kind; all others by their
 * name. A kind reaches nothing but keys of the user's patterns: no SCAN, RANDOMKEY, COPY, MOVE, FUNCTION or FLUSHALL,
 * no other database. Of streams only what the relay does itself: it cannot destroy a consumer group. INFO tells whether
 * the server is still the same.
 */
const COMMANDS = [
  '-@all +@hash +@list +@set +@sortedset +@string +@connection -@dangerous -select',
  '+xadd +xdel +xinfo|groups +xinfo|stream +xlen +xpending +xrange +xrevrange +xtrim',
  '+del +exists +persist +pexpire +pttl +rename +type +eval +evalsha +info',
];

function aclOf(
  keys: readonly string[],
  place: RelayConfig,
  { redisUser }: Pick<Grantees, 'redisUser'>,
): string {
  const patterns = [...new Set(keys.includes('*') ? ['*'] : keys)].map((key) => `~${key}`).join(' ');
  const { db } = redisOptions(place.redisUrl);
  const commands = [...COMMANDS, ...(db === 0 ? [] : [`+select|${db}`])];
  if (isCluster(place)) commands.push('+cluster|slots');
  return `ACL SETUSER ${redisUser} on resetpass >password resetkeys resetchannels ${patterns} ${commands.join(' ')}`;
}

/** The same for sentinels that know users, or nothing where there are none. It is asked where the master is. */
export function sentinelAcl(
  { redisSentinels }: Pick<RelayConfig, 'redisSentinels'>,
  { redisUser }: Pick<Grantees, 'redisUser'>,
): string | undefined {
  if (redisSentinels === 'none') return undefined;
  const commands = '-@all +auth +hello +sentinel|get-master-addr-by-name +sentinel|sentinels';
  return `ACL SETUSER ${redisUser} on resetpass >password resetkeys resetchannels ${commands}`;
}

/** Always in quotes: `user` and other words of SQL are names, too. */
const identifier = (name: string) => `"${name.replaceAll('"', '""')}"`;

const literalText = (text: string) => `'${text.replaceAll("'", "''")}'`;

/** Our patterns know `*` and `?`; those of Redis have brackets, and a backslash takes its meaning from any. */
const inGlob = (pattern: string) => pattern.replace(/[[\]\\]/g, '\\$&');
const literal = (name: string) => name.replace(/[*?[\]\\]/g, '\\$&');
