import { expect, test } from 'vitest';
import { allowing, createTopicCheck } from '../../src/config/topics.ts';

test.each([
  ['*', ['a', 'identity.user.v1', '🦊'], []],
  ['a', ['a'], ['A', 'aa', 'b']],
  ['identity.*', ['identity.user.v1', 'identity.'], ['identity', 'xidentity.user', 'Identity.user']],
  ['*.v?', ['x.v1', '.v🦊', 'a.v1.v2'], ['x.v12', 'x.v']],
  ['a*b*c', ['abc', 'axbxc', 'abcbc'], ['ab', 'acb', 'abcd']],
  ['x, y*', ['x', 'y', 'yz'], ['z', 'xy', ' x']],
  ['a.c+(d)[e]{f}|', ['a.c+(d)[e]{f}|'], ['abc+(d)[e]{f}|', 'a']],
])('the patterns %j', (list, allowed, others) => {
  const isAllowed = allowing(list);
  expect(allowed.filter((topic) => !isAllowed(topic))).toEqual([]);
  expect(others.filter(isAllowed)).toEqual([]);
});

test('a pattern of many stars takes no time that anybody would notice', () => {
  const isAllowed = allowing(`${'*a'.repeat(30)}*b`);
  const before = performance.now();
  expect(isAllowed('a'.repeat(512))).toBe(false);
  expect(performance.now() - before).toBeLessThan(5_000);
});

test.each([
  ['identity.user.v1', null],
  ['', 'topic is empty'],
  ['identity.user.v1.dlq', 'topic is the dead-letter stream'],
  ['bull:relay-publish:wait', 'topic begins with bull:, where BullMQ keeps its keys'],
  [
    'identity.user v1',
    'topic is not 1 to 512 printable characters without white space; it has 16: "identity.user v1"',
  ],
  ['billing.v1', 'topic is none that RELAY_ALLOWED_TOPICS allows: "billing.v1"'],
])('the topic %j: %s', (topic, problem) => {
  const check = createTopicCheck({
    ...{
      dlqStreamName: 'identity.user.v1.dlq',
      queueKeyPrefix: 'bull:',
      allowedTopics: 'identity.*, bull:*',
    },
  });
  expect(check(topic)).toBe(problem);
});
