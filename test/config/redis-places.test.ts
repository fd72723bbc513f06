import { expect, test } from 'vitest';
import type { ConfigProblem } from '../../src/config/conflicts.ts';
import { ConfigError, loadConfig } from '../../src/config/load-config.ts';
import { isCluster, streamPlace } from '../../src/config/redis-places.ts';
import { redisNodes, sentinelOptions } from '../../src/config/redis-urls.ts';
import { createTopicCheck, slotOf } from '../../src/config/topics.ts';
import { createRedis } from '../support/servers.ts';
import { openAdminRedis } from '../support/stages.ts';

function problemsOf(env: Record<string, string>): readonly ConfigProblem[] {
  try {
    loadConfig(env);
  } catch (error) {
    if (error instanceof ConfigError) return error.problems;
    throw error;
  }
  return [];
}

const CLUSTER = { RELAY_REDIS_CLUSTER: 'true' };
const NODES = 'redis://me:secret@a:7000,b,[::1]:7002/0';

test('a slot is what Redis says it is', async () => {
  const server = await createRedis({ args: ['--cluster-enabled', 'yes'] });
  const redis = openAdminRedis(server.adminUrl);
  for (const key of [
    'identity.user.v1',
    '{identity.user.v1}.dlq',
    'a{}b',
    'a{b',
    '{a}{b}',
    'Straße',
    '{{x}}',
  ])
    expect(slotOf(key), key).toBe(await redis.cluster('KEYSLOT', key));
});

test('a cluster is named by a flag, by nodes, or by several hosts in the URL', () => {
  for (const env of [CLUSTER, { RELAY_REDIS_CLUSTER: 'b:7001, c' }, { RELAY_REDIS_URL: NODES }])
    expect(isCluster(loadConfig(env))).toBe(true);
  expect(isCluster(loadConfig({}))).toBe(false);
  const { redisUrl } = loadConfig({ RELAY_REDIS_URL: NODES });
  expect(redisUrl).toBe('redis://me:secret@a:7000,b:6379,[::1]:7002/0');
  expect(redisNodes(redisUrl)).toEqual([
    { host: 'a', port: 7000 },
    { host: 'b', port: 6379 },
    { host: '::1', port: 7002 },
  ]);
  expect(loadConfig({ RELAY_REDIS_CLUSTER: 'b:7001, c' }).redisCluster).toEqual([
    { host: 'b', port: 7001 },
    { host: 'c', port: 6379 },
  ]);
});

test('in a cluster queues and dead letters are in the slot of the stream, if nothing else is said', () => {
  expect(loadConfig(CLUSTER)).toMatchObject({
    queuePrefix: '{identity.user.v1}',
    dlqStreamName: '{identity.user.v1}.dlq',
  });
  expect(loadConfig({ ...CLUSTER, RELAY_STREAM_NAME: 'user{42}' })).toMatchObject({
    queuePrefix: '{42}',
    dlqStreamName: '{42}.dlq',
  });
  expect(loadConfig({ ...CLUSTER, RELAY_QUEUE_PREFIX: 'bull{identity.user.v1}' }).queuePrefix).toBe(
    'bull{identity.user.v1}',
  );
});

test('sentinels are hosts and ports, or a URL with a user of theirs', () => {
  const { redisSentinels } = loadConfig({ RELAY_REDIS_SENTINELS: 'a, b:1' });
  expect(sentinelOptions(redisSentinels).sentinels).toEqual([
    { host: 'a', port: 26379 },
    { host: 'b', port: 1 },
  ]);
  const url = 'rediss+sentinel://me:s%40fe@a,b:1?ssl_cert_reqs=none';
  expect(sentinelOptions(loadConfig({ RELAY_REDIS_SENTINELS: url }).redisSentinels)).toMatchObject({
    ...{ sentinelUsername: 'me', sentinelPassword: 's@fe', sentinelTLS: { rejectUnauthorized: false } },
  });
});

test('the streams are where the queues are, unless they are said to be elsewhere', () => {
  const one = loadConfig({});
  expect(streamPlace(one)).toBe(one);
  const { redisUrl } = loadConfig({});
  expect(loadConfig({ RELAY_STREAM_REDIS_URL: redisUrl }).streamRedisUrl).toBe('same');
  const watched = { RELAY_REDIS_SENTINELS: 'a', RELAY_STREAM_REDIS_URL: 'redis://streams' };
  expect(streamPlace(loadConfig(watched))).toMatchObject({
    ...{ redisUrl: 'redis://streams:6379/0', redisSentinels: 'none', redisCluster: false },
  });
});

const SAYS_WHAT_TO_SET = /set it to \{identity\.user\.v1\}/;

test.each<[Record<string, string>, variable: string, problem: RegExp]>([
  [{ ...CLUSTER, RELAY_QUEUE_PREFIX: 'bull' }, 'RELAY_QUEUE_PREFIX', SAYS_WHAT_TO_SET],
  [{ ...CLUSTER, RELAY_QUEUE_PREFIX: '{bull}' }, 'RELAY_QUEUE_PREFIX', SAYS_WHAT_TO_SET],
  [
    { ...CLUSTER, RELAY_DLQ_STREAM_NAME: 'dead' },
    'RELAY_DLQ_STREAM_NAME',
    /set it to \{identity\.user\.v1\}\.dlq/,
  ],
  [
    { ...CLUSTER, RELAY_ALLOWED_TOPICS: 'identity.user.v1,dictionary.word.v1,{identity.user.v1}.*' },
    'RELAY_ALLOWED_TOPICS',
    /"dictionary\.word\.v1" is not: put \{identity\.user\.v1\} into the name/,
  ],
  [{ ...CLUSTER, RELAY_STREAM_NAME: 'a}b' }, 'RELAY_STREAM_NAME', /put a part of it into \{ \}/],
  [{ ...CLUSTER, RELAY_REDIS_URL: 'redis://a/1' }, 'RELAY_REDIS_URL', /other than 0/],
  [{ ...CLUSTER, RELAY_REDIS_SENTINELS: 'a' }, 'RELAY_REDIS_SENTINELS', /RELAY_REDIS_CLUSTER is set/],
  [{ RELAY_REDIS_URL: NODES, RELAY_REDIS_SENTINELS: 'a' }, 'RELAY_REDIS_SENTINELS', /names several nodes/],
  [{ RELAY_REDIS_URL: NODES, RELAY_REDIS_CLUSTER: 'false' }, 'RELAY_REDIS_CLUSTER', /is false, but/],
  [{ RELAY_REDIS_CLUSTER: 'a:b:c' }, 'RELAY_REDIS_CLUSTER', /true, false, or nodes like/],
  [{ RELAY_REDIS_SENTINEL_NAME: 'x' }, 'RELAY_REDIS_SENTINEL_NAME', /nothing without RELAY_REDIS_SENTINELS/],
  [{ RELAY_REDIS_SENTINELS: 'redis://a' }, 'RELAY_REDIS_SENTINELS', /neither redis\+sentinel nor/],
  [{ RELAY_REDIS_SENTINELS: 'redis+sentinel://a/x' }, 'RELAY_REDIS_SENTINELS', /RELAY_REDIS_SENTINEL_NAME/],
  [{ RELAY_STREAM_REDIS_URL: 'http://s3cr3t' }, 'RELAY_STREAM_REDIS_URL', /^expected same, or a URL like/],
  [{ RELAY_STREAM_REDIS_URL: 'redis://a,b/1' }, 'RELAY_STREAM_REDIS_URL', /other than 0/],
  [
    { ...CLUSTER, RELAY_STREAM_REDIS_URL: 'redis://a', RELAY_QUEUE_PREFIX: 'bull' },
    'RELAY_QUEUE_PREFIX',
    /put it into \{ \}/,
  ],
  [
    { RELAY_STREAM_REDIS_URL: 'redis://a,b', RELAY_QUEUE_PREFIX: 'bull' },
    'RELAY_QUEUE_PREFIX',
    SAYS_WHAT_TO_SET,
  ],
])('%j is refused, with the reason', (env, variable, problem) => {
  const problems = problemsOf(env);
  expect(problems.map((it) => it.variable)).toEqual([variable]);
  expect(problems[0]?.problem).toMatch(problem);
  expect(problems[0]?.problem).not.toMatch(/s3cr3t/);
});

test('in a cluster a topic of another slot is refused, with what to call it', () => {
  const problem = createTopicCheck({
    ...{ dlqStreamName: '{a}.dlq', queueKeyPrefix: '{a}:', allowedTopics: '*', neighbour: 'a' },
  });
  expect([problem('a'), problem('{a}.words')]).toEqual([null, null]);
  expect(problem('words')).toMatch(
    /^topic is in slot \d+ of the cluster, this relay in 15495: put \{a\} into/,
  );
});
