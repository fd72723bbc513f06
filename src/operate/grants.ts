import type { RelayConfig } from '../config.ts';
import { allowing, patternsOf } from '../topics.ts';

/** The rights that the relay uses with this configuration, and no others. A change here is a change of what it may do. */

/** Columns that the relay changes. It adds no rows. */
const CHANGED = [
  ...['published', 'published_at', 'attempts', 'next_attempt_at', 'error_message'],
  ...['dead_lettered_at', 'stream_entry_id'],
] as const;

export type Grantees = Readonly<{
  /** Role of the relay in PostgreSQL. */
  role: string;
  /** Role of whoever writes events. */
  producer: string;
  /** User of the relay in Redis. */
  redisUser: string;
}>;

/**
 * Statements for the owner of the table, in terms of roles that exist. They may be run again: what an earlier
 * configuration needed is taken back.
 */
export function databaseGrants(
  config: Pick<RelayConfig, 'publishedRetentionMs'>,
  grantees: Pick<Grantees, 'role' | 'producer'>,
): string {
  const [relay, producer] = [identifier(grantees.role), identifier(grantees.producer)];
  const deletes = config.publishedRetentionMs > 0;
  return [
    `REVOKE ALL ON identity.outbox FROM ${relay}, ${producer};`,
    `GRANT USAGE ON SCHEMA identity TO ${relay};`,
    `GRANT SELECT${deletes ? ', DELETE' : ''} ON identity.outbox TO ${relay};`,
    `GRANT UPDATE (${CHANGED.join(', ')})`,
    `  ON identity.outbox TO ${relay};`,
    '-- Producers; SELECT is for appendEvent, which returns both.',
    `GRANT USAGE ON SCHEMA identity TO ${producer};`,
    `GRANT INSERT, SELECT (id, event_id) ON identity.outbox TO ${producer};`,
    `GRANT USAGE ON SEQUENCE identity.outbox_id_seq TO ${producer};`,
  ].join('\n');
}

/**
 * The Redis command that makes the user, or a line of its ACL file without the first two words. The password is a
 * placeholder. The user has its queues and every stream that the configuration allows.
 */
export function redisAcl(
  config: Pick<RelayConfig, 'queuePrefix' | 'queueName' | 'dlqStreamName' | 'allowedTopics'>,
  { redisUser }: Pick<Grantees, 'redisUser'>,
): string {
  const { queuePrefix, queueName, dlqStreamName, allowedTopics } = config;
  const topics = patternsOf(allowedTopics).map(inGlob);
  const queues = literal(`${queuePrefix}:${queueName}`);
  const dlq = allowing(allowedTopics)(dlqStreamName) ? [] : [literal(dlqStreamName)];
  // RELAY_STREAM_NAME is one of the topics that are allowed.
  const keys = topics.includes('*') ? ['*'] : [`${queues}-*`, `${queues}:*`, ...topics, ...dlq];
  const patterns = [...new Set(keys)].map((key) => `~${key}`).join(' ');
  // BullMQ uses dozens of commands on its own keys; INFO tells whether the server is still the same.
  const commands = '-@all +@read +@write +@connection +eval +evalsha -@dangerous +info';
  return `ACL SETUSER ${redisUser} on resetpass >password resetkeys resetchannels ${patterns} ${commands}`;
}

const identifier = (name: string) =>
  /^[a-z_][a-z0-9_]*$/.test(name) ? name : `"${name.replaceAll('"', '""')}"`;

/** Our patterns know `*` and `?`; those of Redis have brackets, and a backslash takes its meaning from any. */
const inGlob = (pattern: string) => pattern.replace(/[[\]\\]/g, '\\$&');
const literal = (name: string) => name.replace(/[*?[\]\\]/g, '\\$&');
